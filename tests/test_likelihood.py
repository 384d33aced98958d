"""The likelihoods of sparse counts against those of scvi-tools on dense ones, in value and in gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.model.likelihood import nb_loss, zinb_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing scvi-tools warns of what it imports itself
    from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
    from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive

Kind = Literal["nb", "zinb"]
both = pytest.mark.parametrize("kind", ["nb", "zinb"])
FLOOR = 0.1
"""Nats below which an error is not taken relative to the value: float32 sums terms of about a nat."""


@dataclass
class Case:
    """A minibatch; the parameters require gradients."""

    counts: NDArray[np.float32]
    logits: Tensor
    zero_logits: Tensor
    log_theta: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers as new leaves."""
        tensors = (self.logits, self.zero_logits, self.log_theta)
        return Case(self.counts, *(t.detach().to(dtype).clone().requires_grad_() for t in tensors))

    def gradients(self) -> dict[str, Tensor]:
        """Parameter -> gradient, for the parameters that took part."""
        tensors = {"logits": self.logits, "zero_logits": self.zero_logits, "log_theta": self.log_theta}
        return {name: t.grad for name, t in tensors.items() if t.grad is not None}


@dataclass(frozen=True)
class Spread:
    """How a random minibatch is drawn."""

    n: int = 6
    g: int = 30
    density: float = 0.3
    largest: int = 20
    width: float = 2.0
    log10_theta: tuple[float, float] = (-1.0, 2.0)
    n_empty: int = 1

    def draw(self, seed: int) -> Case:
        rng = np.random.default_rng(seed)
        shape = (self.n, self.g)
        counts = np.where(rng.random(shape) < self.density, np.round(self.largest ** rng.random(shape)), 0)
        if counts.any():
            counts[counts == counts.max()] = self.largest
        counts[: self.n_empty] = 0
        parameters = (
            rng.normal(scale=self.width, size=shape),
            rng.normal(scale=self.width, size=shape),
            rng.uniform(*self.log10_theta, self.g) * np.log(10),
        )
        leaves = (torch.tensor(p, dtype=torch.float32, requires_grad=True) for p in parameters)
        return Case(counts.astype(np.float32), *leaves)


def sparse(counts: NDArray[np.float32], dtype: torch.dtype) -> CountsCSR:
    tensors = CountsCSR.from_scipy(sp.csr_matrix(counts))
    return CountsCSR(tensors.indptr_N, tensors.gene_M, tensors.count_M.to(dtype), tensors.n_genes)


def ours(case: Case, kind: Kind) -> Tensor:
    counts = sparse(case.counts, case.logits.dtype)
    if kind == "nb":
        return nb_loss(case.logits, case.log_theta, counts, counts.library_N())
    return zinb_loss(case.logits, case.zero_logits, case.log_theta, counts, counts.library_N())


def theirs(case: Case, kind: Kind) -> Tensor:
    x = torch.as_tensor(case.counts, dtype=case.logits.dtype)
    mu, theta = torch.softmax(case.logits, 1) * x.sum(1, keepdim=True), case.log_theta.exp()
    if kind == "nb":
        return -log_nb_positive(x, mu, theta).sum(1)
    return -log_zinb_positive(x, mu, theta, case.zero_logits).sum(1)


def error(found: Tensor, expected: Tensor, floor: float | Tensor = FLOOR) -> float:
    """Greatest difference over the greatest value of the tensor, or over ``floor`` where that is more."""
    found, expected = found.detach().double(), expected.detach().double()
    scale = torch.maximum(expected.abs().max(), torch.as_tensor(floor, dtype=torch.float64))
    return float(((found - expected).abs() / scale).max())


def floors(case: Case) -> dict[str, Tensor]:
    """Parameter -> floor of its error, where gradients are small differences of large terms.

    Those of the logits are differences of counts, those of the dispersion of terms ``theta log1p(mu / theta)``, which
    are below both theta and mu; float32 leaves 1e-6 of the terms where they cancel.
    """
    count = max(1.0, float(case.counts.max()))
    return {"logits": torch.tensor(FLOOR * count), "log_theta": FLOOR * case.log_theta.detach().exp().clamp(1.0, count)}


