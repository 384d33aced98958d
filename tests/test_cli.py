"""The command line: how it starts, what it says and where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from trained import Answer, World, carvae, settings, sha256, write_config

import carvae as library
from carvae.errors import CarvaeError
from carvae.invocation import at_home

HEAVY = ("torch", "lightning", "scvi", "wandb", "scanpy", "anndata", "umap", "numba", "sklearn", "matplotlib")
VERBS = ("ingest", "train", "embed", "annotate", "plan", "map", "explain", "respond", "check", "demo")


def process(*commands: tuple[object, ...], cwd: Path) -> list[Answer]:
    """Run some command lines one after the other in a process of their own; ``out`` ends with what they loaded."""
    code = textwrap.dedent(f"""
        import json, sys
        from carvae.cli import main
        for number, arguments in enumerate(json.loads(sys.stdin.read())):
            sys.argv = ["carvae", *arguments]
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code
            print("LOADED", sorted(set({HEAVY!r}) & set(sys.modules)), "CODE", code or 0, "\\f")
            print("\\f", file=sys.stderr)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    text = json.dumps([list(map(str, arguments)) for arguments in commands]).encode()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, input=text, capture_output=True, check=True
    )
    out, err = (stream.decode().split("\f\n")[:-1] for stream in (done.stdout, done.stderr))
    return [Answer(int(o.split()[-1]), o, e) for o, e in zip(out, err, strict=True)]


def test_help_and_version_load_nothing_heavy(tmp_path: Path) -> None:
    top, version, verb = process(("--help",), ("--version",), ("annotate", "--help"), cwd=tmp_path)
    for answer in (top, version, verb):
        assert "LOADED [] CODE 0" in answer.out, answer.err
        assert "\x1b" not in answer.out
        assert answer.err == ""
    assert all(name in top.out for name in VERBS)
    assert version.out.startswith(f"{library.__version__}\n")
    assert "--model" in verb.out


