"""Kernels on rows of counts against the same said in numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.data.rows import look, moved, sums, widened

LIMIT = 1 << 24


def drawn(seed: int, n_cells: int, n_genes: int, dtype: type = np.int32) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.7, (n_cells, n_genes)) * rng.integers(1, 5, (n_cells, n_genes))
    return sp.csr_matrix(dense.astype(dtype))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 20), st.sampled_from([np.int32, np.float32, np.uint16]))
def test_sums_and_fingerprints_are_the_matrix_products(seed: int, n_cells: int, n_genes: int, dtype: type) -> None:
    counts = drawn(seed, n_cells, n_genes, dtype)
    key_G = np.random.default_rng(1).integers(1, 1 << 63, n_genes, dtype=np.uint64)
    seen = look(counts, LIMIT, key_G)
    assert seen.plain
    np.testing.assert_array_equal(seen.total_N, np.asarray(counts.sum(axis=1)).ravel())
    np.testing.assert_array_equal(seen.print_N, counts.astype(np.uint64) @ key_G)
    assert seen.largest == counts.data.max(initial=0)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 20), st.sampled_from([np.uint16, np.int32]))
def test_rows_that_rest_compactly_are_those_of_the_matrix(seed: int, n_cells: int, n_genes: int, dtype: type) -> None:
    counts = drawn(seed, n_cells, n_genes)
    rows = np.random.default_rng(seed).integers(0, n_cells, 2 * n_cells if n_cells else 0)
    entry_M2 = np.column_stack([counts.indices, counts.data]).astype(dtype)
    indptr_N = np.concatenate([[0], np.cumsum(np.diff(counts.indptr)[rows])]).astype(np.int64)
    gene_M, count_M = widened(counts.indptr[rows].astype(np.int64), indptr_N, entry_M2)
    found = sp.csr_matrix((count_M, gene_M, indptr_N), shape=(rows.size, n_genes))
    np.testing.assert_array_equal(found.toarray(), counts.toarray()[rows])
    np.testing.assert_array_equal(sums(indptr_N, count_M), counts.toarray()[rows].sum(1, dtype=np.float32))


@pytest.mark.parametrize("bad", [0.0, -1.0, 0.5, np.nan, np.inf, LIMIT + 2.0])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_a_value_that_is_no_count_is_seen_anywhere(bad: float, at: int) -> None:
    counts = drawn(0, 6, 10, np.float32)
    key_G = np.ones(10, np.uint64)
    assert look(counts, LIMIT, key_G).plain
    counts.data[at] = bad
    assert not look(counts, LIMIT, key_G).plain


def test_genes_in_disorder_or_given_twice_are_seen() -> None:
    for genes in ([3, 1], [1, 1]):
        row = sp.csr_matrix((np.array([1, 2]), np.array(genes), np.array([0, 2])), shape=(1, 5))
        assert not look(row, LIMIT, np.ones(5, np.uint64)).plain


@settings(max_examples=40)
@given(st.data())
def test_moved_columns_are_those_of_the_matrix_product(data: st.DataObject) -> None:
    n_cells, n_genes, n_columns = data.draw(st.tuples(st.integers(0, 8), st.integers(1, 15), st.integers(1, 9)))
    column_G = np.array(data.draw(st.lists(st.integers(-1, n_columns - 1), min_size=n_genes, max_size=n_genes)))
    counts = drawn(data.draw(st.integers(0, 2**31)), n_cells, n_genes)
    there = np.flatnonzero(column_G >= 0)
    to = sp.csr_matrix((np.ones(len(there), np.int32), (there, column_G[there])), shape=(n_genes, n_columns))
    found = moved(counts, column_G, n_columns)
    np.testing.assert_array_equal(found.toarray(), (counts @ to).toarray())
    assert found.dtype == counts.dtype
    assert found.nnz == (counts @ to).nnz
