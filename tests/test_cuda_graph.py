"""A padded minibatch is the same minibatch, and steps on it are the same steps; on a GPU, replayed ones too."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_of, counts_of, obs_of, write_store
from torch import Tensor

from carvae.config import ModelConfig
from carvae.data.loader import Minibatch, Thinning, set_seed
from carvae.data.sparse import CountsCSR
from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.cuda_graph import WARM_UP, GraphedStep, StaticMinibatch
from carvae.model.network import Network
from carvae.model.objective import Objective
from carvae.train import fit

GENES, CAPACITY = 12, 200
LR = 1e-2


def minibatch(n: int, seed: int = 0, density: float = 1.0) -> Minibatch:
    """Cells of two covariates, some genes of some cells not measured."""
    counts = counts_of(n, GENES, seed).toarray()
    rng = np.random.default_rng(seed)
    counts[rng.random(counts.shape) >= density] = 0
    unmeasured_NG = torch.from_numpy(rng.random((n, GENES)) < 0.1)
    counts[unmeasured_NG.numpy()] = 0
    return Minibatch(
        CountsCSR.from_scipy(sp.csr_matrix(counts)),
        torch.from_numpy(rng.integers(-1, 3, (n, 2))),
        unmeasured_NG,
        torch.from_numpy(rng.integers(-1, 2, (n, 1))),
        torch.from_numpy(rng.random((n, 1), dtype=np.float32)),
        n,
    )


def network_of(likelihood: str = "nb", dropout_rate: float = 0.0) -> Network:
    torch.manual_seed(0)
    config = ModelConfig(n_latent=3, n_hidden=8, gene_likelihood=likelihood, dropout_rate=dropout_rate)
    return Network(GENES, {"a": 3, "b": 3}, {"state": torch.eye(2)}, config)


def loss_and_gradients(network: Network, batch: Minibatch) -> dict[str, Tensor]:
    network.zero_grad()
    posterior = network.vae.encoder(batch.counts)
    elbo = network.vae.elbo(batch.counts, posterior, posterior.mean_NK, batch.covariate_NC, batch.unmeasured_NG)
    elbo.loss().backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"loss": elbo.reconstruction_N} | grads


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "plain"])
@given(n=st.integers(1, 6), seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=8)
def test_padding_changes_no_loss_and_no_gradient(
    likelihood: str, dtype: torch.dtype, n: int, seed: int, density: float
) -> None:
    network, exact = network_of(likelihood).to(dtype), minibatch(n, seed, density)
    static = StaticMinibatch(exact, CAPACITY)
    static.load(minibatch(n, seed + 1))  # more entries, whose genes stay behind
    static.load(exact)
    counts = static.batch.counts
    assert counts.count_M.numel() == CAPACITY > exact.counts.count_M.numel()
    assert np.array_equal(counts.library_N(), exact.counts.library_N())
    alike, padded = (
        Minibatch(
            CountsCSR(c.indptr_N, c.gene_M, c.count_M.to(dtype), GENES),
            b.covariate_NC,
            b.unmeasured_NG,
            b.code_NA,
            b.weight_NA,
            b.n_counted,
        )
        for b in (exact, static.batch)
        for c in (b.counts,)
    )
    first, second = loss_and_gradients(network, alike), loss_and_gradients(network, padded)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-6)


def test_entries_after_the_last_cell_are_given_to_it() -> None:
    counts = CountsCSR(torch.tensor([0, 2, 2, 3, 3]), torch.zeros(5, dtype=torch.int32), torch.ones(5), 1)
    assert counts.cell_M().tolist() == [0, 0, 2, 3, 3]
    assert counts.library_N().tolist() == [2, 0, 1, 0]


def step_of(
    network: Network, optimizer: torch.optim.Optimizer, thin: Thinning
) -> Callable[[Minibatch], dict[str, Tensor]]:
    def step(batch: Minibatch) -> dict[str, Tensor]:
        posterior = network.vae.encoder(thin(batch.counts))
        z_NK = posterior.sample()
        elbo = network.vae.elbo(batch.counts, posterior, z_NK, batch.covariate_NC, batch.unmeasured_NG)
        loss = elbo.loss()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"loss": loss, "kl": elbo.kl_N.mean()}

    return step


def test_steps_on_padded_minibatches_are_the_same_steps() -> None:
    sizes = [5, 5, 3, 5, 5, 5, 2]
    weights, sums = [], []
    for fixed in (False, True):
        network = network_of()
        step = step_of(network, torch.optim.Adam(network.parameters(), LR), Thinning(0.0, 1.0, 0.0, 0.0))
        taken = GraphedStep(step, 5 if fixed else 0, CAPACITY)
        for i, n in enumerate(sizes):
            torch.manual_seed(i)
            taken(minibatch(n, i))
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        sums.append(taken.take_sums())
        assert all(value == 0 for value in taken.take_sums().values())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    assert sums[0].keys() == {"loss", "kl", "n"}
    assert sums[0]["n"] == sums[1]["n"] == sum(sizes)
    torch.testing.assert_close(sums[1]["loss"], sums[0]["loss"])


def test_sums_weigh_each_minibatch_by_its_cells() -> None:
    taken = GraphedStep(lambda batch: {"value": torch.tensor(float(batch.counts.n_cells))}, 4, CAPACITY)
    for n in (4, 4, 3):
        taken(minibatch(n))
    assert taken.take_sums() == {"value": 4 * 4 + 4 * 4 + 3 * 3, "n": 11}


def trained(folder: Path, **train: Any) -> tuple[Tensor, list[dict[str, str]], int]:
    """Weights after two epochs of six steps, the last of them smaller; what was logged; and the steps counted."""
    obs = obs_of({"p": 21, "q": 22})
    obs["label"] = np.where(np.arange(43) % 3 == 0, "x", "y")
    off = {"thinning": 0.0, "gene_dropout": 0.0, "threads": 1, "min_steps": 0}  # their draws depend on the padding
    config = config_of(
        model={"n_latent": 3, "n_hidden": 8, "covariates": ["sample"]},
        train={"batch_size": 8, "max_epochs": 2, "wandb": "disabled", "accelerator": "cpu"} | off | train,
    )
    folder.mkdir()
    cohort = Cohort.assemble(write_store(folder / "store", counts_of(43), obs), config)
    everyone = np.arange(43, dtype=np.int64)
    network = fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, folder / "fit").network
    rows = [*csv.DictReader((folder / "fit" / "log" / "metrics.csv").read_text().splitlines())]
    (last,) = (folder / "fit" / "checkpoints").glob("*/last.ckpt")
    n_steps = torch.load(last, weights_only=True)["global_step"]
    return torch.cat([p.detach().flatten() for p in network.parameters()]), rows, n_steps


def assert_same_training(first: tuple[Tensor, Any, int], second: tuple[Tensor, Any, int], tolerance: float) -> None:
    torch.testing.assert_close(second[0], first[0], rtol=tolerance, atol=tolerance)
    assert first[2] == second[2] == 12
    assert len(first[1]) == len(second[1]) == 2
    for name in ("train_loss", "reconstruction", "kl"):
        losses = [[float(row[name]) for row in rows] for rows in (first[1], second[1])]
        np.testing.assert_allclose(losses[1], losses[0], rtol=100 * tolerance)


def test_training_by_padded_minibatches_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trained(tmp_path / "usual")

    def as_on_a_gpu(objective: Objective) -> None:
        objective._graphed = GraphedStep(objective._optimise, 8, objective._most_entries())

    monkeypatch.setattr(Objective, "on_train_start", as_on_a_gpu)
    assert_same_training(usual, trained(tmp_path / "padded"), 1e-6)


@pytest.mark.gpu
def test_training_by_a_graph_is_the_same_training(tmp_path: Path) -> None:
    usual = trained(tmp_path / "usual", accelerator="cuda", cuda_graph=False)
    assert_same_training(usual, trained(tmp_path / "graph", accelerator="cuda"), 1e-4)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def padded(batch: Minibatch) -> Minibatch:
    static = StaticMinibatch(batch, CAPACITY)
    static.load(batch)
    return static.batch


@pytest.mark.gpu
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_replayed_steps_are_the_same_steps_and_read_nothing_back(likelihood: str, bf16: bool) -> None:
    batches = [minibatch(n, seed).to("cuda") for seed, n in enumerate([6] * (WARM_UP + 4) + [4, 6, 6])]
    weights, sums = [], []
    for n_replayed in (0, 6):
        network = network_of(likelihood, dropout_rate=0.2).cuda().train()
        lr = torch.tensor(LR, device="cuda")
        optimizer = torch.optim.Adam(network.parameters(), lr, fused=True, capturable=True)
        optimizer._warned_capturable_if_run_uncaptured = True
        taken = GraphedStep(step_of(network, optimizer, Thinning(0.5, 0.1, 0.3, 0.6)), n_replayed, CAPACITY)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
            for i, batch in enumerate(batches):
                is_alone = n_replayed == 0 and batch.counts.n_cells == 6
                same = padded(batch) if is_alone else batch  # the same random numbers need the same sizes
                set_seed(i, torch.device("cuda"))
                with nullcontext() if i == WARM_UP else no_synchronisation():  # recording waits, once
                    taken(same)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        sums.append(taken.take_sums())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[1]["loss"], sums[0]["loss"], rtol=1e-4, atol=1e-3)
