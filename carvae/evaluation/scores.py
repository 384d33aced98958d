"""Figures of labels over all held-out cells, with intervals over patients.

Patients, not cells, are drawn anew for an interval: cells of one patient are alike. Each figure is a function of sums
per patient, so a draw is a weight per patient, and two methods are compared under the same weights.

Axes: N cells, S leaves, P patients, D draws, B bins, K seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carvae.model.metrics import N_BINS

Array = NDArray[np.float64]
N_DRAWS = 2000
"""Draws of patients for an interval."""
LEVEL = (2.5, 97.5)
"""Percentiles of an interval."""
MIN_PATIENTS = 3
"""Patients without which no interval is given."""
COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))
"""Shares of the cells, the surest first, at which selective accuracy is given."""


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """What a method says of all held-out cells with a known leaf, with one seed."""

    truth_N: NDArray[np.integer]
    probability_NS: NDArray[np.floating]
    patient_N: NDArray[np.object_]
    raw_NS: NDArray[np.floating] | None = None
    set_NS: NDArray[np.bool_] | None = None
    unknown_N: NDArray[np.bool_] | None = None

    @property
    def confidence_N(self) -> NDArray[np.floating]:
        """Greatest probability."""
        return np.asarray(self.probability_NS.max(1))

    @property
    def right_N(self) -> NDArray[np.bool_]:
        """Whether the likeliest leaf is the true one."""
        right_N: NDArray[np.bool_] = self.probability_NS.argmax(1) == self.truth_N
        return right_N

    def take(self, rows: NDArray[np.bool_]) -> Pooled:
        """Some of the cells."""
        arrays = (getattr(self, name) for name in self.__slots__)
        return Pooled(*(None if array is None else array[rows] for array in arrays))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """Sums per patient, from which every figure follows."""

    confusion_PSS: Array
    """True leaf by predicted leaf."""
    gap_PB: Array
    """Right minus confidence, summed in bins of confidence."""
    raw_gap_PB: Array | None
    inside_P: Array | None
    """Cells whose set holds the true leaf."""
    size_P: Array | None
    """Leaves in the sets."""
    unknown_P: Array | None

    @classmethod
    def of(cls, pooled: Pooled, patients: Sequence[str]) -> Tally:
        """Add up the cells of each patient."""
        p_N = np.searchsorted(np.array(patients, dtype=str), pooled.patient_N.astype(str))
        n_leaves, n = pooled.probability_NS.shape[1], len(patients)
        confusion = np.zeros((n, n_leaves, n_leaves))
        np.add.at(confusion, (p_N, pooled.truth_N, pooled.probability_NS.argmax(1)), 1.0)

        def summed(values: NDArray[Any] | None) -> Array | None:
            return None if values is None else np.bincount(p_N, weights=values.astype(float), minlength=n).astype(float)

        sets = pooled.set_NS
        return cls(
            confusion_PSS=confusion,
            gap_PB=_gaps(pooled.probability_NS, pooled.truth_N, p_N, n),
            raw_gap_PB=None if pooled.raw_NS is None else _gaps(pooled.raw_NS, pooled.truth_N, p_N, n),
            inside_P=summed(None if sets is None else sets[np.arange(len(sets)), pooled.truth_N]),
            size_P=summed(None if sets is None else sets.sum(1)),
            unknown_P=summed(pooled.unknown_N),
        )

    @property
    def n_P(self) -> Array:
        """Cells of each patient."""
        n_P: Array = self.confusion_PSS.sum((1, 2))
        return n_P


def _gaps(
    probability_NS: NDArray[np.floating], truth_N: NDArray[np.integer], p_N: NDArray[np.intp], n_patients: int
) -> Array:
    confidence = probability_NS.max(1)
    gap = (probability_NS.argmax(1) == truth_N) - confidence.astype(float)
    bin_N = np.clip((confidence * N_BINS).astype(int), 0, N_BINS - 1)
    found = np.zeros((n_patients, N_BINS))
    np.add.at(found, (p_N, bin_N), gap)
    return found


def accuracy(tally: Tally, weight_DP: Array) -> Array:
    """Share of the cells that are labelled right."""
    right_P = np.einsum("pss->p", tally.confusion_PSS)
    return np.asarray((weight_DP @ right_P) / (weight_DP @ tally.n_P))


def class_f1(tally: Tally, weight_DP: Array) -> Array:
    """F1 of each leaf, [D, S]; not a number where no cell is of it."""
    confusion_DSS = np.einsum("dp,pst->dst", weight_DP, tally.confusion_PSS)
    true_DS, called_DS = confusion_DSS.sum(2), confusion_DSS.sum(1)
    hit_DS = np.einsum("dss->ds", confusion_DSS)
    return np.where(true_DS > 0, 2 * hit_DS / np.maximum(true_DS + called_DS, 1), np.nan)


def class_recall(tally: Tally, weight_DP: Array) -> Array:
    """Share of the cells of each leaf that are labelled right, [D, S]; not a number where no cell is of it."""
    confusion_DSS = np.einsum("dp,pst->dst", weight_DP, tally.confusion_PSS)
    true_DS = confusion_DSS.sum(2)
    return np.where(true_DS > 0, np.einsum("dss->ds", confusion_DSS) / np.maximum(true_DS, 1), np.nan)


def macro_f1(tally: Tally, weight_DP: Array) -> Array:
    """Mean F1 over the leaves that occur."""
    return np.asarray(np.nanmean(class_f1(tally, weight_DP), axis=1))


def balanced_accuracy(tally: Tally, weight_DP: Array) -> Array:
    """Mean recall over the leaves that occur."""
    return np.asarray(np.nanmean(class_recall(tally, weight_DP), axis=1))


def ece(tally: Tally, weight_DP: Array) -> Array:
    """Expected calibration error (Guo et al. 2017, eq. 3)."""
    return np.asarray(np.abs(weight_DP @ tally.gap_PB).sum(1) / (weight_DP @ tally.n_P))


def ece_before(tally: Tally, weight_DP: Array) -> Array:
    """The same before calibration."""
    assert tally.raw_gap_PB is not None
    return np.asarray(np.abs(weight_DP @ tally.raw_gap_PB).sum(1) / (weight_DP @ tally.n_P))


def _share_of(name: str) -> Callable[[Tally, Array], Array]:
    def share(tally: Tally, weight_DP: Array) -> Array:
        return np.asarray((weight_DP @ getattr(tally, name)) / (weight_DP @ tally.n_P))

    return share


FIGURES: dict[str, tuple[Callable[[Tally, Array], Array], str]] = {
    "accuracy": (accuracy, "confusion_PSS"),
    "macro_f1": (macro_f1, "confusion_PSS"),
    "balanced_accuracy": (balanced_accuracy, "confusion_PSS"),
    "ece": (ece, "gap_PB"),
    "ece_before": (ece_before, "raw_gap_PB"),
    "set_coverage": (_share_of("inside_P"), "inside_P"),
    "set_size": (_share_of("size_P"), "size_P"),
    "unknown": (_share_of("unknown_P"), "unknown_P"),
}
"""Name -> how it follows from the sums, and the sums that it needs."""
COMPARED = ("accuracy", "macro_f1", "balanced_accuracy", "ece")


def weights(n_patients: int, rng: np.random.Generator) -> Array:
    """How often each patient is drawn, in every draw: [D, P], the first as they are."""
    drawn = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=N_DRAWS)
    return np.vstack([np.ones(n_patients), drawn]).astype(float)


def interval(value_D: Array, n_patients: int) -> dict[str, float | None]:
    """The figure itself, and where it lies when patients are drawn anew."""
    if n_patients < MIN_PATIENTS:
        return {"value": float(value_D[0]), "low": None, "high": None}
    low, high = np.nanpercentile(value_D[1:], LEVEL)
    return {"value": float(value_D[0]), "low": float(low), "high": float(high)}


def drawn(tallies: Sequence[Tally], weight_DP: Array) -> dict[str, Array]:
    """Every figure in every draw, the mean over seeds."""
    found = {}
    for name, (figure, needs) in FIGURES.items():
        if all(getattr(tally, needs) is not None for tally in tallies):
            found[name] = np.mean([figure(tally, weight_DP) for tally in tallies], axis=0)
    return found


def method_figures(by_seed: Sequence[Pooled], leaves: Sequence[str], weight_DP: Array) -> dict[str, Any]:
    """All figures of one method."""
    patients = sorted(set(by_seed[0].patient_N.astype(str)))
    tallies = [Tally.of(pooled, patients) for pooled in by_seed]
    values = drawn(tallies, weight_DP)
    result: dict[str, Any] = {name: interval(value, len(patients)) for name, value in values.items()}
    for name, value in result.items():
        value["seeds"] = [float(FIGURES[name][0](tally, weight_DP[:1])[0]) for tally in tallies]
    one, whole = np.eye(len(patients)), weight_DP[:1]
    confusion = np.mean([tally.confusion_PSS.sum(0) for tally in tallies], axis=0)
    f1_S = np.mean([class_f1(tally, whole)[0] for tally in tallies], axis=0)
    recall_S = np.mean([class_recall(tally, whole)[0] for tally in tallies], axis=0)
    result["per_class"] = {
        leaf: {"n_cells": int(confusion[s].sum()), "f1": float(f1_S[s]), "recall": float(recall_S[s])}
        for s, leaf in enumerate(leaves)
        if confusion[s].sum() > 0
    }
    own = {name: np.mean([FIGURES[name][0](tally, one) for tally in tallies], axis=0) for name in values}
    result["per_patient"] = {
        patient: {"n_cells": int(tallies[0].n_P[p])} | {name: float(value[p]) for name, value in own.items()}
        for p, patient in enumerate(patients)
    }
    result["confusion"] = {"leaves": list(leaves), "rows": confusion.tolist()}
    result["selective_accuracy"] = selective(by_seed)
    result["reliability"] = reliability(by_seed)
    return result


def differences(
    own: Sequence[Pooled], others: Mapping[str, Sequence[Pooled]], weight_DP: Array
) -> dict[str, dict[str, Any]]:
    """The first method's figures minus those of each other, under the same draws of patients."""
    patients = sorted(set(own[0].patient_N.astype(str)))
    mine = drawn([Tally.of(pooled, patients) for pooled in own], weight_DP)
    found: dict[str, dict[str, Any]] = {}
    for name, pooled in others.items():
        theirs = drawn([Tally.of(part, patients) for part in pooled], weight_DP)
        found[name] = {key: interval(mine[key] - theirs[key], len(patients)) for key in COMPARED}
    return found


