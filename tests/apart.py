"""The command line in processes of their own, which are forked from one that has loaded the libraries.

A new interpreter would spend more seconds on imports than on what the tests ask of it. A forked process has its own
memory, limits, environment and standard streams, and may be killed, as any other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE_S = 300
"""This only ends a test that would hang."""


@dataclass(frozen=True, slots=True)
class Apart:
    """A process that runs."""

    process: Any
    out: Connection
    err: Connection

    def readline(self) -> str:
        """The next line on its standard output; empty where it ended."""
        line = b""
        while not line.endswith(b"\n") and (letter := os.read(self.out.fileno(), 1)):
            line += letter
        return line.decode()

    def kill(self) -> Ended:
        """SIGKILL."""
        self.process.kill()
        return self.wait()

    def wait(self) -> Ended:
        """Read what it says until it ends."""
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(_all, (self.out, self.err))
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, "it closed its streams and did not end"
        return Ended(self.process.exitcode, out, err)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: code as ``subprocess`` tells it, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def begin(
    function: Callable[..., object], *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Apart:
    """Call a function of a module of the tests or of carvae in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loaded"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}):
        forkserver.ensure_running()
    (out, own_out), (err, own_err) = (context.Pipe(duplex=False) for _ in range(2))
    environment = dict(os.environ if env is None else env)
    process = context.Process(
        target=_call, args=(function, arguments, (own_out, own_err), environment, cwd or Path.cwd()), daemon=True
    )
    process.start()
    own_out.close()
    own_err.close()
    return Apart(process, out, err)


def command_line(*arguments: object) -> None:
    """``carvae ARGUMENTS``, to be called by ``begin``."""
    from carvae.cli import main

    sys.argv = ["carvae", *map(str, arguments)]
    main()


def _all(connection: Connection) -> str:
    read = b""
    while block := os.read(connection.fileno(), 65536):
        read += block
    return read.decode()


def _call(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    streams: tuple[Connection, Connection],
    environment: Mapping[str, str],
    cwd: Path,
) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings.simplefilter("ignore")
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out
