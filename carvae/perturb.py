"""``carvae perturb``: genes set up or down in the cells of a query, and what the model then says of them.

A hypothesis and no forecast: the counts of these genes alone are changed, and what the model makes of that is told. How
a cell would answer is not modelled.

Axes: N cells, S states of one label axis, P patients, B draws of the training patients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from carvae.config import PredictConfig
from carvae.data.atomic import replacing_file
from carvae.data.patients import Floats
from carvae.data.readers import CountsSource, open_samples
from carvae.data.sheet import told_of_cells
from carvae.data.spreadsheet import write_table
from carvae.errors import ConfigError, CountsError, SchemaError, nearest
from carvae.model.bundle import Bundle
from carvae.model.intervention import Direction, Expression, Intervention, applied, control, intervention
from carvae.model.machine import load_on
from carvae.model.query import UNKNOWN, Query, Samples, calls, read, refuse_place
from carvae.respond import asked_of, cells_of
from carvae.response.cells import Model, describe
from carvae.section_respond import PerturbConfig

log = logging.getLogger(__name__)

STATES, SAMPLES, RESPONSE, PLOT = "states.csv", "samples.csv", "response.csv", "perturb.png"
_CHANGE, _MOVED = ["change", "direction"], ["before", "after", "difference", "low", "high"]
_CONTROL, _LAST = ["control_low", "control_high", "beyond_controls"], ["genes", "status"]
COLUMNS = {
    STATES: [*_CHANGE, "axis", "state", *_MOVED, "interval_over", "n_patients", "n_cells", *_CONTROL, *_LAST],
    SAMPLES: [*_CHANGE, "patient", "sample", "axis", "state", "before", "after", *_LAST],
    RESPONSE: [*_CHANGE, "patient", *_MOVED, *_CONTROL, *_LAST],
}
HYPOTHESIS = "hypothesis of the model"
INTERVAL = 0.95


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells that are changed: those of the query that the model knows as they are."""

    query: Query
    obs: pd.DataFrame
    """``sample``, ``patient`` and ``product`` of each."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of the cells."""

    probability_NS: Mapping[str, NDArray[np.float32]]
    """Label axis -> probabilities of its states."""
    score_P: Floats | None
    """Predicted outcome of each patient, in the order of their names; None where the model predicts none."""
    refit_BP: Floats | None


def run(query: Path, model: Path, out: Path, config: PerturbConfig, predict: PredictConfig, seed: int = 0) -> Path:
    """Change genes, ask the model again, write tables and a picture to the folder ``out``, and return it.

    ``states.csv``
        Per change and state the mean probability of the state before and after, over patients, with the interval of
        the difference, and the range of the same done to random genes of like expression (``control_low`` to
        ``control_high``): what lies within it is no more than changing any gene would do.
    ``samples.csv``
        Before and after in each sample.
    ``response.csv``
        Where the model predicts outcomes: each patient's prediction before and after; the interval of the difference is
        over the draws of the training patients.

    Raises
    ------
    CarvaeError
        The query, the model or a setting cannot be used; nothing is written then.
    """
    bundle = load_on(model, predict)
    refuse(bundle, out)
    rng = np.random.default_rng((seed, 51))
    asked = _interventions(bundle, config)
    cells = _cells(open_samples(query, counts=predict.counts), bundle, config, predict, rng)
    expression = Expression.of(cells.query.panel, cells.query.total_N, config.level)
    before = _answer(bundle, cells)
    tables: dict[str, list[pd.DataFrame]] = {STATES: [], SAMPLES: [], RESPONSE: []}
    for what in asked:
        if absent := _unread(bundle, cells, what):
            log.warning("%s %s: %s", what.name, what.direction, absent)
        after = _answer(bundle, _changed(cells, what, expression))
        random = []
        for _ in range(config.controls):
            same = control(what, expression, cells.query.present_G, rng)
            random.append(_answer(bundle, _changed(cells, same, expression)))
        _told(bundle, cells, what, (before, after, random), tables)
        log.info("%s %s", what.name, what.direction)
    written = {name: pd.concat(parts, ignore_index=True)[COLUMNS[name]] for name, parts in tables.items() if parts}
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, table in written.items():
            write_table(table, stack.enter_context(replacing_file(out / name)))
        draw(written[STATES], stack.enter_context(replacing_file(out / PLOT)))
    log.info("wrote %s and %s to %s; all of it is a %s", ", ".join(written), PLOT, out, HYPOTHESIS)
    return out


