"""``carvae app`` as a user starts it, for the tests of the page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 300
"""A shared machine is no clock: this only ends a test that would hang."""


@dataclass(frozen=True, slots=True)
class Started:
    """The page's process."""

    process: subprocess.Popen[str]
    url: str
    """With the token."""
    folder: Path
    """In which its private folder is made."""

    @property
    def base(self) -> str:
        """The page's address without the token."""
        return self.url.split("/?")[0]


@contextmanager
def started(bundle: Path, folder: Path, *arguments: str) -> Iterator[Started]:
    """Start it, and end it by SIGTERM; it must end well then, and leave nothing."""
    command = [sys.executable, "-m", "carvae", "app", "--model", str(bundle), "--port", "0", "--no-browser", "-q"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            yield Started(process, url, folder)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
    assert not list(folder.glob("carvae-app-*")), "files are left behind"
