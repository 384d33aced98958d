"""An annotated file without the names in it: a page that is given away calls samples, patients and clones by number.

What stays of a cell is what carvae wrote, the author's label, and what the contract knows of kinds of samples (tissue,
assay, disease, days).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from carvae.page.annotated import Annotated

NUMBERED = {"sample": "sample", "patient": "patient", "study": "study", "product": "product"}
"""Column of the contract -> what its values are called."""
KEPT = ("tissue", "assay", "disease", "timepoint_days", "clone_size")
"""Columns of the contract that stay."""
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
SHORT_TIME = re.compile(rf"(?!.*\b({MONTHS}))[a-z_ +-]{{0,12}}\d{{0,3}}", re.IGNORECASE)
"""A time point that is no date, such as D28: without a year, and without a month."""
NAMING_SETTINGS = ("sample", "sheet", "dask", "car")
"""Settings of the annotation that name columns, files, machines or constructs of one laboratory."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A file whose samples and patients are numbered, and which number is whose."""

    cells: Annotated
    called: Mapping[str, Mapping[str, str]]
    """Column -> name -> its number."""

    def outcomes(self, table: pd.DataFrame) -> pd.DataFrame:
        """Predicted outcomes with numbers in place of patients."""
        return table.assign(patient=[self.called["patient"].get(str(name), "patient") for name in table["patient"]])


def numbered(cells: Annotated, label: str | None) -> Numbered:
    """The file without names; ``label`` is the column with the author's labels.

    Names are numbered in their order, so that the same file gives the same page.
    """
    called = {name: _numbers(cells.about[name], word) for name, word in NUMBERED.items() if name in cells.about}
    if "patient" not in called:  # outcomes then are of samples
        called["patient"] = called["sample"]
    named = [name for name in called if name in cells.about]
    columns: dict[str, Any] = {name: cells.about[name].astype("string").map(called[name]) for name in named}
    columns |= {name: cells.about[name] for name in KEPT if name in cells.about}
    if "timepoint" in cells.about:
        columns["timepoint"] = _times(cells.about["timepoint"])
    about = pd.DataFrame(columns).set_axis(pd.RangeIndex(cells.n_cells).astype(str))
    own = [c for c in map(str, cells.obs) if c.startswith("carvae_") or c in {label, "clone_size"}]
    obs = cells.obs[own].set_axis(about.index)
    if "clone_id" in cells.obs:
        obs = obs.assign(clone_id=_named(cells.obs["clone_id"], "clone").to_numpy())
    samples = None if cells.samples is None else _samples(cells.samples, called["sample"])
    return Numbered(
        replace(
            cells,
            path=Path(f"annotated{cells.path.suffix}"),
            obs=obs,
            about=about,
            made={**cells.made, "notes": "", "settings": _settings(cells.settings)},
            samples=samples,
            samples_text="" if samples is None else samples.rename_axis("sample").to_csv(),
        ),
        called,
    )


def _numbers(column: pd.Series[Any], word: str) -> dict[str, str]:
    names = sorted(set(column.dropna().astype(str)))
    return {name: f"{word} {n:0{len(str(len(names)))}d}" for n, name in enumerate(names, 1)}


def _named(column: pd.Series[Any], word: str) -> pd.Series[Any]:
    return column.astype("string").map(_numbers(column, word))


def _times(column: pd.Series[Any]) -> pd.Series[Any]:
    """The time points, numbered if any of them may be a date."""
    short = all(SHORT_TIME.fullmatch(str(time)) for time in column.dropna().unique())
    return column if short else _named(column, "time ")


def _samples(table: pd.DataFrame, called: Mapping[str, str]) -> pd.DataFrame:
    """The table of samples with numbers for names, and without what else is text of the file."""
    numbers = table.select_dtypes("number").columns
    kept = [name for name in table if name in numbers or str(name).startswith("verdict")]
    return table[kept].rename(index=lambda name: called.get(str(name), "sample"))


def _settings(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if name not in NAMING_SETTINGS})
