"""The server's end of the process of a job."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from carvae.web.task import Task

LONGEST_LINE = 16 << 20
KEPT_LINES, KEPT_LETTERS = 40, 400


class Process:
    """A process that waits for a task, does it, and ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        self.reading = asyncio.create_task(self._read_errors())

    @classmethod
    async def start(cls) -> Process:
        """Start one, in a session of its own; it imports what it needs while it waits."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "carvae.web.worker"),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            limit=LONGEST_LINE,
            start_new_session=True,
        )
        return cls(process)

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.returncode is None

    async def do(self, task: Task, tell: Callable[[dict[str, Any]], None]) -> int:
        """Give it its task and hand on what it says; returns its exit status, negative for a signal."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(ConnectionError):
            stdin.write(task.line().encode())
            await stdin.drain()
        async for line in stdout:
            tell(json.loads(line))
        await self.reading
        return await self.process.wait()

    async def kill(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with suppress(ValueError):  # a line without an end
            async for line in self.process.stderr:
                self.last.append(line.decode(errors="replace").rstrip()[:KEPT_LETTERS])
