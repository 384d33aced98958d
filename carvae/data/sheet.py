"""A table with one row per sample, for queries that say nothing of their samples but the name, as 10x folders do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from carvae.data.schema import NAMES, inspect_obs
from carvae.data.tables import read_table
from carvae.errors import SchemaError, join_problems

SHOWN = 5


def read_sheet(path: Path) -> pd.DataFrame:
    """What is known of each sample in the names of the contract, indexed by sample.

    Raises
    ------
    ReadError
        There is no such table.
    SchemaError
        It names no sample, or one twice, or a column cannot be used.
    """
    table = read_table(path, "predict.sheet")
    found = inspect_obs(table, "", {}, {}, require=("sample",))
    if "sample" not in found.obs or found.obs["sample"].isna().any():
        raise SchemaError(f"{path} needs a column 'sample' that names every row (it has {', '.join(map(str, table))})")
    broken = [f"column {p.column!r}: {p.what} ({p.count:,}); {p.remedy}" for p in found.problems]
    if broken:
        raise SchemaError(join_problems(f"{path} cannot be used", broken))
    sheet = found.obs.set_index(found.obs["sample"].astype(str).to_numpy(object)).drop(columns="sample")
    if sheet.index.has_duplicates:
        raise SchemaError(f"{path} names sample {sheet.index[sheet.index.duplicated()][0]!r} twice; keep one row of it")
    if not len(sheet.columns):
        raise SchemaError(
            f"{path} says nothing of samples that carvae knows; name its columns {', '.join(NAMES[2:8])} ..."
        )
    return sheet


def of_cells(sheet: pd.DataFrame, sample: pd.Series[str], path: Path) -> pd.DataFrame:
    """The sheet's columns for every cell.

    Raises
    ------
    SchemaError
        A sample is not in the sheet.
    """
    there = pd.unique(sample)
    if absent := [str(name) for name in there if name not in sheet.index]:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        raise SchemaError(
            f"{path} has no row for sample {', '.join(map(repr, absent[:SHOWN]))}{more}; its samples are "
            f"{', '.join(map(repr, sheet.index[:SHOWN]))}{' ...' if len(sheet) > SHOWN else ''}"
        )
    return sheet.loc[sample.to_numpy(object)].reset_index(drop=True)


def told_of_cells(path: Path | None, sample: pd.Series[str]) -> pd.DataFrame:
    """What the sheet at ``path`` says of every cell; without columns where none is given. Raises as the two above."""
    return pd.DataFrame(index=range(len(sample))) if path is None else of_cells(read_sheet(path), sample, path)
