"""UCell scores of sparse integer counts in one pass per cell (numba), equal to pyucell's to the last bit.

UCell: Andreatta and Carmona 2021, doi 10.1016/j.csbj.2021.06.043. A gene's rank in a cell is among the cell's genes
with counts, the highest first, ties sharing their mean rank; ranks beyond ``max_rank``, and genes without counts, count
as ``max_rank``. pyucell sorts each cell; counts are small whole numbers, so here a table of how often each value occurs
gives the ranks of the few genes that any signature holds. `tests/test_ucell.py` compares the two.

Axes: N cells, G genes, M stored values, C signatures, L genes of all signatures one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]

TABLE = 4096
"""Counts from here on, which are rare, are ranked by looking at all of the cell's values."""


class GeneLists(NamedTuple):
    """The genes of some lists, one list after the other."""

    gene_L: Ints
    first_C: Ints
    """Where each list begins; one more than lists."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> GeneLists:
        """The lists as two arrays."""
        first_C = np.cumsum([0, *map(len, lists)]).astype(np.int64)
        return cls(np.array([gene for genes in lists for gene in genes], np.int64), first_C)


def ucell(
    counts: sp.csr_matrix,
    gene_of: Ints,
    up: Sequence[Sequence[int]],
    down: Sequence[Sequence[int]],
    max_rank: int,
) -> NDArray[np.float32]:
    """Scores [N, C] in [0, 1]; a cell without counts scores as if all its genes were low.

    Parameters
    ----------
    counts
        Whole numbers.
    gene_of
        Gene of each column, numbered from 0; columns of one gene are summed.
    up, down
        Genes that are high, and low, in each signature.
    max_rank
        Rank of a gene without counts.
    """
    out_NC = np.zeros((counts.shape[0], len(up)), np.float32)
    rows = _Rows(counts.data, counts.indices, counts.indptr, np.asarray(gene_of, np.int64))
    n_genes = int(rows.gene_of.max(initial=-1)) + 1
    _scores(rows, n_genes, GeneLists.of(up), GeneLists.of(down), max_rank, out_NC)
    return out_NC


class _Rows(NamedTuple):
    value_M: NDArray[Any]
    column_M: Ints
    indptr_N: Ints
    gene_of: Ints


@njit(nogil=True, cache=True)
def _scores(
    rows: _Rows, n_genes: int, up: GeneLists, down: GeneLists, max_rank: int, out_NC: NDArray[np.float32]
) -> None:
    wanted_G = np.zeros(n_genes, np.bool_)
    wanted_G[up.gene_L] = True
    wanted_G[down.gene_L] = True
    rank_G = np.full(n_genes, np.float32(max_rank))
    above = np.zeros(TABLE + 1, np.int64)  # above[x]: genes with more than x counts, once summed
    place_G, gene, value = np.full(n_genes, -1), np.empty(n_genes, np.int64), np.empty(n_genes, np.int64)
    for n in range(out_NC.shape[0]):
        filled = _one_cell(rows, n, place_G, gene, value)
        genes, values = gene[:filled], value[:filled]
        greatest = _count_above(values, above)
        for j in range(filled):
            if wanted_G[genes[j]]:
                rank_G[genes[j]] = _rank(values[j], values, above, max_rank)
        for c in range(out_NC.shape[1]):
            score = _score(up, c, rank_G, max_rank) - _score(down, c, rank_G, max_rank)
            out_NC[n, c] = max(score, np.float32(0))
        for g in genes:
            rank_G[g] = np.float32(max_rank)
            place_G[g] = -1
        above[: greatest + 1] = 0


@njit(nogil=True)
def _one_cell(rows: _Rows, n: int, place_G: Ints, gene: Ints, value: Ints) -> int:
    """Write the cell's genes with their counts, each gene once; returns how many. ``place_G`` is -1 before."""
    filled = 0
    for j in range(rows.indptr_N[n], rows.indptr_N[n + 1]):
        g, x = rows.gene_of[rows.column_M[j]], np.int64(rows.value_M[j])
        if place_G[g] >= 0:
            value[place_G[g]] += x
        elif x > 0:
            place_G[g], gene[filled], value[filled] = filled, g, x
            filled += 1
    return filled


@njit(nogil=True)
def _count_above(values: Ints, above: Ints) -> int:
    """Fill the table, which is zero before; returns the last place used."""
    greatest = 0
    for j in range(values.size):
        place = min(values[j], TABLE)
        above[place] += 1
        greatest = max(greatest, place)
    running = 0
    for x in range(greatest, -1, -1):
        here = above[x]
        above[x] = running
        running += here
    return greatest


@njit(nogil=True)
def _rank(value: int, values: Ints, above: Ints, max_rank: int) -> Any:
    if value < TABLE:
        more = above[value]
        equal = above[value - 1] - more
    else:
        more, equal = 0, 0
        for j in range(values.size):
            more += values[j] > value
            equal += values[j] == value
    rank = np.float32(more + 0.5 * (equal + 1))
    return rank if rank <= max_rank else np.float32(max_rank)


@njit(nogil=True)
def _score(lists: GeneLists, c: int, rank_G: NDArray[np.float32], max_rank: int) -> Any:
    first, last = lists.first_C[c], lists.first_C[c + 1]
    n = last - first
    least, most = n * (n + 1) / 2.0, float(n * max_rank)
    if n == 0 or least == most:
        return np.float32(0)
    total = np.float32(0)
    for i in range(first, last):
        total += rank_G[lists.gene_L[i]]
    return np.float32(1) - (total - np.float32(least)) / np.float32(most - least)
