"""What an outcome is predicted by: trivial and linear baselines, each fitted on the patients it is given and no others.

A method gets training patients alone, so that scaling, imputing, selecting and tuning cannot see those that are asked.
Features are centred within each training study (a linear model of them cannot then learn which study a patient is of)
and scaled by the spread within studies. Samples of one patient share its weight.

Axes: R rows (samples), F features, C cuts between levels of the outcome.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.patients import Floats, Patients, Rows
from carvae.errors import RespondError
from carvae.model.responder import EDGE, FRACTION, NO_SPREAD, Linear, Recalibration, transformed
from carvae.response.pairs import Outcomes, Tally
from carvae.response.splits import Fold, inner

CLONAL = re.compile(
    r"(?i)(shannon|simpson|gini|chao|(^|[^a-z])ace([^a-z]|$)|clon|entropy|expan|diversity|richness|hill)"
)
GROUPS: dict[str, Callable[[str], bool]] = {
    "composition": lambda name: name.startswith(FRACTION) and not name.endswith("+"),
    "signatures": lambda name: name.startswith("mean score_"),
    "pseudobulk": lambda name: name.startswith("pseudobulk "),
    "clonal": lambda name: bool(CLONAL.search(name)),
}
"""Baseline -> which columns it reads; names as in the table of samples that `carvae annotate` writes."""
SPREADS = (0.05, 0.5, 5.0)
"""Penalties tried in the inner folds, as the variance of the log odds that they expect of all features together."""
MAX_STEPS, MAX_MOVE, TOLERANCE = 60, 4.0, 1e-8
"""Of Newton's method: steps, greatest change of the log odds in one, and change of a coefficient at which it ends."""
MAJORITY = "majority"
CHANCE = 0.5
PLATT, LEAST_SLOPE = 10.0, 0.01
"""Penalty of a recalibration (as of a regression), and its least slope, which keeps the order."""
EVERYTHING = "features"
"""Baseline that reads every column but those of the pseudobulk."""


class Fitted(Protocol):
    """A method that has learned."""

    def score(self, asked: Patients) -> Floats:
        """Greater for better outcomes, [R]; for two levels the probability of the better."""
        ...


Fit = Callable[[Patients, Sequence[float], int], Sequence[Fitted]]
"""Training patients, settings and seed -> what has learned, with each setting."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to predict an outcome, and the settings among which inner folds choose."""

    name: str
    fit: Fit
    settings: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """What most patients have."""

    value: float

    def score(self, asked: Patients) -> Floats:
        """The same for all."""
        return np.full(asked.sample_R.size, self.value)


def majority(learn: Patients, settings: Sequence[float], seed: int) -> list[Fitted]:
    """Mean outcome of the training patients, whoever is asked."""
    mean = 0.0 if learn.kind == "time" else float(np.average(learn.outcome_R, weights=shared_weight(learn)))
    return [Constant(mean) for _ in settings]


