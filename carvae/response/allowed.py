"""What these patients allow: refusals with the reason, what confounds, and what could be seen at all.

Axes: P patients, S studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import multivariate_normal, norm

from carvae.data.patients import Floats, Patients
from carvae.errors import EvaluateError
from carvae.response.pairs import Outcomes, Tally, p_value

MIN_PATIENTS = 8
"""Patients of each class (or with an event, or off the commonest level) below which no figure is given."""
NESTED = 0.9
"""Share of the errors of guessing the commonest outcome that knowing the study takes away (Goodman and Kruskal's
lambda, 1954), from which on the outcome counts as nested in study."""
ALPHA, POWER = 0.05, 0.8
SHUFFLES = 500
N_FOLDS = 5
EFFECTS = (0.60, 0.65, 0.70, 0.75, 0.80)
MAX_PATIENTS = 100_000


@dataclass(frozen=True, slots=True)
class Informative:
    """The patients that can be compared: those of studies with more than one outcome."""

    studies: tuple[str, ...]
    alone: tuple[str, ...]
    """Studies in which all patients have the same outcome."""
    strata: tuple[tuple[int, int], ...]
    """Patients without and with the (best) outcome in each informative study."""


def informative(patients: Patients) -> Informative:
    """Which studies allow a comparison.

    Raises
    ------
    EvaluateError
        Fewer than `MIN_PATIENTS` of a class, or the outcome is nested in study, so that no honest figure exists.
    """
    outcomes = Outcomes.of(patients)
    mark_P = outcomes.level if outcomes.event is None else outcomes.event.astype(float)
    table = pd.crosstab(pd.Series(outcomes.study, dtype=str), mark_P)
    _refuse_few(patients, table.sum(axis=0), "")
    mixed = (table > 0).sum(axis=1) > 1
    names = [str(name) for name in table.index]
    if not mixed.any():
        raise EvaluateError(
            f"the outcome is nested in study: in each of {', '.join(names)} all patients have the same one, so that "
            "what tells responders apart is what tells studies apart; add a study that has both"
        )
    count = table.to_numpy()
    rest = count.sum() - count.sum(0).max()
    told = (count.max(1).sum() - count.sum(0).max()) / rest if rest else 0.0
    if len(table) > 1 and told >= NESTED:
        raise EvaluateError(
            f"the outcome is nested in study: the study alone tells it in {count.max(1).sum() / count.sum():.0%} of "
            "the patients; what tells responders apart is then what tells studies apart, so no figure is given"
        )
    _refuse_few(patients, table[mixed].sum(axis=0), " in studies that have more than one outcome")
    best = count[mixed.to_numpy()][:, -1]
    strata = [(int(n), int(k)) for n, k in zip(count[mixed.to_numpy()].sum(1) - best, best, strict=True)]
    alone = tuple(n for n, m in zip(names, mixed, strict=True) if not m)
    return Informative(tuple(n for n, m in zip(names, mixed, strict=True) if m), alone, tuple(strata))


def _refuse_few(patients: Patients, count: pd.Series[int], where: str) -> None:
    """Raise where too few patients differ in outcome."""
    words = patients.levels or ("without the event", "with the event")
    n = {words[int(level)]: int(count.get(float(level), 0)) for level in range(len(words))}
    few = sum(n.values()) - max(n.values()) if patients.kind == "ordinal" else min(n.values())
    if patients.kind == "time":
        few = n[words[1]]
    if few < MIN_PATIENTS:
        said = ", ".join(f"{k} {word}" for word, k in n.items())
        raise EvaluateError(
            f"too few patients: {said}{where}; at least {MIN_PATIENTS} of each class are needed, below which any "
            "figure is luck"
        )


def confounding(patients: Patients, rng: np.random.Generator) -> list[dict[str, Any]]:
    """How well study, product, and how samples were measured predict the outcome by themselves.

    A category is scored by the mean outcome of its patients in the other folds, a number as it is (whichever way);
    patients of different studies are compared too. ``p`` is of shuffles across all patients.
    """
    outcomes = Outcomes.of(patients)
    beside = {name: column for name, column in patients.beside.items() if not name.startswith("verdict")}
    columns: dict[str, NDArray[Any]] = {"study": patients.study_R.astype(str)} | beside
    place = {name: p for p, name in enumerate(outcomes.patient)}
    n_P = np.bincount([place[n] for n in patients.patient_R if n in place], minlength=len(place)).astype(float)
    found = []
    for name, column in columns.items():
        if column.dtype.kind == "f":
            value_P = outcomes.per_patient(patients, column)
            found.append(_alone(name, outcomes, value_P, None, rng))
        else:
            first = patients.first_rows(outcomes.patient)
            code_P = pd.factorize(column[first])[0]
            found.append(_alone(name, outcomes, None, code_P, rng))
    found.append(_alone("samples per patient", outcomes, n_P, None, rng))
    return [row for row in found if row is not None]


def _alone(
    name: str, outcomes: Outcomes, value_P: Floats | None, code_P: NDArray[np.int64] | None, rng: np.random.Generator
) -> dict[str, Any] | None:
    values: Any = value_P if code_P is None else code_P
    seen = values[~np.isnan(values)] if code_P is None else values
    if np.unique(seen).size < 1 + 1:
        return None
    known = outcomes.level
    group_P = rng.permutation(values.size) % N_FOLDS

    def concordance(order: NDArray[np.int64]) -> float:
        event = None if outcomes.event is None else outcomes.event[order]
        shuffled = Outcomes(outcomes.patient, outcomes.study, known[order], event)
        if code_P is None:
            return Tally.of(shuffled, [values], apart=True).value
        return Tally.of(shuffled, _by_category(code_P, known[order], group_P), apart=True).value

    value = concordance(np.arange(values.size))
    null = np.array([concordance(rng.permutation(values.size)) for _ in range(SHUFFLES)])
    both = code_P is None
    return {"what": name, "auroc": max(value, 1 - value) if both else value, "p": p_value(value, null, both_sides=both)}


def _by_category(code_P: NDArray[np.int64], level_P: Floats, group_P: NDArray[np.int64]) -> list[Floats]:
    """Mean outcome of a patient's category in the other groups; one array per group asked, NaN elsewhere."""
    found = []
    for g in range(N_FOLDS):
        out, n = group_P == g, int(code_P.max()) + 1
        total = np.bincount(code_P[~out], weights=level_P[~out], minlength=n)
        count = np.bincount(code_P[~out], minlength=n)
        mean = np.where(count > 0, total / np.maximum(count, 1), level_P[~out].mean())
        found.append(np.where(out, mean[code_P], np.nan))
    return found


