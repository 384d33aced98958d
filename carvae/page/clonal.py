"""Section 9: clones by state, clones over time, and states over time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from carvae.data.clonotypes import own_clones
from carvae.data.timepoints import in_order
from carvae.data.tracking import ClonalCells, tracked, transitions
from carvae.errors import SchemaError
from carvae.labels.axis import RESERVED
from carvae.page.blocks import Absent, Block, Grid, Section
from carvae.page.facts import Facts, several
from carvae.page.picture import picture
from carvae.plots.clones import draw_flow, draw_tracking, plot_clone_sizes

TITLE = "Clones and time"
MOST_PATIENTS = 12
"""Patients whose clones and states over time are drawn."""
MOST_CLONES = 20
NO_RECEPTORS = (
    "No receptors were given, so there are no clones; add --clones FILE_OR_FOLDER to carvae annotate (10x contigs, "
    "AIRR, "
    "scirpy)."
)
TRACKED = {
    "patient": "patient",
    "n_cells": "cells",
    "timepoints": "time points",
    "first_fraction": "share first",
    "last_fraction": "share last",
    "first_state": "state first",
    "last_state": "state last",
}
COLUMNS = {
    "clone_cells": "cells with a clone",
    "clone_n": "clones",
    "clone_single": "in clones of one cell",
    "clone_hyperexpanded": "in clones of more than 100",
    "clone_shannon": "Shannon",
    "clone_expansion": "expansion",
    "clone_gini": "Gini",
    "clone_depth": "equal depth",
    "clone_shannon_at_depth": "Shannon at equal depth",
    "clone_expansion_at_depth": "expansion at equal depth",
}


def section(facts: Facts) -> Section:
    """Clonal expansion by state, tracked clones, flow of states."""
    obs = facts.cells.obs
    cloned = obs["clone_id"].notna().to_numpy() if "clone_id" in obs else None
    blocks: list[Block] = []
    if cloned is None:
        blocks.append(Absent(NO_RECEPTORS))
    elif not cloned.any():
        blocks.append(Absent("Receptors were given, but no cell has a clone; see the receipt of carvae annotate."))
    else:
        blocks += _sizes(facts, obs.loc[cloned], cloned)
    return Section("clones", TITLE, (*blocks, *_over_time(facts, cloned is not None and bool(cloned.any()))))


def _sizes(facts: Facts, obs: pd.DataFrame, cloned: NDArray[np.bool_]) -> list[Block]:
    state, size = facts.cells.state[cloned], obs["clone_size"]

    def draw() -> Axes:
        return plot_clone_sizes(state, size, facts.cells.order)

    biggest = obs["clone_id"].astype(str).value_counts()
    shows = (
        f"{len(obs):,} of {facts.cells.n_cells:,} cells are in {several(len(biggest), 'clone')}, told within the "
        "patient "
        f"(the sample where no patient is named); the largest has {int(biggest.iloc[0]):,}. Sizes are of cells in "
        "this file."
    )
    blocks: list[Block] = [picture("clones", "Clonal expansion by state", shows, draw)]
    table = facts.cells.samples
    there = [] if table is None else [name for name in COLUMNS if name in table and table[name].notna().any()]
    if table is not None and there:
        frame = table.loc[table["clone_cells"].fillna(0) > 0, there].rename(columns=COLUMNS)
        for name in ("in clones of one cell", "in clones of more than 100"):
            if name in frame:
                frame[name] = [f"{v:.0%}" for v in frame[name]]
        for name in ("cells with a clone", "clones", "equal depth"):
            if name in frame:
                frame[name] = frame[name].astype("Int64")
        shows = "Plain figures grow with the number of cells: compare samples at equal depth."
        blocks.append(Grid("Diversity of the samples", frame.rename_axis("sample"), shows))
    return blocks


def _over_time(facts: Facts, has_clones: bool) -> list[Block]:
    try:
        found = _timed(facts)
    except SchemaError as error:
        return [Absent(f"States over time are not drawn: {error}.")]
    if found is None:
        text = "The file names no time points for patients, so there is nothing to follow over time; a table of samples"
        return [Absent(f"{text} (predict.sheet) with patient and timepoint says them.")]
    followed = [patient for patient in found.patients() if len(found.of(patient)[1]) > 1]
    if not followed:
        return [Absent("No patient has two time points, so there is nothing to follow over time.")]
    chosen = followed[:MOST_PATIENTS]
    cells = found.cells[found.cells["patient"].isin(chosen)].reset_index(drop=True)
    shown = ClonalCells(cells, found.order)
    table, order = transitions(shown), list(facts.cells.states)

    def flow() -> Canvas:
        return draw_flow(shown, table, order)

    more = f" {len(followed) - len(chosen)} more patients are not drawn." if len(followed) > len(chosen) else ""
    shows = f"The states of all cells of a patient at each time point, with numbers of cells.{more}"
    if not has_clones:
        return [picture("flow", "States over time", shows, flow)]
    if len(table):
        shows += " Right, from which state to which clones went that were seen at a time point and the next, each once."
    return [*_tracking(facts, shown, chosen, order), picture("flow", "States over time", shows, flow)]


def _tracking(facts: Facts, shown: ClonalCells, chosen: list[str], order: list[str]) -> list[Block]:
    table = tracked(shown)
    if not len(table):
        return [Absent("No clone is seen at two time points of a patient.")]
    several_times = [patient for patient in chosen if (table["patient"] == patient).any()]

    def draw() -> Canvas:
        return draw_tracking(shown, several_times, facts.clones.top, order)

    shows = (
        f"{several(len(table), 'clone is', 'clones are')} seen at two or more time points; the largest "
        f"{facts.clones.top} of "
        "each patient, coloured by state. In the grey a clone may be there and not be seen. A clone that is not seen "
        "is "
        "not lost."
    )
    head = table.head(MOST_CLONES).set_index("clone")[list(TRACKED)].rename(columns=TRACKED)
    more = f"The first {len(head)} of {len(table):,}; carvae clones writes all." if len(head) < len(table) else ""
    grid = Grid("Tracked clones", head, more)
    return [picture("tracking", "Clones over time", shows, draw), grid]


def _timed(facts: Facts) -> ClonalCells | None:
    """Cells with patient and time point; None where the file names none.

    Raises
    ------
    SchemaError
        The order of the time points is not clear.
    """
    cells = facts.cells
    patient = cells.known("patient")
    time = cells.known("timepoint")
    if time is None and (days := cells.known("timepoint_days")) is not None:
        time = ("D" + days.map("{:g}".format).astype("string")).where(days.notna())
    if patient is None or time is None:
        return None
    state = pd.Series(cells.state_N, dtype="string")
    frame = pd.DataFrame({"patient": patient.astype("string").to_numpy(), "sample": cells.sample_N})
    frame["timepoint"] = time.astype("string").to_numpy()
    frame["state"] = state.mask(state == RESERVED).to_numpy()
    frame["clone"] = None
    if "clone_id" in cells.obs:
        clones = own_clones(cells.obs["clone_id"].astype("string"), frame["patient"].to_numpy(object))
        frame["clone"] = pd.Series([*clones.names, None], dtype=object).to_numpy()[clones.code_N]
    frame = frame.dropna(subset=["patient", "timepoint"]).astype(object).reset_index(drop=True)
    order = in_order(list(frame["timepoint"].unique()), facts.clones.order)
    frame = frame[frame["timepoint"].isin(order)].reset_index(drop=True)
    return ClonalCells(frame.where(frame.notna(), None), tuple(order))
