"""Sparse counts as tensors, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import counts_of

from carvae.data.sparse import CompactCSR, CountsCSR, GeneSums, entry_bytes

DENSE = hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 5))


@given(DENSE)
def test_from_scipy_and_back(dense: np.ndarray) -> None:
    counts = CountsCSR.from_scipy(sp.csr_matrix(dense))
    assert np.array_equal(counts.to_scipy().toarray(), dense)
    assert counts.n_cells == len(dense)
    assert counts.n_genes == dense.shape[1]
    assert (counts.indptr_N.dtype, counts.gene_M.dtype, counts.count_M.dtype) == (
        torch.int64,
        torch.int32,
        torch.float32,
    )


LARGE = st.sampled_from([0, 0, 1, 2, 255, 65_534, 65_535, 65_536, (1 << 24) - 1])


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=LARGE), st.data())
def test_compact_rows_are_those_of_scipy_in_any_order_with_repeats(dense: np.ndarray, data: st.DataObject) -> None:
    """To the last count, whether all fit into 16 bits or not; by both ways of gathering."""
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(dense) - 1), max_size=12)), dtype=torch.int64)
    compact = CompactCSR.from_scipy(sp.csr_matrix(dense))
    assert compact.entry_M2.dtype == (torch.uint16 if dense.max() <= 65_535 else torch.int32)
    taken = compact.rows(rows)
    assert np.array_equal(taken.to_scipy().toarray(), dense[rows.numpy()].reshape(-1, dense.shape[1]))
    assert (taken.gene_M.dtype, taken.count_M.dtype) == (torch.int32, torch.float32)
    assert taken.gene_M.is_contiguous()
    assert taken.count_M.is_contiguous()
    first_N = compact.indptr_N[rows]
    gene_M, count_M = compact._by_entry(first_N, taken.indptr_N, taken.gene_M.numel())
    assert torch.equal(gene_M, taken.gene_M)
    assert torch.equal(count_M, taken.count_M)
    assert (gene_M.dtype, count_M.dtype) == (torch.int32, torch.float32)
    assert gene_M.is_contiguous()


@pytest.mark.parametrize(("n_genes", "dtype"), [(1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)])
def test_many_genes_are_not_cut_to_sixteen_bits(n_genes: int, dtype: torch.dtype) -> None:
    counts = sp.csr_matrix(([3, 7, 5], ([0, 1, 1], [0, n_genes - 1, 40_000])), shape=(2, n_genes))
    compact = CompactCSR.from_scipy(counts)
    assert compact.entry_M2.dtype == dtype
    assert compact.entry_M2.nbytes == 3 * entry_bytes(n_genes, 7)
    assert (compact.rows(torch.arange(2)).to_scipy() != counts).nnz == 0


def test_cells_at_rest_can_be_filled_a_piece_at_a_time() -> None:
    counts = counts_of(9)
    compact = CompactCSR.empty(np.diff(counts.indptr).astype(np.int64), 12, 65_535, torch.device("cpu"))
    for first, last in ((0, 5), (5, counts.nnz)):
        compact.fill(first, counts.indices[first:last], counts.data[first:last])
    assert (compact.rows(torch.arange(9)).to_scipy() != counts).nnz == 0
    moved = compact.to(torch.device("cpu")).rows(torch.arange(9), counts.nnz)
    assert (moved.to_scipy() != counts).nnz == 0


@given(DENSE)
def test_libraries_and_cells_of_entries(dense: np.ndarray) -> None:
    matrix = sp.csr_matrix(dense)
    counts = CountsCSR.from_scipy(matrix)
    assert counts.library_N().tolist() == dense.sum(1).tolist()
    assert counts.cell_M().tolist() == matrix.tocoo().row.tolist()


def moments(dense: np.ndarray, chunk: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [dense[start : start + chunk] for start in range(0, len(dense), chunk)]
    return GeneSums.of((CountsCSR.from_scipy(sp.csr_matrix(part)) for part in parts), dense.shape[1]).moments()


def naive_moments(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve E[x^2] = p E[l] + p^2 E[l^2] (1 + 1 / theta) for theta, gene by gene."""
    library = dense.sum(1)
    share, theta = [], []
    for x in dense.T.astype(float):
        p = x.sum() / library.sum()
        poisson = p * library.mean()
        inflated = (x**2).mean() - poisson
        expected = p**2 * (library.astype(float) ** 2).mean()
        share.append(p)
        theta.append(expected / max(inflated - expected, 1e-6))
    return np.array(share), np.array(theta)


def test_moments_are_those_of_a_naive_loop() -> None:
    dense = counts_of(60).toarray()
    share, theta = moments(dense)
    expected_share, expected_theta = naive_moments(dense)
    assert share.numpy() == pytest.approx(expected_share, rel=1e-5)
    assert theta.numpy() == pytest.approx(expected_theta, rel=1e-4)
    assert float(share.sum()) == pytest.approx(1)
    for one, other in zip((share, theta), moments(dense, chunk=7), strict=True):
        assert other.numpy() == pytest.approx(one.numpy(), rel=1e-6)


def test_moments_find_the_dispersion_of_simulated_counts() -> None:
    rng = np.random.default_rng(0)
    library, share, theta = rng.uniform(500, 2000, 20_000), np.array([0.5, 0.3, 0.2]), np.array([0.5, 2.0, 10.0])
    mean = library[:, None] * share
    dense = rng.poisson(rng.gamma(theta, mean / theta))
    # what is observed is not the library that was planted: dominant genes move the sum, so the padding gene is large
    padding = np.round(1e4 * library - dense.sum(1)).astype(np.int64)[:, None]
    _, found = moments(np.hstack([dense, padding]))
    assert found[:3].numpy() == pytest.approx(theta, rel=0.1)


def test_moments_of_genes_without_counts_and_of_empty_cells_are_finite() -> None:
    share, theta = moments(np.zeros((4, 3), np.int64))
    assert torch.isfinite(share).all()
    assert torch.isfinite(theta).all()
