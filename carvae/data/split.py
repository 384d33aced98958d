"""Splits by patient; never by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

N_DRAWS = 200
"""Random sets of patients among which the one of the wanted size is taken."""


@dataclass(frozen=True, slots=True)
class PatientSplit:
    """Cells of training patients and of held-out patients."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    """Empty where nothing is held out."""
    validation_patients: tuple[str, ...]


def patient_folds(patient: pd.Series[str], labelled: NDArray[np.bool_], n_folds: int) -> list[PatientSplit]:
    """Splits that hold out every patient (or study) once, in ``n_folds`` groups (fewer with fewer) of like size.

    The patient with most labelled cells (of cells, where none is labelled) goes first, each to the smallest group.
    """
    patient = patient.astype(str)
    size = pd.Series(labelled if labelled.any() else np.ones(len(patient)), index=patient.index).groupby(patient).sum()
    ordered = sorted(size.items(), key=lambda item: (-float(item[1]), str(item[0])))
    groups: list[list[str]] = [[] for _ in range(min(n_folds, len(ordered)))]
    totals = [0.0] * len(groups)
    for name, cells in ordered:
        smallest = totals.index(min(totals))
        groups[smallest].append(str(name))
        totals[smallest] += float(cells) + 1e-9  # patients without labels too are spread
    held = [patient.isin(group).to_numpy() for group in groups]
    return [
        PatientSplit(np.flatnonzero(~out), np.flatnonzero(out), tuple(sorted(group)))
        for out, group in zip(held, groups, strict=True)
    ]


def split_patients(
    patient: pd.Series[str], labelled: NDArray[np.bool_], share: float, rng: np.random.Generator
) -> PatientSplit:
    """Return a split that holds out about ``share`` of the labelled cells as whole patients.

    Patients differ in size by orders of magnitude, so of `N_DRAWS` random sets of ``round(share * patients)``
    (at least one) patients the one nearest to the wanted share of labelled cells (of cells, where none is labelled)
    is taken; sets that leave either side without labelled cells come last. With a share of 0, or a single patient,
    nothing is held out.

    Parameters
    ----------
    patient
        Patient of each cell.
    labelled
        Whether the cell bears a label.
    """
    patient = patient.astype(str)
    names = np.array(sorted(set(patient)))
    everyone = np.arange(len(patient), dtype=np.int64)
    if share == 0 or names.size == 1:
        return PatientSplit(everyone, everyone[:0], ())
    size = pd.Series(labelled if labelled.any() else np.ones(len(patient)), index=patient.index)
    per_patient = size.groupby(patient).sum().reindex(names).to_numpy(dtype=float)
    n_held = min(max(1, round(share * names.size)), names.size - 1)
    draws = [rng.choice(names.size, n_held, replace=False) for _ in range(N_DRAWS)]
    total = per_patient.sum()

    def misfit(draw: NDArray[np.intp]) -> tuple[bool, bool, float]:
        labelled_cells = float(per_patient[draw].sum())
        return labelled_cells == total, labelled_cells == 0, abs(labelled_cells - share * total)

    held = names[np.sort(min(draws, key=misfit))]
    out = patient.isin(held).to_numpy()
    return PatientSplit(everyone[~out], everyone[out], tuple(str(p) for p in held))
