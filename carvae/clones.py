"""Clones of patients over time, from an annotated file or any table of cells: tables and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata.io import read_elem

from carvae.data.adata import root_of
from carvae.data.atomic import refuse_file, replacing_file
from carvae.data.clonotypes import own_clones
from carvae.data.diversity import clonal_figures
from carvae.data.results import cells_path
from carvae.data.schema import inspect_obs, named_column, raise_problems
from carvae.data.spreadsheet import write_table
from carvae.data.tables import read_table
from carvae.data.timepoints import in_order
from carvae.data.tracking import ClonalCells, changes, flow, persistence, sharing, tracked, transitions
from carvae.errors import ReadError, SchemaError
from carvae.labels.axis import RESERVED
from carvae.plots.clones import draw_flow, draw_tracking
from carvae.section_patient import ClonesConfig

log = logging.getLogger(__name__)

TABLES = ("tracked.csv", "changes.csv", "persistence.csv", "sharing.csv", "transitions.csv", "flow.csv", "samples.csv")
PLOTS = ("tracking.png", "flow.png")
DPI = 130
CELLS = (".h5ad", ".zarr", ".csv", ".tsv")
"""Kinds of files that hold cells."""
STATES = ("carvae_state", "state", "cell_type")
"""Columns with the state, the first that is there."""


def run(source: Path, out: Path, config: ClonesConfig, seed: int = 0) -> Path:
    """Follow the clones of every patient; write tables and pictures to the folder ``out``, and return it.

    ``tracked.csv``
        Clones seen at two or more time points, with their states first and last.
    ``changes.csv``
        Clones between two time points: expanding, contracting, new (`data.tracking.changes`).
    ``persistence.csv``
        How many are seen again, beside what is expected, and the least frequency that would be seen.
    ``sharing.csv``
        Clones that two states have in common.
    ``transitions.csv``
        From which state to which the tracked clones went.
    ``flow.csv``
        Composition at each time point.
    ``samples.csv``
        Diversity of each sample, plain and at equal depth (`data.diversity`).
    ``tracking.png``, ``flow.png``
        The largest clones over time; composition, and the states of tracked clones.

    Parameters
    ----------
    source
        ``.h5ad`` or zarr that ``carvae annotate`` wrote, or a table of cells (``.csv``, ``.tsv``, either ``.gz``) with
        patient, time point, state and clone; or a folder of those, as where months were annotated one by one.

    Raises
    ------
    CarvaeError
        The file cannot be read or lacks a column, or the order of the time points is not clear; nothing is written.
    """
    found = look(source, out, config)
    log.info("%s", sentence(found))
    _say_pooled(found)
    tables = (
        tracked(found),
        changes(found, config.alpha),
        persistence(found),
        sharing(found),
        transitions(found),
        flow(found),
        sample_figures(found, config, np.random.default_rng(seed)),
    )
    followed = sorted(set(tables[0]["patient"]))
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        places = {name: stack.enter_context(replacing_file(out / name)) for name in TABLES}
        for name, table in zip(TABLES, tables, strict=True):
            write_table(table, places[name], float_format="%.6g")
        if followed:
            picture = draw_tracking(found, followed, config.top)
            picture.savefig(stack.enter_context(replacing_file(out / PLOTS[0])), dpi=DPI)
        picture = draw_flow(found, tables[TABLES.index("transitions.csv")])
        picture.savefig(stack.enter_context(replacing_file(out / PLOTS[1])), dpi=DPI)
    if not followed:
        (out / PLOTS[0]).unlink(missing_ok=True)  # of an earlier run
        several = facts(found)["followed"]
        why = "no clone is at two time points" if several else "no patient has two time points with clones"
        log.info("%s, so there is nothing to follow and no %s", why, PLOTS[0])
    log.info("%s clones are seen at two or more time points; wrote tables and pictures to %s", len(tables[0]), out)
    return out


def look(source: Path, out: Path, config: ClonesConfig) -> ClonalCells:
    """The cells that `run` would follow; raises what it would refuse, and writes nothing."""
    refuse_file(out, "clones")
    return clonal_cells(read_obs(source, config), source.name, config)


def sentence(found: ClonalCells) -> str:
    """What was found, in words."""
    return "{cells:,} cells of {n} patients, {with_clone:,} with a clone; time points: {times}".format(
        **facts(found), n=len(found.patients()), times=", ".join(found.order)
    )


def facts(found: ClonalCells) -> dict[str, Any]:
    """What was found, for programs."""
    return {
        "cells": len(found.cells),
        "with_clone": int(found.cells["clone"].notna().sum()),
        "patients": list(map(str, found.patients())),
        "timepoints": list(found.order),
        "followed": [str(patient) for patient in found.patients() if len(found.cloned(patient)[1]) > 1],
    }


def read_obs(source: Path, config: ClonesConfig) -> pd.DataFrame:
    """One row per cell, from an AnnData on disk, a table, or a folder of those.

    Raises
    ------
    ReadError
        The file is not there, broken, or of another kind; or the folder holds none, or one twice.
    """
    if not source.exists():
        raise ReadError(f"{source} does not exist")
    if source.is_dir() and source.suffix != ".zarr":
        files = sorted(path for path in source.iterdir() if path.name.removesuffix(".gz").endswith(CELLS))
        twice = {cells_path(path) for path in files if path.suffix in {".h5ad", ".zarr"}}
        files = [path for path in files if path not in twice and not path.name.endswith(".samples.csv")]
        if not files:
            raise ReadError(f"{source} holds no {', '.join(CELLS)}")
        tables = [_read_file(path, config) for path in files]
        for (one, a), (other, b) in combinations(zip(files, tables, strict=True), 2):
            if a.equals(b):
                raise ReadError(f"{one} and {other} hold the same cells, which would count twice; keep one of them")
        return pd.concat(tables, ignore_index=True)
    return _read_file(source, config)


def _read_file(source: Path, config: ClonesConfig) -> pd.DataFrame:
    try:
        if source.suffix == ".h5ad" or source.is_dir():
            with root_of(source) as root:
                return _frame(read_elem(root["obs"]))
    except (OSError, KeyError, ValueError) as error:
        raise ReadError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
    if source.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        text, samples = ([] if own is None else [own] for own in (config.patient, config.sample))
        return read_table(source, text=text, samples=samples)
    raise ReadError(f"{source} is no table of cells; give .h5ad, .zarr, .csv or .tsv (.csv.gz, .tsv.gz)")


def _frame(obs: object) -> pd.DataFrame:
    assert isinstance(obs, pd.DataFrame)
    return obs


def clonal_cells(obs: pd.DataFrame, name: str, config: ClonesConfig) -> ClonalCells:
    """The cells with patient, time point, state and clone in the columns that the settings or custom name.

    Cells without a time point are left out, and so are time points that ``clones.order`` does not name.

    Raises
    ------
    SchemaError
        A column is not there, no cell has a clone, or the order of the time points is not clear.
    """
    columns = [str(column) for column in obs.columns]
    settings = {"patient": config.patient, "sample": config.sample, "clone_id": config.clone}
    settings["timepoint"] = config.timepoint
    named = {key: own for key, own in settings.items() if own is not None}
    has_sample = "sample" in named or bool(named_column(columns, "sample"))
    # Without a sample all cells would be taken as one of several patients.
    known = obs if has_sample else obs.assign(sample=np.arange(len(obs)))
    found = inspect_obs(known, name, named, {}, require=())
    raise_problems(found.problems)
    for note in found.notes:
        if any(word in note for word in ("patient", "timepoint", "clone_id")):
            log.info("%s", note.removeprefix(f"study {name!r}: "))
    cells = pd.DataFrame({"patient": _needed(found.obs, "patient", name, columns)})
    cells["timepoint"] = _timepoints(found.obs, name, columns)
    cells["state"] = _state(obs, name, config)
    clones = own_clones(_needed(found.obs, "clone_id", name, columns), cells["patient"].to_numpy(object))
    labels = np.array([*clones.names, None], dtype=object)
    cells["clone"] = labels[clones.code_N]
    own_sample = has_sample and "sample" in found.obs
    cells["sample"] = (
        found.obs["sample"].astype("string") if own_sample else cells["patient"] + "_" + cells["timepoint"]
    )
    cells = cells.dropna(subset=["patient", "timepoint"]).astype(object).reset_index(drop=True)
    if not cells["clone"].notna().any():
        raise SchemaError(f"{name}: no cell with a patient and a time point has a clone; look at clones.clone=COLUMN")
    order = in_order(list(cells["timepoint"].unique()), config.order)
    cells = cells[cells["timepoint"].isin(order)].reset_index(drop=True)
    return ClonalCells(cells.where(cells.notna(), None), tuple(order))


def _needed(obs: pd.DataFrame, column: str, name: str, columns: Sequence[str]) -> pd.Series[str]:
    if column not in obs:
        setting = "clone" if column == "clone_id" else column
        if len(there := named_column(columns, column)) == 1:
            raise SchemaError(
                f"{name} has no value in obs[{there[0]!r}] of {len(obs):,} cells, so no {setting} is known"
            )
        raise SchemaError(
            f"{name} names no {setting}; say which column does: clones.{setting}=COLUMN (it has "
            f"{', '.join(columns[:20])}{', ...' if columns[20:] else ''})"
        )
    found: pd.Series[str] = obs[column].astype("string")
    return found


def _timepoints(obs: pd.DataFrame, name: str, columns: Sequence[str]) -> pd.Series[str]:
    if "timepoint" not in obs and "timepoint_days" in obs:
        days = obs["timepoint_days"]
        return ("D" + days.map("{:g}".format).astype("string")).where(days.notna())
    return _needed(obs, "timepoint", name, columns)


def _state(obs: pd.DataFrame, name: str, config: ClonesConfig) -> pd.Series[str]:
    column = config.state or next((own for own in STATES if own in obs), None)
    if column is None or column not in obs:
        what = f"has no column {column!r}" if column else "names no state"
        columns = ", ".join(map(str, obs.columns[:20]))
        raise SchemaError(f"{name} {what}; say which column does: clones.state=COLUMN (it has {columns})")
    state: pd.Series[str] = obs[column].astype("string")
    return state.mask(state.eq(RESERVED) | state.eq(""))


def _say_pooled(found: ClonalCells) -> None:
    pooled = found.cells.groupby(["patient", "timepoint"])["sample"].nunique()
    if (pooled := pooled[pooled > 1]).size:
        first = " ".join(map(str, pooled.index[0]))
        log.info("%s time points pool several samples of a patient, such as %s", len(pooled), first)


def sample_figures(found: ClonalCells, config: ClonesConfig, rng: np.random.Generator) -> pd.DataFrame:
    """Diversity of each sample, in the order of patients and time points."""
    cells = found.cells
    keys = cells[["patient", "timepoint", "sample"]].drop_duplicates()
    place = {time: i for i, time in enumerate(found.order)}
    keys = keys.assign(at=keys["timepoint"].map(place)).sort_values(["patient", "at", "sample"]).drop(columns="at")
    code = pd.MultiIndex.from_frame(keys).get_indexer(
        pd.MultiIndex.from_frame(cells[["patient", "timepoint", "sample"]])
    )
    clone = pd.factorize(cells["clone"])[0]
    figures = clonal_figures(clone, code, len(keys), config.depth, config.min_cells, config.draws, rng)
    table = keys.reset_index(drop=True).assign(n_cells=np.bincount(code, minlength=len(keys)))
    return pd.concat([table, figures], axis=1)
