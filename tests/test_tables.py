"""Tables that users give: what a spreadsheet writes is read, names stay as written, and what is no table is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.data.tables import read_table
from carvae.errors import ReadError

FRAME = pd.DataFrame({"sample": ["007", "12"], "note": ["a, b; c", "d"], "share": [0.5, 1e-3], "n": [1, 2]})


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("t.csv", {}),
        ("t.tsv", {"sep": "\t"}),
        ("t.csv.gz", {}),
        ("t.tsv.gz", {"sep": "\t"}),
        ("german.csv", {"sep": ";", "decimal": ",", "encoding": "utf-8-sig", "lineterminator": "\r\n"}),
        ("points.csv", {"sep": ";"}),
        ("tabs.csv", {"sep": "\t"}),
    ],
)
def test_what_a_spreadsheet_writes_is_read(tmp_path: Path, name: str, how: dict[str, str]) -> None:
    FRAME.to_csv(tmp_path / name, index=False, **how)  # type: ignore[call-overload]
    pd.testing.assert_frame_equal(read_table(tmp_path / name), FRAME, check_dtype=False)


def test_packed_is_told_by_the_bytes_and_not_by_the_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(gzip.compress(b"sample,n\n01,2\n"))
    assert read_table(tmp_path / "t.csv")["sample"].tolist() == ["01"]


def test_names_are_as_written_but_for_a_point_that_a_table_added(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("donor_id,who,n\n1.0,001,1.0\n,002,\n2.0,,3\n")
    found = read_table(tmp_path / "t.csv", text=["who"])
    assert found["donor_id"].fillna("").tolist() == ["1", "", "2"]
    assert found["who"].fillna("").tolist() == ["001", "002", ""]
    assert found["n"].dtype == float
    (tmp_path / "t.csv").write_text("Sample;Patient;Timepoint\n01;007;M1\n")
    assert read_table(tmp_path / "t.csv").iloc[0].tolist() == ["01", "007", "M1"], "customary names in any case"


def test_rows_that_hold_nothing_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sample;n\na;1,5\n;\nb;2\n;\n;\n")
    assert read_table(tmp_path / "t.csv").to_numpy().tolist() == [["a", 1.5], ["b", 2.0]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"^predict\.sheet=.*t\.csv does not exist$"),
        (b"", "cannot be read as a table: No columns"),
        (b"PK\x03\x04", "is a workbook of Excel; save the sheet as CSV"),
        (b"a,b\n\xff\xfe,1\n", r"no text in UTF-8; save it as CSV \(UTF-8\)"),
        ("a\tb\n1\t2\n".encode("utf-16"), "no text in UTF-8"),
        (b"a,b\n1,2,3,4\n5,6\n1,2,3,4,5,6\n", "cannot be read as a table: Error tokenizing"),
        (gzip.compress(b"a,b\n" * 9999, mtime=0)[:40], "cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ReadError, match=words) as told:
        read_table(tmp_path / "t.csv", "predict.sheet")
    assert "\n" not in str(told.value)
    with pytest.raises(ReadError):
        read_table(tmp_path)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_table_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(content)
    said = ""
    try:
        read_table(file)
    except ReadError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
