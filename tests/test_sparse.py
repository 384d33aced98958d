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

from carvae.data.sparse import CountsCSR

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


@given(DENSE, st.data())
def test_rows_are_those_of_scipy_in_any_order_with_repeats(dense: np.ndarray, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(dense) - 1), max_size=12))
    taken = CountsCSR.from_scipy(sp.csr_matrix(dense)).rows(torch.tensor(rows, dtype=torch.int64))
    assert np.array_equal(taken.to_scipy().toarray(), dense[rows])


@given(DENSE)
def test_libraries_and_cells_of_entries(dense: np.ndarray) -> None:
    matrix = sp.csr_matrix(dense)
    counts = CountsCSR.from_scipy(matrix)
    assert counts.library_N().tolist() == dense.sum(1).tolist()
    assert counts.cell_M().tolist() == matrix.tocoo().row.tolist()


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
    share, theta = CountsCSR.from_scipy(sp.csr_matrix(dense)).moments()
    expected_share, expected_theta = naive_moments(dense)
    assert share.numpy() == pytest.approx(expected_share, rel=1e-5)
    assert theta.numpy() == pytest.approx(expected_theta, rel=1e-4)
    assert float(share.sum()) == pytest.approx(1)


def test_moments_find_the_dispersion_of_simulated_counts() -> None:
    rng = np.random.default_rng(0)
    library, share, theta = rng.uniform(500, 2000, 20_000), np.array([0.5, 0.3, 0.2]), np.array([0.5, 2.0, 10.0])
    mean = library[:, None] * share
    dense = rng.poisson(rng.gamma(theta, mean / theta))
    # what is observed is not the library that was planted: dominant genes move the sum, so the padding gene is large
    padding = np.round(1e4 * library - dense.sum(1)).astype(np.int64)[:, None]
    _, found = CountsCSR.from_scipy(sp.csr_matrix(np.hstack([dense, padding]))).moments()
    assert found[:3].numpy() == pytest.approx(theta, rel=0.1)


def test_moments_of_genes_without_counts_and_of_empty_cells_are_finite() -> None:
    share, theta = CountsCSR.from_scipy(sp.csr_matrix(np.zeros((4, 3), np.int64))).moments()
    assert torch.isfinite(share).all()
    assert torch.isfinite(theta).all()
