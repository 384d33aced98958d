"""The protocol for outcomes of patients: everything that is learned is learned without the patients that are asked.

The headline is the concordance within study (of studies held out in turn, where two or more can be): what would be seen
in a new study. Beside it stand an interval over patients, shuffles of the outcome through the whole pipeline, baselines
in the same folds, what confounds, and what could be seen at all with so many patients.

Axes: R rows (samples), P patients, D draws.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from carvae.data.patients import Floats, Patients
from carvae.errors import EvaluateError
from carvae.evaluation.response_figures import calibration, decision_curve
from carvae.response.allowed import Informative, confounding, informative, power
from carvae.response.choice import CHOSEN, chosen
from carvae.response.guards import suspicions
from carvae.response.methods import Choice, Method, asked_in, choose, inner_folds
from carvae.response.pairs import BOTH_WAYS, Outcomes, Tally, difference, interval, p_value, weights
from carvae.response.splits import TWO, Fold, by_patient, by_study, check_apart
from carvae.section_respond import RespondConfig

log = logging.getLogger(__name__)

STUDY, SCORE = "study", "score"
"""Design that holds out studies, and name (and design) of a column that is itself the prediction."""
INCONCLUSIVE, PREDICTS, OTHER_WAY, WORSE = "inconclusive", "predicts", "predicts the other way", "no better"
ALPHA, CHANCE, SCORE_SHUFFLES = 0.05, 0.5, 2000


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What is evaluated, and how."""

    patients: Patients
    methods: tuple[Method, ...]
    config: RespondConfig
    seed: int

    @property
    def named(self) -> dict[str, Method]:
        """The methods by name."""
        return {method.name: method for method in self.methods}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What every method says in every fold of a design."""

    by_method: dict[str, list[Floats]]
    """Method -> scores of the patients of each fold [P], NaN elsewhere."""
    settings: list[dict[str, Any]]
    """What was chosen in each fold."""


def evaluate(run: Run) -> dict[str, Any]:
    """All figures.

    Raises
    ------
    EvaluateError
        There are too few patients of a class, or the outcome is nested in study.
    LeakError
        A patient, clone or cell is on both sides of a split.
    """
    patients = run.patients
    allowed = informative(patients)
    doubts = suspicions(patients, run.config.trusted)
    designs = designs_of(run)
    rng = np.random.default_rng((run.seed, 20))
    metrics: dict[str, Any] = _head(run, allowed) | {
        "suspicions": [{"what": doubt.what, "why": doubt.why} for doubt in doubts],
        "confounding": confounding(patients, rng),
        "power": power(allowed, both_sides=run.config.score is not None) if patients.kind == "binary" else None,
        "designs": {},
    }
    for name, folds in designs.items():
        for deal in folds:
            check_apart(deal, patients)
        log.info("design %s: %d folds", name, sum(map(len, folds)))
        metrics["designs"][name] = figures_of(run, name, folds, scores_of(run, folds))
    headline = next(iter(designs))
    metrics["headline"] = _headline(run, headline, designs[headline], metrics["designs"][headline])
    return metrics


def designs_of(run: Run) -> dict[str, list[list[Fold]]]:
    """Design -> folds of each deal of the patients; the headline's design is the first."""
    patients = run.patients
    if run.config.score is not None:
        return {SCORE: []}
    found = {}
    studies = by_study(patients, patients.known)
    if len(studies) >= TWO:
        found[STUDY] = [studies]
    rngs = (np.random.default_rng((run.seed, 21, k)) for k in range(run.config.repeats))
    found["patient"] = [by_patient(patients, patients.known, run.config.folds, rng) for rng in rngs]
    return found


def scores_of(run: Run, folds: Sequence[Sequence[Fold]], only: str | None = None) -> Scores:
    """Fit and ask every method in every fold; with ``only`` that one alone."""
    outcomes, patients = Outcomes.of(run.patients), run.patients
    by_method: dict[str, list[Floats]] = {}
    settings = []
    if run.config.score is not None:
        value_R = patients.of([run.config.score])[:, 0]
        return Scores({SCORE: [outcomes.per_patient(patients, value_R)]}, [])
    for k, fold in enumerate(fold for deal in folds for fold in deal):
        learn = patients.take(fold.train)
        found = choices(run, learn, run.seed + k)
        best = chosen(found)
        settings.append({"fold": fold.name, CHOSEN: best.method.name} | {n: c.setting for n, c in found.items()})
        wanted = {CHOSEN: best} | found if only is None else {only: best if only == CHOSEN else found[only]}
        done: dict[int, Floats] = {}
        for name, choice in wanted.items():
            if id(choice) not in done:
                fitted = choice.fit(learn, run.seed + k)
                done[id(choice)] = outcomes.per_patient(patients, asked_in(fold, patients, fitted))
            by_method.setdefault(name, []).append(done[id(choice)])
    return Scores(by_method, settings)


def choices(run: Run, learn: Patients, seed: int) -> dict[str, Choice]:
    """Every method with its setting, chosen among the training patients."""
    folds = inner_folds(learn, seed)
    return {method.name: choose(method, learn, folds, seed) for method in run.methods}


