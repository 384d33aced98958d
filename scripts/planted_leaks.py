"""Twenty-five leaks planted into a cohort in which nothing predicts, and what becomes of each (row E2 of the goals).

A leak is caught when reading, splitting or preparing refuses it, or when the protocol names it as suspicious. What is
done outside the folds is planted as a preparation of all patients, which `check_preparation` must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from carvae.data.patients import Patients, check_patients, patients_of
from carvae.errors import CarvaeError
from carvae.response.guards import check_preparation, suspicions
from carvae.response.splits import Fold, by_patient, check_apart
from carvae.section_respond import RespondConfig

N, N_FEATURES = 60, 40
Frame = pd.DataFrame


def cohort(rng: np.random.Generator) -> Frame:
    """Sixty patients of four studies, forty features of noise, an outcome by chance."""
    frame = Frame(rng.normal(size=(N, N_FEATURES)), columns=[f"gene{g}" for g in range(N_FEATURES)])
    frame["patient"] = [f"P{p:02d}" for p in range(N)]
    frame["study"] = [f"s{p % 4}" for p in range(N)]
    frame["outcome"] = rng.permutation(np.arange(N) % 2)
    return frame


def with_bags(patients: Patients, rng: np.random.Generator) -> Patients:
    """The same with thirty cells and five clones for each patient."""
    bags = {"latent": tuple(rng.normal(size=(30, 4)).astype(np.float32) for _ in range(N))}
    clones = tuple(frozenset(f"{p}-{k}" for k in range(5)) for p in range(N))
    return replace(patients, bags=bags, clones=clones)


def read(frame: Frame) -> Patients:
    """As the protocol reads a table."""
    return patients_of(frame, RespondConfig())


# Leaks of the table: (name, what is done to it).
def _copied(frame: Frame, name: str, noise: float, rng: np.random.Generator) -> Frame:
    twin = frame.iloc[[0]].assign(patient=name)
    numbers = twin.columns[:N_FEATURES]
    twin[numbers] = twin[numbers] * (1 + noise * rng.normal(size=N_FEATURES))
    return pd.concat([frame, twin], ignore_index=True)


def _column(name: str, make: Callable[[Frame, np.random.Generator], object]) -> Callable[..., Frame]:
    return lambda frame, rng: frame.assign(**{name: make(frame, rng)})


TABLES: dict[str, Callable[[Frame, np.random.Generator], Frame]] = {
    "patient in two studies": lambda f, rng: pd.concat([f, f.iloc[[0]].assign(study="s9")], ignore_index=True),
    "patient twice under another name": lambda f, rng: _copied(f, "Q00", 0.0, rng),
    "replicate, equal to rounding": lambda f, rng: _copied(f, "Q00", 1e-9, rng),
    "patient in two spellings": lambda f, rng: _copied(f, "p-00", 1.0, rng),
    "patient with two outcomes": lambda f, rng: pd.concat(
        [f, f.iloc[[0]].assign(outcome=1 - f["outcome"].iloc[0])], ignore_index=True
    ),
    "outcome under another name": _column("score7", lambda f, rng: f["outcome"] * 2.0 + 1),
    "outcome with noise": _column("score7", lambda f, rng: f["outcome"] + rng.normal(0, 0.4, N)),
    "response column": _column("best_response", lambda f, rng: f["outcome"].astype(float)),
    "known after the outcome": _column("pfs_months", lambda f, rng: 3 + 9 * f["outcome"] + rng.normal(0, 3, N)),
    "study id": _column("site", lambda f, rng: f["study"].str[1:].astype(int)),
    "product code": _column("construct", lambda f, rng: (f["study"] == "s0").astype(float)),
}


# Leaks of cells and clones: what is done to the patients.
def _shared_cells(patients: Patients, a: int, b: int, n: int) -> Patients:
    bags = [bag.copy() for bag in patients.bags["latent"]]
    bags[b][:n] = bags[a][:n]
    return replace(patients, bags={"latent": tuple(bags)})


def _shared_clone(patients: Patients) -> Patients:
    assert patients.clones is not None
    clones = [*patients.clones]
    clones[1] = clones[1] | {next(iter(clones[0]))}
    return replace(patients, clones=tuple(clones))


CELLS: dict[str, Callable[[Patients], Patients]] = {
    "time points as patients (a clone in common)": _shared_clone,
    "one cell in two patients": lambda p: _shared_cells(p, 0, 1, 1),
    "all cells of a patient in another": lambda p: _shared_cells(p, 0, 1, 30),
}


# Leaks of a split.
def _by_sample() -> Fold:
    """One of two samples of each patient on either side."""
    return Fold("by sample", np.arange(0, N, 2), np.arange(1, N, 2))


def _oversampled(patients: Patients) -> tuple[Patients, Fold]:
    """Patients drawn twice before the split."""
    twice = patients.take(np.concatenate([np.arange(N), np.arange(10)]))
    return twice, Fold("s", np.arange(N), np.arange(N, N + 10))


SPLITS: dict[str, Callable[[Patients], tuple[Patients, Fold]]] = {
    "split by sample": lambda p: (
        replace(p, patient_R=np.repeat(p.patient_R[::2], 2)),
        _by_sample(),
    ),
    "rows on both sides": lambda p: (p, Fold("s", np.arange(40), np.arange(39, N))),
    "drawn twice before the split": _oversampled,
}


# Leaks of preparation: what is made of all patients before they are split.
def _selected(patients: Patients) -> Patients:
    """The ten features that go best with the outcome."""
    centred = patients.x_RF - patients.x_RF.mean(0)
    strength = np.abs(centred.T @ (patients.outcome_R - patients.outcome_R.mean()))
    kept = tuple(patients.columns[f] for f in np.argsort(-strength)[:10])
    return replace(patients, columns=kept, x_RF=patients.of(kept))


def _by_outcome(patients: Patients) -> Patients:
    """Class means in place of values (target encoding)."""
    high_RF = patients.x_RF > np.median(patients.x_RF, axis=0)
    mean = [[patients.outcome_R[high_RF[:, f] == h].mean() for h in (0, 1)] for f in range(patients.x_RF.shape[1])]
    return replace(patients, x_RF=np.take_along_axis(np.array(mean), high_RF.T.astype(int), 1).T)


def _tuned(patients: Patients) -> Patients:
    """A penalty found on all patients, used as the scale of the features."""
    spread = float(np.corrcoef(patients.x_RF[:, 0], patients.outcome_R)[0, 1])
    return replace(patients, x_RF=patients.x_RF * (1 + spread))


def _integrated(patients: Patients) -> Patients:
    """Cells moved to the mean of all."""
    mean = np.concatenate(patients.bags["latent"]).mean(0)
    return replace(patients, bags={"latent": tuple((bag - mean).astype(np.float32) for bag in patients.bags["latent"])})


def _recalibrated(patients: Patients) -> Patients:
    """Features moved so that the mean outcome of all is met."""
    return replace(patients, x_RF=patients.x_RF + patients.outcome_R.mean() + patients.outcome_R @ patients.x_RF / 1e3)


def _with(patients: Patients, x_RF: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Patients:
    return replace(patients, x_RF=x_RF)


PREPARATIONS: dict[str, Callable[[Patients], Patients]] = {
    "scaled on all": lambda p: _with(p, (p.x_RF - p.x_RF.mean(0)) / p.x_RF.std(0)),
    "genes chosen on all": _selected,
    "components of all": lambda p: _with(p, PCA(p.x_RF.shape[1], svd_solver="full").fit_transform(p.x_RF)),
    "ranked among all": lambda p: _with(p, p.x_RF.argsort(0).argsort(0).astype(float)),
    "outcome in place of values": _by_outcome,
    "tuned on the outer fold": _tuned,
    "calibrated on the outer fold": _recalibrated,
    "cells integrated with all": _integrated,
}


@dataclass(frozen=True, slots=True)
class Caught:
    """What became of a leak."""

    leak: str
    how: str
    """``refused``, ``named`` or ``missed``."""
    said: str


def run(seed: int) -> list[Caught]:
    """Plant every leak in turn."""
    found = []
    for name, spoil in TABLES.items():
        found.append(_try(name, lambda rng, spoil=spoil: _names(read(spoil(cohort(rng), rng))), seed))
    for name, spoil_cells in CELLS.items():
        found.append(_try(name, lambda rng, s=spoil_cells: check_patients(s(with_bags(read(cohort(rng)), rng))), seed))
    for name, split in SPLITS.items():
        found.append(_try(name, lambda rng, s=split: _split(*s(read(cohort(rng)))), seed))
    for name, prepare in PREPARATIONS.items():
        found.append(_try(name, lambda rng, p=prepare: _prepared(p, rng), seed))
    return found


def honest(seed: int) -> list[Caught]:
    """The same checks where nothing was planted: all must be silent."""
    scaled_alone: Callable[[Patients], Patients] = lambda p: _with(p, np.tanh(p.x_RF))  # noqa: E731
    return [
        _try("table", lambda rng: _names(read(cohort(rng))), seed),
        _try("cells and clones", lambda rng: check_patients(with_bags(read(cohort(rng)), rng)), seed),
        _try("preparation of each row by itself", lambda rng: _prepared(scaled_alone, rng), seed),
    ]


def _names(patients: Patients) -> str | None:
    doubts = suspicions(patients)
    if patients.set_aside:
        return f"{patients.set_aside[0]} is set aside: by its name it is known after the outcome"
    return f"{doubts[0].what} {doubts[0].why}" if doubts else None


def _split(patients: Patients, fold: Fold) -> None:
    check_apart([fold], patients)


def _prepared(prepare: Callable[[Patients], Patients], rng: np.random.Generator) -> None:
    patients = with_bags(read(cohort(rng)), rng)
    fold = by_patient(patients, patients.known, 5, rng)[0]
    check_preparation(prepare, patients, fold, rng)


def _try(name: str, work: Callable[[np.random.Generator], str | None], seed: int) -> Caught:
    try:
        said = work(np.random.default_rng(seed))
    except CarvaeError as error:
        return Caught(name, "refused", str(error))
    return Caught(name, "named" if said else "missed", said or "")
