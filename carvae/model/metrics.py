"""Scores of labels on held-out cells, over the whole set at once (an average over minibatches would be another number).

Axes: N cells, S leaves of one label axis.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, f1_score, recall_score

N_BINS = 15
"""Bins of the calibration error, as usual since Guo et al. 2017 (arXiv:1706.04599)."""


@dataclass(frozen=True, slots=True)
class AxisScores:
    """How well one axis is labelled, on cells whose label is a single leaf."""

    n_cells: int
    accuracy: float
    macro_f1: float
    """Mean F1 over the leaves that occur among the true labels."""
    balanced_accuracy: float
    ece: float
    """Expected calibration error of the top probability."""
    recall: dict[str, float]
    """Per leaf that occurs."""
    confusion: list[list[int]]
    """Rows: true leaf, columns: predicted leaf, in the order of ``leaves``."""
    leaves: list[str]

    def confusion_rows(self) -> list[list[str | int]]:
        """The confusion matrix as rows of a table: the true leaf, then the cells of each predicted leaf."""
        return [[leaf, *row] for leaf, row in zip(self.leaves, self.confusion, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def score_axis(
    probability_NS: NDArray[np.floating], leaf_N: NDArray[np.integer], leaves: tuple[str, ...]
) -> AxisScores | None:
    """Return the scores on cells with ``leaf_N >= 0``; None when there is none."""
    known = leaf_N >= 0
    if not known.any():
        return None
    truth, probability = leaf_N[known], probability_NS[known]
    predicted = probability.argmax(1)
    present = np.unique(truth)
    recall = recall_score(truth, predicted, labels=present, average=None, zero_division=0)
    return AxisScores(
        n_cells=int(truth.size),
        accuracy=float((predicted == truth).mean()),
        macro_f1=float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0)),
        balanced_accuracy=float(recall.mean()),
        ece=expected_calibration_error(probability, truth),
        recall={leaves[i]: float(r) for i, r in zip(present, recall, strict=True)},
        confusion=confusion_matrix(truth, predicted, labels=np.arange(len(leaves))).tolist(),
        leaves=list(leaves),
    )


def expected_calibration_error(probability_NS: NDArray[np.floating], truth_N: NDArray[np.integer]) -> float:
    """Gap between accuracy and confidence, mean over bins of the top probability (Guo et al. 2017, eq. 3)."""
    confidence = probability_NS.max(1)
    right = probability_NS.argmax(1) == truth_N
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gap = np.bincount(bins, weights=right - confidence, minlength=N_BINS)
    return float(np.abs(gap).sum() / truth_N.size)
