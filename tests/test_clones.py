"""`carvae clones`: from any table of cells to tables and pictures, or one sentence and nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trained import carvae

from carvae import clones
from carvae.clones import PLOTS, TABLES, clonal_cells, run
from carvae.errors import SchemaError
from carvae.section_patient import ClonesConfig


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 900
    clone = "c" + pd.Series(rng.zipf(1.5, n).clip(max=60).astype(str))
    return pd.DataFrame(
        {
            "donor_id": rng.choice(["p1", "p2"], n),
            "timepoint": rng.choice(["product", "D28", "M6"], n, p=[0.3, 0.4, 0.3]),
            "cell_type": rng.choice(["memory", "effector", "exhausted", "unknown"], n),
            "clonotype": np.where(rng.random(n) < 0.2, None, clone),
        }
    )


@pytest.fixture(scope="module")
def written(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clones")
    table.to_csv(folder / "cells.csv.gz", index_label="cell")
    answer = carvae("clones", folder / "cells.csv.gz", "--out", folder / "out", "clones.depth=40", "seed=3")
    assert answer.code == 0, answer.err
    return folder


def test_a_table_of_cells_becomes_tables_and_pictures(written: Path, table: pd.DataFrame) -> None:
    out = written / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted([*TABLES, *PLOTS])
    assert all((out / plot).read_bytes().startswith(b"\x89PNG") for plot in PLOTS)
    tracked = pd.read_csv(out / "tracked.csv")
    known = table.dropna(subset=["clonotype"])
    seen = known.groupby(["donor_id", "clonotype"])["timepoint"].nunique()
    assert len(tracked) == (seen > 1).sum()
    assert tracked["clone"].is_unique, "a name in two patients is two clones"
    assert "unknown" not in " ".join(tracked["first_states"].fillna(""))
    samples = pd.read_csv(out / "samples.csv")
    assert list(samples["timepoint"]) == ["product", "D28", "M6"] * 2
    assert set(samples["clone_depth"]) == {40}
    assert samples["clone_cells"].sum() == len(known)


def test_a_second_run_says_the_same(written: Path, tmp_path: Path) -> None:
    run(written / "cells.csv.gz", tmp_path / "again", ClonesConfig(depth=40), seed=3)
    for name in TABLES:
        assert (tmp_path / "again" / name).read_bytes() == (written / "out" / name).read_bytes()


def test_what_would_be_followed_is_said_and_what_was_is_told_to_programs(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query, out = written / "cells.csv.gz", tmp_path / "out"
    dry = carvae("clones", query, "--out", out, "--dry-run", "--json")
    assert json.loads(dry.out)["followed"] == ["p1", "p2"]
    assert json.loads(dry.out)["timepoints"] == ["product", "D28", "M6"]
    said = carvae("clones", query, "--out", out, "--dry-run").out
    assert said.startswith("900 cells of 2 patients, ")
    assert not out.exists()
    answer = carvae("clones", query, "--out", out, "clones.depth=40", "--seed", 3, "--json")
    told = json.loads(answer.out)
    assert (answer.code, told["verb"], told["seed"]) == (0, "clones", 3)
    assert sorted(told["written"]) == sorted(map(str, out.iterdir()))
    assert [row["timepoint"] for row in told["rows"]] == ["product", "D28", "M6"] * 2
    assert (out / "samples.csv").read_bytes() == (written / "out" / "samples.csv").read_bytes()
    assert said.strip() in caplog.text, "a run begins with what --dry-run says"


def test_a_patient_without_a_clone_seen_twice_has_no_empty_panel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    real = clones.draw_tracking
    monkeypatch.setattr(clones, "draw_tracking", lambda found, who, top: (drawn.extend(who), real(found, who, top))[1])
    rows = ["patient,timepoint,state,clone_id", "A,D0,m,x", "A,D7,e,x", "B,D0,m,", "B,D7,m,", "C,D0,m,y", "C,D7,m,z"]
    (tmp_path / "cells.csv").write_text("\n".join(rows))
    run(tmp_path / "cells.csv", tmp_path / "out", ClonesConfig())
    assert drawn == ["A"]
    (tmp_path / "cells.csv").write_text("\n".join([rows[0], *rows[-2:]]))
    run(tmp_path / "cells.csv", tmp_path / "out", ClonesConfig())
    assert not (tmp_path / "out" / PLOTS[0]).exists()
    assert "no clone is at two time points, so there is nothing to follow" in caplog.text


def test_months_that_were_annotated_one_by_one_are_put_together(
    table: pd.DataFrame, written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "months"
    folder.mkdir()
    (folder / "D28.samples.csv").write_text("sample\na\n")
    for time, cells in table.groupby("timepoint"):
        cells.to_csv(folder / f"{time}.csv", index=False)
    run(folder, tmp_path / "out", ClonesConfig(depth=40))
    for name in set(TABLES) - {"samples.csv"}:
        assert (tmp_path / "out" / name).read_bytes() == (written / "out" / name).read_bytes()


def test_a_copy_in_the_folder_is_refused(table: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "months"
    folder.mkdir()
    for time, cells in table.groupby("timepoint"):
        cells.to_csv(folder / f"{time}.csv", index=False)
    (folder / "D28 (1).csv").write_bytes((folder / "D28.csv").read_bytes())
    answer = carvae("clones", folder, "--out", tmp_path / "out")
    assert answer.code == 1
    assert "D28 (1).csv and" in answer.err
    assert "hold the same cells, which would count twice; keep one of them" in answer.err
    assert not (tmp_path / "out").exists()


def test_one_time_point_is_told_and_leaves_no_old_picture(
    table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = table[table["timepoint"] == "D28"]
    one.to_csv(tmp_path / "cells.tsv", sep="\t", index=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PLOTS[0]).touch()
    answer = carvae("clones", tmp_path / "cells.tsv", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "no patient has two time points with clones, so there is nothing to follow" in caplog.text
    assert "patient is taken from obs['donor_id']" in caplog.text
    assert not (tmp_path / "out" / PLOTS[0]).exists()
    assert (tmp_path / "out" / PLOTS[1]).exists()


def test_columns_and_order_are_the_users(table: pd.DataFrame) -> None:
    other = table.rename(columns=dict(zip(table, ["who", "visit", "kind", "tcr"], strict=True)))
    other["visit"] = other["visit"].map({"product": "zero", "D28": "first", "M6": "second"})
    other["run"] = other["who"] + other["visit"]
    settings = {"patient": "who", "timepoint": "visit", "state": "kind", "clone": "tcr", "sample": "run"}
    found = clonal_cells(other, "t", ClonesConfig(**settings, order=("zero", "second")))
    assert found.order == ("zero", "second")
    assert set(found.cells["sample"]) == {"p1zero", "p2zero", "p1second", "p2second"}
    with pytest.raises(SchemaError, match=r"not clear when 'first', 'second', 'zero' was"):
        clonal_cells(other, "t", ClonesConfig(**settings))
    days = table.drop(columns="timepoint").assign(timepoint_days=np.where(table["timepoint"] == "M6", 180, 28.5))
    assert clonal_cells(days, "t", ClonesConfig()).order == ("D28.5", "D180")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"donor_id": ""}, "has no value in obs['donor_id'] of"),
        ({"donor_id": None}, "names no patient; say which column does: clones.patient=COLUMN (it has timepoint,"),
        ({"clonotype": None}, "names no clone; say which column does: clones.clone=COLUMN"),
        ({"timepoint": None}, "names no timepoint; say which column does: clones.timepoint=COLUMN"),
        ({"cell_type": None}, "names no state; say which column does: clones.state=COLUMN"),
        ({"clonotype": ""}, "has no value in obs['clonotype'] of"),
    ],
)
def test_what_lacks_is_said_with_the_remedy(
    table: pd.DataFrame, tmp_path: Path, change: dict[str, str | None], words: str
) -> None:
    wrong = table.copy()
    for column, value in change.items():
        wrong = wrong.drop(columns=column) if value is None else wrong.assign(**{column: value})
    wrong.to_csv(tmp_path / "t.csv", index=False)
    answer = carvae("clones", tmp_path / "t.csv", "--out", tmp_path / "out")
    assert answer.code == 1
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_text("no")
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.rds").touch()
    for name, words in (
        ("nowhere.csv", "does not exist"),
        ("x.h5ad", "cannot be read"),
        ("x.csv", "cannot be read"),
        ("empty", "holds no .h5ad, .zarr, .csv, .tsv"),
        ("x.rds", "is no table of cells"),
    ):
        answer = carvae("clones", tmp_path / name, "--out", tmp_path / "out")
        assert answer.code == 1
        assert words in answer.err
    answer = carvae("clones", tmp_path / "x.csv", "--out", tmp_path / "x.rds")
    assert "is a file; clones writes its tables and pictures into a folder" in answer.err
    answer = carvae("clones", tmp_path / "x.csv", "--out", tmp_path / "out", "predict.root=auto")
    assert "changes nothing here; this verb reads clones.* and seed alone" in answer.err
