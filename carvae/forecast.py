"""How long training takes here: foretold from some steps on a few cells, for `carvae.check`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from carvae.config import Config
from carvae.data.split import PatientSplit
from carvae.data.store import CellStore
from carvae.errors import CarvaeError
from carvae.ingest import Part, draft
from carvae.labels.cohort import CohortLabels
from carvae.model.cohort import Cohort
from carvae.model.gene_view import MAX_CELLS
from carvae.model.witness import DEPTHS, OVERLAPS
from carvae.train import fit

STEPS_TRIED, EPOCHS_TRIED = 8, 3
"""Minibatches that training is tried on, and how often each."""
FORWARD = 1 / 3
"""Of a step, what a pass without gradients takes."""
TOLD_HOW_SURE = len(DEPTHS) * len(OVERLAPS)
"""Passes over the held-out cells of calibration, each with other counts and genes taken away."""
FIRST_AND_LAST = 2
"""Networks without those of calibration."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much a training has to do."""

    n_cells: int
    n_labelled: int
    epochs: int
    batches: int
    networks: int


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that training takes here."""

    step: float
    """Of an optimiser step."""
    besides: float
    """Of what is done once for a network: its start, and the gene view of its head."""
    n_labelled: int
    """Labelled cells behind ``besides``."""

    def of(self, work: Work, batch_size: int) -> float:
        """Seconds of some work: all networks, and passes over cells that are held out and told how sure they are."""
        grown = max(1.0, min(work.n_labelled, MAX_CELLS) / max(self.n_labelled, 1))
        passes = work.epochs * work.n_cells if work.networks > 1 else 0
        passes += TOLD_HOW_SURE * work.n_labelled if work.networks > FIRST_AND_LAST else 0
        whole = work.networks * (work.epochs * work.batches * self.step + self.besides * grown)
        return whole + FORWARD * self.step / batch_size * passes


def labelled(labels: CohortLabels) -> int:
    """Cells with a label on any axis."""
    return int(np.any([axis.code >= 0 for axis in labels.labels.axes], axis=0).sum())


def paced(parts: Sequence[Part], labels: CohortLabels | None, config: Config) -> tuple[Pace | None, str]:
    """Train on a few cells by the clock, as `carvae train` does; None with the reason where that cannot be."""
    if config.train.devices * config.train.num_nodes > 1:
        return None, "since several processes would share the work"
    short = {"min_steps": 0, "map_every": 0, "wandb": "disabled", "calibration_folds": 0}
    try:
        with tempfile.TemporaryDirectory(prefix="carvae-") as name, torch.random.fork_rng():
            folder = Path(name)
            rows = draft(parts, config, STEPS_TRIED * config.train.batch_size, folder / "store")
            some = None if labels is None else CohortLabels(labels.tree, labels.labels.take(rows))
            cohort = Cohort.of(CellStore(folder / "store"), some, config)
            every = PatientSplit(np.arange(len(cohort.obs)), np.arange(0), ())
            seconds = []
            for run, epochs in enumerate((1, 1, 1 + EPOCHS_TRIED)):  # the first compiles
                train = config.train.model_copy(update={**short, "max_epochs": epochs})
                begun = time.perf_counter()
                fit(cohort, every, config.model_copy(update={"train": train}), folder / f"fit{run}")
                seconds.append(time.perf_counter() - begun)
    except CarvaeError as error:
        return None, f"since a try on {STEPS_TRIED} minibatches failed ({error})"
    batches = math.ceil(len(cohort.obs) / config.train.batch_size)
    step = max(seconds[2] - seconds[1], 0.0) / (EPOCHS_TRIED * batches)
    n_labelled = 0 if some is None else labelled(some)
    return Pace(step, max(seconds[1] - step * batches, 0.0), n_labelled), ""
