"""Which networks teach how sure labels are: those trained on labels of some patients and shown those of others.

A network that never saw a label guesses, and one shown no labels cannot be proven wrong: neither says anything of how
sure the final network is, of which sets it needs or of how strange cells of known states look to it. Of the unlabelled
nothing else is learned either: novelty is measured beside cells of known states, which they may not be, and the limits
for samples are in terms of it.

Axes: N cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.split import PatientSplit, patient_folds
from carvae.labels.tree import AxisLabels, EncodedLabels

MIN_TAUGHT = 20
"""Labelled cells of an axis without which patients neither teach a network nor test one."""


def taught(labels: EncodedLabels, train: NDArray[np.int64]) -> tuple[str, ...]:
    """The axes on which a network is taught by the cells in ``train``."""
    return tuple(axis.axis for axis in labels.axes if _counting(axis)[train].sum() >= MIN_TAUGHT)


def teaching_folds(obs: pd.DataFrame, labels: EncodedLabels, n_folds: int) -> list[PatientSplit]:
    """Splits of which each network sees labels and is shown, by one of them at least, labels of others.

    Whole studies are held out where several have labels: a query is of another study, which is stranger than a patient.

    Returns
    -------
    Empty where no split has labels of one axis on both sides, as where one patient alone has labels.
    """
    counting_N = np.any([_counting(axis) for axis in labels.axes], axis=0)
    for unit in ("study", "patient"):
        folds = [fold for fold in patient_folds(obs[unit], counting_N, n_folds) if taught(labels, fold.train)]
        if any(
            _counting(labels[name])[fold.validation].sum() >= MIN_TAUGHT
            for fold in folds
            for name in taught(labels, fold.train)
        ):
            return folds
    return []


def uncalibrated(labels: EncodedLabels, folds: Sequence[PatientSplit]) -> str:
    """A sentence on the axes whose confidence these splits cannot calibrate, with the remedy; empty without any."""
    axes = [
        axis.axis
        for axis in labels.axes
        if not any(
            axis.axis in taught(labels, fold.train) and ((axis.leaf >= 0) & ~axis.weak)[fold.validation].any()
            for fold in folds
        )
    ]
    if not axes:
        return ""
    what = "no sets of states" if folds else "no sets of states, no cell unknown by its looks, no verdicts on samples"
    return (
        f"how sure labels of {', '.join(axes)} are cannot be learned, since no network trained on authors' labels of "
        f"some patients meets those of others: confidence stays as trained, not calibrated ({what}); give labels of at "
        "least two patients (of two studies where several have labels), or set train.calibration_folds=0"
    )


def _counting(axis: AxisLabels) -> NDArray[np.bool_]:
    """Cells whose labels count: the authors' where there are any, else weak ones."""
    labelled_N: NDArray[np.bool_] = axis.code >= 0
    authored_N: NDArray[np.bool_] = labelled_N & ~axis.weak
    return authored_N if authored_N.any() else labelled_N