def power_at(auroc: float, strata: Sequence[tuple[int, int]], *, both_sides: bool) -> float:
    """Chance that a true AUROC is seen at the 5% level, for classes of these sizes within each study.

    Normal scores of equal variance in both classes, of which Hanley and McNeil's (1982) variance follows exactly.
    """
    if auroc <= 1 / 2:
        return ALPHA
    d = np.sqrt(2) * norm.ppf(auroc)
    both = float(multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]]).cdf([d / np.sqrt(2)] * 2))  # of two, both exceed
    pairs = np.array([n * m for n, m in strata], float)
    of_null = np.array([(n + m + 1) / (12 * n * m) for n, m in strata])
    of_true = np.array([(auroc * (1 - auroc) + (n + m - 2) * (both - auroc**2)) / (n * m) for n, m in strata])
    share = pairs / pairs.sum()
    sd_null, sd_true = (float(np.sqrt((share**2 * variance).sum())) for variance in (of_null, of_true))
    limit = float(norm.ppf(1 - ALPHA / (2 if both_sides else 1))) * sd_null
    return float(norm.cdf((auroc - 0.5 - limit) / sd_true))


def power(found: Informative, *, both_sides: bool) -> dict[str, Any]:
    """Smallest true AUROC that would be seen in four of five such studies, and patients needed for given ones."""
    grid = np.arange(0.51, 0.995, 0.005)
    enough = [a for a in grid if power_at(float(a), found.strata, both_sides=both_sides) >= POWER]
    n = sum(n + m for n, m in found.strata)
    needed = {f"{effect:.2f}": _needed(effect, found, n, both_sides) for effect in EFFECTS}
    return {
        "smallest_detectable": round(float(enough[0]), 3) if enough else None,
        "patients": n,
        "sides": 2 if both_sides else 1,
        "patients_needed": needed,
    }


def _needed(effect: float, found: Informative, n: int, both_sides: bool) -> int:
    """Patients, in as many studies with as many of each class, to see an effect with 80% power."""
    low, high = 1, MAX_PATIENTS

    def enough(total: int) -> bool:
        strata = [(max(1, round(a * total / n)), max(1, round(b * total / n))) for a, b in found.strata]
        return power_at(effect, strata, both_sides=both_sides) >= POWER

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
