"""Tables that users give: one reader for all of them, so that a file that is none is refused in the same words.

Columns are parted by what parts the names in the first line: commas, tabs, or the semicolons that a spreadsheet writes
where a comma is the decimal point. Names of samples and patients stay as they are written: ``007`` is no number, and a
sample may be called ``NA``: it is missing only where its cell is empty.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from carvae.data.atomic import note_input
from carvae.data.schema import CONTRACT
from carvae.errors import ReadError, refuse_stream

SEPARATORS = (",", "\t", ";")
"""The first of those that are as frequent wins."""
SAMPLE, PATIENT = (
    {name.casefold() for column in CONTRACT if column.name == kind for name in (column.name, *column.aliases)}
    for kind in ("sample", "patient")
)
"""Columns that are read as text, whatever their case."""
QUOTED = re.compile(r'"[^"]*"')
WHOLE = re.compile(r"\d+\.0")
"""A number that a table wrote with a point since others were missing."""
DECIMAL = re.compile(r"[-+]?\d+(,\d+)?([eE][-+]?\d+)?")
WORKBOOK = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""How files of Excel begin."""
PACKED = b"\x1f\x8b"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def read_table(path: Path, setting: str = "", text: Iterable[str] = (), samples: Iterable[str] = ()) -> pd.DataFrame:
    """A table in CSV, with commas, semicolons or tabs, packed with gzip or not.

    Parameters
    ----------
    setting
        What named the file, such as ``predict.sheet``, for messages.
    text
        Further columns that are read as text.
    samples
        Further columns that name samples.

    Raises
    ------
    ReadError
        The file is not there, is no table, or is one of Excel.
    """
    refuse_stream(path)
    note_input(path)
    try:
        head, first = _beginning(path)
        if head.startswith(WORKBOOK):
            raise ReadError(f"{path} is a workbook of Excel; save the sheet as CSV (UTF-8) and give that")
        line = QUOTED.sub("", first.splitlines()[0]) if first.strip() else ""
        sep = max(SEPARATORS, key=line.count)
        with _opened(path, packed=head.startswith(PACKED)) as lines:
            columns = [*map(str, pd.read_csv(lines, sep=sep, nrows=0).columns)]
        of_samples = {c for c in columns if c.casefold() in SAMPLE} | set(samples)
        names = {c for c in columns if c.casefold() in PATIENT} | set(text) | of_samples
        with _opened(path, packed=head.startswith(PACKED)) as lines:
            table = pd.read_csv(
                lines,
                sep=sep,
                dtype=dict.fromkeys(names - of_samples, str),
                converters=dict.fromkeys(of_samples, str),
                low_memory=False,
            )
    except FileNotFoundError:
        raise ReadError(f"{f'{setting}=' if setting else ''}{path} does not exist") from None
    except UnicodeDecodeError:
        raise ReadError(f"{path} cannot be read as a table: it is no text in UTF-8; save it as CSV (UTF-8)") from None
    except (OSError, EOFError, ValueError) as error:
        raise ReadError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from None
    for sample in of_samples.intersection(table):
        table[sample] = table[sample].astype("str").where(table[sample].map(str.strip) != "")
    table = table.dropna(how="all").reset_index(drop=True)  # a spreadsheet writes separators for rows that were cleared
    for name in table:
        if name in names:
            table[name] = _as_written(table[name])
        elif sep == ";" and not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = _with_points(table[name])
    table.columns = [CONTROL.sub(" ", str(name)) for name in table]  # such as the line break of a wide header
    return table


def _beginning(path: Path) -> tuple[bytes, str]:
    """The first bytes of a file, and its first line."""
    with path.open("rb") as file:
        head = file.read(4)
    with _opened(path, packed=head.startswith(PACKED), errors="replace") as lines:
        return head, lines.readline()


def _opened(path: Path, *, packed: bool, errors: str = "strict") -> TextIO:
    """The text of a file, its lines ended by a newline: single carriage returns take pandas' parser all memory."""
    if packed:
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors)
    return path.open(encoding="utf-8-sig", errors=errors)


def _as_written(column: pd.Series[str]) -> pd.Series[str]:
    """Names as they are, but whole numbers without a point where the table wrote all with one."""
    known = column.dropna()
    if len(known) and known.map(lambda name: WHOLE.fullmatch(name) is not None).all():
        return column.str.removesuffix(".0")
    return column


def _with_points(column: pd.Series[str]) -> pd.Series[Any]:
    """Numbers with decimal commas as numbers, all else as it is."""
    known = column.dropna().astype(str)
    if len(known) and known.map(lambda value: DECIMAL.fullmatch(value) is not None).all():
        return pd.to_numeric(column.str.replace(",", "."))
    return column
