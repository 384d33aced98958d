"""What every method answered in every fold, kept on disk so that a killed run goes on where it stopped.

Axes: N asked cells, M training cells, L labelled asked cells, P points, S leaves, K latent.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carvae import __version__
from carvae.config import EvaluateConfig
from carvae.data.atomic import replacing_file
from carvae.evaluation.cells import WHOLE, Point, Rows
from carvae.evaluation.task import Floats, Method, Settings, Task

NOT_SWEPT = frozenset({"scvi_logistic", "scanvi"})
"""Methods that must be trained anew for every query."""
NO_MATTER: dict[str, Any] = {"ingest": {"studies": {"__all__": {"path"}}}, "train": {"wandb"}}
"""Settings that change nothing: what is in the files is in the fingerprint."""
DRAWS = {"depth": 3, "umi": 3, "missing": 8}
"""Random choices of the counts or genes taken away at every point; much hangs on which genes these are."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One method in one fold with one seed."""

    rows_N: Rows
    probability_NS: Floats
    novelty_N: Floats
    raw_NS: Floats | None
    set_NS: NDArray[np.bool_] | None
    unknown_N: NDArray[np.bool_] | None
    sweep_PLS: Floats | None
    """Probabilities of labelled cells at every point; the points are those of `points_of`."""
    train_rows_M: Rows | None
    train_latent_MK: Floats | None
    latent_NK: Floats | None
    settings: Settings
    seconds: float


def points_of(config: EvaluateConfig) -> list[Point]:
    """All points that labelled cells are asked at, each several times."""
    kinds = [("depth", v) for v in config.depths] + [("umi", v) for v in config.umis]
    kinds += [("missing", v) for v in config.missing]
    return [Point(kind, float(value), draw) for kind, value in kinds for draw in range(DRAWS[kind])]  # type: ignore[arg-type]


def key_of(task: Task, name: str) -> str:
    """What an answer depends on: cells, fold, seed, method, points and version; carvae's own also on its settings."""
    swept = name not in NOT_SWEPT and task.fold.state is None
    settings: list[Any] = [f"{point}" for point in points_of(task.config.evaluate)] if swept else []
    if name == "carvae":
        kept = {"ingest", "labels", "model", "train"}
        settings.append(task.config.model_dump(mode="json", include=kept, exclude=NO_MATTER))
    return hashlib.sha256(json.dumps([__version__, task.stamp, name, settings], sort_keys=True).encode()).hexdigest()


def answer(task: Task, name: str, method: Method) -> Answer:
    """Train a method and ask it everything."""
    start = time.perf_counter()
    fitted, query = method(task), task.fold.query
    said = fitted.says(query, WHOLE)
    labelled, sweep = query[task.cells.truth_N[query] >= 0], None
    points: Sequence[Point] = points_of(task.config.evaluate)
    if points and name not in NOT_SWEPT and task.fold.state is None and labelled.size:
        sweep = np.stack([fitted.says(labelled, point).probability_NS for point in points])
    train = task.fold.train[task.cells.truth_N[task.fold.train] >= 0]
    with_space = fitted.latent is not None and task.fold.state is None
    return Answer(
        rows_N=query,
        probability_NS=said.probability_NS,
        novelty_N=said.novelty_N,
        raw_NS=said.raw_NS,
        set_NS=said.set_NS,
        unknown_N=said.unknown_N,
        sweep_PLS=sweep,
        train_rows_M=train if with_space else None,
        train_latent_MK=fitted.latent(train) if with_space and fitted.latent else None,
        latent_NK=fitted.latent(query) if with_space and fitted.latent else None,
        settings=fitted.settings,
        seconds=round(time.perf_counter() - start, 1),
    )


def save(answer: Answer, path: Path, key: str) -> None:
    """Write an answer; the file appears when it is whole."""
    arrays = {f.name: getattr(answer, f.name) for f in fields(Answer)}
    arrays["settings"] = np.array(json.dumps(answer.settings))
    arrays["key"] = np.array(key)
    with replacing_file(path) as scratch:
        np.savez_compressed(scratch, **{name: value for name, value in arrays.items() if value is not None})


def load(path: Path, key: str) -> Answer | None:
    """The answer in a file; None where there is none, or one to another question."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            if str(file["key"]) != key:
                return None
            found: dict[str, Any] = {f.name: file[f.name] if f.name in file else None for f in fields(Answer)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Answer(**found | {"settings": json.loads(str(found["settings"])), "seconds": float(found["seconds"])})
