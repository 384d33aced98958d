"""Files and folders that are either the old ones or the complete new ones, whenever the process dies.

The new one is written beside the old under a hidden name that tells host and process, so that what a killed process
left is known for litter and goes with the next write.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from carvae.errors import ConfigError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
REMOVALS = 40
"""How often a folder is removed into which threads of a writer that failed still write."""


MODEL = ("model.json", "weights.safetensors", "card.md")
"""A folder that holds these is a model."""
_inputs: list[set[Path]] = []
"""What the command that runs has read, where `inputs_kept`."""


@contextmanager
def inputs_kept() -> Iterator[None]:
    """Refuse to write over what was read (`note_input`) until the block ends, as a command of the command line."""
    _inputs.append(set())
    try:
        yield
    finally:
        _inputs.pop()


def note_input(path: Path) -> None:
    """Say that the command that runs reads a file."""
    if _inputs:
        _inputs[-1].add(Path(os.path.realpath(path)))


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``target`` that becomes ``target`` if the block succeeds, and vanishes if not."""
    target = Path(os.path.realpath(target))  # a link stays a link: what it points to is replaced
    if _inputs and target in _inputs[-1]:
        raise ConfigError(f"{target} is read by this command and would be overwritten; choose another output")
    scratch = _scratch(target)
    try:
        yield scratch
        _sync(scratch)
        os.replace(scratch, target)
    except OSError as error:
        if str(error.filename) == str(scratch):
            error.filename = str(target)  # the name that the caller knows
        raise
    finally:
        _remove(scratch)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``target`` that takes its place if the block succeeds."""
    target = Path(os.path.realpath(target))
    scratch = _scratch(target)
    scratch.mkdir()
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
        _remove(scratch)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that is gone at the end; messages that name it go to nobody."""
    with tempfile.TemporaryDirectory(prefix="carvae-") as folder:

        def concerns_others(record: logging.LogRecord) -> bool:
            return folder not in record.getMessage()

        handlers = [*logging.getLogger().handlers, *logging.getLogger("carvae").handlers]
        for handler in handlers:
            handler.addFilter(concerns_others)
        try:
            yield Path(folder)
        finally:
            for handler in handlers:
                handler.removeFilter(concerns_others)


_held: set[Path] = set()
"""What this process holds by `alone`."""


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold an output against other processes of carvae, on this machine or on a disk that tells machines of locks.

    A process may hold the same output several times. The lock goes with the process, however that ends.

    Raises
    ------
    ConfigError
        Another process holds it.
    """
    output = Path(os.path.realpath(output))
    if output in _held:
        yield
        return
    made = [folder for folder in output.parents if not folder.exists()]
    _make(output.parent)
    file = output.with_name(f".{output.name}.lock")
    descriptor = _locked(file, output)
    _held.add(output)
    try:
        yield
    finally:
        _held.discard(output)
        file.unlink(missing_ok=True)  # while it is locked: who comes next finds it gone and makes its own
        os.close(descriptor)
        with suppress(OSError):  # what was made for the lock alone goes with it
            for folder in made:
                folder.rmdir()


def _locked(file: Path, output: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"{holder} is at work on {output}; wait until it is done, or choose another output"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was given up, and removed, in between


def _scratch(target: Path) -> Path:
    """A path beside ``target`` that nothing else uses; what dead processes of this host left of it is removed."""
    _make(target.parent)
    clear(target)
    host = _host()
    # the ending is kept: writers choose the format by it
    return target.with_name(f".{target.stem}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp{target.suffix}")


def _host() -> str:
    return re.sub(r"\W", "-", socket.gethostname())


def refuse_model(out: Path, *, itself: bool = True) -> None:
    """Raise ConfigError where a place is a model, or lies in one; not ``itself`` where it is to be replaced."""
    for folder in (out.resolve(), *out.resolve().parents)[0 if itself else 1 :]:
        if all((folder / name).is_file() for name in MODEL):
            raise ConfigError(f"{str(out)!r} is a model or lies in one, {folder}; choose another place for the output")


def refuse_file(out: Path, verb: str) -> None:
    """Raise ConfigError where the folder that a verb writes is a file, or lies in a model."""
    refuse_model(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; {verb} writes its tables and pictures into a folder")


def clear(target: Path) -> None:
    """Remove what dead processes of this host left of ``target`` when they died."""
    target = Path(os.path.realpath(target))
    host = _host()
    mine = re.compile(rf"\.{re.escape(target.stem)}\.{host}\.(\d+)\.[0-9a-f]{{8}}\.tmp{re.escape(target.suffix)}")
    for entry in target.parent.iterdir():
        if (found := mine.fullmatch(entry.name)) and not _runs(int(found.group(1))):
            _remove(entry)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{folder} is no folder, nor can it be made; choose another output") from None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        for _ in range(REMOVALS):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
            time.sleep(0.05)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths in one step (Linux); elsewhere in two, between which ``b`` is missing for a moment."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename and not rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
            return
    aside = _scratch(b.with_name(f"{b.name}.old"))
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)
