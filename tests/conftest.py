"""What every test runs under: one thread, no network logger, no screen, reproducible hypothesis."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Before numpy, numba or torch are imported: two threads on a busy two-core machine were 16 times slower than one.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "offline"

# A shared machine is no clock, and a check that passed must pass again.
settings.register_profile("carvae", deadline=None, derandomize=True)
settings.load_profile("carvae")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
