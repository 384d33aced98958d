"""The likelihoods of sparse counts against those of scvi-tools on dense ones, in value and in gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.model.likelihood import nb_loss, zinb_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing scvi-tools warns of what it imports itself
    from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
    from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive

Loss = Callable[["Case"], Tensor]


@dataclass
class Case:
    """A minibatch; the parameters require gradients."""

    counts: NDArray[np.float32]
    logits: Tensor
    zero_logits: Tensor
    log_theta: Tensor
    weight: Tensor
    """What each cell's loss is multiplied by."""

    @property
    def sparse(self) -> CountsCSR:
        tensors = CountsCSR.from_scipy(sp.csr_matrix(self.counts))
        count = tensors.count_M.to(self.logits.dtype)
        return CountsCSR(tensors.indptr_N, tensors.gene_M, count, tensors.n_genes)

    def as_type(self, dtype: torch.dtype) -> Case:
        """The same numbers as new leaves."""
        tensors = (self.logits, self.zero_logits, self.log_theta)
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
        return Case(self.counts, *leaves, self.weight.to(dtype))

    def gradients(self) -> dict[str, Tensor]:
        given = {"logits": self.logits, "zero logits": self.zero_logits, "log theta": self.log_theta}
        return {name: t.grad for name, t in given.items() if t.grad is not None}


def make_case(seed: int, n: int = 6, g: int = 30, density: float = 0.3, **edges: float) -> Case:
    """A random minibatch. ``edges``: greatest count, width of the logits, least and greatest log10 of theta, zero cells."""
    rng = np.random.default_rng(seed)
    largest = edges.get("largest", 20)
    counts = np.where(rng.random((n, g)) < density, np.ceil(largest ** rng.random((n, g))), 0).astype(np.float32)
    counts[: int(edges.get("empty", 0))] = 0
    low, high = edges.get("log_theta", (-1.0, 2.0)) if "log_theta" in edges else (-1.0, 2.0)
    return Case(
        counts,
        torch.tensor(rng.normal(size=(n, g)) * edges.get("width", 2.0), dtype=torch.float32, requires_grad=True),
        torch.tensor(rng.normal(size=(n, g)) * edges.get("width", 2.0), dtype=torch.float32, requires_grad=True),
        torch.tensor(rng.uniform(low, high, g) * np.log(10), dtype=torch.float32, requires_grad=True),
        torch.tensor(rng.normal(size=n), dtype=torch.float32),
    )


def ours(case: Case, kind: str) -> Tensor:
    library = torch.as_tensor(case.counts.sum(1), dtype=case.logits.dtype)
    if kind == "nb":
        return nb_loss(case.logits, case.log_theta, case.sparse, library)
    return zinb_loss(case.logits, case.zero_logits, case.log_theta, case.sparse, library)


def theirs(case: Case, kind: str) -> Tensor:
    x = torch.as_tensor(case.counts, dtype=case.logits.dtype)
    mu, theta = torch.softmax(case.logits, 1) * x.sum(1, keepdim=True), case.log_theta.exp()
    if kind == "nb":
        return -log_nb_positive(x, mu, theta).sum(1)
    return -log_zinb_positive(x, mu, theta, case.zero_logits).sum(1)


def error(found: Tensor, expected: Tensor) -> float:
    """Greatest difference, relative to the greatest value of the tensor."""
    scale = float(expected.abs().max())
    difference = float((found.double() - expected.double()).abs().max())
    return difference if scale == 0 else difference / scale
