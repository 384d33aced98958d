"""All cells of the studies in memory, with every gene and the author's label as one leaf of the main axis.

A cell is seen whole, or from a `Point`: with some of its counts, or without some genes. Every method sees the very
same poorer cells. Axes: N cells, G genes of one source.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import Config
from carvae.data.gene_table import ResolvedGenes
from carvae.data.genes import align
from carvae.errors import EvaluateError
from carvae.ingest import open_all
from carvae.labels.axis import main_first
from carvae.model.cohort import SOURCE, labels_of

log = logging.getLogger(__name__)

MISSING = "Unlabelled"
"""Label of a cell whose leaf is not known, for methods that want a word for it."""
Rows = NDArray[np.int64]
Kind = Literal["whole", "depth", "umi", "missing"]


@dataclass(frozen=True, slots=True)
class Point:
    """How much of a cell is seen."""

    kind: Kind = "whole"
    value: float = 1.0
    """Share of the counts, counts per cell, or share of the genes that is missing."""
    draw: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        return "whole" if self.kind == "whole" else f"{self.kind} {self.value:g}"

    def rng(self) -> np.random.Generator:
        """The same for every method, so that all see the same poorer cells."""
        return np.random.default_rng((9, round(1e6 * self.value), self.draw))


WHOLE = Point()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The cells of one file: consecutive rows of the whole."""

    study: str
    genes: tuple[str, ...]
    gene_ids: tuple[str, ...] | None
    resolved: ResolvedGenes
    counts: sp.csr_matrix
    first: int

    def own(self, rows: Rows) -> Rows:
        """Those of the given rows that are of this source, counted from its first."""
        return np.asarray(rows[(rows >= self.first) & (rows < self.first + self.counts.shape[0])] - self.first)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Everything that may be trained on or asked."""

    sources: tuple[Source, ...]
    obs: pd.DataFrame
    """The contract's columns, the author's label and the source's study, one row per cell."""
    truth_N: NDArray[np.int32]
    """Leaf by the author, -1 where it is missing, coarse or weak."""
    axis: str
    leaves: tuple[str, ...]
    shared: tuple[str, ...]
    """Symbols that every file measured: what the baselines see."""
    symbols: NDArray[np.object_]
    """Symbols that any file measured."""

    @classmethod
    def read(cls, config: Config) -> Cells:
        """Read all studies of a config.

        Raises
        ------
        CarvaeError
            A study cannot be read, or no study has labels.
        """
        parts, sources, rows, first = open_all(config.ingest), [], [], 0
        for part in parts:
            counts = sp.vstack(list(part.source.chunks(config.ingest.chunk_size))).tocsr()
            part.keep &= np.asarray(counts.sum(axis=1)).ravel() >= config.ingest.min_counts
            ids = None if part.source.gene_ids is None else tuple(part.source.gene_ids)
            own = Source(part.study, tuple(part.source.genes), ids, part.genes, counts[part.keep], first)
            sources.append(own)
            first += own.counts.shape[0]
            rows.append(part.obs[part.keep])
        obs = pd.concat(rows).reset_index(drop=True)
        known = labels_of(obs, config.model_copy(update={"labels": config.labels.model_copy(update={"weak": False})}))
        if known is None:
            raise EvaluateError("no study has labels, so there is nothing to score; name a label column with `label:`")
        axis = main_first(axis.name for axis in known.tree.axes)[0]
        symbols = [{str(symbol) for symbol in source.resolved.symbols} for source in sources]
        return cls(
            sources=tuple(sources),
            obs=obs,
            truth_N=known.labels[axis].leaf.astype(np.int32),
            axis=axis,
            leaves=known.tree[axis].leaves,
            shared=tuple(sorted(set.intersection(*symbols))),
            symbols=np.array(sorted(set.union(*symbols)), dtype=object),
        )

    @property
    def patient_N(self) -> NDArray[np.object_]:
        """Patient of each cell."""
        return self.obs["patient"].astype(str).to_numpy(dtype=object)

    @property
    def fingerprint(self) -> str:
        """Hash of all counts, genes, columns and labels."""
        digest = hashlib.sha256(pd.util.hash_pandas_object(self.obs, index=False).to_numpy().tobytes())
        digest.update(self.truth_N.tobytes() + "\t".join((self.axis, *self.leaves)).encode())
        for source in self.sources:
            for array in (source.counts.indptr, source.counts.indices, source.counts.data):
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update("\t".join(source.genes).encode())
        return digest.hexdigest()

    @property
    def n_bytes(self) -> int:
        """Memory of the counts."""
        return sum(s.counts.data.nbytes + s.counts.indices.nbytes + s.counts.indptr.nbytes for s in self.sources)

    def gone(self, point: Point) -> frozenset[str]:
        """Symbols that are not measured at a point."""
        if point.kind != "missing":
            return frozenset()
        n = round(point.value * self.symbols.size)
        return frozenset(map(str, point.rng().permutation(self.symbols)[:n]))

    def seen(self, rows: Rows, point: Point = WHOLE) -> Iterator[tuple[Source, sp.csr_matrix]]:
        """The counts of some cells (ascending) at a point, by source; genes that are gone hold zeros."""
        rng, gone = point.rng(), self.gone(point)
        for source in self.sources:
            own = source.own(rows)
            if not own.size:
                continue
            counts = source.counts[own]
            if point.kind in {"depth", "umi"}:
                counts = thinned(counts, point, rng)
            elif gone:
                kept = ~np.isin(source.resolved.symbols.astype(str), list(gone))
                counts = counts.multiply(kept[None, :]).tocsr()
                counts.eliminate_zeros()
            yield source, counts

    def adata(self, rows: Rows, point: Point = WHOLE, *, labels: bool = False) -> ad.AnnData:
        """Cells for a baseline: raw counts of the genes that all files measured, and ``obs`` label, patient, sample.

        The label is `MISSING` unless ``labels`` says that they are to be learned from.
        """
        blocks = [align(source.resolved, self.shared).apply(counts) for source, counts in self.seen(rows, point)]
        gone = self.gone(point)
        kept = np.array([symbol not in gone for symbol in self.shared])
        counts = sp.vstack(blocks).tocsr().astype(np.float32)[:, kept]
        names = np.array([*self.leaves, MISSING], dtype=object)[self.truth_N[rows] if labels else -1]
        text = self.obs.iloc[rows]
        obs = pd.DataFrame(
            {
                "label": names,
                "patient": text["patient"].astype(str).to_numpy(),
                "sample": text["sample"].astype(str).to_numpy(),
            },
            index=rows.astype(str),
        )
        return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=np.array(self.shared, dtype=object)[kept]))

    def studies(self, rows: Rows) -> dict[str, list[ad.AnnData]]:
        """Study -> some of its cells as carvae reads them: genes as the files name them, ``obs`` as in the contract."""
        found: dict[str, list[ad.AnnData]] = {}
        for source, counts in self.seen(rows):
            own = source.own(rows) + source.first
            obs = self.obs.iloc[own].drop(columns=[SOURCE])
            text = obs.select_dtypes(exclude=["number"]).columns
            obs = obs.assign(**{name: obs[name].astype("string").fillna("").astype(object) for name in text})
            var = pd.DataFrame(index=pd.Index(source.genes))
            if source.gene_ids is not None:
                var["gene_ids"] = list(source.gene_ids)
            obs.index = own.astype(str)
            found.setdefault(source.study, []).append(ad.AnnData(counts, obs=obs, var=var))
        return found


def thinned(counts: sp.csr_matrix, point: Point, rng: np.random.Generator) -> sp.csr_matrix:
    """The counts as shallower sequencing would give them: each molecule is kept with the same chance in a cell.

    With a number of UMIs per cell, a cell that has fewer keeps them all.
    """
    total_N = np.maximum(np.asarray(counts.sum(axis=1), np.float64).ravel(), 1.0)
    chance_N = np.minimum(1.0, point.value / total_N) if point.kind == "umi" else np.full(total_N.size, point.value)
    chance = np.repeat(chance_N, np.diff(counts.indptr))
    kept = rng.binomial(counts.data.astype(np.int64), chance).astype(counts.data.dtype)
    result = sp.csr_matrix((kept, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
    result.eliminate_zeros()
    return result
