"""Tables for people: no text is computed by a spreadsheet, nothing else changes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.spreadsheet import neutral, neutral_text, write_table


@pytest.mark.parametrize("text", ["=1+1", "+SUM(A1)", "-cmd", "@x", " =1", ";=1", "＝1", "=HYPERLINK(1)", "-"])
def test_formulas_become_text(text: str) -> None:
    assert neutral_text(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-7", "+3.5", "-1e-3", ".5", "CD8+", "a=b", "", "1-2", "AAAC-1"])
def test_numbers_and_plain_text_stay(text: str) -> None:
    assert neutral_text(text) == text


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_is_one_line_of_a_table(names: list[str]) -> None:
    rows = neutral(pd.DataFrame({"a": names, "b": range(len(names))})).to_csv(index=False)
    assert len(rows.splitlines()) == len(names) + 1


@given(st.text())
def test_what_comes_out_is_on_one_line_and_safe_and_safe_twice(text: str) -> None:
    once = neutral_text(text)
    assert isinstance(once, str)
    assert len(once.splitlines()) <= 1
    assert neutral_text(once) == once
    if once.lstrip()[:1] in {"=", "@", ";"}:
        pytest.fail(f"{once!r} is computed")


def test_every_part_of_a_table_is_neutral(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "=head": ["=a", "b"],
            "state": pd.Categorical(["+x", None], categories=["y", "+x"]),
            "text": pd.array(["@z", None], dtype="string"),
            "n": [-1.5, np.nan],
        },
        index=["-cell", "cell"],
    )
    before = table.copy()
    found = neutral(table)
    pd.testing.assert_frame_equal(table, before)
    assert found.columns.tolist() == ["'=head", "state", "text", "n"]
    assert found.index.tolist() == ["'-cell", "cell"]
    assert found["'=head"].tolist() == ["'=a", "b"]
    assert found["state"].tolist() == ["'+x", None]
    assert found["text"].iloc[0] == "'@z"
    assert found["n"].iloc[0] == -1.5
    write_table(table, tmp_path / "t.csv")
    write_table(table, tmp_path / "t.csv.gz")
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines() == ["'=head,state,text,n", "'=a,'+x,'@z,-1.5", "b,,,"]
    assert gzip.decompress((tmp_path / "t.csv.gz").read_bytes()).decode() == text


def test_two_columns_of_one_name_are_both_neutral() -> None:
    table = pd.DataFrame([["=a", "=b"]], columns=["x", "x"])
    assert neutral(table).iloc[0].tolist() == ["'=a", "'=b"]
