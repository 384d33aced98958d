"""Tables for people: what a user's text says is text in Excel and R too, never a formula.

A cell that begins with ``=``, ``+``, ``-``, ``@`` or a control character is computed by a spreadsheet when the table is
opened (OWASP, CSV Injection); an apostrophe before it makes it text. Numbers stay numbers.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pandas as pd

_FORMULA = re.compile(r"\s*[=+\-@;＝＋－＠]")
"""What Excel, LibreOffice or Google Sheets computes."""
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_BREAK = re.compile(r"[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+")
"""What ends a line or a cell for one reader or another; a row of a table is one line."""
FAST = 3
"""Level of gzip: levels above take several times as long for a tenth less."""


def neutral_text(value: object) -> object:
    """The value, with an apostrophe before it where it is text that a spreadsheet would compute; breaks are spaces."""
    if not isinstance(value, str):
        return value
    text = _BREAK.sub(" ", value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def neutral(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `neutral_text` in all cells, the index and the names of columns."""
    found = table.copy(deep=False)
    for place in range(table.shape[1]):
        column = table.iloc[:, place]
        if isinstance(column.dtype, pd.CategoricalDtype):
            said = [neutral_text(value) for value in column.cat.categories]
            if said != list(column.cat.categories):
                values = pd.Series([*said, None], dtype=object)
                found.isetitem(place, values.iloc[column.cat.codes].to_numpy(object))
        elif column.dtype == object or isinstance(column.dtype, pd.StringDtype):
            found.isetitem(place, column.map(neutral_text).to_numpy(object))
    found.columns = pd.Index([neutral_text(name) for name in table.columns], dtype=object)
    if table.index.dtype == object or isinstance(table.index.dtype, pd.StringDtype):
        found.index = pd.Index([neutral_text(name) for name in table.index], dtype=object, name=table.index.name)
    return found


@contextmanager
def text_file(place: Path) -> Iterator[IO[str]]:
    """A file of text to write; packed where its name ends in ``.gz``, with the same bytes for the same text."""
    if place.suffix != ".gz":
        with place.open("w", encoding="utf-8", newline="") as plain:
            yield plain
        return
    with (
        place.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=FAST, fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        yield text


def write_table(table: pd.DataFrame, place: Path, float_format: str | None = None) -> None:
    """Write a table without its index as CSV; packed where the name of ``place`` ends in ``.gz``."""
    with text_file(place) as file:
        neutral(table).to_csv(file, index=False, float_format=float_format, lineterminator="\n")
