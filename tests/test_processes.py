"""Training in two processes is training in one, to float tolerance; the first alone writes and speaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from trained import World, settings, write_config

from carvae import cli
from carvae.config import Config
from carvae.data import order
from carvae.data.order import Share
from carvae.data.residence import Streamed
from carvae.errors import ConfigError
from carvae.ingest import work_folder
from carvae.model import processes
from carvae.model.objective import Objective
from carvae.model.vae import Posterior
from carvae.train import run as verb

TOLERANCE = 2e-5
"""Of weights after some dozen steps of Adam, which turns rounding of near-zero gradients into steps."""
QUIET: dict[str, Any] = {"max_epochs": 4, "min_steps": 0, "thinning": 0, "gene_dropout": 0, "shards": 2}
"""Noise is a function of the process, so it is switched off where runs are compared."""
STOPS = "CARVAE_TEST_STOPS_IN_EPOCH"
"""Environment variable of the processes that these tests start."""


@contextmanager
def comparable() -> Iterator[None]:
    """z at its mean, and many small windows of streamed cells."""
    with (
        mock.patch.object(Posterior, "sample", lambda self, generator=None: self.mean_NK),
        mock.patch.object(Streamed, "window", 64),
        mock.patch.object(order, "BLOCK", 16),
    ):
        yield


def main() -> None:
    """What a started process runs: the command line, which may die on its way."""

    def stop(self: Any) -> None:
        if self.current_epoch == int(os.environ.get(STOPS, "-1")):
            raise SystemExit(3)

    with comparable(), mock.patch.object(Objective, "on_train_epoch_start", stop):
        cli.main()


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    err: str


def started(folder: Path, *arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> Ran:
    """Train by the command line in new processes."""
    worker = folder / "worker.py"
    worker.write_text("from test_processes import main\n\nmain()\n", encoding="utf-8")
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")}
    done = subprocess.run(
        [sys.executable, *launcher, str(worker), "train", *map(str, arguments)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(done.returncode, done.stderr)


def prepared(world: World, folder: Path, name: str, **train: Any) -> Path:
    """A config beside the world's own store; returns its path."""
    output = folder / name
    if not work_folder(output).exists():
        shutil.copytree(work_folder(world.bundle) / "store.zarr", work_folder(output) / "store.zarr")
    config = settings(world.folder, output, train=QUIET | train, model={"n_latent": 8, "dropout_rate": 0.0})
    return write_config(folder / f"{name}.yaml", config)


def in_one(world: World, folder: Path, **train: Any) -> Path:
    """Train in this process; returns the bundle."""
    with comparable():
        return verb(Config.read(prepared(world, folder, "one", **train)))


def assert_equal_bundles(one: Path, other: Path) -> None:
    """Equal weights and scores, to float tolerance."""
    weights, others = (load_file(path / "weights.safetensors") for path in (one, other))
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], rtol=0, atol=TOLERANCE), name
    scores, more = (json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in (one, other))
    assert scores["epochs"] == more["epochs"]
    assert scores["held_out"]["state"]["confusion"] == more["held_out"]["state"]["confusion"]


def log_of(bundle: Path) -> list[list[float]]:
    text = (work_folder(bundle) / "fit" / "log" / "metrics.csv").read_text(encoding="utf-8")
    return [[float(value or 0) for value in line.split(",")] for line in text.splitlines()[1:]]


@pytest.mark.slow
def test_two_processes_are_one(world: World, tmp_path: Path) -> None:
    """Streaming, with minibatches of an odd size whose parts are ragged; logs and scores agree too."""
    ran = started(tmp_path, prepared(world, tmp_path, "two", devices=2, data="stream", batch_size=57))
    assert ran.code == 0, ran.err
    assert ran.err.count("epoch 2 of ") == 1, "the second process speaks too"
    assert "Traceback" not in ran.err
    one = in_one(world, tmp_path, data="stream", batch_size=57)
    assert_equal_bundles(one, tmp_path / "two")
    rows, others = log_of(one), log_of(tmp_path / "two")
    assert len(rows) == 8
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_another_number_of_processes(world: World, tmp_path: Path) -> None:
    """Two resident ones by torchrun, then one, which also trains on all patients."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = prepared(world, tmp_path, "two", devices=2, refit=True)
    assert started(tmp_path, two, launcher=torchrun, **{STOPS: "2"}).code != 0
    assert not (tmp_path / "two").exists()
    assert len([*(tmp_path / "two.work").rglob("last.ckpt")]) == 1
    with comparable(), mock.patch.object(import_module("carvae.train").log, "info") as said:
        verb(Config.read(two, ["train.devices=1"]))
    assert any(str(call.args[0]).startswith("continuing from") for call in said.call_args_list)
    assert_equal_bundles(in_one(world, tmp_path, refit=True), tmp_path / "two")


@pytest.mark.slow
def test_what_is_wrong_is_said_once_and_ends_all_processes(world: World, tmp_path: Path) -> None:
    ran = started(tmp_path, prepared(world, tmp_path, "m", devices=2), "--quiet", "train.lr=1e30")
    assert ran.code == 1
    assert "lower train.lr" in ran.err
    said = [line for line in ran.err.splitlines() if "socket.cpp" not in line]  # of torch, where no name server is
    assert len(said) == 1, ran.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("world_size", "train", "message"),
    [
        (2, {"shards": 3}, "train.shards is 3, which 2 processes cannot have equally"),
        (2, {"batch_size": 1}, "train.batch_size is 1, less than the 2 shards"),
    ],
)
def test_shards_that_cannot_be_dealt_are_refused(world_size: int, train: dict[str, Any], message: str) -> None:
    with mock.patch.object(processes, "world", return_value=world_size):
        with pytest.raises(ConfigError, match=message):
            processes.share(Config.parse({"train": train}))
        assert processes.share(Config()) == Share(0, world_size, world_size)


def test_other_processes_than_the_settings_say_are_refused(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4"}):
        with pytest.raises(ConfigError, match=r"4 processes were started, but train\.devices x train\.num_nodes is 2"):
            verb(Config.parse({"output": str(tmp_path / "m"), "train": {"devices": 2}}))


def test_gradients_are_weighted_by_cells() -> None:
    """As the other process of two, which brought the gradient 5 of three cells, would have them."""
    one, none = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    one.grad = torch.tensor([1.0, 2.0])

    def add(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([5.0 * 3, 5.0 * 3, 0.0, 3.0])

    with mock.patch.object(processes, "total", add):
        processes.mean_gradients([one, none], 1)
    assert one.grad.tolist() == [(1 + 15) / 4, (2 + 15) / 4]
    assert none.grad is not None
    assert none.grad.tolist() == [0]


def test_a_failure_of_the_first_is_raised_there() -> None:
    with pytest.raises(KeyError, match="what was wrong"):
        processes.on_first(lambda: {}["what was wrong"])
    assert processes.everywhere(True)
    assert not processes.everywhere(False)