def test_without_a_verb_it_shows_the_help() -> None:
    answer = carvae()
    assert answer.code == 2
    assert "Usage" in answer.out + answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("annotate", "Q.h5ad", "--model", "m", "--out", "A.h5ad", "--colour", "red"),
        ("annotate", "Q.h5ad", "--out", "A.h5ad"),
        ("annotate", "Q.h5ad", "--model", "m"),
        ("train",),
        ("fly",),
        ("--verbose",),
    ],
    ids=["unknown option", "no model", "no out", "no config", "unknown verb", "unknown global option"],
)
def test_wrong_usage_exits_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = carvae(*arguments)
    assert answer.code == 2
    assert "Usage" in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_epoch=3", "train.max_epoch is not a key; the nearest is 'max_epochs'"),
        ("trian.lr=3", "trian is not a key; the nearest is 'train'"),
        ("train.lr=fast", "train.lr: input should be a valid number"),
        ("train.lr=-1", "train.lr: input should be greater than 0"),
        ("train.lr", "'train.lr' is not of the form section.key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_the_nearest(
    world: World, tmp_path: Path, override: str, words: str
) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m") | {"seed": 0})
    answer = carvae("train", path, override)
    assert answer.code == 1
    assert words in answer.err
    assert answer.err.startswith("carvae: ")
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_wrong_key_in_the_file_names_the_file_and_the_nearest(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", {"ingest": {"n_top_gene": 5}})
    answer = carvae("ingest", path)
    assert answer.code == 1
    assert f"{path} is not a valid config" in answer.err
    assert "ingest.n_top_gene is not a key; the nearest is 'n_top_genes'" in answer.err


@pytest.mark.parametrize("content", [None, "- a\n- b\n", "a: [1\n", "\x00\x01"])
def test_a_file_that_is_no_config_is_said(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    answer = carvae("train", path)
    assert answer.code == 1
    assert str(path) in answer.err
    assert answer.err.count("\n") == 1


def test_overrides_beat_the_file(world: World, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m"))
    assert carvae("ingest", path, f"output={tmp_path / 'other'}", "ingest.min_counts=3").code == 0
    saved = library.Config.read(tmp_path / "other.work" / "config.yaml")
    assert saved.ingest.min_counts == 3
    assert saved.output == tmp_path / "other"
    assert not (tmp_path / "m.work").exists()


def test_messages_go_to_stderr_without_colour_and_quiet_means_quiet(world: World, tmp_path: Path) -> None:
    query = ("annotate", world.query_path, "--model", world.bundle, "predict.warn_overlap=0.5")
    short = {"max_epochs": 1, "min_steps": 0, "validation_share": 0}
    config = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m", train=short))
    loud, quiet, trained, wrong = process(
        (*query, "--out", tmp_path / "A.csv"),
        (*query, "--out", tmp_path / "B.csv", "--quiet"),
        ("train", config, "--quiet"),
        ("annotate", tmp_path / "gone.h5ad", "--model", world.bundle, "--out", tmp_path / "C.csv", "-q"),
        cwd=tmp_path,
    )
    assert [a.code for a in (loud, quiet, trained, wrong)] == [0, 0, 0, 1]
    assert all(a.out.startswith("LOADED") for a in (loud, quiet, trained, wrong))
    assert "genes found" in loud.err
    assert "\x1b" not in loud.err
    assert "\r" not in loud.err
    assert (quiet.err, trained.err) == ("", "")
    assert wrong.err == f"carvae: {tmp_path / 'gone.h5ad'} does not exist\n"
    assert (tmp_path / "A.csv").read_bytes() == (tmp_path / "B.csv").read_bytes()
    made = ["A.csv", "A.samples.csv", "B.csv", "B.samples.csv", "c.yaml", "m", "m.work"]
    assert sorted(p.name for p in tmp_path.iterdir()) == made


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_the_query_is_never_written_over(world: World, verb: str) -> None:
    before = sha256(world.query_path)
    answer = carvae(verb, world.query_path, "--model", world.bundle, "--out", world.query_path)
    assert answer.code == 1
    assert "is the query itself; choose another name" in answer.err
    aside = world.folder / ".." / world.folder.name / world.query_path.name
    assert carvae(verb, world.query_path, "--model", world.bundle, "--out", aside).code == 1
    assert sha256(world.query_path) == before


@pytest.mark.parametrize("name", ["A", "A.txt", "A.h5", "A.csv.zip"])
def test_an_output_without_a_known_format_is_refused_before_any_work(world: World, tmp_path: Path, name: str) -> None:
    # neither the query nor the model exists: the name is looked at first
    answer = carvae("annotate", tmp_path / "gone.h5ad", "--model", tmp_path / "gone", "--out", tmp_path / name)
    assert answer.code == 1
    assert "says no format; end it in .h5ad, .zarr, .csv or .csv.gz" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_carvae_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("carvae.predict.run", fail)
    with pytest.raises(ZeroDivisionError):
        carvae("annotate", world.query_path, "--model", world.bundle, "--out", tmp_path / "A.csv")


def test_an_error_of_the_file_system_is_one_sentence(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", tmp_path / "file" / "A.csv")
    assert answer.code == 1
    assert answer.err.count("\n") == 1
    assert str(tmp_path / "file") in answer.err


def test_a_tilde_behind_an_option_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert at_home("--out=~/runs/a.csv") == "--out=/home/ann/runs/a.csv"
    assert [at_home(other) for other in ("~a", "--out=a~b", "--dry-run")] == ["~a", "--out=a~b", "--dry-run"]
    assert at_home("train.lr=1e-3") == "train.lr=1e-3"


@pytest.mark.parametrize("module", ["carvae", "carvae.cli"])
def test_both_modules_are_the_command(module: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{library.__version__}\n"


def test_a_home_of_nobody_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CarvaeError, match="nobody-here"):
        library.load("~nobody-here/model")
