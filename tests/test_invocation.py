"""Options that all verbs with a query share: one way, one meaning, nothing written that was not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from trained import World, carvae, sha256

from carvae.invocation import OF_QUERIES

VERBS = ("embed", "annotate", "plan", "map", "explain", "respond", "perturb")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_with_a_query_takes_the_same_options(verb: str) -> None:
    text = carvae(verb, "--help").out
    for name in OF_QUERIES:
        if name != "overrides":
            assert f"--{name.removeprefix('as_').replace('_', '-')}" in text
    assert "section.key=value" in text


def test_flags_are_settings_and_the_summary_is_one_line_of_json(world: World, tmp_path: Path) -> None:
    out = tmp_path / "A.h5ad"
    flags = ("predict.warn_overlap=0.99", "--threads", 1, "--device", "cpu", "--seed", 7)
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", out, "--json", *flags)
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out)
    samples = pd.read_csv(tmp_path / "A.samples.csv")
    assert summary["verb"] == "annotate"
    assert summary["seed"] == 7
    assert summary["bundle_id"] == json.loads((world.bundle / "model.json").read_text())["sha256"][:12]
    assert [Path(path).name for path in summary["written"]] == ["A.h5ad", "A.cells.csv.gz", "A.samples.csv"]
    assert all(Path(path).exists() for path in summary["written"])
    assert [row["sample"] for row in summary["rows"]] == samples["sample"].tolist()
    assert [row["n_cells"] for row in summary["rows"]] == samples["n_cells"].tolist()
    assert all("nan" not in json.dumps(row).casefold().split('"') for row in summary["rows"])
    assert any("genes are missing" in warning for warning in summary["warnings"])
    cells = pd.read_csv(tmp_path / "A.cells.csv.gz")
    assert cells["sample"].value_counts().to_dict() == samples.set_index("sample")["n_cells"].to_dict()
    assert not any(column.startswith("X_carvae") for column in cells)


def test_a_labelled_map_takes_one_command(world: World, tmp_path: Path) -> None:
    out, page = tmp_path / "A.h5ad", tmp_path / "A.html"
    ask = ("annotate", world.query_path, "--model", world.bundle, "--report", page)
    for wrong, words in (
        (("--out", tmp_path / "A.csv"), "is a table of cells without counts"),
        (("--out", out, "--report", tmp_path / "A.pdf"), "is no page; end it in .html"),
        (("--out", out, "--report", world.bundle / "A.html"), "is a model or lies in one"),
        (("--out", "-"), "--out - prints a table; give --out A.h5ad"),
    ):
        for more in ((), ("--dry-run",)):
            answer = carvae(*ask, *wrong, *more)
            assert answer.code == 1
            assert words in answer.err
            assert not list(tmp_path.iterdir()), "refused before any cell is labelled"
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", out, "report.names=false")
    assert answer.code == 1
    assert "report.* is about the page, and none is asked for; give --report" in answer.err
    assert not list(tmp_path.iterdir())
    answer = carvae(*ask, "--out", out, "report.genes=[NOSUCH]")
    assert answer.code == 1
    assert f"the labels are in {out}, and `carvae report` makes the page" in answer.err
    assert out.exists()
    assert not page.exists()
    answer = carvae(*ask, "--out", out, "--json", "report.max_cells=100")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["written"][-1] == str(page)
    later = ("report", out, "--model", world.bundle, "--out", tmp_path / "B.html")
    assert carvae(*later, "report.max_cells=100").code == 0
    again = (tmp_path / "B.html").read_text(encoding="utf-8")
    assert len(page.read_text(encoding="utf-8")) == pytest.approx(len(again), rel=0.01)


@pytest.mark.parametrize("verb", ["embed", "annotate", "plan", "map", "explain", "perturb", "respond"])
def test_no_verb_writes_into_a_model(world: World, verb: str) -> None:
    before = sha256(world.bundle)
    inside = world.bundle / ("A.csv" if verb in {"embed", "annotate", "respond"} else "more")
    for more in ((), ("--dry-run",)):
        answer = carvae(verb, world.query_path, "--model", world.bundle, "--out", inside, *more)
        assert answer.code == 1
        assert "is a model or lies in one" in answer.err
    assert sha256(world.bundle) == before


def test_neither_do_verbs_without_a_model_nor_training(world: World, tmp_path: Path) -> None:
    before = sha256(world.bundle)
    table = tmp_path / "t.csv"
    table.write_text("patient,timepoint,clone_id,cell_type\np,D0,c,x\n")
    for words in (
        ("clones", table, "--out", world.bundle),
        ("compare", table, table, "--out", world.bundle / "in" / "it"),
        ("train", world.config, f"output={world.bundle / 'inner'}"),
        ("check", world.config, f"output={world.bundle / 'inner'}"),
    ):
        answer = carvae(*words)
        assert answer.code == 1
        assert "is a model or lies in one" in answer.err
    assert sha256(world.bundle) == before
    assert not world.bundle.with_name("inner.work").exists()


def test_what_a_command_reads_is_never_written_over(world: World, tmp_path: Path) -> None:
    sheet = tmp_path / "A.samples.csv"
    names = sorted(world.query.obs["library_id"].astype(str).unique())
    sheet.write_text("sample,patient\n" + "".join(f"{name},p{n}\n" for n, name in enumerate(names)))
    table = tmp_path / "k" / "samples.csv"
    table.parent.mkdir()
    table.write_text("patient,timepoint,clone_id,cell_type\n" + "".join(f"p,D{d},c{d % 2},x\n" for d in (0, 7, 14)))
    before = sha256(sheet), sha256(table)
    annotated = ("annotate", world.query_path, "--model", world.bundle, "--out", tmp_path / "A.h5ad")
    for words in ((*annotated, f"predict.sheet={sheet}"), ("clones", table, "--out", table.parent)):
        answer = carvae(*words)
        assert answer.code == 1
        assert "is read by this command and would be overwritten; choose another output" in answer.err
    assert (sha256(sheet), sha256(table)) == before
    assert not (tmp_path / "A.h5ad").exists()
    assert carvae(*annotated).code == 0, "a table of an earlier run is no input"


def test_a_device_that_is_not_there_is_said(world: World, tmp_path: Path) -> None:
    answer = carvae(
        "embed", world.query_path, "--model", world.bundle, "--out", tmp_path / "A.csv", "--device", "cuda:99"
    )
    assert answer.code == 1
    assert "predict.device is cuda:99, but torch finds" in answer.err
    wrong = carvae("embed", world.query_path, "--model", world.bundle, "--out", tmp_path / "A.csv", "--device", "gpu")
    assert wrong.code == 1
    assert "predict.device" in wrong.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_check_says_and_writes_nothing(world: World, tmp_path: Path) -> None:
    query = (world.query_path, "--model", world.bundle)
    dry = carvae("annotate", *query, "--out", tmp_path / "A.h5ad", "--dry-run", "--json")
    said = carvae("check", *query, "--json")
    assert (dry.code, said.code) == (0, 0), dry.err + said.err
    of_time = {"seconds", "memory_bytes", "free_bytes"}
    facts, others = ({k: v for k, v in json.loads(answer.out).items() if k not in of_time} for answer in (dry, said))
    assert facts == others
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "out", "words"),
    [
        ("annotate", "A.txt", "says no format"),
        ("respond", "A.csv", "predicts no outcomes"),
        ("plan", "file", "is a file; plan writes"),
        ("explain", "file", "is a file; explain writes"),
        ("perturb", "file", "is a file; perturb writes"),
        ("map", "file", "is a file, and a model is a folder"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(world: World, tmp_path: Path, verb: str, out: str, words: str) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = (verb, world.query_path, "--model", world.bundle, "--out", tmp_path / out)
    dry, wet = carvae(*arguments, "--dry-run"), carvae(*arguments)
    assert dry.code == wet.code == 1
    assert words in dry.err
    assert dry.err == wet.err
    assert dry.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_table_is_printed_when_it_is_complete(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    query = ("annotate", world.query_path, "--model", world.bundle)
    assert carvae(*query, "--out", tmp_path / "A.csv").code == 0
    monkeypatch.chdir(tmp_path)
    caplog.clear()
    answer = carvae(*query, "--out", "-")
    assert answer.code == 0, answer.err
    assert answer.out.encode() == (tmp_path / "A.csv").read_bytes()
    assert "genes found" in caplog.text
    assert "wrote" not in caplog.text  # a scratch file that is no more
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.csv", "A.samples.csv"]
    answer = carvae("annotate", tmp_path / "gone.h5ad", *query[2:], "--out", "-")
    assert (answer.code, answer.out) == (1, "")


@pytest.mark.parametrize(
    ("verb", "more", "words"),
    [("annotate", ("--json",), "both write to the standard output"), ("plan", (), "writes a folder")],
)
def test_what_cannot_be_printed_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, more: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = carvae(verb, world.query_path, "--model", world.bundle, "--out", "-", *more)
    assert answer.code == 1
    assert words in answer.err
    assert list(tmp_path.iterdir()) == []


def test_settings_that_a_verb_does_not_read_are_refused(world: World, tmp_path: Path) -> None:
    answer = carvae("embed", world.query_path, "train.lr=1", "--model", world.bundle, "--out", tmp_path / "A.csv")
    assert answer.code == 1
    assert "changes nothing here; this verb reads predict.* alone" in answer.err
