"""What a bundle keeps of outcomes: the method that did best in the inner folds, learned of all patients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from carvae.data.patients import Patients
from carvae.model.responder import Linear, Responder
from carvae.model.response import Head, HeadSettings
from carvae.response.allowed import informative
from carvae.response.choice import HEAD, chosen
from carvae.response.heads import heads
from carvae.response.methods import Fitted, baselines, choose, inner_folds

log = logging.getLogger(__name__)

N_REFITS = 20
"""Draws of the patients that are learned from anew, for intervals."""


def learn(
    patients: Patients, seed: int, digest: Callable[[str], str], settings: HeadSettings | None = None
) -> Responder:
    """Choose among the head and the baselines within the patients, and learn from all of them.

    Parameters
    ----------
    digest
        What stands for a product's name in the bundle.

    Raises
    ------
    EvaluateError
        There are too few patients of a class, or the outcome is nested in study.
    """
    informative(patients)
    learned = patients.take(patients.known)
    methods = [*baselines(learned), *heads(learned, settings or HeadSettings())]
    folds = inner_folds(learned, seed)
    found = {method.name: choose(method, learned, folds, seed) for method in methods}
    best = chosen(found)
    log.info("%s", sentence(best.method.name, {name: choice.inner for name, choice in found.items()}))
    rng = np.random.default_rng((seed, 43))
    refits = [_kept(best.plain(drawn_anew(learned, rng), seed + 1 + k)) for k in range(N_REFITS)]
    products = learned.beside.get("product", np.array([], str))
    return Responder(
        method=best.method.name,
        predictor=_kept(best.plain(learned, seed)),
        refits=tuple(refits),
        levels=learned.levels,
        kind=learned.kind,
        products=tuple(sorted(digest(str(name)) for name in set(products) if name)),
        n_patients=len(set(learned.patient_R)),
        n_studies=len(set(learned.study_R)),
        recalibration=best.recalibration,
        inner={name: round(choice.inner, 4) for name, choice in found.items()},
    )


def sentence(used: str, inner: dict[str, float]) -> str:
    """Which method is used and why."""
    if HEAD not in inner:
        return f"outcomes are predicted by {used} ({inner[used]:.2f} in the inner folds)"
    others = {name: value for name, value in inner.items() if name != HEAD}
    best = max(others, key=lambda name: others[name])
    if used == HEAD:
        return f"outcomes are predicted by the head ({inner[HEAD]:.2f} in the inner folds; {best}: {others[best]:.2f})"
    return (
        f"outcomes are predicted by {used} ({inner[used]:.2f} in the inner folds), which the head ({inner[HEAD]:.2f}) "
        "did not beat"
    )


def drawn_anew(patients: Patients, rng: np.random.Generator) -> Patients:
    """As many patients, drawn with replacement within study and outcome; one drawn twice counts as two."""
    mark = patients.outcome_R if patients.event_R is None else patients.event_R.astype(float)
    first = {name: r for r, name in enumerate(patients.patient_R)}
    group: dict[tuple[str, float], list[object]] = {}
    for name, r in first.items():
        group.setdefault((str(patients.study_R[r]), float(mark[r])), []).append(name)
    rows, names = [], []
    for own in group.values():
        for k, i in enumerate(rng.integers(len(own), size=len(own))):
            found = np.flatnonzero(patients.patient_R == own[i])
            rows.append(found)
            names += [f"{own[i]}, draw {k}"] * found.size
    return replace(patients.take(np.concatenate(rows)), patient_R=np.array(names, dtype=object))


def _kept(fitted: Fitted) -> Head | Linear:
    assert isinstance(fitted, Head | Linear)
    return fitted
