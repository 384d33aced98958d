"""Some cells of a query in memory, and what a model calls them: for verbs that look at a query without writing it anew.

Axes: N cells, G genes of the model, E other genes, B samples.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import PredictConfig
from carvae.data.atomic import refuse_file
from carvae.data.genes import GeneTable
from carvae.data.readers import CountsSource
from carvae.data.schema import query_samples
from carvae.errors import BundleError
from carvae.model.bundle import Bundle

log = logging.getLogger(__name__)

UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Samples:
    """Which sample each cell of a query is of."""

    code_N: NDArray[np.intp]
    names: tuple[str, ...]

    @classmethod
    def of(cls, sources: Sequence[CountsSource], column: str | None) -> Samples:
        """As the sources name them; raises SchemaError as `query_samples` does."""
        names = np.concatenate([query_samples(source.obs, source.name, column)[0] for source in sources])
        code_N, samples = pd.factorize(names, sort=True)
        return cls(code_N, tuple(map(str, samples)))

    def evenly(self, most: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which of all cells to take for at most ``most``, as many of each sample; told where it is not all."""
        taken_N: NDArray[np.bool_] = order_within(self.code_N, rng) < max(1, most // len(self.names))
        if not taken_N.all():
            log.info("%s of %s cells are taken, evenly over the samples", f"{taken_N.sum():,}", f"{len(taken_N):,}")
        return taken_N


@dataclass(frozen=True, slots=True)
class Query:
    """Cells of a query."""

    panel: sp.csr_matrix
    """Counts over the model's genes, [N, G]; of those alone that all sources measured."""
    total_N: NDArray[np.int64]
    """Counts over all genes."""
    sample_N: NDArray[np.intp]
    samples: tuple[str, ...]
    present_G: NDArray[np.bool_]
    """The model's genes that all sources measured."""
    other: sp.csr_matrix
    """Counts over the other genes that were asked for, [N, E]."""
    measured_E: NDArray[np.bool_]
    """Those of them that all sources measured."""

    def depth_B(self) -> NDArray[np.float64]:
        """Mean counts per cell of each sample."""
        n_B = np.bincount(self.sample_N, minlength=len(self.samples))
        return np.bincount(self.sample_N, weights=self.total_N, minlength=len(self.samples)) / n_B


def read(
    sources: Sequence[CountsSource],
    bundle: Bundle,
    predict: PredictConfig,
    samples: Samples,
    taken_N: NDArray[np.bool_],
    others: Sequence[str] = (),
) -> Query:
    """The cells of the sources that are taken, with the counts of ``others``, symbols of genes, beside the model's.

    Raises
    ------
    GeneError, CountsError
        Too few of the model's genes are there, or the counts are none.
    """
    parts, first = [], 0
    for source in sources:
        parts.append(_read_source(source, bundle, predict, taken_N[first : first + source.n_cells], others))
        first += source.n_cells
    present_G = np.all([part.present_G for part in parts], axis=0)
    panel = sp.vstack([part.panel for part in parts], format="csr")
    if some := int(np.any([part.present_G for part in parts], axis=0).sum() - present_G.sum()):
        log.info("%d of the model's genes are in some of the files and not in others, and are left out", some)
        panel = panel.multiply(present_G[None, :]).tocsr()  # else their counts came on top of what is expected of them
    return Query(
        panel=panel,
        total_N=np.concatenate([part.total_N for part in parts]),
        sample_N=samples.code_N[taken_N],
        samples=samples.names,
        present_G=present_G,
        other=sp.vstack([part.other for part in parts], format="csr"),
        measured_E=np.all([part.measured_E for part in parts], axis=0),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    panel: sp.csr_matrix
    total_N: NDArray[np.int64]
    present_G: NDArray[np.bool_]
    other: sp.csr_matrix
    measured_E: NDArray[np.bool_]


def _read_source(
    source: CountsSource, bundle: Bundle, predict: PredictConfig, taken_N: NDArray[np.bool_], others: Sequence[str]
) -> _Part:
    from carvae.data.rows import moved  # numba is slow to import

    resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
    alignment = bundle.align(resolved, predict.min_overlap)
    log.info("%s: %s", source.name, alignment.receipt.sentence())
    place = {gene: e for e, gene in enumerate(others)}
    other_of = np.array([place.get(str(symbol), -1) for symbol in resolved.symbols], np.int64)
    panels, totals, found, first = [], [], [], 0
    for block in source.blocks(predict.chunk_size):
        own = taken_N[first : first + len(block.total_N)]
        counts = block.counts[own]
        panels.append(alignment.apply(counts))
        found.append(moved(counts, other_of, len(others)))
        totals.append(block.total_N[own])
        first += len(block.total_N)
    return _Part(
        panel=sp.vstack(panels, format="csr"),
        total_N=np.concatenate(totals),
        present_G=alignment.present,
        other=sp.vstack(found, format="csr"),
        measured_E=np.isin(np.arange(len(others)), other_of),
    )


@dataclass(frozen=True, slots=True)
class Calls:
    """What the model says of each cell on one label axis."""

    label_N: NDArray[np.intp]
    """`UNKNOWN` where the counts are too few, or the cell is unlike what the model knows."""
    confidence_N: NDArray[np.float32]


def calls(
    panel: sp.csr_matrix, bundle: Bundle, predict: PredictConfig, present_G: NDArray[np.bool_]
) -> dict[str, Calls]:
    """Labels on every axis of the model, as `carvae annotate` gives them to cells with the genes in ``present_G``."""
    known_N = np.asarray(panel.sum(axis=1)).ravel() >= predict.min_counts
    if bundle.trust is None:
        said = bundle.network.predict(panel, predict.precision, present_G=present_G).probability_NS
    else:
        judged = bundle.trust.judge(bundle.network, panel, present_G)
        said, known_N = judged.probability_NS, known_N & ~bundle.trust.unknown(judged)
    return {axis: Calls(np.where(known_N, p_NS.argmax(1), UNKNOWN), p_NS.max(1)) for axis, p_NS in said.items()}


def refuse_place(bundle: Bundle, out: Path, verb: str) -> None:
    """Refuse what a verb that writes a folder about a model's labels cannot do.

    Raises
    ------
    ConfigError
        ``out`` is a file, or lies in a model.
    BundleError
        The model has no labels.
    """
    refuse_file(out, verb)
    if bundle.tree is None:
        raise BundleError(f"this model was trained without labels, so there is nothing to {verb}")


def order_within(group_N: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Each cell's place in a random order of the cells of its group, from 0."""
    shuffled = rng.permutation(len(group_N))
    by_group = shuffled[np.argsort(group_N[shuffled], kind="stable")]
    first_B = np.cumsum(np.bincount(group_N)) - np.bincount(group_N)
    order_N: NDArray[np.intp] = np.empty(len(group_N), np.intp)
    order_N[by_group] = np.arange(len(group_N)) - first_B[group_N[by_group]]
    return order_N
