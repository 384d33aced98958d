"""Which cells are trained on and which are asked, for every design; no patient is ever on both sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from carvae.config import EvaluateConfig
from carvae.data.split import patient_folds
from carvae.errors import EvaluateError, nearest
from carvae.evaluation.cells import Cells, Rows

MIN_STATE_CELLS = 5
"""Held-out cells of a state without which its novelty is not judged."""
STATE_GROUPS = 3
"""Groups of patients held out in turn beside each held-out state."""
TWO = 2


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Cells to learn from, and cells to ask."""

    design: str
    name: str
    """What is held out."""
    train: Rows
    query: Rows
    state: str | None = None
    """A state that is in the query and of which no cell was learned from."""

    @property
    def file(self) -> str:
        """Name of its folder; names that differ have folders that differ."""
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", self.name)
        return plain if plain == self.name else f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def checked(fold: Fold, cells: Cells) -> Fold:
    """The fold itself.

    Raises
    ------
    EvaluateError
        A patient (and with it a clone) is on both sides, or the held-out state is among the training cells: what was
        measured then would be memory.
    """
    patient = cells.patient_N
    if both := sorted(set(patient[fold.train]) & set(patient[fold.query])):
        raise EvaluateError(
            f"fold {fold.name!r} of {fold.design!r} has {'patient' if len(both) == 1 else 'patients'} "
            f"{', '.join(both)} on both sides of the split; nothing was scored"
        )
    if fold.state is not None and (cells.truth_N[fold.train] == cells.leaves.index(fold.state)).any():
        raise EvaluateError(f"fold {fold.name!r} learns from cells of the state that it holds out; nothing was scored")
    return fold


def untaught(cells: Cells, folds: Sequence[Fold]) -> dict[str, int]:
    """State -> its cells that are asked where no training cell has it: no method can name them; they count as wrong."""
    n_S = np.zeros(len(cells.leaves), np.int64)
    for fold in folds:
        asked, taught = cells.truth_N[fold.query], np.unique(cells.truth_N[fold.train])
        n_S += np.bincount(asked[(asked >= 0) & ~np.isin(asked, taught)], minlength=n_S.size)
    return {leaf: int(n) for leaf, n in zip(cells.leaves, n_S, strict=True) if n}


def folds_of(design: str, cells: Cells, config: EvaluateConfig) -> list[Fold]:
    """All folds of a design.

    Raises
    ------
    EvaluateError
        The data do not allow it: too few patients, studies or states, or a name that is not there.
    """
    if not (cells.truth_N >= 0).any():
        raise EvaluateError("no cell bears a label that names one state, so there is nothing to score")
    found = DESIGNS[design](cells, config)
    if not found:
        raise EvaluateError(f"design {design!r} leaves nothing to score: no held-out cell bears a label")
    return [checked(fold, cells) for fold in found]


def _patients(cells: Cells, config: EvaluateConfig) -> list[Fold]:
    return _by_column(cells, config, "patient")


def _studies(cells: Cells, config: EvaluateConfig) -> list[Fold]:
    return _by_column(cells, config, "study")


def _by_column(cells: Cells, config: EvaluateConfig, column: str) -> list[Fold]:
    unit = cells.obs[column].astype(str).to_numpy(dtype=object)
    labelled = cells.truth_N >= 0
    names = sorted(set(unit[labelled]))
    plural = "studies" if column == "study" else "patients"
    if len(names) < TWO:
        raise EvaluateError(
            f"evaluate.designs asks for each {column} held out, but labels are of {len(names)} {column} alone "
            f"({', '.join(names)}); at least two {plural} must have labelled cells"
        )
    folds = []
    for name in _chosen(names, config.hold_out, plural):
        out = unit == name
        folds.append(Fold(column, name, np.flatnonzero(~out), np.flatnonzero(out)))
    return folds


def _states(cells: Cells, config: EvaluateConfig) -> list[Fold]:
    """Each state held out beside a third of the patients, whose cells of that state should look strange."""
    labelled, patient = cells.truth_N >= 0, pd.Series(cells.patient_N)
    if patient[labelled].nunique() < TWO:
        raise EvaluateError(
            "evaluate.designs asks for each state held out on patients that were not trained on, but one patient alone "
            "has labelled cells; at least two must"
        )
    groups = patient_folds(patient, labelled, STATE_GROUPS)
    names = [cells.leaves[s] for s in np.unique(cells.truth_N[labelled])]
    folds = []
    for state in _chosen(names, config.hold_out, "states"):
        is_state = cells.truth_N == cells.leaves.index(state)
        if (n := patient[is_state].nunique()) < TWO:
            if state in config.hold_out:
                raise EvaluateError(
                    f"state {state!r} cannot be held out: {n} patient alone has it ({patient[is_state].iloc[0]}), so "
                    "what is new of the state cannot be told from what is new of the patient; leave it out of "
                    "evaluate.hold_out"
                )
            continue
        for g, group in enumerate(groups):
            query = group.validation[labelled[group.validation]]
            n_new = int(is_state[query].sum())
            if MIN_STATE_CELLS <= n_new < query.size:
                train = group.train[~is_state[group.train]]
                folds.append(Fold("state", f"{state}, patients {g + 1}", train, query, state))
    return folds


def _reference(cells: Cells, config: EvaluateConfig) -> list[Fold]:
    study = cells.obs["study"].astype(str).to_numpy(dtype=object)
    names = sorted(set(study))
    if not config.reference:
        raise EvaluateError(
            f"evaluate.designs has 'reference', and evaluate.reference names no study to train on; "
            f"there are {', '.join(names)}"
        )
    known = np.isin(study, _chosen(names, config.reference, "studies"))
    if known.all():
        raise EvaluateError("evaluate.reference names all studies, so that none is left to label; name fewer")
    train, folds = np.flatnonzero(known), []
    for name in sorted(set(study[~known])):
        query = np.flatnonzero(study == name)
        if (cells.truth_N[query] >= 0).any():
            folds.append(Fold("reference", name, train, query))
    return folds


def _chosen(names: list[str], wanted: tuple[str, ...], what: str) -> list[str]:
    """The names that are wanted, or all."""
    if unknown := [name for name in wanted if name not in names]:
        raise EvaluateError(
            f"{unknown[0]!r} is none of the {what} with labelled cells{nearest(unknown[0], names)} "
            f"(there are {', '.join(names)})"
        )
    return [name for name in names if not wanted or name in wanted]


DESIGNS: dict[str, Callable[[Cells, EvaluateConfig], list[Fold]]] = {
    "patient": _patients,
    "study": _studies,
    "state": _states,
    "reference": _reference,
}
