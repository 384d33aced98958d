"""Jobs one after the other, each in a process of its own, so that none can take the server with it.

There are two lanes, each with one process at a time: looking at a query, which is short, and labelling it, which may be
long. One process waits ready-made for the next job, since starting one takes seconds.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from carvae.web.job import Job, State
from carvae.web.limits import Limits
from carvae.web.process import Process
from carvae.web.task import Task
from carvae.web.worker import memory_sentence

log = logging.getLogger(__name__)

BESIDE_S, BESIDE_PER_CELL_S = 25.0, 0.004
"""Time of what is not labelling, as measured on one core: starting, writing, drawing the report."""
LEARNED = 0.5
"""How much a job that is done says of how fast this machine is."""
FAULT = (
    "carvae stopped at this file without saying why (exit status {status}); that is a fault of carvae: please report "
    "it with the lines below"
)


class Lane:
    """Jobs that wait for one kind of work."""

    def __init__(self, do: Literal["look", "run"], longest_s: float) -> None:
        self.do, self.longest_s = do, longest_s
        self.waiting: deque[Job] = deque()
        self.woken = asyncio.Event()
        self.job: Job | None = None
        self.process: Process | None = None

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self.waiting.append(job)
        self.woken.set()

    async def next(self) -> Job:
        """The next job, once there is one."""
        while not self.waiting:
            self.woken.clear()
            await self.woken.wait()
        self.job = self.waiting.popleft()
        return self.job


class Workers:
    """The lanes and their processes.

    Parameters
    ----------
    models
        Name of a model -> its folder.
    settings
        Settings of all jobs that differ from the defaults, as of `Config`.
    """

    def __init__(self, models: dict[str, Path], settings: dict[str, Any], limits: Limits) -> None:
        self.models, self.settings, self.limits = models, settings, limits
        self.looking, self.running = Lane("look", limits.check_s), Lane("run", limits.run_s)
        self.lanes = (self.looking, self.running)
        self.spare: Process | None = None
        self.pace = 1.0
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to serve."""
        self.spare = await Process.start()
        self.tasks = [asyncio.create_task(self._serve(lane)) for lane in self.lanes]

    async def close(self) -> None:
        """End everything."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for process in (self.spare, *(lane.process for lane in self.lanes)):
            if process is not None:
                await process.kill()

    def look(self, job: Job) -> None:
        """Queue a job whose files are complete to be looked at."""
        job.state = State.WAITING
        self.looking.add(job)

    def run(self, job: Job) -> None:
        """Queue a job that was looked at to be done."""
        job.state = State.QUEUED
        self.running.add(job)

    def ahead(self, job: Job) -> int:
        """How many jobs go before it, the one at work included."""
        for lane in self.lanes:
            if job in lane.waiting:
                return lane.waiting.index(job) + (lane.job is not None)
        return 0

    async def cancel(self, job: Job) -> None:
        """End a job wherever it is; none of its files stay."""
        job.state = State.CANCELLED
        for lane in self.lanes:
            if job in lane.waiting:
                lane.waiting.remove(job)
            if lane.job is job and lane.process is not None:
                await lane.process.kill()
        job.end(State.CANCELLED)

    async def _serve(self, lane: Lane) -> None:
        while True:
            job = await lane.next()
            try:
                await self._do(lane, job)
            except Exception:  # a fault met at one job must not end the others
                log.exception("a job failed in the server")
                job.end(State.FAILED, "the page failed at this file; that is a fault of carvae: please report it")
            lane.job = lane.process = None

    async def _do(self, lane: Lane, job: Job) -> None:
        process = self.spare if self.spare is not None and self.spare.alive else await Process.start()
        lane.process, self.spare = process, None
        self.spare = await Process.start()
        if job.state is State.CANCELLED:
            await process.kill()
            return
        job.state = State.CHECKING if lane is self.looking else State.RUNNING
        job.started, job.share, job.stage, job.messages = time.time(), 0.0, "Starting", []
        said: dict[str, Any] = {}
        try:
            work = process.do(self._task(lane, job), lambda event: _hear(job, event, said))
            status = await asyncio.wait_for(work, lane.longest_s)
        except TimeoutError:
            await process.kill()
            said["error"] = f"{job.name} took longer than {lane.longest_s / 60:,.0f} minutes; use `carvae annotate`"
            status = 0
        if job.state is not State.CANCELLED:
            _conclude(job, said, status, process)
            self._foretell(job)

    def _foretell(self, job: Job) -> None:
        """Say how long a job will take, and learn from one that is done."""
        if job.found is None:
            return
        usual_s = float(job.found["seconds"]) + BESIDE_S + BESIDE_PER_CELL_S * int(job.found["cells"])
        if job.state is State.READY:
            job.expected_s = self.pace * usual_s
        elif job.state is State.DONE and job.started and job.finished:
            self.pace += LEARNED * ((job.finished - job.started) / usual_s - self.pace)

    def _task(self, lane: Lane, job: Job) -> Task:
        return Task(
            do=lane.do,
            query=str(job.query),
            archive=str(job.archive or ""),
            demo=job.demo,
            model=str(self.models[job.model]),
            result=str(job.folder / "result"),
            stem=job.stem,
            name=job.name,
            hashes={upload.given: upload.sha256 for upload in job.uploads},
            settings=self.settings,
            limits=self.limits,
        )


def _hear(job: Job, event: dict[str, Any], said: dict[str, Any]) -> None:
    """Take in what a process says of its job."""
    if "stage" in event:
        job.stage, job.share = str(event["stage"]), float(event["share"])
        job.cells = event.get("cells")
    elif "say" in event:
        job.say(str(event["say"]))
    else:
        said.update(event)


def _conclude(job: Job, said: dict[str, Any], status: int, process: Process) -> None:
    """What became of a job whose process has ended."""
    if "error" in said:
        job.end(State.FAILED, str(said["error"]))
    elif status == -signal.SIGKILL:
        job.end(State.FAILED, memory_sentence(job.name))
    elif status or not said:
        job.end(State.FAILED, FAULT.format(status=status), "\n".join(process.last))
    elif "found" in said:
        job.found, job.query, job.state = said["found"], Path(said["query"]), State.READY
        job.share = 0.0
    else:
        job.results = {key: Path(path) for key, path in said["results"].items()}
        job.samples = said["samples"]
        job.share = 1.0
        job.end(State.DONE)
