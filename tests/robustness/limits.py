"""Processes that run the command line with little disk or memory, or write a model again and again."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from apart import command_line


def limited(kind: str, n: int, *arguments: object) -> None:
    """``carvae ARGUMENTS`` with files of at most n bytes (``disk``, ``kill``), or n bytes more memory than now."""
    if kind == "memory":
        n += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (n, n))
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "kill" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
    command_line(*arguments)


def save_for_ever(model: Path, place: Path) -> None:
    """Say "ready", and save the model until the process is killed."""
    from carvae.model.bundle import load

    bundle = load(model)
    print("ready", flush=True)
    while True:
        bundle.save(place)