def linear(columns: Sequence[str]) -> Fit:
    """Logistic regression (one per cut between levels) or Cox regression of some columns."""
    names = tuple(columns)

    def fit(learn: Patients, settings: Sequence[float], seed: int) -> list[Fitted]:
        x_RF = transformed(learn.of(names), names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column may be empty among these patients
            median_F = np.nan_to_num(np.nanmedian(x_RF, axis=0))
        x_RF, centre_F = centred(np.where(np.isnan(x_RF), median_F, x_RF), learn.study_R)
        scale_F = x_RF.std(0)
        scale_F[scale_F <= np.abs(centre_F) * 1e-9 + 1e-12] = NO_SPREAD  # constant here: nothing can be learned of it
        found = _cox if learn.kind == "time" else _logistic
        parts = found(x_RF / scale_F, learn, [setting / len(names) for setting in settings])
        return [Linear(names, median_F, centre_F, scale_F, *part, learn.kind) for part in parts]

    return fit


def centred(x_RF: Floats, study_R: Any) -> tuple[Floats, Floats]:
    """Rows minus the mean of their study, and the mean of those means."""
    _, code_R = np.unique(study_R.astype(str), return_inverse=True)
    mean_SF = np.stack([x_RF[code_R == s].mean(0) for s in range(code_R.max() + 1)])
    return x_RF - mean_SF[code_R], mean_SF.mean(0)


def shared_weight(learn: Patients) -> Floats:
    """One over the number of the patient's samples."""
    _, code_R, n = np.unique(learn.patient_R.astype(str), return_inverse=True, return_counts=True)
    return np.asarray(1 / n[code_R])


def _logistic(x_RF: Floats, learn: Patients, penalties: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Coefficients and intercepts for every penalty, [C, F] and [C]."""
    weight_R = shared_weight(learn)
    u_RK, s_K, v_KF = np.linalg.svd(x_RF, full_matrices=False)  # the penalty is the same in any rotation
    found = []
    for penalty in penalties:
        rows = [
            ridge_logistic(u_RK * s_K, learn.outcome_R > c, weight_R, penalty) for c in range(len(learn.levels) - 1)
        ]
        found.append((np.stack([w_K @ v_KF for w_K, _ in rows]), np.array([b for _, b in rows])))
    return found


def ridge_logistic(x_RK: Floats, above_R: NDArray[np.bool_], weight_R: Floats, penalty: float) -> tuple[Floats, float]:
    """The minimum of ``|w|^2 / 2 + penalty * sum(weight * log loss)`` by Newton's method; the intercept is free.

    It is that of scikit-learn's LogisticRegression(C=penalty), in a tenth of its time on tables this small; a whole
    null distribution asks for a hundred thousand of them. With one class alone the intercept is that of half a patient
    more in each class.
    """
    share, n = float(np.average(above_R, weights=weight_R)), float(weight_R.sum())
    beta = np.zeros(x_RK.shape[1] + 1)
    beta[-1] = np.log((share * n + 0.5) / ((1 - share) * n + 0.5))
    if share in {0.0, 1.0}:
        return beta[:-1], float(beta[-1])
    design = np.column_stack([x_RK, np.ones(len(x_RK))])
    ridge = np.append(np.ones(x_RK.shape[1]) / penalty, 0.0)
    for _ in range(MAX_STEPS):
        p_R = 1 / (1 + np.exp(-(design @ beta)))
        slope = design.T @ (weight_R * (p_R - above_R)) + ridge * beta
        curve = (design * (weight_R * p_R * (1 - p_R))[:, None]).T @ design + np.diag(ridge + 1e-10)
        step = np.linalg.solve(curve, slope)
        beta -= step / max(1.0, float(np.abs(design @ step).max()) / MAX_MOVE)
        if np.abs(step).max() < TOLERANCE:
            break
    return beta[:-1], float(beta[-1])


def _cox(x_RF: Floats, learn: Patients, penalties: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """As `_logistic`, of minus the log hazard; each study has a baseline of its own."""
    try:
        from lifelines import CoxPHFitter
    except ImportError:
        raise RespondError("times to an event need lifelines; `pip install 'carvae[stats]'`") from None
    frame = pd.DataFrame(x_RF).add_prefix("x")
    frame = frame.assign(time=learn.outcome_R, event=learn.event_R, study=learn.study_R, weight=shared_weight(learn))
    found = []
    for penalty in penalties:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of columns without variance, which the penalty takes care of
            model = CoxPHFitter(penalizer=1 / (penalty * len(frame)), l1_ratio=0.0)
            model.fit(frame, "time", "event", strata=["study"], weights_col="weight", robust=False)
        found.append((-model.params_.to_numpy(float)[None, :], np.zeros(1)))
    return found


def baselines(patients: Patients) -> list[Method]:
    """Those that the columns allow."""
    names = list(patients.columns)
    found = [Method(MAJORITY, majority)]
    groups = {group: [name for name in names if belongs(name)] for group, belongs in GROUPS.items()}
    small = [name for name in names if name not in groups["pseudobulk"]]
    groups[EVERYTHING] = small
    seen: list[list[str]] = []
    for group, columns in groups.items():
        if columns and columns not in seen:
            seen.append(columns)
            found.append(Method(group, linear(columns), SPREADS))
    return found


def blind(patients: Patients, rows: Rows) -> Patients:
    """Rows to ask: without their outcomes."""
    asked = patients.take(rows)
    event = None if asked.event_R is None else np.zeros_like(asked.event_R)
    return replace(asked, outcome_R=np.full(rows.size, np.nan), event_R=event)


def asked_in(fold: Fold, patients: Patients, fitted: Fitted) -> Floats:
    """Scores of the held-out rows at their places among all rows; NaN elsewhere."""
    score_R = np.full(patients.sample_R.size, np.nan)
    score_R[fold.held] = fitted.score(blind(patients, fold.held))
    return score_R


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with the setting that did best in the inner folds."""

    method: Method
    setting: float
    inner: float
    """Concordance in the inner folds, within study."""
    recalibration: Recalibration | None = None
    """Of the probabilities, from what was said in the inner folds; None but for two levels."""

    def plain(self, learn: Patients, seed: int) -> Fitted:
        """Learn from all the training patients, without recalibration."""
        return self.method.fit(learn, [self.setting], seed)[0]

    def fit(self, learn: Patients, seed: int) -> Fitted:
        """Learn from all the training patients."""
        plain = self.plain(learn, seed)
        return plain if self.recalibration is None else Recalibrated(plain, self.recalibration)


@dataclass(frozen=True, slots=True, eq=False)
class Recalibrated:
    """A method whose probabilities are made as sure as they may be."""

    plain: Fitted
    recalibration: Recalibration

    def score(self, asked: Patients) -> Floats:
        """Probability of the better level."""
        return self.recalibration(self.plain.score(asked))


def choose(method: Method, learn: Patients, folds: Sequence[Fold], seed: int) -> Choice:
    """Setting of a method by the inner folds: by log loss for two levels (for the probabilities), else concordance.

    Of equals the first is taken, which is the most careful. Methods are compared by concordance whatever the outcome.
    """
    if method.name == MAJORITY:
        return Choice(method, method.settings[0], CHANCE)
    outcomes = Outcomes.of(learn)
    scores: list[list[Floats]] = [[] for _ in method.settings]
    for fold in folds:
        for own, fitted in zip(scores, method.fit(learn.take(fold.train), method.settings, seed), strict=True):
            own.append(outcomes.per_patient(learn, asked_in(fold, learn, fitted)))
    found = [Tally.of(outcomes, own).value for own in scores]
    value = [CHANCE if np.isnan(v) else v for v in found]  # NaN where nothing could be compared
    if learn.kind != "binary":
        best = int(np.argmax(value))
        return Choice(method, method.settings[best], value[best])
    best = int(np.argmax([-_log_loss(own, outcomes.level) for own in scores]))
    return Choice(method, method.settings[best], value[best], _recalibration(scores[best], outcomes.level))


def _recalibration(scores: Sequence[Floats], level_P: Floats) -> Recalibration:
    """Logistic regression of the outcome on the log odds that were said (Platt 1999; Cox 1958), never turned round.

    Log odds are taken from the mean of their fold: where many of the held-out patients respond, few of the others do,
    so that the means of folds run against the outcome.
    """
    stacked = np.clip(np.stack(scores), EDGE, 1 - EDGE)
    said = ~np.isnan(stacked)
    logit = np.log(stacked / (1 - stacked))
    level = np.broadcast_to(level_P, stacked.shape)[said] > 0
    centred_logit = (logit - np.nanmean(logit, axis=1, keepdims=True))[said]
    (slope,), shift = ridge_logistic(centred_logit[:, None], level, np.ones(level.size), PLATT)
    if slope < LEAST_SLOPE:  # what is left is the share of the level
        slope, shift = LEAST_SLOPE, ridge_logistic(np.zeros((level.size, 1)), level, np.ones(level.size), PLATT)[1]
    return Recalibration(float(slope), float(shift - slope * np.nanmean(logit)))


def _log_loss(scores: Sequence[Floats], level_P: Floats) -> float:
    """Mean over what was said of patients in all folds."""
    p_SP = np.clip(np.stack(scores), EDGE, 1 - EDGE)
    return float(-np.nanmean(np.where(level_P > 0, np.log(p_SP), np.log(1 - p_SP))))


def inner_folds(learn: Patients, seed: int) -> list[Fold]:
    """Folds of the training patients for choices."""
    return inner(learn, np.arange(learn.sample_R.size), np.random.default_rng((seed, 11)))
