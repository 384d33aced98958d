"""Counts of some genes in every cell of an annotated file, and how deep each cell was seen: one pass over its matrix.

Axes: N cells, E genes that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.data.genes import GeneTable
from carvae.data.readers import CountsSource, open_source
from carvae.errors import CountsError

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Expression:
    """Counts of the genes that the report looks at."""

    genes: tuple[str, ...]
    counts: sp.csr_matrix
    """[N, E]."""
    measured_E: NDArray[np.bool_]
    """Whether the file has the gene."""
    total_N: NDArray[np.int64]
    """Counts over all genes."""
    n_genes_N: NDArray[np.int64]
    """Genes with a count."""
    mito_N: NDArray[np.float64] | None
    """Share of mitochondrial counts; None where the file has no mitochondrial genes."""
    n_genes: int
    """Genes of the file."""
    by_id: bool
    """Whether the file has Ensembl ids."""
    where: str
    notes: tuple[str, ...]

    def of(self, gene: str) -> NDArray[np.int64]:
        """Counts of one gene."""
        return np.asarray(self.counts[:, self.genes.index(gene)].toarray()).ravel()

    @property
    def missing(self) -> list[str]:
        """The genes that the file does not have."""
        return [gene for gene, there in zip(self.genes, self.measured_E, strict=True) if not there]


def read_expression(path: Path, counts: str, genes: Sequence[str]) -> Expression:
    """Read the counts of ``genes`` (approved symbols); ``counts`` is the setting by which the file was annotated.

    Raises
    ------
    CountsError, ReadError
        The file holds no raw counts, or cannot be read.
    """
    try:
        return _read(open_source(path, counts=counts, whole=False), genes)
    except CountsError:  # not where the first cells pointed to: all places are looked through
        return _read(open_source(path, counts=counts), genes)


def _read(source: CountsSource, genes: Sequence[str]) -> Expression:
    from carvae.data.rows import moved  # numba is slow to import

    symbols = GeneTable.default().resolve(source.genes, source.gene_ids).symbols.astype(str)
    place = {gene: e for e, gene in enumerate(genes)}
    column_G = np.array([place.get(symbol, -1) for symbol in symbols], np.int64)
    mito_G = np.char.startswith(symbols, "MT-").astype(np.float64)
    parts: dict[str, list[Any]] = {name: [] for name in ("counts", "total", "n_genes", "mito")}
    for block in source.blocks(BLOCK):
        parts["counts"].append(moved(block.counts, column_G, len(genes)))
        parts["total"].append(block.total_N)
        parts["n_genes"].append(np.diff(block.counts.indptr).astype(np.int64))
        parts["mito"].append(block.counts @ mito_G)
    total_N = np.concatenate(parts["total"])
    return Expression(
        genes=tuple(genes),
        counts=sp.vstack(parts["counts"], format="csr"),
        measured_E=np.isin(np.arange(len(genes)), column_G),
        total_N=total_N,
        n_genes_N=np.concatenate(parts["n_genes"]),
        mito_N=np.concatenate(parts["mito"]) / np.maximum(total_N, 1) if mito_G.any() else None,
        n_genes=len(source.genes),
        by_id=source.gene_ids is not None or bool(source.genes and source.genes[0].startswith("ENSG")),
        where=source.where,
        notes=source.notes,
    )
