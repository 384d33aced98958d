"""The two sides of a comparison: tables of samples as `carvae annotate` writes them, their figures and their units.

Axes: R rows (samples), U units (patients or samples).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.adata import root_of
from carvae.data.composition import fraction_interval
from carvae.data.contrast import Floats
from carvae.data.diversity import SIZE_BINS
from carvae.data.results import samples_path
from carvae.data.tables import read_table
from carvae.errors import ReadError, SchemaError, nearest

NEEDED = ("sample", "n_cells", "n_cells_used")
UNKNOWN = "fraction_unknown"
GROUPS = ("composition", "sureness", "CAR", "markers", "signatures", "clones", "depth")
"""Kinds of figures, in the order of the table."""
OF_KIND = {
    "sureness": (
        UNKNOWN,
        "mean_confidence",
        "mean_novelty",
        "gene_overlap",
        "batch_distance",
        "ambient_hint",
        "doublet_hint",
    ),
    "CAR": ("car_fraction", "car_detected"),
    "signatures": ("mean_pseudotime",),
    "depth": ("n_cells", "n_cells_used", "median_counts"),
}
ENDINGS = (".h5ad", ".zarr", ".csv.gz", ".csv")
BINARY = 2
DEPTH, AT_DEPTH = "clone_depth", "_at_depth"


@dataclass(frozen=True, slots=True)
class Side:
    """Samples of one side."""

    name: str
    table: pd.DataFrame
    unit_R: NDArray[np.object_]
    """Patient or sample of each row."""

    @property
    def units(self) -> list[str]:
        """Patients or samples, sorted."""
        return sorted(set(map(str, self.unit_R)))

    def weights(self, figure: str) -> Floats:
        """Share of each row in its unit, by its cells; rows without the figure have none."""
        known = self.table[figure].notna() if figure in self.table else pd.Series(False, index=self.table.index)
        cells = self.table["n_cells_used"].where(known, 0).astype(float)
        total = cells.groupby(self.unit_R).transform("sum").to_numpy(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(total > 0, cells.to_numpy() / total, 0.0), np.float64)

    def values(self, figure: str) -> Floats:
        """The figure of each unit, NaN where it has none."""
        value_R, _, _ = self.rows(figure)
        weight_R = self.weights(figure)
        found = [
            float(np.nansum((weight_R * value_R)[own])) if weight_R[own].any() else np.nan
            for own in (self.unit_R == unit for unit in self.units)
        ]
        return np.array(found, np.float64)

    def rows(self, figure: str) -> tuple[Floats, Floats, Floats]:
        """The figure of each row with its ends where cells were counted; NaN where there are none."""
        nothing = np.full(len(self.table), np.nan)
        if figure not in self.table:
            return nothing, nothing, nothing
        value_R = self.table[figure].to_numpy(float)
        for low, high in ((f"low {figure}", f"high {figure}"), (f"{figure}_low", f"{figure}_high")):
            if low in self.table and high in self.table:
                return value_R, self.table[low].to_numpy(float), self.table[high].to_numpy(float)
        if figure in {UNKNOWN, "car_detected"} or kind_of(figure, self.table) == "markers":
            of = "n_cells" if figure == UNKNOWN else "n_cells_used"
            total_R = self.table[of].to_numpy(float)
            low_R, high_R = fraction_interval(value_R * total_R, total_R, BINARY)
            return value_R, np.minimum(low_R, value_R), np.maximum(high_R, value_R)
        return value_R, nothing, nothing


def read_side(path: Path, where: Mapping[str, str], setting: str, unit: str) -> Side:
    """One side, from an annotated file, its table of samples, or a folder of those.

    Parameters
    ----------
    where
        Column of the table -> the value that rows must have.
    setting
        Name of the setting with ``where``, for messages.
    unit
        ``auto``, ``patient`` or ``sample``.

    Raises
    ------
    ReadError, SchemaError
        There is no such table, it is of another kind, or no row is left.
    """
    table = pd.concat([_read(file) for file in _tables(path)], ignore_index=True)
    if path.name.endswith((".h5ad", ".zarr")):
        _check_current(path, int(table["n_cells"].sum()))
    if twice := sorted(set(table["sample"][table["sample"].duplicated()])):
        raise SchemaError(f"{path} has sample {twice[0]!r} in two tables; keep one of them")
    for column, value in where.items():
        table = _where(table, column, value, path, setting)
    if UNKNOWN not in table:
        table[UNKNOWN] = np.nan
    unknown = 1 - table["n_cells_used"] / table["n_cells"]
    table[UNKNOWN] = table[UNKNOWN].fillna(unknown)
    named = "patient" in table and bool(table["patient"].notna().all())
    if unit == "patient" and not named:
        raise SchemaError(f"{path} does not name the patient of every sample; compare.unit=sample compares samples")
    by = "patient" if named and unit != "sample" else "sample"
    return Side(_name(path, where), table.reset_index(drop=True), table[by].astype(str).to_numpy(object))


def _tables(path: Path) -> list[Path]:
    if not path.exists():
        what = "is a setting where B is expected; give A and B, which may be one file"  # B was left out
        raise ReadError(f"{path} {what if '=' in path.name else 'does not exist'}")
    if path.is_dir() and path.suffix != ".zarr":
        found = sorted(path.glob("*.samples.csv"))
        if not found:
            raise ReadError(f"{path} holds no table of samples (*.samples.csv), which `carvae annotate` writes")
        return found
    if path.name.endswith(".samples.csv") or not path.name.endswith(ENDINGS):
        return [path]
    beside = samples_path(path)
    if beside.exists():
        return [beside]
    if path.name.endswith(".csv"):
        return [path]
    raise ReadError(f"{path} has no table of samples beside it ({beside.name}); annotate it again, or give the table")


def _check_current(path: Path, n_told: int) -> None:
    """Raise ReadError where an annotated file has another number of cells than the table of samples beside it tells."""
    try:
        with root_of(path) as root:
            n_cells = int(root["obs"][root["obs"].attrs["_index"]].shape[0])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ReadError(f"{path} cannot be read ({' '.join(str(error).split())}); annotate the query again") from None
    if n_cells != n_told:
        raise ReadError(
            f"{path} has {n_cells:,} cells, and {samples_path(path).name} beside it is of {n_told:,}; annotate the "
            "file again, or give the table that fits"
        )


def _read(path: Path) -> pd.DataFrame:
    table = read_table(path)
    if absent := [name for name in NEEDED if name not in table]:
        raise SchemaError(
            f"{path} is no table of samples as `carvae annotate` writes it beside its results: it has no column "
            f"{absent[0]!r}"
        )
    if table["sample"].isna().any():
        raise SchemaError(f"{path} has rows without a sample; name each, or annotate again")
    for name in [name for name in map(str, table) if name in NEEDED[1:] or kind_of(name, table)]:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise SchemaError(f"{path}, column {name!r}, holds words where numbers are needed; annotate again")
    if not composition(table):
        raise SchemaError(f"{path} has no composition (columns 'fraction STATE' with 'low' and 'high'); annotate again")
    return table


def _where(table: pd.DataFrame, column: str, value: str, path: Path, setting: str) -> pd.DataFrame:
    if column not in table:
        raise SchemaError(f"{path} has no column {column!r}, which {setting} names{nearest(column, table.columns)}")
    text = table[column].map(lambda own: f"{own:g}" if isinstance(own, float) else str(own))
    if not (kept := table[text == value]).size:
        values = ", ".join(sorted(set(text))[:10])
        raise SchemaError(f"{path} has no row with {column} {value!r} ({setting}); its values are {values}")
    return kept


def _name(path: Path, where: Mapping[str, str]) -> str:
    name = path.name
    for ending in (".samples.csv", *ENDINGS):
        name = name.removesuffix(ending)
    return ", ".join([name, *(f"{column} {value}" for column, value in where.items())])


def composition(table: pd.DataFrame) -> list[str]:
    """Columns with the fraction of a state."""
    return [str(c) for c in table if str(c).startswith("fraction ") and f"low {c}" in table]


def kind_of(column: str, table: pd.DataFrame) -> str:
    """Kind of a figure; empty for what is none."""
    for kind, names in OF_KIND.items():
        if column in names:
            return kind
    if column.startswith("fraction "):
        return "composition" if f"low {column}" in table else "markers"
    if column.startswith("mean score_"):
        return "signatures"
    if column.startswith("clone_") and not column.endswith(("_low", "_high")) and column != DEPTH:
        return "clones"
    return ""


def is_share(figure: str, kind: str) -> bool:
    """Whether a figure is between 0 and 1."""
    others = {UNKNOWN, "mean_confidence", "mean_novelty", "gene_overlap"}
    of_clones = {f"clone_{name}" for name in (*SIZE_BINS, "expansion", "gini_simpson", "evenness", "gini")}
    known = kind in {"composition", "markers", "signatures", "CAR"} or figure in others
    return known or figure.removesuffix(AT_DEPTH) in of_clones


def depths_of(a: Side, b: Side) -> list[float]:
    """Cells to which clonal figures at equal depth were drawn."""
    return sorted({float(depth) for side in (a, b) if DEPTH in side.table for depth in side.table[DEPTH].dropna()})


def apart(a: Side, b: Side) -> tuple[Side, Side, list[str]]:
    """The sides such that they can be compared, and what was done for it.

    Where the samples of B are among those of A, they are left out of A: B is compared with the others. Clonal figures
    at equal depth are left out where the depths of the sides differ.
    """
    notes = []
    inside = a.table["sample"].isin(b.table["sample"]).to_numpy()
    if inside.sum() == len(b.table) < len(a.table):
        a = Side(a.name, a.table[~inside].reset_index(drop=True), a.unit_R[~inside])
        notes.append("the samples of B are in A too, and left out there: B is compared with the others")
    if len(depths := depths_of(a, b)) > 1:
        said = ", ".join(f"{depth:g}" for depth in depths)
        notes.append(
            f"clonal figures at equal depth were drawn at different depths ({said}) and are left out; plain ones grow "
            f"with the cells counted, so that no difference is told: annotate both sides with the same clones.depth"
        )
        a, b = (
            Side(s.name, s.table.drop(columns=[c for c in s.table if AT_DEPTH in str(c)]), s.unit_R) for s in (a, b)
        )
    return a, b, notes


def figures(a: Side, b: Side) -> dict[str, str]:
    """Figure -> kind, of all that either side has, in the order of the table.

    Raises
    ------
    SchemaError
        The sides know different states.
    """
    states = [set(composition(side.table)) for side in (a, b)]
    if states[0] != states[1]:
        other = sorted(states[0] ^ states[1])[0].removeprefix("fraction ")
        raise SchemaError(
            f"only one of {a.name} and {b.name} knows the state {other!r}: they were labelled by models with different "
            "states; label both by one model"
        )
    columns = list(dict.fromkeys([*map(str, a.table), *map(str, b.table)]))
    kinds = {c: kind_of(c, a.table) or kind_of(c, b.table) for c in columns}
    return {c: kind for group in GROUPS for c, kind in kinds.items() if kind == group}


def first_axis(sides: tuple[Side, Side], columns: list[str]) -> list[str]:
    """The states of the first label axis: those whose fractions come to one in every sample."""
    total = np.zeros(sum(len(side.table) for side in sides))
    for n, column in enumerate(columns, start=1):
        total += np.concatenate([side.table[column].fillna(0).to_numpy(float) for side in sides])
        known = np.concatenate([side.table[column].notna().to_numpy() for side in sides])
        if np.allclose(total[known], 1.0, atol=1e-6):
            return columns[:n]
    return columns
