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
    kind, dtype = np.iinfo if block.data.dtype.kind in "iu" else np.finfo, block.data.dtype
    most = dtype.type(min(limit, kind(dtype).max))  # in the type of the values, which need no widening then
    plain, largest = _look(block.data, block.indices, block.indptr, most, key_G, (total_N, print_N))
    return Look(bool(plain), total_N, print_N, int(largest))


def moved(counts: sp.csr_matrix, column_G: Ints, n_columns: int) -> sp.csr_matrix:
    """The counts in other columns, -1 being none; what meets in one column is summed.

    The entries of a row keep their order. The values keep their type.
    """
    indptr_N = np.zeros(counts.shape[0] + 1, np.int64)
    gene_M = np.empty(counts.nnz + 1, np.int32)  # one to write over
    value_M = np.empty(counts.nnz + 1, counts.data.dtype)
    some_meet = np.bincount(column_G[column_G >= 0], minlength=1).max() > 1
    place_C = np.full(n_columns if some_meet else 0, -1, np.int64)
    out, column_G = (indptr_N, gene_M, value_M), column_G.astype(np.int32)
    n_values = _moved(counts.data, counts.indices, counts.indptr, column_G, place_C, out)
    # not through the constructor, which would copy: the rest of the memory was never touched
    result = sp.csr_matrix((counts.shape[0], n_columns), dtype=counts.data.dtype)
    wide = sp.get_index_dtype(maxval=max(n_values, n_columns))
    result.data, result.indices = value_M[:n_values], gene_M[:n_values].astype(wide, copy=False)
    result.indptr = indptr_N.astype(wide, copy=False)
    return result


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def sums(indptr_N: Ints, count_M: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of each row: of whole numbers exact, in whatever order, and then rounded once."""
    sum_N = np.empty(indptr_N.size - 1, np.float32)
    for n in range(sum_N.size):
        total, part = 0.0, count_M[indptr_N[n] : indptr_N[n + 1]]
        for j in range(part.size):
            total += part[j]
        sum_N[n] = total
    return sum_N


@njit(nogil=True, cache=True, error_model="numpy")
def widened(first_N: Ints, indptr_N: Ints, entry_M2: Ints) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Genes and counts of some rows one after the other; they begin at ``first_N`` among the entries [M, 2]."""
    gene_M, count_M = np.empty(indptr_N[-1], np.int32), np.empty(indptr_N[-1], np.float32)
    entry_M = entry_M2.reshape(entry_M2.size)
    for n in range(first_N.size):
        start, stop = indptr_N[n], indptr_N[n + 1]
        gene, count = gene_M[start:stop], count_M[start:stop]
        entry = entry_M[2 * first_N[n] : 2 * (first_N[n] + stop - start)]
        for j in range(gene.size):
            gene[j], count[j] = entry[np.uint64(2 * j)], entry[np.uint64(2 * j + 1)]
    return gene_M, count_M


@njit(nogil=True, cache=True, error_model="numpy")
def _look(
    value_M: Values, gene_M: Ints, indptr_N: Ints, limit: Any, key_G: NDArray[np.uint64], out: tuple[Any, Any]
) -> tuple[bool, int]:
    """Short loops, each without a branch, of which LLVM makes vector instructions; a row stays in the cache."""
    total_N, print_N = out
    greatest, one = np.int32(0), limit // limit
    for n in range(total_N.size):
        value, gene = value_M[indptr_N[n] : indptr_N[n + 1]], gene_M[indptr_N[n] : indptr_N[n + 1]]
        n_bad, later = np.int32(0), gene[1:]
        for j in range(value.size):
            n_bad += np.int32(not ((value[j] >= one) & (value[j] <= limit)))  # 1 for NaN
        for j in range(later.size):
            n_bad += np.int32(later[j] <= gene[j])
        if n_bad:
            return False, 0
        total = np.int64(0)
        for j in range(value.size):
            whole = np.int32(value[j])
            n_bad += np.int32(whole != value[j])
            greatest = max(greatest, whole)
            total += whole
        if n_bad:
            return False, 0
        fingerprint = np.uint64(0)
        for j in range(value.size):
            fingerprint += np.uint64(np.int32(value[j])) * key_G[np.uint32(gene[j])]
        total_N[n], print_N[n] = total, fingerprint
    return True, greatest  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def _moved(
    value_M: Values, gene_M: Ints, indptr_N: Ints, column_G: Ints, place_C: Ints, out: tuple[Ints, Ints, Values]
) -> int:
    """Each entry is written, and written over by the next if it has no column: a branch would be guessed wrong.

    ``place_C`` is -1 for every column, and empty where no two genes have the same.
    """
    out_indptr_N, out_gene_M, out_value_M = out
    end = 0
    for n in range(indptr_N.size - 1):
        first = end
        value, gene = value_M[indptr_N[n] : indptr_N[n + 1]], gene_M[indptr_N[n] : indptr_N[n + 1]]
        for j in range(value.size):
            column = column_G[np.uint32(gene[j])]
            out_gene_M[end], out_value_M[end] = column, value[j]
            end += column >= 0
        if place_C.size:
            end = _met(first, end, place_C, out_gene_M, out_value_M)
        out_indptr_N[n + 1] = end
    return end


@njit(nogil=True)
def _met(first: int, end: int, place_C: Ints, gene_M: Ints, value_M: Values) -> int:
    """Sum a row's entries of the same column; returns where the row ends then."""
    free = first
    for j in range(first, end):
        column, value = gene_M[j], value_M[j]
        if place_C[column] >= first:  # where the column stands in this row
            value_M[place_C[column]] += value
        else:
            place_C[column] = free
            gene_M[free], value_M[free] = column, value
            free += 1
    return free
