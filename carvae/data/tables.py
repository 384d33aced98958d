"""Tables of text that a spreadsheet opens: a name that it would take for a formula is marked as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, Any

import pandas as pd

_FORMULA = re.compile(r"\s*[=+\-@;＝＋－＠]")
"""What a cell begins with that Excel, LibreOffice or Google Sheets runs (OWASP, "CSV injection")."""
_BREAK = re.compile(r"[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+")
"""What ends a line or a cell for one reader or another; a row of a table is one line."""


def write_csv(table: pd.DataFrame, file: Path | str | IO[str], **settings: Any) -> None:
    """Write a table as CSV by ``DataFrame.to_csv``, every text in it inert.

    Names come from other people's files. One that begins like a formula gets an apostrophe before it, which a
    spreadsheet does not show, and a break of the line in it becomes a space; numbers, negative ones too, stay.
    """
    inert = table.copy(deep=False)
    inert.columns = pd.Index([_inert(name) for name in table.columns], dtype=object)
    if not pd.api.types.is_numeric_dtype(table.index):
        inert.index = table.index.map(_inert)
    for position, column in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(column):
            values = table.iloc[:, position]
            shown = {value: _inert(value) for value in values.dropna().unique()}
            if any(text is not value for value, text in shown.items()):
                inert.isetitem(position, values.astype(object).map(shown).array)
    inert.to_csv(file, **settings)


def _inert(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = _BREAK.sub(" ", value) if _BREAK.search(value) else value
    if not _FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
