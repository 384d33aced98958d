"""The compiled operations against plain torch in float64: values, every gradient, threads and autocast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carvae.data.sparse import CountsCSR
from carvae.model import fused
from carvae.model.fused import Target
from carvae.model.likelihood import reconstruction

zinb_too = pytest.mark.parametrize("inflated", [False, True], ids=["nb", "zinb"])


def minibatch(n: int, g: int, density: float, largest: int, seed: int) -> CountsCSR:
    """Counts of which the greatest is ``largest``; the first cell is empty."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, g)) < density, np.round(largest ** rng.random((n, g))), 0).astype(np.float32)
    if x.any():
        x[x == x.max()] = largest
    x[0] = 0
    return CountsCSR.from_scipy(sp.csr_matrix(x))


class Ends(nn.Module):
    """Last hidden layer (a unit per cell: logits are the weights, exact in float32), layers and dispersion."""

    def __init__(self, n: int, g: int, inflated: bool, width: float, log10_theta: tuple[float, float]) -> None:
        super().__init__()
        self.hidden_NH = nn.Parameter(torch.eye(n))
        self.scale = nn.Linear(n, g)
        self.zero = nn.Linear(n, g) if inflated else None
        for layer in (self.scale, self.zero):
            if layer is not None:
                nn.init.normal_(layer.weight, std=width)
                nn.init.zeros_(layer.bias)
        low, high = log10_theta
        self.log_theta_G = nn.Parameter((low + (high - low) * torch.rand(g)) * float(np.log(10)))

    def forward(self, counts: CountsCSR, unmeasured_NG: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss and that of each cell."""
        counts = CountsCSR(counts.indptr_N, counts.gene_M, counts.count_M.to(self.log_theta_G.dtype), counts.n_genes)
        target = Target(counts, counts.library_N(), unmeasured_NG)
        return reconstruction(self.hidden_NH, self.scale, self.zero, self.log_theta_G, target)


def results(ends: Ends, *arguments: Any) -> dict[str, Tensor]:
    """Loss of each cell and all gradients of the mean, in float64."""
    ends.zero_grad()
    mean, loss_N = ends(*arguments)
    mean.backward()
    assert not loss_N.requires_grad
    torch.testing.assert_close(mean.detach(), loss_N.mean())
    grads = {name: p.grad.double().clone() for name, p in ends.named_parameters() if p.grad is not None}
    return {"loss": loss_N.double()} | grads


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], terms: dict[str, float], tolerance: float) -> None:
    """Errors relative to the greatest value of a tensor, or of the terms whose differences it is."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        scale = max(float(value.abs().max()), terms.get(name, 0.1))
        assert float((found[name] - value).abs().max()) / scale < tolerance, name


def cancelling(ends: Ends, shape: tuple[int, int], largest: int, width: float) -> dict[str, float]:
    """Size of the terms that cancel in each gradient.

    Gradients of logits are differences of counts (of them the mean over cells is taken), those of theta of terms below
    theta and mu: float32 leaves 1e-6 of the terms where they cancel.
    """
    logits, greatest = max(1.0, largest) / shape[0], max(1.0, width) * 4
    theta = float(ends.log_theta_G.detach().exp().max())
    terms = {"scale.bias": logits * shape[0], "scale.weight": logits, "hidden_NH": logits * shape[1] * greatest}
    return terms | {"log_theta_G": max(1.0, min(theta, largest))}


@zinb_too
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 70)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    largest=st.sampled_from([1, 8, 9, 300, 65_535]),
    width=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    log10_theta=st.sampled_from([(-1.0, 2.0), (-4.0, 6.0), (-4.0, -3.0), (5.0, 6.0)]),
    seed=st.integers(0, 2**16),
)
@example(shape=(7, 70), density=1.0, largest=65_535, width=30.0, log10_theta=(-4.0, 6.0), seed=0)
@example(shape=(1, 1), density=0.0, largest=1, width=0.0, log10_theta=(5.0, 6.0), seed=1)
@settings(max_examples=100)
def test_the_kernels_equal_float64(
    inflated: bool,
    shape: tuple[int, int],
    density: float,
    largest: int,
    width: float,
    log10_theta: tuple[float, float],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    counts = minibatch(*shape, density, largest, seed)
    ends = Ends(*shape, inflated, width, log10_theta)
    assert fused.available(ends.log_theta_G)
    found = results(ends, counts)
    exact = results(ends.double(), counts)
    assert not fused.available(ends.log_theta_G)
    assert_close(found, exact, cancelling(ends, shape, largest, width), tolerance=1e-5)


@zinb_too
def test_unmeasured_genes_add_exactly_nothing(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(6, 40, 0.3, 20, 0), Ends(6, 40, inflated, 1.0, (-1.0, 2.0))
    gone_G = torch.arange(40) >= 25
    dense = counts.to_scipy().toarray()
    dense[:, 25:] = 0
    found = results(ends, CountsCSR.from_scipy(sp.csr_matrix(dense)), gone_G.expand(6, 40))
    for name in ("scale.weight", "scale.bias", "log_theta_G"):
        assert (found[name][25:] == 0).all()
        assert (found[name][:25] != 0).any()
    assert_close(
        found, results(ends.double(), CountsCSR.from_scipy(sp.csr_matrix(dense)), gone_G.expand(6, 40)), {}, 1e-5
    )


@zinb_too
def test_threads_change_nothing_but_the_order_of_sums(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(50, 60, 0.2, 30, 0), Ends(50, 60, inflated, 1.0, (-1.0, 2.0))
    one = results(ends, counts)
    torch.set_num_threads(3)
    try:
        three = results(ends, counts)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one["loss"], three["loss"])
    assert_close(three, one, {}, 1e-6)


@zinb_too
def test_under_autocast_products_alone_are_in_bfloat16(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(50, 60, 0.2, 30, 0), Ends(50, 60, inflated, 1.0, (-1.0, 2.0))
    exact = results(ends, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(ends, counts)
    assert not torch.equal(found["loss"], exact["loss"])
    assert_close(found, exact, {}, 0.03)


def test_a_nan_is_seen_in_the_loss() -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(4, 30, 0.3, 9, 0), Ends(4, 30, False, 1.0, (-1.0, 2.0))
    with torch.no_grad():
        ends.hidden_NH[2, 0] = torch.nan
        _, loss_N = ends(counts)
    assert loss_N.isnan().tolist() == [False, False, True, False]


@given(seed=st.integers(0, 2**16), n=st.integers(1, 8), density=st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=30)
def test_the_sparse_product_and_its_gradient_are_those_of_the_dense(seed: int, n: int, density: float) -> None:
    counts = minibatch(n, 30, density, 300, seed)
    generator = torch.Generator().manual_seed(seed)
    weight_GH = torch.randn(30, 7, generator=generator, requires_grad=True)
    grad_NH = torch.randn(n, 7, generator=generator)
    found_NH = fused.sparse_product(counts, counts.count_M.log1p(), weight_GH)
    found_NH.backward(grad_NH)  # type: ignore[no-untyped-call]
    dense_NG = torch.from_numpy(counts.to_scipy().toarray()).double().log1p()
    torch.testing.assert_close(found_NH.detach().double(), dense_NG @ weight_GH.detach().double(), rtol=1e-5, atol=1e-4)
    assert weight_GH.grad is not None
    torch.testing.assert_close(weight_GH.grad.double(), dense_NG.t() @ grad_NH.double(), rtol=1e-5, atol=1e-4)


def test_room_after_the_last_cell_changes_no_gradient() -> None:
    counts = minibatch(5, 30, 0.4, 20, 1)
    extra = torch.full((7,), 29, dtype=torch.int32)
    padded = CountsCSR(
        counts.indptr_N, torch.cat([counts.gene_M, extra]), torch.cat([counts.count_M, torch.zeros(7)]), 30
    )
    gradients = []
    for some in (counts, padded):
        weight_GH = torch.ones(30, 40, requires_grad=True)
        fused.sparse_product(some, some.count_M.log1p(), weight_GH).square().sum().backward()
        gradients.append(weight_GH.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
