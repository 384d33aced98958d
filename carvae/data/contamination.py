"""Hints of doublets and of ambient RNA: what T cells of a sample hold of cells that are none.

RNA of cells that burst is in every droplet, a little of it: many T cells with some of a marker of another lineage. Two
cells in one droplet are few, and hold much of both. Two T cells together cannot be told in this way.

Axes: N cells, G genes, L lineages, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

T_CELL = ("CD3D", "CD3E", "CD3G")
LINEAGES = {
    "B cells": ("MS4A1", "CD79A", "CD19"),
    "monocytes": ("LYZ", "CD14", "FCN1"),
    "platelets": ("PPBP", "PF4"),
    "red cells": ("HBB", "HBA1", "HBA2"),
}
"""Marker genes that T cells do not express."""
LEAST_T = 2
"""Counts of `T_CELL` from which on a cell is taken for a T cell, so that ambient RNA does not make one."""
MUCH = 3
"""Counts of a lineage's markers from which on a droplet is taken to hold one of its cells."""
MIN_CELLS = 20
"""T cells without which a sample gets no hint."""
AMBIENT, DOUBLETS = 0.2, 0.05
"""Shares of T cells above which there is a hint. CARPALL's median sample has 6% and less than 1%."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Whether some cells are T cells, and what they hold of other lineages."""

    is_t_N: NDArray[np.bool_]
    count_NL: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Markers:
    """Where a source has the markers."""

    group_G: NDArray[np.int64]
    """0 for a marker of T cells, from 1 on those of the lineages, -1 for any other gene."""

    @classmethod
    def of(cls, symbols: Sequence[str]) -> Markers:
        """Among a source's genes; a lineage may have none."""
        group = {gene: k for k, genes in enumerate((T_CELL, *LINEAGES.values())) for gene in genes}
        return cls(np.array([group.get(symbol, -1) for symbol in symbols], np.int64))

    def look(self, counts: sp.csr_matrix) -> Mixed:
        """Counts of the markers in each cell, [N, G] -> [N] and [N, L]."""
        from carvae.data.rows import moved  # numba is slow to import

        of_group = moved(counts, self.group_G, 1 + len(LINEAGES)).toarray()
        return Mixed(of_group[:, 0] >= LEAST_T, of_group[:, 1:].astype(np.int64))


class MixedSums:
    """Added up for each sample as its cells come by."""

    def __init__(self, n_samples: int) -> None:
        self.n_B = np.zeros(n_samples, np.int64)
        self.some_BL, self.much_BL = (np.zeros((n_samples, len(LINEAGES)), np.int64) for _ in range(2))

    def add(self, code_N: NDArray[np.integer], mixed: Mixed) -> None:
        """Add cells of the samples ``code_N``."""
        code_T, count_TL = code_N[mixed.is_t_N], mixed.count_NL[mixed.is_t_N]
        np.add.at(self.n_B, code_T, 1)
        np.add.at(self.some_BL, code_T, count_TL > 0)
        np.add.at(self.much_BL, code_T, count_TL >= MUCH)

    def hints(self, sample: int) -> Hints:
        """Of one sample."""
        n = int(self.n_B[sample])
        if n < MIN_CELLS:
            return Hints(np.nan, np.nan, ())
        some_L, much_L = self.some_BL[sample] / n, self.much_BL[sample] / n
        ambient_L = some_L > AMBIENT
        doublets = float(much_L[~ambient_L].sum())  # of a lineage whose RNA is everywhere much may be ambient too
        words = [
            f"{share:.0%} of its T cells hold RNA of {name} (ambient RNA?)"
            for name, share, found in zip(LINEAGES, some_L, ambient_L, strict=True)
            if found
        ]
        if doublets > DOUBLETS:
            most = list(LINEAGES)[int(np.where(ambient_L, -1, much_L).argmax())]
            words.append(f"{doublets:.0%} of its T cells hold much RNA of other cells too, most of {most} (doublets?)")
        return Hints(float(some_L.max()), doublets, tuple(words))


@dataclass(frozen=True, slots=True)
class Hints:
    """What is said of a sample; empty where it has too few T cells."""

    ambient: float
    """Share of its T cells with RNA of the lineage that most of them hold some of."""
    doublets: float
    """Share of its T cells that hold much of another lineage whose RNA is not everywhere."""
    words: tuple[str, ...]