def figures_of(run: Run, design: str, folds: Sequence[Sequence[Fold]], scores: Scores) -> dict[str, Any]:
    """Figures of all methods of a design."""
    widen = BOTH_WAYS if design == STUDY else 1.0
    outcomes = Outcomes.of(run.patients)
    weight_DP = weights(outcomes, np.random.default_rng((run.seed, 22)))
    tallies = {name: Tally.of(outcomes, found) for name, found in scores.by_method.items()}
    methods: dict[str, Any] = {}
    for name, tally in tallies.items():
        methods[name] = {"auroc": interval(tally.value, tally.drawn(weight_DP), widen)}
        if run.patients.kind == "binary" and name not in {SCORE, "majority"}:
            probability_P = _mean(scores.by_method[name])
            methods[name] |= {"calibration": calibration(probability_P, outcomes.level)}
            methods[name] |= {"decision_curve": decision_curve(probability_P, outcomes.level)}
    own = CHOSEN if CHOSEN in tallies else SCORE
    others = {n: t for n, t in tallies.items() if n not in {own, "majority"}}
    by_study = {study: _in_study(tallies[own], outcomes, study) for study in sorted(set(outcomes.study.astype(str)))}
    return {
        "folds": [[fold.name for fold in deal] for deal in folds],
        "methods": methods,
        "by_study": by_study,
        "differences": {name: difference(tallies[own], tally, weight_DP, widen) for name, tally in others.items()},
        "settings": scores.settings,
        "predictions": _predictions(outcomes, scores.by_method[own]),
    }


def null_of(run: Run, folds: Sequence[Sequence[Fold]], name: str) -> Floats:
    """Concordance of a method with outcomes shuffled within study, everything learned anew each time; [shuffles].

    Of a score nothing is learned, so that shuffles cost next to nothing and `SCORE_SHUFFLES` are made at least.
    """
    n = run.config.permutations
    n = max(n, SCORE_SHUFFLES) if n and name == SCORE else n
    score, found = scores_of(run, folds).by_method[SCORE] if name == SCORE else None, []
    for k in range(n):
        shuffled = run.patients.shuffled(np.random.default_rng((run.seed, 23, k)))
        scores = score or scores_of(replace(run, patients=shuffled), folds, only=name).by_method[name]
        found.append(Tally.of(Outcomes.of(shuffled), scores).value)
        if name != SCORE and (k + 1) % max(1, n // 5) == 0:
            log.info("%d of %d shuffles", k + 1, n)
    return np.array(found)


def verdict(auroc: Mapping[str, float | None], p: float | None, *, both_sides: bool) -> str:
    """What may be said: nothing is said to predict where the interval holds 0.5 or shuffles do as well."""
    low, high = auroc["low"], auroc["high"]
    if low is None or high is None or p is None or p >= ALPHA or low <= CHANCE <= high:
        return INCONCLUSIVE
    if low > CHANCE:
        return PREDICTS
    return OTHER_WAY if both_sides else INCONCLUSIVE


def _headline(run: Run, design: str, folds: Sequence[Sequence[Fold]], found: dict[str, Any]) -> dict[str, Any]:
    """The one figure, with its shuffles and its verdict."""
    name = SCORE if design == SCORE else CHOSEN
    both = design == SCORE
    auroc = found["methods"][name]["auroc"]
    if auroc["value"] is None:
        raise EvaluateError("no two patients of one study with different outcomes could be compared; nothing is scored")
    null = null_of(run, folds, name)
    p = p_value(auroc["value"], null, both_sides=both) if null.size else None
    return {
        "design": design,
        "method": name,
        "auroc": auroc,
        "p": p,
        "sides": TWO if both else 1,
        "null": null.tolist(),
        "verdict": verdict(auroc, p, both_sides=both),
    }


def _head(run: Run, allowed: Informative) -> dict[str, Any]:
    outcomes = Outcomes.of(run.patients)
    levels = run.patients.levels
    mark = outcomes.level if outcomes.event is None else outcomes.event.astype(float)
    words = levels or ("censored", "event")
    return {
        "kind": run.patients.kind,
        "levels": list(levels),
        "patients": int(outcomes.patient.size),
        "patients_without_outcome": len(set(run.patients.patient_R)) - int(outcomes.patient.size),
        "samples": int(run.patients.sample_R.size),
        "classes": {word: int((mark == n).sum()) for n, word in enumerate(words)},
        "studies": {s: int((outcomes.study == s).sum()) for s in sorted(set(outcomes.study.astype(str)))},
        "studies_with_one_outcome": list(allowed.alone),
        "features": list(run.patients.columns),
        "set_aside": list(run.patients.set_aside),
    }


def _mean(scores: Sequence[Floats]) -> Floats:
    """Mean of what was said of each patient; NaN where nothing was."""
    stacked = np.stack(scores)
    n = (~np.isnan(stacked)).sum(0)
    return np.asarray(np.divide(np.nansum(stacked, 0), n, out=np.full(n.size, np.nan), where=n > 0))


def _in_study(tally: Tally, outcomes: Outcomes, study: str) -> float | None:
    own = outcomes.study.astype(str) == study
    value = Tally(tally.right_PP[np.ix_(own, own)], tally.seen_PP[np.ix_(own, own)]).value
    return None if np.isnan(value) else value


def _predictions(outcomes: Outcomes, scores: Sequence[Floats]) -> list[dict[str, Any]]:
    """Mean held-out score of each patient, for the figures; patients are numbered, not named."""
    mean = _mean(scores)
    rows = zip(outcomes.study, outcomes.level, mean, strict=True)
    return [{"study": str(s), "outcome": float(y), "score": float(v)} for s, y, v in rows if not np.isnan(v)]