def refuse(bundle: Bundle, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    refuse_place(bundle, out, "perturb")


def _interventions(bundle: Bundle, config: PerturbConfig) -> list[Intervention]:
    """What is asked; every signature of the model, both ways, where nothing is."""
    both: dict[Direction, tuple[str, ...]] = {"up": config.up, "down": config.down}
    if not config.up and not config.down:
        reads = set(bundle.genes)
        some = tuple(s.name for s in bundle.signatures.items if reads & {*s.genes, *s.down})
        both = {"up": some, "down": some}
    return [
        intervention(name, direction, bundle.genes, bundle.signatures)
        for direction, names in both.items()
        for name in dict.fromkeys(names)
    ]


def _cells(
    sources: Sequence[CountsSource],
    bundle: Bundle,
    config: PerturbConfig,
    predict: PredictConfig,
    rng: np.random.Generator,
) -> Cells:
    samples = Samples.of(sources, predict.sample)
    obs = cells_of(sources, predict)
    chosen_N = _where(sources, told_of_cells(predict.sheet, obs["sample"]), config.where)
    taken_N = np.zeros(len(chosen_N), np.bool_)
    within = Samples(samples.code_N[chosen_N], samples.names)
    taken_N[np.flatnonzero(chosen_N)[within.evenly(config.max_cells, rng)]] = True
    query = read(sources, bundle, predict, samples, taken_N)
    assert bundle.tree is not None
    known_N = calls(query.panel, bundle, predict, query.present_G)[bundle.axes[0]].label_N != UNKNOWN
    if not known_N.any():
        raise CountsError(
            "every cell of the query is unknown to the model, so what a change would do cannot be asked; look at what "
            "`carvae annotate` says of it, or lower predict.min_counts"
        )
    known = Query(
        panel=query.panel[known_N],
        total_N=query.total_N[known_N],
        sample_N=query.sample_N[known_N],
        samples=query.samples,
        present_G=query.present_G,
        other=query.other[known_N],
        measured_E=query.measured_E,
    )
    return Cells(known, obs[taken_N][known_N].reset_index(drop=True))


def _where(sources: Sequence[CountsSource], told: pd.DataFrame, where: Mapping[str, str]) -> NDArray[np.bool_]:
    """Cells that have the values asked for; raises where a column, or a cell with them, is not there.

    Parameters
    ----------
    told
        What the table of samples says of each cell; it goes before the query's own columns.
    """
    parts, first = [], 0
    for source in sources:
        known = told.iloc[first : first + source.n_cells].set_axis(source.obs.index)
        obs = source.obs.drop(columns=known.columns, errors="ignore").join(known)
        first += source.n_cells
        own = np.ones(len(obs), np.bool_)
        for column, value in where.items():
            if column not in obs:
                hint = nearest(column, map(str, obs.columns))
                raise SchemaError(f"{source.name} has no column {column!r} for perturb.where{hint}")
            own &= (obs[column].astype("string") == value).fillna(False).to_numpy(bool)
        parts.append(own)
    chosen_N: NDArray[np.bool_] = np.concatenate(parts)
    if not chosen_N.any():
        asked = " and ".join(f"{column}={value}" for column, value in where.items())
        raise ConfigError(f"no cell of the query has {asked}, which perturb.where asks for")
    return chosen_N


def _unread(bundle: Bundle, cells: Cells, what: Intervention) -> str:
    """What the change leaves out, in words: genes that the model does not read, or that the query did not measure."""
    unmeasured = [bundle.genes[g] for g in what.genes if not cells.query.present_G[g]]
    said = [f"{', '.join(what.absent)} not among the model's genes"] if what.absent else []
    said += [f"{', '.join(unmeasured)} not measured in the query, set all the same"] if unmeasured else []
    return "; ".join(said)


def _changed(cells: Cells, what: Intervention, expression: Expression) -> Cells:
    """The cells with the genes set; these are known then, also where the query did not measure them."""
    query = cells.query
    known_G = query.present_G.copy()
    known_G[list(what.genes)] = True
    panel = applied(query.panel, query.total_N, what, expression)
    return replace(cells, query=replace(query, panel=panel, present_G=known_G))


def _answer(bundle: Bundle, cells: Cells) -> Answer:
    assert bundle.tree is not None
    query = cells.query
    if bundle.trust is None:
        probability = dict(bundle.network.predict(query.panel, present_G=query.present_G).probability_NS)
    else:
        probability = bundle.trust.probability(bundle.network, query.panel, query.present_G)
    if bundle.responder is None:
        return Answer(probability, None, None)
    model = Model(bundle.network, bundle.genes, bundle.tree, bundle.signatures)
    said = bundle.network.predict(query.panel, present_G=query.present_G)
    asked = asked_of(describe(model, query.panel, query.sample_N, query.samples, said), cells.obs)
    score_R, refit_BR = bundle.responder.score(asked)
    of_P = [asked.patient_R == name for name in sorted(set(asked.patient_R))]
    return Answer(
        probability,
        np.array([score_R[own].mean() for own in of_P]),
        np.stack([refit_BR[:, own].mean(1) for own in of_P], axis=1),
    )


def _told(
    bundle: Bundle,
    cells: Cells,
    what: Intervention,
    answers: tuple[Answer, Answer, list[Answer]],
    tables: dict[str, list[pd.DataFrame]],
) -> None:
    """Add the rows of one change to the tables."""
    before, after, random = answers
    genes = " ".join(bundle.genes[g] for g in what.genes)
    head = {"change": what.name, "direction": what.direction, "genes": genes}
    assert bundle.tree is not None
    for axis in bundle.axes:
        leaves = bundle.tree[axis].leaves
        was, now = (_by_sample(cells, a.probability_NS[axis], leaves) for a in (before, after))
        both = was.rename(columns={"mean": "before"}).assign(after=now["mean"], axis=axis)
        tables[SAMPLES].append(both.assign(status=HYPOTHESIS, **head))
        drawn = [_overall(_by_sample(cells, a.probability_NS[axis], leaves)) for a in random]
        rows = _changes(cells, before.probability_NS[axis], after.probability_NS[axis], (was, now), leaves)
        rows = _beside_controls(rows, np.array(drawn).reshape(len(drawn), len(leaves)) - _overall(was))
        tables[STATES].append(rows.assign(axis=axis, status=HYPOTHESIS, **head))
    if before.score_P is not None:
        tables[RESPONSE].append(_response(cells, before, after, random).assign(status=HYPOTHESIS, **head))


def _by_sample(cells: Cells, probability_NS: NDArray[np.float32], leaves: Sequence[str]) -> pd.DataFrame:
    """Mean probability of each state in each sample."""
    wide = pd.DataFrame(probability_NS.astype(np.float64), columns=list(leaves))
    means = wide.groupby([cells.obs["patient"], cells.obs["sample"]], sort=True).mean().reset_index()
    return means.melt(["patient", "sample"], var_name="state", value_name="mean")


def _overall(by_sample: pd.DataFrame) -> NDArray[np.float64]:
    """Mean over patients of the mean over their samples, per state in the order of the leaves."""
    per_patient = by_sample.groupby(["state", "patient"], sort=False)["mean"].mean()
    return per_patient.groupby("state", sort=False).mean().to_numpy()


def _changes(
    cells: Cells,
    before_NS: NDArray[np.float32],
    after_NS: NDArray[np.float32],
    by_sample: tuple[pd.DataFrame, pd.DataFrame],
    leaves: Sequence[str],
) -> pd.DataFrame:
    """Per state the means, their difference, and its interval over patients (t), or over the cells of the only one.

    Of one patient the samples weigh alike, as in the means, and the interval is of cells drawn anew within samples.
    """
    was, now = by_sample
    patients = sorted(set(was["patient"]))
    moved = was.assign(moved=now["mean"] - was["mean"])
    rows = []
    for s, leaf in enumerate(leaves):
        own = moved[moved["state"] == leaf].groupby("patient")["moved"].mean().to_numpy()
        if len(patients) > 1:
            error, degrees = own.std(ddof=1) / np.sqrt(len(own)), len(own) - 1
        else:
            error, degrees = _error_within(after_NS[:, s] - before_NS[:, s], cells), len(cells.obs) - 1
        half = float(stats.t.ppf((1 + INTERVAL) / 2, max(1, degrees)) * error)
        rows.append({"state": leaf, "low": own.mean() - half, "high": own.mean() + half})
    means = pd.DataFrame({"before": _overall(was), "after": _overall(now)})
    over = "patients" if len(patients) > 1 else "cells of one patient"
    table = pd.DataFrame(rows).assign(before=means["before"], after=means["after"])
    return table.assign(
        difference=table["after"] - table["before"],
        interval_over=over,
        n_patients=len(patients),
        n_cells=len(cells.obs),
    )


def _error_within(moved_N: NDArray[np.float32], cells: Cells) -> float:
    """Standard error of the mean over samples; NaN where no sample has two cells."""
    by_sample = pd.Series(moved_N.astype(np.float64)).groupby(cells.obs["sample"])
    variance = (by_sample.var(ddof=1) / by_sample.size()).dropna()
    return float(np.sqrt(variance.sum()) / by_sample.ngroups) if len(variance) else float("nan")


def _beside_controls(table: pd.DataFrame, moved_CS: NDArray[np.float64]) -> pd.DataFrame:
    """The range of what random genes did, and whether the difference lies outside of it."""
    if not len(moved_CS):
        return table.assign(control_low=np.nan, control_high=np.nan, beyond_controls="")
    low, high = moved_CS.min(0), moved_CS.max(0)
    beyond = (table["difference"] < low) | (table["difference"] > high)
    return table.assign(control_low=low, control_high=high, beyond_controls=beyond)


def _response(cells: Cells, before: Answer, after: Answer, random: Sequence[Answer]) -> pd.DataFrame:
    """Each patient's prediction before and after."""
    patients = sorted(set(cells.obs["patient"].fillna("unknown patient").astype(str)))
    rows: list[dict[str, Any]] = []
    for p, patient in enumerate(patients):
        was, now = _scores(before, p), _scores(after, p)
        moved, half = now[0] - was[0], float(stats.norm.ppf((1 + INTERVAL) / 2) * (now[1] - was[1]).std(ddof=1))
        row = {"patient": patient, "before": was[0], "after": now[0], "difference": moved}
        rows.append(row | {"low": moved - half, "high": moved + half})
    drawn = np.array([[_scores(a, p)[0] - _scores(before, p)[0] for p in range(len(patients))] for a in random])
    return _beside_controls(pd.DataFrame(rows), drawn.reshape(len(random), len(patients)))


def _scores(answer: Answer, patient: int) -> tuple[float, Floats]:
    assert answer.score_P is not None
    assert answer.refit_BP is not None
    return float(answer.score_P[patient]), answer.refit_BP[:, patient]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Differences as colours, a row per change, a panel per label axis; a dot where random genes do not reach."""
    from matplotlib.figure import Figure

    named = table.assign(row=table["change"] + table["direction"].map({"up": " ↑", "down": " ↓"}))
    rows, axes_names = list(dict.fromkeys(named["row"])), list(dict.fromkeys(named["axis"]))
    widths = [named[named["axis"] == axis]["state"].nunique() for axis in axes_names]
    size = (3.6 + 0.42 * sum(widths) + 0.8 * len(widths), 2.6 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0])
    most = max(float(table["difference"].abs().max()), 1e-3)
    for panel, axis in zip(panels, axes_names, strict=True):
        own = named[named["axis"] == axis]
        states = list(dict.fromkeys(own["state"]))
        grid = own.pivot(index="row", columns="state", values="difference").loc[rows, states]
        beyond = own.pivot(index="row", columns="state", values="beyond_controls").loc[rows, states]
        image = panel.imshow(grid.to_numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        y, x = np.nonzero(beyond.to_numpy(object) == np.True_)
        panel.plot(x, y, "o", color="black", markersize=3, linestyle="none")
        panel.set_xticks(range(len(states)), states, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
        panel.set_yticks(range(len(rows)), rows, fontsize="small")
        panel.set_title(axis, fontsize="medium")
    figure.colorbar(image, ax=list(panels), label="change of mean probability")
    figure.suptitle("Hypothesis of the model; dot: more than random genes of like expression do", fontsize="medium")
    figure.savefig(path, dpi=150)
