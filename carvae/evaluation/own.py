"""carvae in one fold: trained by its own verb on files that hold the training cells alone, then asked.

Axes: N cells, G genes, S leaves, K latent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import Config, StudyConfig
from carvae.data.hdf5 import write_anndata
from carvae.data.schema import NAMES
from carvae.evaluation.cells import WHOLE, Point, Rows, Source
from carvae.evaluation.task import Fitted, Floats, Said, Task, unsure
from carvae.ingest import work_folder
from carvae.model.bundle import Bundle, load
from carvae.model.cohort import LABEL
from carvae.train import run as train

COVERAGE = 0.9
"""Coverage at which the sets are asked for."""


def carvae(task: Task) -> Fitted:
    """A model trained on the training cells, and what it says of others."""
    bundle = load(_trained(task), device="cpu")
    own = _Own(task, bundle)
    return Fitted(own.says, {"epochs": float(bundle.metrics["epochs"])}, own.latent)


def _trained(task: Task) -> Path:
    """The fold's bundle; its store and the files that it was trained on are gone when it is there."""
    output, files = task.folder / "carvae", task.folder / "cells"
    try:
        train(fold_config(task, output, files))
    finally:
        shutil.rmtree(files, ignore_errors=True)
    shutil.rmtree(work_folder(output), ignore_errors=True)
    return output


def fold_config(task: Task, output: Path, files: Path) -> Config:
    """The config of a training run on the fold's training cells, which are written to ``files`` for it."""
    studies = {}
    missing = set(task.cells.obs.iloc[task.fold.train][LABEL].astype(str))
    for name, parts in task.cells.studies(task.fold.train).items():
        (files / name).mkdir(parents=True, exist_ok=True)
        for k, part in enumerate(parts):
            write_anndata(part, files / name / f"{k}.h5ad")
        given = task.config.ingest.studies[name]
        studies[name] = StudyConfig(
            path=files / name,
            obs={column: column for column in parts[0].obs if column in NAMES},
            counts="X",
            label=None if given.label is None else LABEL,
            missing_labels=tuple(label for label in given.missing_labels if label in missing),
            mapping=given.mapping,
        )
    ingest = task.config.ingest.model_copy(update={"studies": studies, "exclude_patients": ()})
    return task.config.model_copy(update={"output": output, "seed": task.seed, "ingest": ingest})


@dataclass(frozen=True, slots=True)
class _Own:
    task: Task
    bundle: Bundle

    def says(self, rows: Rows, point: Point) -> Said:
        """Labels, sets and novelty, as ``carvae annotate`` gives them."""
        network, trust = self.bundle.network, self.bundle.trust
        parts: list[Said] = []
        for panel, present_G in self._panels(rows, point):
            raw_NS = self._spread(network.predict(panel, present_G=present_G).probability_NS[self.task.cells.axis])
            if trust is None:
                parts.append(Said(raw_NS, unsure(raw_NS)))
                continue
            judged = trust.judge(network, panel, present_G)
            probability_NS = judged.probability_NS[self.task.cells.axis]
            known = self.task.cells.axis in trust.calibration
            held_NS = (
                self._spread(
                    trust.calibration[self.task.cells.axis].sets(probability_NS, judged.bin_N, COVERAGE)
                ).astype(bool)
                if known
                else None
            )
            unknown_N = trust.unknown(judged)
            parts.append(Said(self._spread(probability_NS), judged.novelty_N, raw_NS, held_NS, unknown_N))
        return _joined(parts)

    def latent(self, rows: Rows) -> Floats:
        """Latent means."""
        found = [self.bundle.network.predict(panel, label=False) for panel, _ in self._panels(rows, WHOLE)]
        return np.concatenate([part.latent_NK for part in found])

    def _panels(self, rows: Rows, point: Point) -> Iterator[tuple[sp.csr_matrix, NDArray[np.bool_]]]:
        """Counts over the model's genes, and which of these were measured, by source."""
        gone = list(self.task.cells.gone(point))
        measured_G = ~np.isin(np.array(self.bundle.genes, dtype=object).astype(str), gone)
        for source, counts in self.task.cells.seen(rows, point):
            panel, present_G = _aligned(self.bundle, source, counts)
            yield panel, present_G & measured_G

    def _spread(self, values_NS: NDArray[np.floating] | NDArray[np.bool_]) -> Floats:
        assert self.bundle.tree is not None
        leaves = self.bundle.tree[self.task.cells.axis].leaves
        return self.task.spread(values_NS.astype(np.float32), np.array(leaves, dtype=object))


def _aligned(bundle: Bundle, source: Source, counts: sp.csr_matrix) -> tuple[sp.csr_matrix, NDArray[np.bool_]]:
    alignment = bundle.align(source.resolved, 0.0)
    return alignment.apply(counts), alignment.present


def _joined(parts: list[Said]) -> Said:
    def together(name: str) -> NDArray[np.generic] | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return Said(*(together(name) for name in Said.__slots__))  # type: ignore[arg-type]