def selective(by_seed: Sequence[Pooled]) -> dict[str, float]:
    """Share of the cells, the surest first -> their accuracy; equally sure cells count as their mean."""
    curves = []
    for pooled in by_seed:
        _, tie_N, size = np.unique(-pooled.confidence_N, return_inverse=True, return_counts=True)
        mean_right = np.bincount(tie_N, weights=pooled.right_N.astype(float)) / size
        order = np.argsort(tie_N, kind="stable")
        right = mean_right[tie_N[order]].cumsum() / np.arange(1, order.size + 1)
        curves.append([right[max(1, round(c * order.size)) - 1] for c in COVERAGES])
    return {f"{c:g}": float(v) for c, v in zip(COVERAGES, np.mean(curves, axis=0), strict=True)}


def reliability(by_seed: Sequence[Pooled]) -> list[dict[str, float | str]]:
    """Mean confidence and accuracy in bins of confidence, before and after calibration, over all seeds."""
    truth = np.concatenate([pooled.truth_N for pooled in by_seed])
    rows: list[dict[str, float | str]] = []
    for when, name in (("after", "probability_NS"), ("before", "raw_NS")):
        parts = [getattr(pooled, name) for pooled in by_seed]
        if any(part is None for part in parts):
            continue
        probability = np.concatenate(parts)
        confidence, right = probability.max(1), probability.argmax(1) == truth
        bin_N = np.clip((confidence * N_BINS).astype(int), 0, N_BINS - 1)
        for b in np.unique(bin_N):
            here = bin_N == b
            rows.append(
                {
                    "calibration": when,
                    "confidence": float(confidence[here].mean()),
                    "accuracy": float(right[here].mean()),
                    "n_cells": int(here.sum() / len(by_seed)),
                }
            )
    return rows
