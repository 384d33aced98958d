"""What is installed: two builds are the same bytes, and the lock holds every dependency with its hashes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("carvae", "configs", "pyproject.toml", "README.md", "LICENSE")
PINNED = re.compile(r"^([A-Za-z0-9_.\-]+)==([^\s;\\]+)", re.MULTILINE)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def built(folder: Path, epoch: str, umask: int) -> bytes:
    """The wheel of a copy of the sources, made at another time by another user."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
            )
        else:
            shutil.copyfile(ROOT / name, source / name)
    for k, file in enumerate(sorted(source.rglob("*"))):
        os.utime(file, (1e9 + 1000 * k + umask, 1e9 + 1000 * k + umask))
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "out")]
    env = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    done = subprocess.run(command, cwd=source, env=env, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "out").iterdir()
    return wheel.read_bytes()


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; pip install hatchling")
    first, second = (built(tmp_path / f"b{umask}", "1700000000", umask) for umask in (0o022, 0o027))
    assert first == second
    assert first != built(tmp_path / "later", "1800000000", 0o022), "the date is in it, so that the test could fail"


def test_the_lock_holds_every_direct_dependency_with_hashes_and_the_tested_version() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=[A-Za-z0-9])", lock) if "==" in entry]
    assert len(entries) > 100
    assert all("--hash=sha256:" in entry for entry in entries)
    locked = {normal(name): version for name, version in PINNED.findall(lock)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [normal(re.split(r"[<>=!;\[ ]", wanted)[0]) for wanted in project["dependencies"]]
    assert set(direct) <= set(locked)
    tested = {normal(n): v for n, v in PINNED.findall((ROOT / "constraints.txt").read_text(encoding="utf-8"))}
    assert {name: locked[name] for name in direct if name in tested} == {n: tested[n] for n in direct if n in tested}
