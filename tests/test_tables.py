"""Tables that users give: what a spreadsheet writes is read, names stay as written, and what is no table is told."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trained import carvae

from carvae.data.results import samples_path
from carvae.data.sides import read_side
from carvae.data.tables import read_table
from carvae.errors import ReadError
from carvae.page.annotated import read_annotated
from carvae.section_patient import ClonesConfig

KEPT = Path(__file__).resolve().parent / "bundles" / "0.1.0-layout5"

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


def test_single_carriage_returns_end_lines_and_take_no_memory(tmp_path: Path) -> None:
    """Found by fuzzing: of such a file of 488 bytes pandas made 20 GB."""
    (tmp_path / "t.csv").write_bytes(b"sample;n\r01;2\r02;3\r")
    assert read_table(tmp_path / "t.csv")["n"].tolist() == [2, 3]
    case = Path(__file__).parent / "robustness" / "corpus" / "text" / "found-carriage-returns"
    (tmp_path / "t.csv").write_bytes(case.read_bytes()[1:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_table(tmp_path / "t.csv")) == 4, "two of the six rows hold nothing"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_what_a_name_holds_of_control_characters_is_neither_kept_nor_shown(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'"Day\n28",\x1b[31msample,n\n1,2,3\n')
    assert list(read_table(tmp_path / "t.csv")) == ["Day 28", " [31msample", "n"]
    assert str(ReadError("sample \x1b[31m\r\x07 of\nfile")) == "sample \\x1b[31m\\r\\x07 of\nfile"


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


def test_a_sample_may_be_called_na_and_is_missing_where_its_cell_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Sample,lot,note\nNA,NA,NA\nnan,nan,x\nNone,007,y\n,,z\n ,,z\n007,1,z\n")
    found = read_table(tmp_path / "t.csv", samples=["lot"])
    assert found["Sample"].fillna("missing").tolist() == ["NA", "nan", "None", "missing", "missing", "007"]
    assert found["lot"].fillna("missing").tolist() == ["NA", "nan", "007", "missing", "missing", "1"]
    assert found["note"].isna().tolist() == [True, False, False, False, False, False]


def test_all_readers_take_na_for_the_name_of_a_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    query = ad.read_h5ad(KEPT / "query.h5ad")
    query.obs["sample_id"] = pd.Series(["NA", "nan", None] * (query.n_obs // 3), query.obs_names, dtype=object)
    with ad.settings.override(allow_write_nullable_strings=False):
        query.write_h5ad(tmp_path / "q.h5ad")
    (tmp_path / "sheet.csv").write_text("sample,tissue\nNA,blood\nnan,marrow\nunknown sample,NA\n")
    out = tmp_path / "A.h5ad"
    said = carvae(
        "annotate", tmp_path / "q.h5ad", "--model", KEPT / "model", "--out", out, "--json",
        "--report", tmp_path / "A.html", f"predict.sheet={tmp_path / 'sheet.csv'}", "report.max_cells=100",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "holds 'NA', 'nan' (40), taken as a name of a sample" in caplog.text
    names = ["NA", "nan", "unknown sample"]
    rows = {row["sample"]: row for row in json.loads(said.out)["rows"]}
    assert sorted(rows) == names
    assert {rows[name]["n_cells"] for name in names} == {query.n_obs // 3}
    assert [rows[name]["tissue"] for name in names] == ["blood", "marrow", None]
    assert list(read_annotated(out, ClonesConfig()).sample_names) == names
    assert read_table(samples_path(out))["sample"].tolist() == names
    assert sorted(read_side(out, {}, "compare.a", "sample").units) == names
    assert list(read_side(out, {"sample": "NA"}, "compare.a", "sample").units) == ["NA"]


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
