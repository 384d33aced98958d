"""Jobs: what was uploaded, how far it is, and what came of it; each in a folder of its own, found by who has its id."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from carvae.data.readers import names_a_sample
from carvae.errors import CarvaeError, ConfigError, ReadError
from carvae.web.limits import Limits, size_text
from carvae.web.names import ARCHIVE, DATA, TAKEN, ending, home, is_litter, refuse_kind, safe_path, stem

MATRICES = (".h5ad", ".h5", ".mtx", ".mtx.gz")
MAX_MESSAGES = 200
ROOM_LEFT = 2
"""Uploads are taken only where this many times their size is free on the disk, for the results."""


class State(StrEnum):
    """How far a job is."""

    UPLOADING = "uploading"
    WAITING = "waiting"
    """To be looked at."""
    CHECKING = "checking"
    READY = "ready"
    """Looked at; the user says whether it is to run."""
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(slots=True)
class Upload:
    """One file of a job."""

    given: str
    """The client's name, to be shown and never used as a path."""
    target: Path
    size: int
    received: int = 0
    sha256: str = ""
    """Once it is complete."""


@dataclass(slots=True, eq=False)
class Job:
    """One query on its way."""

    id: str
    """Who has it may see the job."""
    owner: str
    """Session whose list it is in."""
    name: str
    """What the client calls it."""
    stem: str
    """What its files are called here."""
    model: str
    folder: Path
    uploads: list[Upload]
    query: Path
    archive: Path | None = None
    demo: bool = False
    state: State = State.UPLOADING
    error: str = ""
    details: str = ""
    """Of a fault of carvae's own: the end of what the process said."""
    found: dict[str, Any] | None = None
    expected_s: float = 0.0
    """Expected time of labelling it, once it was looked at."""
    stage: str = ""
    share: float = 0.0
    cells: list[int] | None = None
    """Cells that are done, and all."""
    messages: list[str] = field(default_factory=list)
    results: dict[str, Path] = field(default_factory=dict)
    """Key of a download -> file."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None

    @property
    def stored(self) -> int:
        """Bytes on the disk, of uploads that have begun as many as they will be."""
        if self.state in ENDED:
            return sum(path.stat().st_size for path in self.results.values())
        return sum(upload.size for upload in self.uploads if upload.received)

    def say(self, message: str) -> None:
        """Keep a message for the user; the first ones, if there are very many."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)

    def end(self, state: State, error: str = "", details: str = "") -> None:
        """Come to an end; what was uploaded goes, and results too where they are not whole."""
        self.state, self.error, self.details, self.finished = state, error, details, time.time()
        for part in ("upload", "query", *(() if state is State.DONE else ("result",))):
            shutil.rmtree(self.folder / part, ignore_errors=True)

    def to_dict(self, ahead: int = 0) -> dict[str, Any]:
        """What the page shows; ``ahead`` jobs go before it."""
        return {
            "id": self.id,
            "name": self.name,
            "model": self.model,
            "demo": self.demo,
            "state": self.state,
            "ahead": ahead,
            "error": self.error,
            "details": self.details,
            "files": [{"name": u.given, "size": u.size, "received": u.received} for u in self.uploads],
            "found": self.found,
            "expected_s": round(self.expected_s, 1),
            "stage": self.stage,
            "share": round(self.share, 4),
            "cells": self.cells,
            "messages": self.messages,
            "samples": self.samples,
            "downloads": {key: {"name": p.name, "size": p.stat().st_size} for key, p in self.results.items()},
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
        }


