"""Tables are read by spreadsheets: no name of a file is a formula there, and none breaks a row."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.tables import write_csv

FORMULAS = [
    '=HYPERLINK("http://127.0.0.1/?"&A1)', "+1+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", ";=1",
    "＝1+1", " =1+1", "\n@x",
]  # fmt: skip


def written(table: pd.DataFrame, **settings: object) -> str:
    file = io.StringIO()
    write_csv(table, file, **settings)
    return file.getvalue()


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_name_like_a_formula_is_text(formula: str) -> None:
    table = pd.DataFrame({formula: [formula, "plain"], "group": pd.Categorical([formula, "x"])}, index=[formula, "b"])
    before = table.copy()
    rows = list(csv.reader(io.StringIO(written(table, index_label="cell"))))
    assert [len(row) for row in rows] == [3, 3, 3]
    assert all(text.lstrip()[:1] not in set("=+-@;＝＋－＠") for row in rows for text in row)
    marked = "'" + re.sub(r"[\t\r\n]", " ", formula)
    assert {rows[0][1], rows[1][0], rows[1][1], rows[1][2]} == {marked}
    pd.testing.assert_frame_equal(table, before)


def test_numbers_and_plain_names_are_as_pandas_writes_them() -> None:
    table = pd.DataFrame({"x": [-1.5, np.nan], "day": ["-7", None], "name": ["CD4+ a-b", "AAAC-1"], "n": [1, -2]})
    assert written(table, index=False) == table.to_csv(index=False)
    assert written(table) == table.to_csv()


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_is_one_line_and_one_cell(names: list[str]) -> None:
    rows = written(pd.DataFrame({"a": names, "b": range(len(names))}), index=False)
    assert len(rows.splitlines()) == len(names) + 1
