"""What every test runs under: one thread, no network logger, no screen, reproducible hypothesis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Before numpy, numba or torch are imported: two threads on a busy two-core machine were 16 times slower than one.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "offline"
# Triton decides when it is imported, which other libraries do, whether it compiles for a GPU or interprets.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine is no clock, and a check that passed must pass again.
settings.register_profile("carvae", deadline=None, derandomize=True)
settings.load_profile("carvae")

from trained import World, build_world, carvae, write_config  # noqa: E402 - it is light, but the variables come first
from trained import settings as settings_of  # noqa: E402

if TYPE_CHECKING:
    from carvae.model.bundle import Bundle


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Simulated studies and a model trained on them (see ``trained.py``)."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def sure(world: World, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model that learned how sure it is, each study held out in turn; none of the tests changes it."""
    from carvae.model.bundle import load

    folder = tmp_path_factory.mktemp("sure")
    config = settings_of(world.folder, folder / "model", train={"calibration_folds": 2})
    answer = carvae("train", write_config(folder / "config.yaml", config))
    assert answer.code == 0, answer.err
    return load(folder / "model")


@pytest.fixture
def sure_folder(sure: Bundle, tmp_path: Path) -> Path:
    """The same as a folder."""
    return sure.save(tmp_path / "sure")