def assert_equal_to_scvi(case: Case, kind: Kind, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    """Check the loss per cell, and all gradients under a random weight per cell, against scvi-tools in float64."""
    found, expected = case.to(dtype), case.to(torch.float64)
    weight = torch.randn(len(case.counts), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, reference = ours(found, kind), theirs(expected, kind)
    (loss * weight.to(dtype)).sum().backward()
    (reference * weight).sum().backward()
    assert loss.dtype == dtype
    assert loss.shape == reference.shape
    errors = {"loss": error(loss, reference)}
    assert found.gradients().keys() == expected.gradients().keys()
    for name, gradient in expected.gradients().items():
        errors[name] = error(found.gradients()[name], gradient, floors(case).get(name, FLOOR))
    assert max(errors.values()) < tolerance, errors


spreads = st.builds(
    Spread,
    n=st.integers(1, 8),
    g=st.integers(1, 60),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    largest=st.sampled_from([1, 5, 300, 65_535]),
    width=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    log10_theta=st.sampled_from([(-1.0, 2.0), (-4.0, 6.0), (-4.0, -3.0), (5.0, 6.0)]),
    n_empty=st.integers(0, 2),
)


@both
@given(spread=spreads, seed=st.integers(0, 2**16))
@example(spread=Spread(largest=65_535, log10_theta=(-4, 6)), seed=0)
@example(spread=Spread(largest=65_535, log10_theta=(5, 6), width=30), seed=1)
@example(spread=Spread(n=1, density=0), seed=2)
@settings(max_examples=150)
def test_float32_equals_scvi_in_float64(kind: Kind, spread: Spread, seed: int) -> None:
    assert_equal_to_scvi(spread.draw(seed), kind, tolerance=1e-5)


@both
@given(spread=spreads, seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_float64_equals_scvi(kind: Kind, spread: Spread, seed: int) -> None:
    assert_equal_to_scvi(spread.draw(seed), kind, tolerance=1e-7, dtype=torch.float64)


@both
@pytest.mark.parametrize("logit", [-1e4, -200.0, 200.0, 1e4])
def test_extreme_logits_stay_finite_and_equal(kind: Kind, logit: float) -> None:
    case = Spread(n_empty=0).draw(3)
    with torch.no_grad():
        case.logits[:, 0] = case.zero_logits[:, 1] = logit
        case.zero_logits[:, 2] = -logit
    assert_equal_to_scvi(case, kind, tolerance=1e-5)


@both
def test_the_loss_is_what_scvis_distributions_say(kind: Kind) -> None:
    case = Spread(n_empty=0).draw(4).to(torch.float64)
    x = torch.as_tensor(case.counts, dtype=torch.float64)
    mu, theta = torch.softmax(case.logits, 1) * x.sum(1, keepdim=True), case.log_theta.exp()
    px = (
        NegativeBinomial(mu=mu, theta=theta)
        if kind == "nb"
        else ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=case.zero_logits)
    )
    torch.testing.assert_close(ours(case, kind), -px.log_prob(x).sum(1), rtol=1e-10, atol=1e-10)


@both
def test_gradients_are_those_of_finite_differences(kind: Kind) -> None:
    case = Spread(n=3, g=7, n_empty=1).draw(5).to(torch.float64)

    def loss(logits: Tensor, zero_logits: Tensor, log_theta: Tensor) -> Tensor:
        return ours(Case(case.counts, logits, zero_logits, log_theta), kind) + 0 * zero_logits.sum()

    assert torch.autograd.gradcheck(loss, (case.logits, case.zero_logits, case.log_theta))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unmeasured_genes_add_exactly_nothing(kind: Kind, dtype: torch.dtype) -> None:
    case = Spread(n=8, g=40, log10_theta=(-4, 6), n_empty=1).draw(6)
    measured = np.random.default_rng(0).random(40) < 0.6
    case.counts[:, ~measured] = 0
    whole, part = case.to(dtype), case.to(dtype)
    part = Case(
        case.counts[:, measured], part.logits[:, measured], part.zero_logits[:, measured], part.log_theta[measured]
    )
    part = part.to(dtype)
    with torch.no_grad():
        whole.logits[:, ~measured] = -torch.inf
    loss, expected = ours(whole, kind), ours(part, kind)
    loss.sum().backward()
    expected.sum().backward()
    assert error(loss, expected) < (1e-6 if dtype == torch.float32 else 1e-14)
    for name, gradient in whole.gradients().items():
        assert gradient[..., ~measured].count_nonzero() == 0, name
        assert error(gradient[..., measured], part.gradients()[name]) < (1e-6 if dtype == torch.float32 else 1e-13), (
            name
        )


@both
def test_genes_may_be_measured_in_some_cells_only(kind: Kind) -> None:
    case = Spread(n=4, g=25, n_empty=0).draw(7)
    hidden = torch.zeros(4, 25, dtype=torch.bool)
    hidden[:2, ::3] = True
    case.counts[hidden.numpy()] = 0
    with torch.no_grad():
        case.logits[hidden] = -torch.inf
    loss = ours(case, kind)
    loss.sum().backward()
    for name in ("logits", "zero_logits"):
        if name in case.gradients():
            assert case.gradients()[name][hidden].count_nonzero() == 0
    for cell in range(4):
        alone = Case(*(t[cell : cell + 1] for t in (case.counts, case.logits, case.zero_logits)), case.log_theta)
        kept = ~hidden[cell]
        alone = Case(
            alone.counts[:, kept.numpy()], alone.logits[:, kept], alone.zero_logits[:, kept], alone.log_theta[kept]
        )
        torch.testing.assert_close(ours(alone, kind)[0], loss[cell], rtol=1e-6, atol=0)


@both
def test_stored_zeros_are_zeros(kind: Kind) -> None:
    """Thinned counts keep the places of counts that became zero."""
    case = Spread().draw(8)
    dense = sparse(case.counts, torch.float32)
    n, g = case.counts.shape
    stored = CountsCSR(
        torch.arange(n + 1) * g, torch.arange(g, dtype=torch.int32).repeat(n), torch.from_numpy(case.counts).ravel(), g
    )
    losses, cases = [], []
    for counts in (dense, stored):
        leaf = case.to(torch.float32)
        arguments = (leaf.logits, leaf.zero_logits) if kind == "zinb" else (leaf.logits,)
        loss = (nb_loss if kind == "nb" else zinb_loss)(*arguments, leaf.log_theta, counts, dense.library_N())
        loss.sum().backward()
        losses.append(loss)
        cases.append(leaf.gradients())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(cases[0], cases[1])


@both
def test_an_empty_cell_costs_nothing_and_teaches_nothing(kind: Kind) -> None:
    case = Spread(density=0.0).draw(9)
    loss = ours(case, kind)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in case.gradients().values())


@both
def test_the_caller_keeps_the_logits(kind: Kind) -> None:
    case = Spread().draw(10)
    before = [t.detach().clone() for t in (case.logits, case.zero_logits, case.log_theta)]
    ours(case, kind).sum().backward()
    for was, now in zip(before, (case.logits, case.zero_logits, case.log_theta), strict=True):
        assert torch.equal(was, now)


@both
def test_a_diverged_network_shows(kind: Kind) -> None:
    case = Spread(n_empty=0).draw(11)
    with torch.no_grad():
        case.logits[2] = torch.nan
    loss = ours(case, kind)
    assert loss[2].isnan()
    assert loss[[0, 1, 3, 4, 5]].isfinite().all()


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    case = Spread().draw(12)
    loss = ours(case, "nb").sum()
    first = torch.autograd.grad(loss, [case.logits, case.log_theta], retain_graph=True)
    second = torch.autograd.grad(loss, [case.logits, case.log_theta])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
