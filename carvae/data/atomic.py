"""Files and folders that are either the old ones or the complete new ones, whenever the process dies."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``target`` that becomes ``target`` if the block succeeds, and vanishes if not."""
    scratch = _scratch(target)
    try:
        yield scratch
        _sync(scratch)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``target`` that takes its place if the block succeeds."""
    scratch = _scratch(target)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            _exchange(scratch, target)
        else:
            os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    # the ending is kept: writers choose the format by it
    return target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step (Linux); elsewhere in two, between which ``b`` is missing for a moment."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename and not rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
            return
    aside = _scratch(b.with_name(f"{b.name}.old"))
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
