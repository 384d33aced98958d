"""Rows of sparse counts, each in one pass (numba): are they counts, what do they add up to, and whose genes they are.

Axes: N cells, G genes, M stored values. Each kernel reads every value once, so that a query costs little more than
its file costs to unpack; the first call on a machine takes a second or two, later ones read numba's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Values = NDArray[Any]


class Look(NamedTuple):
    """What one look at every value of some rows showed."""

    plain: bool
    """All values are whole, between 1 and the limit, and each row's genes rise: nothing is to be done. Otherwise
    something is to be looked at: a value that is no count, a stored zero, genes in disorder."""
    total_N: NDArray[np.int64]
    """Sum of each row."""
    print_N: NDArray[np.uint64]
    """Fingerprint of each row: the sum, modulo 2^64, of values times their gene's key."""
    largest: int


def look(block: sp.csr_matrix, limit: int, key_G: NDArray[np.uint64]) -> Look:
    """Look at every value once; the sums are right only where the rows are plain."""
    total_N = np.empty(block.shape[0], np.int64)
    print_N = np.empty(block.shape[0], np.uint64)
    plain, largest = _look(block.data, block.indices, block.indptr, limit, key_G, (total_N, print_N))
    return Look(bool(plain), total_N, print_N, int(largest))


def moved(counts: sp.csr_matrix, column_G: Ints, n_columns: int) -> sp.csr_matrix:
    """The counts in other columns, -1 being none; what meets in one column is summed.

    The entries of a row keep their order. The values keep their type.
    """
    indptr_N = np.zeros(counts.shape[0] + 1, np.int64)
    gene_M = np.empty(counts.nnz, np.int32)
    value_M = np.empty(counts.nnz, counts.data.dtype)
    n_values = _moved(counts.data, counts.indices, counts.indptr, column_G, n_columns, (indptr_N, gene_M, value_M))
    parts = value_M[:n_values].copy(), gene_M[:n_values].copy(), indptr_N  # copies: the rest of the memory goes
    return sp.csr_matrix(parts, shape=(counts.shape[0], n_columns))


@njit(nogil=True, cache=True)
def _look(
    value_M: Values, gene_M: Ints, indptr_N: Ints, limit: int, key_G: NDArray[np.uint64], out: tuple[Any, Any]
) -> tuple[bool, int]:
    total_N, print_N = out
    greatest = 0
    for n in range(total_N.size):
        total, fingerprint, before, good = np.int64(0), np.uint64(0), -1, True
        for j in range(indptr_N[n], indptr_N[n + 1]):
            value, gene = value_M[j], gene_M[j]
            good &= value >= 1 and value <= limit and value == np.floor(value) and gene > before  # False for NaN
            before = gene
            total += np.int64(value)
            fingerprint += np.uint64(value) * key_G[gene]
            greatest = max(greatest, np.int64(value))  # type: ignore[assignment]
        if not good:
            return False, 0
        total_N[n], print_N[n] = total, fingerprint
    return True, greatest


@njit(nogil=True, cache=True)
def _moved(
    value_M: Values, gene_M: Ints, indptr_N: Ints, column_G: Ints, n_columns: int, out: tuple[Ints, Ints, Values]
) -> int:
    out_indptr_N, out_gene_M, out_value_M = out
    place_C = np.full(n_columns, -1, np.int64)  # where a column stands in the output, valid from `first` of a row on
    end = 0
    for n in range(indptr_N.size - 1):
        first = end
        for j in range(indptr_N[n], indptr_N[n + 1]):
            column = column_G[gene_M[j]]
            if column < 0:
                continue
            if place_C[column] >= first:
                out_value_M[place_C[column]] += value_M[j]
            else:
                place_C[column] = end
                out_gene_M[end], out_value_M[end] = column, value_M[j]
                end += 1
        out_indptr_N[n + 1] = end
    return end
