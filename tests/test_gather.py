"""The first layer of embedding against PyTorch's dense layer in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from carvae.data.sparse import CountsCSR
from carvae.model.fused import sum_of_rows
from carvae.model.gather import CELLS_AT_ONCE, COLUMNS, LOGS, FixedLayer, weight_gradient, weighted_rows


def drawn(seed: int, n_cells: int, n_genes: int, density: float, largest: int) -> CountsCSR:
    rng = np.random.default_rng(seed)
    dense_NG = rng.integers(1, largest + 1, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)
    return CountsCSR.from_scipy(sp.csr_matrix(dense_NG.astype(np.float32)))


def exact(counts: CountsCSR, weight_GH: torch.Tensor, bias_H: torch.Tensor) -> torch.Tensor:
    value_NG = torch.from_numpy(counts.to_scipy().toarray()).double().log1p()
    hidden_NH = value_NG @ weight_GH.double() + bias_H.double()
    return functional.layer_norm(hidden_NH, hidden_NH.shape[1:]).relu()


@given(
    seed=st.integers(0, 2**16),
    n=st.sampled_from([0, 1, 7, CELLS_AT_ONCE + 3]),
    n_hidden=st.sampled_from([1, 31, 32, 70, 128]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    largest=st.sampled_from([3, LOGS.size - 1, LOGS.size, 1 << 24]),
)
@settings(max_examples=40, deadline=None)
def test_the_layer_is_the_dense_layer(seed: int, n: int, n_hidden: int, density: float, largest: int) -> None:
    counts = drawn(seed, n, 30, density, largest)
    generator = torch.Generator().manual_seed(seed)
    weight_GH, bias_H = torch.randn(30, n_hidden, generator=generator), torch.randn(n_hidden, generator=generator)
    found_NH = FixedLayer(weight_GH, bias_H, torch.float32)(counts)
    torch.testing.assert_close(found_NH.double(), exact(counts, weight_GH, bias_H), rtol=1e-5, atol=1e-4)
    narrow_NH = FixedLayer(weight_GH, bias_H, torch.bfloat16)(counts)
    rounded_GH = weight_GH.bfloat16().float()
    torch.testing.assert_close(narrow_NH.double(), exact(counts, rounded_GH, bias_H), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "n_hidden"), [(0, COLUMNS), (1, COLUMNS), (50, 2 * COLUMNS)])
def test_the_layer_in_training_is_torchs_own(n: int, n_hidden: int) -> None:
    counts = drawn(n, n, 30, 0.3, 9)
    value_M, weight_GH = counts.count_M.log1p(), torch.randn(30, n_hidden, generator=torch.Generator().manual_seed(n))
    for given_GH in (weight_GH, weight_GH.t().contiguous().t()):
        found_NH = weighted_rows(counts, value_M, given_GH)
        torch.testing.assert_close(found_NH, sum_of_rows(counts, value_M, weight_GH), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="weights of shape"):
        weighted_rows(counts, value_M, weight_GH[:, 1:])
    with pytest.raises(ValueError, match=r"values of torch\.float32 for rows"):
        weighted_rows(counts, value_M, weight_GH.double())
    with pytest.raises(ValueError, match="values for"):
        weighted_rows(counts, torch.zeros(len(value_M) + 1), weight_GH)


def test_values_that_are_no_counts_are_taken_as_they_are() -> None:
    counts = CountsCSR.from_scipy(sp.csr_matrix(np.array([[0.5, 255.0, 256.5, 0.0, -0.5]], np.float32)))
    weight_GH, bias_H = torch.eye(5), torch.zeros(5)
    found_NH = FixedLayer(weight_GH, bias_H, torch.float32)(counts)
    torch.testing.assert_close(found_NH.double(), exact(counts, weight_GH, bias_H))


def test_threads_share_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = drawn(0, 5 * CELLS_AT_ONCE, 30, 0.3, 9)
    layer = FixedLayer(torch.randn(30, 40), torch.randn(40), torch.float32)
    alone_NH = layer(counts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(layer(counts), alone_NH, rtol=0, atol=0)


def test_a_part_of_the_cells_gives_their_rows() -> None:
    counts = drawn(1, 300, 30, 0.3, 9)
    layer = FixedLayer(torch.randn(30, 40), torch.randn(40), torch.float32)
    torch.testing.assert_close(layer(counts.part(40, 290)), layer(counts)[40:290], rtol=0, atol=0)


def test_counts_over_other_genes_are_refused() -> None:
    layer = FixedLayer(torch.randn(20, 4), torch.randn(4), torch.float32)
    with pytest.raises(ValueError, match="30 genes for weights of 20"):
        layer(drawn(0, 3, 30, 0.5, 3))


def test_what_is_no_number_stays_none() -> None:
    """Else a cell of overflowing weights would be embedded at zero, as if it were one like others."""
    layer = FixedLayer(torch.full((30, 4), torch.inf), torch.zeros(4), torch.float32)
    assert layer(drawn(0, 3, 30, 1.0, 3)).isnan().all()


def test_a_cell_has_the_same_bits_whatever_its_company() -> None:
    """One count beyond the table sends its whole block another way."""
    rng = np.random.default_rng(4)
    dense_NG = rng.integers(0, LOGS.size, (CELLS_AT_ONCE, 30)).astype(np.float32)
    layer = FixedLayer(torch.randn(30, 40), torch.randn(40), torch.float32)
    alone_NH = layer(CountsCSR.from_scipy(sp.csr_matrix(dense_NG)))
    dense_NG[7, 3] = LOGS.size + 5
    beside_NH = layer(CountsCSR.from_scipy(sp.csr_matrix(dense_NG)))
    others = np.arange(CELLS_AT_ONCE) != 7
    torch.testing.assert_close(beside_NH[others], alone_NH[others], rtol=0, atol=0)


def test_tensors_with_gaps_and_weights_of_double_precision_are_read_as_they_are() -> None:
    counts, weight_GH, bias_H = drawn(5, 40, 30, 0.4, 9), torch.randn(30, 40), torch.randn(40)
    gaps = CountsCSR(
        counts.indptr_N.repeat_interleave(2)[::2],
        counts.gene_M.repeat_interleave(2)[::2],
        counts.count_M.repeat_interleave(2)[::2],
        30,
    )
    assert not gaps.count_M.is_contiguous()
    expected = exact(counts, weight_GH, bias_H)
    for given_GH, given_H in ((weight_GH, bias_H), (weight_GH.double(), bias_H.double())):
        found_NH = FixedLayer(given_GH, given_H, torch.float32)(gaps)
        torch.testing.assert_close(found_NH.double(), expected, rtol=1e-5, atol=1e-4)
    grad_NH = torch.randn(40, 40)
    found_GH = weight_gradient(gaps, gaps.count_M, grad_NH)
    torch.testing.assert_close(found_GH, counts.dense(counts.count_M).t() @ grad_NH, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_together_is_refused() -> None:
    counts = drawn(6, 10, 30, 0.4, 9)
    with pytest.raises(ValueError, match="a bias of 41 for weights of 40 columns"):
        FixedLayer(torch.randn(30, 40), torch.randn(41), torch.float32)
    with pytest.raises(ValueError, match="3 values for"):
        weight_gradient(counts, counts.count_M[:3], torch.randn(10, 40))
