"""Cases D: full disks, little memory, two at work on one output. The whole of it: ``scripts/kill_test.py``."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path

import anndata as ad
import limits
import pytest
from apart import Ended, begin
from small import KEPT, Says, Small
from trained import World, carvae, settings, sha256, write_config

from carvae.data import atomic
from carvae.model.bundle import load


def limited(kind: str, n: int, *arguments: object) -> Ended:
    """Run the command line in a process of its own under a limit that is set after its libraries are loaded."""
    return begin(limits.limited, kind, n, *arguments).wait()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.case("D01", "D02", "D03", "D04")
@pytest.mark.parametrize(("kind", "ending"), [("disk", ".h5ad"), ("kill", ".h5ad")])
def test_a_full_disk_or_a_kill_leaves_the_older_result(
    small: Small, tmp_path: Path, kind: str, ending: str, says: Says
) -> None:
    out = tmp_path / f"A{ending}"
    assert small.annotate(small.query_path, out).code == 0
    before = sha256(tmp_path)
    done = limited(kind, 6_000, "annotate", small.query_path, "--model", small.model, "--out", out)
    assert "Traceback" not in done.stderr
    if kind == "disk":
        assert done.returncode == 1
        assert sha256(tmp_path) == before
        said = [line for line in done.stderr.splitlines() if line.startswith("carvae: ")]
        assert len(said) == 1, done.stderr
        says(said[0])
    else:
        assert done.returncode < 0
        for name in ("A.samples.csv", out.name):
            assert (tmp_path / name).stat().st_size
        assert small.annotate(small.query_path, out).code == 0  # the same command goes on, and clears what was left
        assert names(tmp_path) == ["A.cells.csv.gz", "A.h5ad", "A.samples.csv"]


@pytest.mark.case("D02")
def test_a_full_disk_leaves_the_older_model_and_store(studies: World, tmp_path: Path, says: Says) -> None:
    config = settings(studies.folder, tmp_path / "m", train={"max_epochs": 1, "min_steps": 0})
    path = write_config(tmp_path / "c.yaml", config)
    done = limited("disk", 4_000, "train", path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    says(done.stderr.splitlines()[-1])


LATEST = KEPT.parent / "0.1.0-layout5" / "model"
"""A model that can be shared."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A query whose page is drawn in no time: UMAP, which takes seconds, is of 30 cells and more."""
    path = tmp_path_factory.mktemp("few") / "query.h5ad"
    ad.read_h5ad(LATEST.parent / "query.h5ad")[20:45].write_h5ad(path)
    return path


@pytest.mark.case("D02")
def test_a_full_disk_leaves_the_older_model_where_one_is_shared(tmp_path: Path, says: Says) -> None:
    out = tmp_path / "S"
    assert carvae("export", LATEST, "--out", out).code == 0
    before = sha256(tmp_path)
    done = limited("disk", 6_000, "export", LATEST, "--share", "--out", out)
    assert (done.returncode, done.stderr.count("carvae: ")) == (1, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert sha256(tmp_path) == before
    assert names(tmp_path) == ["S"]
    assert carvae("export", LATEST, "--share", "--out", out).code == 0
    assert sha256(tmp_path) != before
    says(done.stderr.splitlines()[-1])


@pytest.mark.case("D02")
def test_a_disk_that_is_full_when_the_page_is_written_leaves_the_labels_and_the_older_page(
    few: Path, tmp_path: Path, says: Says
) -> None:
    out, page = tmp_path / "A.h5ad", tmp_path / "A.html"
    page.write_text("older")
    asked = ("annotate", few, "--model", LATEST, "--out", out, "--report", page)
    done = limited("disk", 400_000, *asked)
    assert (done.returncode, done.stderr.count("carvae: ")) == (1, 1), done.stderr
    assert f"the labels are in {out}, and `carvae report` makes the page" in done.stderr
    assert page.read_text() == "older"
    assert out.stat().st_size < 400_000
    assert names(tmp_path) == ["A.cells.csv.gz", "A.h5ad", "A.html", "A.samples.csv"]
    before = sha256(out)
    full = limited("disk", 6_000, "reproduce", out, "--model", LATEST)  # made again in a temporary place
    assert (full.returncode, full.stderr.count("carvae: "), full.stdout) == (1, 1, ""), full.stderr
    assert sha256(out) == before
    says(done.stderr.splitlines()[-1])


@pytest.mark.case("D04")
def test_a_folder_that_cannot_be_written_to_is_told(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, says: Says
) -> None:
    made = atomic._make

    def make(folder: Path) -> None:
        if folder.name == "fixed":  # permissions do not bind root, under whom tests may run
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        made(folder)

    monkeypatch.setattr(atomic, "_make", make)
    fixed = tmp_path / "fixed"
    answer = carvae("export", LATEST, "--share", "--out", fixed / "S")
    assert (answer.code, answer.err) == (1, f"carvae: Read-only file system: {fixed}; choose another output\n")
    out = tmp_path / "A.h5ad"
    answer = carvae("annotate", few, "--model", LATEST, "--out", out, "--report", fixed / "A.html")
    assert (answer.code, answer.err) == (1, f"carvae: Read-only file system: {fixed}; choose another output\n")
    assert f"the labels are in {out}" in caplog.text
    assert names(tmp_path) == ["A.cells.csv.gz", "A.h5ad", "A.samples.csv"]
    says(answer.err)


@pytest.mark.case("D11")
@pytest.mark.parametrize("more", [1 << 20, 8 << 20])
def test_too_little_memory_is_one_sentence(small: Small, tmp_path: Path, says: Says, more: int) -> None:
    asked = ("annotate", small.query_path, "--model", small.model, "--out", tmp_path / "A.h5ad")
    done = limited("memory", more, *asked)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []
    says(done.stderr.splitlines()[-1])


N_READ = 40


@pytest.mark.case("D08")
def test_readers_of_a_model_that_is_written_again_and_again_never_fail(small: Small, model: Path, says: Says) -> None:
    load(small.model).save(model)  # in today's layout, as the writers will
    with ExitStack() as stack:
        for _ in range(2):
            writer = begin(limits.save_for_ever, small.model, model)
            stack.callback(writer.kill)
            assert writer.readline() == "ready\n"
        expected, seen = load(model).bundle_id, set()
        for _ in range(N_READ):
            assert load(model).bundle_id == expected
            seen.add((model / "model.json").stat().st_ino)
    assert len(seen) > 1  # it was another folder meanwhile
    load(small.model).save(model)
    assert names(model.parent) == ["model"]  # what the killed writers left is cleared by the next
    says(f"{N_READ} loads while two processes write: none failed, none was of another model")


@pytest.mark.case("D12")
def test_training_gives_the_generators_back(studies: World, tmp_path: Path, says: Says) -> None:
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    path = write_config(
        tmp_path / "c.yaml", settings(studies.folder, tmp_path / "m", train={"max_epochs": 1, "min_steps": 0})
    )
    assert carvae("train", path).code == 0
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    says("global generators of Python, numpy and torch are as before training")
