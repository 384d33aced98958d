"""Old or new, never other: whatever happens to the writer, and nothing is left lying about."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from carvae.data.atomic import alone, replacing_file, replacing_folder
from carvae.errors import ConfigError

KINDS = ("file", "folder")


def put(target: Path, kind: str, text: str) -> None:
    """Replace ``target`` by two files' worth of ``text`` (a folder) or by ``text`` (a file)."""
    if kind == "file":
        with replacing_file(target) as scratch:
            scratch.write_text(text)
        return
    with replacing_folder(target) as scratch:
        (scratch / "a").write_text(text)
        (scratch / "in").mkdir()
        (scratch / "in" / "b").write_text(text)


def content(target: Path) -> str:
    """What is there; both files of a folder must agree."""
    if target.is_file():
        return target.read_text()
    assert sorted(p.name for p in target.rglob("*")) == ["a", "b", "in"]
    assert (target / "a").read_text() == (target / "in" / "b").read_text()
    return (target / "a").read_text()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_new_target_appears_and_an_old_one_is_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "deep" / "er" / "x.zarr"
    put(target, kind, "first")
    assert content(target) == "first"
    put(target, kind, "second")
    assert content(target) == "second"
    assert [p.name for p in target.parent.iterdir()] == ["x.zarr"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_writer_leaves_the_old_one_and_no_litter(
    tmp_path: Path, kind: str, existed: bool, error: BaseException
) -> None:
    target = tmp_path / "x.h5ad"
    if existed:
        put(target, kind, "old")
    replacing = replacing_file if kind == "file" else replacing_folder
    with pytest.raises(type(error)), replacing(target) as scratch:  # noqa: PT012 - the block is what fails
        (scratch if kind == "file" else scratch / "a").write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == (["x.h5ad"] if existed else [])
    assert not existed or content(target) == "old"


@pytest.mark.parametrize(
    ("kind", "call"), [("file", "fsync"), ("file", "replace"), ("folder", "fsync"), ("folder", "rename")]
)
def test_a_full_disk_at_the_last_step_leaves_the_old_one(
    tmp_path: Path, kind: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    put(target, kind, "old")

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(sys, "platform", "darwin")  # the way without renameat2
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="disk full"):
        put(target, kind, "new")
    monkeypatch.undo()
    assert content(target) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_an_exchange_call_a_failed_second_rename_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    put(target, "folder", "old")
    real, calls = os.rename, []

    def second_fails(a: str, b: str) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        real(a, b)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="I/O"):
        put(target, "folder", "new")
    monkeypatch.undo()
    assert content(target) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_an_exchange_call_folders_are_swapped_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    put(target, "folder", "old")
    monkeypatch.setattr(sys, "platform", "darwin")
    put(target, "folder", "new")
    assert content(target) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "x.zarr"
    target.write_text("a file")
    put(target, "folder", "new")
    assert content(target) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]


def test_a_link_stays_a_link(tmp_path: Path, kind: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    put(disk / "real", kind, "old")
    (tmp_path / "link").symlink_to(disk / "real")
    put(tmp_path / "link", kind, "new")
    assert (tmp_path / "link").is_symlink()
    assert content(disk / "real") == content(tmp_path / "link") == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in disk.iterdir()] == ["real"]


KILLED = """
import os, signal, sys
from pathlib import Path
from carvae.data import atomic

kind, point, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def then_die(call):
    def both(*arguments):
        call(*arguments)
        die()
    return both

if point == "sync":
    atomic._sync = die
elif point == "before":
    atomic.os.replace = atomic._exchange = die
elif point == "after":
    atomic.os.replace, atomic._exchange = then_die(atomic.os.replace), then_die(atomic._exchange)
with (atomic.replacing_file if kind == "file" else atomic.replacing_folder)(target) as scratch:
    if kind == "file":
        scratch.write_text("new")
    else:
        (scratch / "a").write_text("new")
        if point == "write":
            die()
        (scratch / "in").mkdir()
        (scratch / "in" / "b").write_text("new")
    if point == "write":
        die()
"""


@pytest.mark.parametrize("point", ["write", "sync", "before", "after"])
def test_a_killed_writer_leaves_old_or_new_and_the_next_one_clears_its_litter(
    tmp_path: Path, kind: str, point: str
) -> None:
    """Peers: 0 of 13 saves were usable after a kill. The process dies for real, by SIGKILL."""
    target = tmp_path / "x.zarr"
    put(target, kind, "old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), kind, point, str(target)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert content(target) == ("new" if point == "after" else "old")
    put(target, kind, "next")
    assert content(target) == "next"
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]


def test_litter_of_a_living_process_and_of_other_targets_is_left_alone(tmp_path: Path) -> None:
    with replacing_file(tmp_path / "x.csv") as first:
        first.write_text("still writing")
        put(tmp_path / "x.csv", "file", "overtook")
        assert first.read_text() == "still writing"
    assert (tmp_path / "x.csv").read_text() == "still writing"
    stranger = tmp_path / ".x.other-host.1.00000000.tmp.csv"
    stranger.write_text("another host's")
    put(tmp_path / "x.csv", "file", "new")
    assert stranger.exists()


HOLDS = """
import sys, time
from pathlib import Path
from carvae.data.atomic import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_work_on_one_output_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "a"
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(output)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"process {other.pid} on .* is at work on .*/runs/a; wait"),
            alone(output),
        ):
            pass
        with alone(tmp_path / "runs" / "b"):
            pass
        other.kill()
    with alone(output), alone(output):
        assert (output.parent / ".a.lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} ")
    assert list(output.parent.iterdir()) == []


def test_an_output_is_free_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), alone(tmp_path / "b" / "c" / "a"):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files")
def test_what_cannot_be_written_is_called_by_the_name_that_was_given() -> None:
    with pytest.raises(OSError, match=r"/proc/x\.csv") as error, replacing_file(Path("/proc/x.csv")) as scratch:
        scratch.write_text("a")
    assert ".tmp" not in str(error.value)