@dataclass(slots=True)
class Jobs:
    """All jobs, by id."""

    root: Path
    limits: Limits
    by_id: dict[str, Job] = field(default_factory=dict)

    def add(self, owner: str, model: str, files: Sequence[tuple[str, int]]) -> Job:
        """A new job for files of the given names and sizes; none for a demo.

        Raises
        ------
        CarvaeError
            A file is of a kind or size that is not taken, or there is no room.
        """
        if files and all(is_litter(name) for name, _ in files):
            raise ReadError(f"a hidden file is no query; rename it, or give {TAKEN}")
        files = [(name, size) for name, size in files if not is_litter(name)]
        self._check(files)
        job_id = secrets.token_urlsafe(24)
        folder = self.root / secrets.token_hex(8)
        given = _name([name for name, _ in files])
        plain = stem(safe_path(given).name)
        uploads, query, archive = _places(files, folder, given)
        job = Job(job_id, owner, given, plain, model, folder, uploads, query, archive, demo=not files)
        for part in (folder, folder / "upload", folder / "query", folder / "result"):
            part.mkdir(mode=0o700)
        self.by_id[job_id] = job
        return job

    def remove(self, job: Job) -> None:
        """Forget a job and all its files."""
        self.by_id.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)

    def need_room(self, total: int) -> None:
        """Raise ReadError where so many bytes more have no room."""
        limits = self.limits
        if total + sum(job.stored for job in self.by_id.values()) > limits.stored_factor * limits.max_upload:
            raise ReadError("the page holds as many files as it may; remove jobs that are done")
        if shutil.disk_usage(self.root).free < ROOM_LEFT * total:
            raise ReadError(f"the disk has no room for {size_text(total)} and results; make room in {self.root.parent}")

    def _check(self, files: Sequence[tuple[str, int]]) -> None:
        if len(self.by_id) >= self.limits.max_jobs:
            raise ConfigError(f"{len(self.by_id)} jobs are kept already; remove some that are done")
        if files:
            _check_kinds(files, self.limits)
            self._check_room(_name([name for name, _ in files]), sum(size for _, size in files))

    def _check_room(self, name: str, total: int) -> None:
        """Refuse what is too large, for the page or for the disk, before it is sent."""
        limits = self.limits
        if total > limits.max_upload:
            raise ReadError(
                f"{name} has {size_text(total)}, and this page takes {size_text(limits.max_upload)}; start it "
                f"as `carvae app --max-upload {-(-total >> 30) + 1}GB`, or use `carvae annotate`, which has no limit"
            )
        self.need_room(total)


def _check_kinds(files: Sequence[tuple[str, int]], limits: Limits) -> None:
    """Refuse files that make no query, before they are sent."""
    for name, size in files:
        refuse_kind(name)
        if size < 1:
            raise ReadError(f"{stem(name)} is empty; download or write it again")
    names = [name for name, _ in files]
    archives = [name for name in names if ending(name, (ARCHIVE,))]
    if archives and len(names) > 1:
        raise ReadError("a zip goes alone, and several things were given; put all matrices into one zip")
    if not archives and not any(ending(name, DATA) in MATRICES for name in names):
        raise ReadError(f"there is no matrix among {', '.join(sorted(map(stem, names))[:3])}; give {TAKEN}")
    if len(names) > limits.max_files:
        raise ReadError(f"{len(names):,} files are more than {limits.max_files:,}; give the matrix folders alone")


def _places(files: Sequence[tuple[str, int]], folder: Path, given: str) -> tuple[list[Upload], Path, Path | None]:
    """Where each file goes, where the query will be, and the archive it is packed in."""
    query, own = folder / "query", home(given)
    if not files:
        return [], query / f"{own}.h5ad", None
    if ending(files[0][0], (ARCHIVE,)):
        upload = Upload(files[0][0], folder / "upload" / "archive.zip", files[0][1])
        return [upload], query / own, upload.target
    paths = [safe_path(name) for name, _ in files]
    if len({str(path).casefold() for path in paths}) < len(paths):
        raise CarvaeError("two files have names that differ in nothing but marks or case; rename one")
    tops = {path.parts[0] for path in paths}
    together = len(tops) == 1 and (len(files) > 1 or ending(files[0][0], DATA) in (".h5ad", ".h5"))
    place = query if together and names_a_sample(stem(paths[0].parts[0])) else query / own
    at = place / paths[0].parts[0] if together else place
    return [Upload(name, place / path, size) for (name, size), path in zip(files, paths, strict=True)], at, None


def _name(names: Sequence[str]) -> str:
    """What several files together are called: their folder, else how all their names begin."""
    if not names:
        return "demo"
    if len(names) == 1:
        return PurePosixPath(names[0].replace("\\", "/")).name or "file"
    tops = {name.split("/")[0] for name in names}
    if len(tops) == 1:
        return tops.pop() or "sample"
    several = sum(ending(name, MATRICES) != "" for name in names) > 1
    return _beginning(names) or ("samples" if several else "sample")


def _beginning(names: Sequence[str]) -> str:
    """How all names begin, as far as that tells them from others."""
    same = 0
    for letters in zip(*names, strict=False):
        if len(set(letters)) > 1:
            break
        same += 1
    return names[0][:same].rstrip("_.- ")
