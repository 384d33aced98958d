"""Which patients are learned from and which are asked; no patient, cell or clone is ever on both sides.

Axes: R rows (samples), P patients.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carvae.data.patients import Patients, Rows
from carvae.errors import LeakError

TWO = 2


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Rows to learn from, whose outcomes are all known, and rows to ask."""

    name: str
    train: Rows
    held: Rows


def classes(patients: Patients, rows: Rows) -> dict[float, int]:
    """Class -> number of patients: levels of an outcome, or whether an event was seen."""
    first, mark = {patients.patient_R[row]: row for row in rows}, _class_R(patients)
    values, n = np.unique([mark[row] for row in first.values()], return_counts=True)
    return {float(v): int(k) for v, k in zip(values, n, strict=True)}


def _class_R(patients: Patients) -> NDArray[np.float64]:
    return patients.outcome_R if patients.event_R is None else patients.event_R.astype(float)


def by_study(patients: Patients, rows: Rows) -> list[Fold]:
    """Each study held out in turn; those with one class alone are only learned from."""
    study = patients.study_R[rows]
    folds = []
    for name in sorted(set(study)):
        train, held = rows[study != name], rows[study == name]
        if len(classes(patients, held)) >= TWO and len(classes(patients, train)) >= TWO:
            folds.append(checked(Fold(str(name), train, held), patients))
    return folds


def by_patient(patients: Patients, rows: Rows, n_folds: int, rng: np.random.Generator) -> list[Fold]:
    """Groups of patients held out in turn, like in study and class; at most as many as the rarest class has."""
    n_folds = max(TWO, min(n_folds, *classes(patients, rows).values()))
    mark = _class_R(patients)
    first = {patients.patient_R[row]: row for row in rows}
    names = np.array(sorted(first), dtype=object)
    where = np.array([first[name] for name in names], np.int64)
    order = rng.permutation(names.size)
    key = sorted(order, key=lambda p: (str(patients.study_R[where[p]]), mark[where[p]]))  # stable: chance within
    start, group = int(rng.integers(n_folds)), {}
    for k, p in enumerate(key):
        group[names[p]] = (k + start) % n_folds
    group_R = np.array([group[name] for name in patients.patient_R[rows]])
    found = [Fold(f"group {g + 1}", rows[group_R != g], rows[group_R == g]) for g in range(n_folds)]
    return [checked(fold, patients) for fold in found if len(classes(patients, fold.train)) >= TWO]


def inner(patients: Patients, rows: Rows, rng: np.random.Generator) -> list[Fold]:
    """Folds of training rows, for choices: by study where three or more can be held out, else by patient."""
    folds = by_study(patients, rows)
    three = 3
    return folds if len(folds) >= three else by_patient(patients, rows, three, rng)


def checked(fold: Fold, patients: Patients) -> Fold:
    """The fold; raises LeakError where a patient is on both sides, or an outcome to learn from is not known."""
    if np.isnan(patients.outcome_R[fold.train]).any():
        raise LeakError(f"fold {fold.name!r} learns from rows without an outcome")
    _refuse(fold, "patient", set(patients.patient_R[fold.train]) & set(patients.patient_R[fold.held]))
    return fold


def check_apart(folds: Sequence[Fold], patients: Patients) -> None:
    """Raise LeakError where a patient, cell or clone is on both sides of any of the folds.

    Cells are compared by their coordinates; patients without outcomes are not asked and not compared.
    """
    for fold in folds:
        checked(fold, patients)
        for space, bags in patients.bags.items():
            a, b = ({c.tobytes() for row in rows for c in bags[row]} for rows in (fold.train, fold.held))
            _refuse(fold, f"cell in {space!r}", a & b)
        if patients.clones is not None:
            a, b = ({c for row in rows for c in patients.clones[row]} for rows in (fold.train, fold.held))
            _refuse(fold, "clone", a & b)


def _refuse(fold: Fold, what: str, shared: Set[object]) -> None:
    if shared:
        example = min((repr(name) for name in shared if isinstance(name, str)), default="")
        raise LeakError(
            f"fold {fold.name!r} has {len(shared)} {what}{'s' * (len(shared) > 1)} {example and f'({example}) '}on "
            "both sides of the split, and what is learned of it would be asked again; nothing was scored: give each "
            "person one name, and remove copies"
        )
