"""Signs that a figure rests on a leak: features that know the outcome, and preparation that saw those asked.

Axes: R rows (samples), F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import binom, norm

from carvae.data.patients import Patients, Rows
from carvae.errors import LeakError
from carvae.response.pairs import Outcomes, Tally
from carvae.response.splits import Fold

CEILING = 0.85
"""AUROC above which a response figure is taken for a leak until shown otherwise (an honest one from the product alone,
at 30 to 80 patients, is 0.65 to 0.75)."""
MIN_SHUFFLES = 200
MAX_SHIFT = 0.02
"""How far the mean of the shuffles may lie from 0.5, beside three standard errors."""
CHANCE, FEW = 1e-6, 8
"""Features as a whole look chosen where so many go with the outcome that chance alone would seldom give as many."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Something that may be a leak, in words."""

    what: str
    why: str


def suspicions(patients: Patients, trusted: tuple[str, ...] = ()) -> list[Suspicion]:
    """What is odd about the features, before anything is fitted.

    A feature that orders patients within study almost as the outcome does may be the outcome, or come after it. Columns
    that are constant in every study only name the study. Where most of many features go with the outcome one by one,
    they were probably chosen by it, on the very patients that are now asked.
    """
    outcomes = Outcomes.of(patients)
    found, small = [], 0
    asked = [name for name in patients.columns if name not in trusted]
    pseudo = [c for c in asked if c.startswith("pseudobulk ")]
    for name in asked:
        value_R = patients.of([name])[:, 0]
        value = Tally.of(outcomes, [outcomes.per_patient(patients, value_R)]).value
        if np.isnan(value):
            continue
        small += abs(value - 0.5) / _sd(outcomes) > norm.ppf(0.975)
        if max(value, 1 - value) > CEILING:
            why = f"orders patients within study almost as the outcome does (AUROC {max(value, 1 - value):.2f})"
            found.append(Suspicion(name, f"{why}; is it the outcome, or measured after it?"))
    found += [Suspicion(n, "is the same in all samples of each study: it names the study") for n in constants(patients)]
    n = len(asked)
    if n >= FEW and len(pseudo) < n and binom.sf(small - 1, n, 0.05) < CHANCE and small > n / 2:
        found.append(
            Suspicion(
                "the features as a whole",
                f"{small} of {n} go with the outcome one by one (p < 0.05): were they chosen on these patients?",
            )
        )
    return found


def _sd(outcomes: Outcomes) -> float:
    """Standard deviation of a within-study AUROC of noise (Mann and Whitney), for a rough count of small p-values."""
    best = outcomes.level == outcomes.level.max()
    total, variance = 0.0, 0.0
    for study in set(outcomes.study):
        own = outcomes.study == study
        m = int((own & best).sum())
        n = int(own.sum()) - m
        total += n * m
        variance += n * m * (n + m + 1) / 12
    return float(np.sqrt(variance) / total) if total else float("inf")


def constants(patients: Patients) -> list[str]:
    """Features that vary between studies and within none. Nothing can be learned of them, which centring sees to."""
    x = pd.DataFrame(patients.x_RF)
    within = x.groupby(patients.study_R).nunique(dropna=False).max()
    whole = x.nunique(dropna=False)
    return [name for name, most, all_ in zip(patients.columns, within, whole, strict=True) if most <= 1 < all_]


def shuffles_pass(null: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    """Whether enough shuffles were made, and their mean is that of chance."""
    if null.size < MIN_SHUFFLES:
        return False
    return abs(float(null.mean()) - 0.5) <= MAX_SHIFT + 3 * float(null.std() / np.sqrt(null.size))


Preparation = Callable[[Patients], Patients]
"""From measured to what is learned from: scaling, selection, integration; the same rows in the same order."""


def check_preparation(prepare: Preparation, patients: Patients, fold: Fold, rng: np.random.Generator) -> None:
    """Raise LeakError where what is made of the training rows depends on the rows that are asked.

    Features, cells and outcomes of the held-out rows are replaced by others, and everything is prepared again: what the
    training rows have become must be the same to the last bit.
    """
    before = prepare(patients).take(fold.train)
    after = prepare(_other(patients, fold.held, rng)).take(fold.train)
    changed = [name for name in before.columns if name not in after.columns or _differs(before, after, name)]
    changed += [name for name in after.columns if name not in before.columns]
    for space, bags in before.bags.items():
        same = all(np.array_equal(a, b) for a, b in zip(bags, after.bags.get(space, ()), strict=False))
        if not same or len(after.bags.get(space, ())) != len(bags):
            changed.append(f"cells in {space!r}")
    if not np.array_equal(before.outcome_R, after.outcome_R, equal_nan=True):
        changed.append("the outcomes")
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LeakError(
            f"what is learned from in fold {fold.name!r} depends on the patients that are held out ({changed[0]!r}"
            f"{more}): scaling, selecting, imputing, integrating and "
            "tuning must be done on training patients alone; nothing was scored"
        )


def _differs(before: Patients, after: Patients, name: str) -> bool:
    return not np.array_equal(before.of([name]), after.of([name]), equal_nan=True)


def _other(patients: Patients, rows: Rows, rng: np.random.Generator) -> Patients:
    """The same patients with noise in these rows."""
    x_RF = patients.x_RF.copy()
    x_RF[rows] = x_RF[rows] * 3 + rng.normal(size=x_RF[rows].shape)
    held = set(rows.tolist())
    bags = {
        space: tuple(
            (3 * bag + rng.normal(size=bag.shape)).astype(np.float32) if r in held else bag for r, bag in enumerate(own)
        )
        for space, own in patients.bags.items()
    }
    outcome_R = patients.outcome_R.copy()
    outcome_R[rows] = rng.permutation(outcome_R[rows])[::-1]
    if patients.kind == "binary":
        outcome_R[rows] = 1 - patients.outcome_R[rows]
    return replace(patients, x_RF=x_RF, bags=bags, outcome_R=outcome_R)
