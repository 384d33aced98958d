"""The penalty on batches that put one state at different places: its value, its gradient, its effect in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trained import World, settings

from carvae.config import Config
from carvae.model.alignment import LEAST_VARIANCE, MIN_CELLS, state_gap
from carvae.train import run


def cells(
    seed: int, n: int = 60, k: int = 4, s: int = 3, b: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    z = torch.tensor(rng.normal(size=(n, k)))
    p = torch.tensor(rng.dirichlet(np.full(s, 0.3), n))
    return z, p, torch.tensor(rng.integers(-1, b, n))


def plain(z: np.ndarray, p: np.ndarray, batch: np.ndarray, n_batches: int) -> float:
    """The same by its definition, one state and one batch at a time."""
    total = weight = 0.0
    for s in range(p.shape[1]):
        means = {}
        for b in range(n_batches):
            own = batch == b
            if p[own, s].sum() >= MIN_CELLS:
                means[b] = np.average(z[own], axis=0, weights=p[own, s])
        if len(means) > 1:
            centre = np.mean([*means.values()], axis=0)
            for b, mean in means.items():
                mass = p[batch == b, s].sum()
                total += mass * ((mean - centre) ** 2).sum() / max(z.var(0).sum(), LEAST_VARIANCE)
                weight += mass
    return total / max(weight, 1)


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_it_is_what_its_definition_says(seed: int, n_batches: int) -> None:
    z, p, batch = cells(seed, b=n_batches)
    found = state_gap(z, p, batch, n_batches)
    assert float(found) == pytest.approx(plain(z.numpy(), p.numpy(), batch.numpy(), n_batches), rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_neither_scale_nor_order_of_the_cells_matters(seed: int, scale: float) -> None:
    z, p, batch = cells(seed)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(z)))
    expected = float(state_gap(z, p, batch, 4))
    assert float(state_gap(scale * z[order] + 3, p[order], batch[order], 4)) == pytest.approx(expected, rel=1e-6)


def test_batches_that_differ_in_their_states_alone_have_no_gap() -> None:
    state = torch.tensor([0] * 30 + [1] * 10 + [0] * 5 + [1] * 40)
    place = torch.tensor([[0.0, 0.0], [5.0, 1.0]])[state]
    batch = torch.tensor([0] * 40 + [1] * 45)
    assert float(state_gap(place, torch.eye(2)[state], batch, 2)) < 1e-12
    apart = place + torch.tensor([1.0, 0.0]) * batch[:, None]
    assert float(state_gap(apart, torch.eye(2)[state], batch, 2)) > 0.01


def test_cells_are_moved_towards_the_other_batches_and_not_renamed() -> None:
    z = torch.tensor([[0.0]] * 5 + [[2.0]] * 5, requires_grad=True)
    p = torch.ones(10, 1, requires_grad=True)
    state_gap(z, p, torch.tensor([0] * 5 + [1] * 5), 2).backward()
    assert z.grad is not None
    assert (z.grad[:5] < 0).all()  # downhill is to the right
    assert (z.grad[5:] > 0).all()
    assert p.grad is None


@pytest.mark.parametrize("batch", [[0] * 8, [-1] * 8, [0] * 6 + [1] * 2])
def test_one_batch_unknown_batches_and_few_cells_add_nothing(batch: list[int]) -> None:
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert float(state_gap(z, torch.ones(8, 1), torch.tensor(batch), 2)) == 0


def test_training_with_it_brings_the_batches_of_a_state_together(world: World, tmp_path: Path) -> None:
    gaps = {}
    for weight in (1e-9, 100.0):
        changed = {"align_weight": weight, "max_epochs": 3, "min_steps": 90, "validation_share": 0}
        config = Config.parse(settings(world.folder, tmp_path / str(weight), train=changed))
        run(config)
        log = pd.read_csv(next((tmp_path / f"{weight}.work").rglob("metrics.csv")))
        gaps[weight] = float(log["train_gap" if "train_gap" in log else "gap"].dropna().iloc[-1])
    assert gaps[100.0] < 0.6 * gaps[1e-9]
