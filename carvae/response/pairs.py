"""Concordance of scores with outcomes over pairs of patients that may be compared.

All figures follow from two matrices: for every pair of patients with known outcomes, how often it was compared, and how
often the one with the better outcome had the higher score (half for ties). For two levels this is the AUROC (Mann and
Whitney 1947), for times Harrell's C (1982). Pairs are compared within a study, and of trained methods only within one
held-out fold: scores of different folds are of different models, and pooling them biases the figure (a pooled
leave-one-out AUC of noise lies far below 0.5).

Axes: P patients, D draws.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from carvae.data.patients import Floats, Patients

N_DRAWS = 2000
"""Draws of patients for an interval."""
LEVEL = 0.95
BOTH_WAYS = 4 / 3
"""How much wider intervals are where studies are held out in turn. What is learned from study A and asked in B, and
what is learned from B and asked in A, err alike, and draws of the patients that are asked do not see it. For a linear
rule of noise the variance doubles (so the square root of 2); this value held the truth in 94 to 97% of simulated
cohorts of 60 patients whatever the effect, and 1 held it in 84 to 89%."""
Strings = NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What is known of each patient with an outcome; [P] each, patients sorted by name."""

    patient: Strings
    study: Strings
    level: Floats
    event: NDArray[np.bool_] | None

    @classmethod
    def of(cls, patients: Patients) -> Outcomes:
        """One entry per patient whose outcome is known."""
        names = patients.names
        rows = patients.first_rows(names)
        event = None if patients.event_R is None else patients.event_R[rows]
        return cls(names, patients.study_R[rows], patients.outcome_R[rows], event)

    @property
    def better_PP(self) -> NDArray[np.bool_]:
        """Whether the first patient's outcome is known to be better than the second's."""
        more = self.level[:, None] > self.level[None, :]
        return np.asarray(more if self.event is None else more & self.event[None, :], bool)

    def per_patient(self, patients: Patients, score_R: Floats) -> Floats:
        """Mean of the scores of each patient's samples; NaN where none has one."""
        total, n = np.zeros(self.patient.size), np.zeros(self.patient.size)
        place = {name: p for p, name in enumerate(self.patient)}
        for name, score in zip(patients.patient_R, score_R, strict=True):
            if name in place and not np.isnan(score):
                total[place[name]] += score
                n[place[name]] += 1
        return np.asarray(np.divide(total, n, out=np.full(n.size, np.nan), where=n > 0))


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """How often each pair of patients was compared, and how often rightly ordered."""

    right_PP: Floats
    seen_PP: Floats

    @classmethod
    def of(cls, outcomes: Outcomes, scores: Iterable[Floats], apart: bool = False) -> Tally:
        """Compare the patients that each array of scores [P] covers (NaN elsewhere).

        Parameters
        ----------
        apart
            Also compare patients of different studies.
        """
        same = np.ones((outcomes.study.size,) * 2, bool) if apart else outcomes.study[:, None] == outcomes.study[None]
        may = outcomes.better_PP & same
        right, seen = np.zeros(may.shape), np.zeros(may.shape)
        for score in scores:
            both = may & ~np.isnan(score)[:, None] & ~np.isnan(score)[None, :]
            more, tied = score[:, None] > score[None, :], score[:, None] == score[None, :]
            right += both * (more + 0.5 * tied)
            seen += both
        return cls(right, seen)

    @property
    def value(self) -> float:
        """Share of the compared pairs that are rightly ordered; NaN where none was compared."""
        total = self.seen_PP.sum()
        return float(self.right_PP.sum() / total) if total else float("nan")

    def drawn(self, weight_DP: Floats) -> Floats:
        """The same with each patient counted so many times, for every draw."""
        right = np.einsum("dp,dp->d", weight_DP @ self.right_PP, weight_DP)
        seen = np.einsum("dp,dp->d", weight_DP @ self.seen_PP, weight_DP)
        return np.asarray(np.divide(right, seen, out=np.full(len(seen), np.nan), where=seen > 0))


def weights(outcomes: Outcomes, rng: np.random.Generator, n: int = N_DRAWS) -> Floats:
    """How often each patient is drawn: anew within study and class, as the figure is given those; [D, P].

    A time to an event has no classes, so patients are drawn within study alone.
    """
    group = outcomes.study.astype(str)
    if outcomes.event is None:
        group = np.char.add(np.char.add(group, "|"), outcomes.level.astype(str))
    weight = np.zeros((n, group.size))
    for name in np.unique(group):
        own = np.flatnonzero(group == name)
        weight[:, own] = rng.multinomial(own.size, np.full(own.size, 1 / own.size), size=n)
    return weight


def interval(value: float, drawn_D: Floats, widen: float = 1.0) -> dict[str, float | None]:
    """The figure with its 95% interval: normal on the scale of the logit, by the draws' standard deviation.

    Times ``widen``, which is `BOTH_WAYS` where studies were held out in turn.

    The standard deviation goes to that scale by the derivative, ``sd / (value (1 - value))``. Percentiles of the draws
    are too narrow for few patients; `scripts/bench_response.py coverage` measures how often this one holds the truth.
    """
    inside = drawn_D[~np.isnan(drawn_D)]
    if inside.size < drawn_D.size // 2 or np.isnan(value):
        return {"value": None if np.isnan(value) else value, "low": None, "high": None}
    if not 0 < value < 1:  # every draw is alike; one pair the other way would have been possible
        return {"value": value, "low": float(inside.min()), "high": float(inside.max())}
    centre = np.log(value / (1 - value))
    half = norm.ppf(0.5 + LEVEL / 2) * widen * inside.std(ddof=1) / (value * (1 - value))
    low, high = (1 / (1 + np.exp(-(centre + sign * half))) for sign in (-1, 1))
    return {"value": value, "low": float(low), "high": float(high)}


def difference(mine: Tally, other: Tally, weight_DP: Floats, widen: float = 1.0) -> dict[str, float | None]:
    """One figure minus another with its 95% interval, normal, by the standard deviation of the same draws of both."""
    value = mine.value - other.value
    half = float(norm.ppf(0.5 + LEVEL / 2) * widen * np.nanstd(mine.drawn(weight_DP) - other.drawn(weight_DP), ddof=1))
    return {"value": value, "low": value - half, "high": value + half}


def p_value(value: float, null: Floats, *, both_sides: bool) -> float:
    """Share of the shuffles at least as far out, the observed counted in (Phipson and Smyth 2010)."""
    if both_sides:
        value, null = abs(value - 0.5), np.abs(null - 0.5)
    return float((1 + (null >= value - 1e-12).sum()) / (1 + null.size))
