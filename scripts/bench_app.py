"""Does the web page stand many users at once, with good and bad files? Loopback only.

``python scripts/bench_app.py --model BUNDLE --users 50 --seconds 600``

Starts `carvae app` and lets users, each in a browser of their own, give file after file until the time is over: whole
ones, whose cells and samples no other user's have; cut, empty, hostile and foreign ones; too large ones; uploads that
break off; and now and then a whole one is labelled to the end. Every answer is compared with what it must be. What
still waits in the queue when time is over is cancelled and counted. The last line is one line of JSON: answers, wrong
ones (each is printed), mix-ups between users, slowest answer, peak memory of server and processes, whether the service
lives, and what it leaves behind.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import scipy.sparse as sp

from carvae.model.bundle import load

LIMIT_MB = 4
CELLS = 60
"""Of the first user; each further one has one more."""
LABELLED_TO_THE_END = 0.25
WAIT_S = 900
KINDS = ("whole", "whole", "zipped", "cut", "page", "traversal", "locked out", "large", "broken off", "foreign")


@dataclass(slots=True)
class Tally:
    """What was seen."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    mixed: int = 0
    waiting: int = 0
    done: int = 0
    slowest_s: float = 0.0
    server_mb: float = 0.0
    all_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class User:
    """One user, with a file that no other has."""

    number: int
    client: httpx.AsyncClient
    file: bytes
    n_cells: int
    tally: Tally

    @property
    def sample(self) -> str:
        """Name of the user's sample."""
        return f"user{self.number}"

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A request, timed."""
        begun = time.monotonic()
        answer = await self.client.request(method, path, **more)
        if method != "PUT":  # an upload waits for its turn
            self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - begun)
        return answer

    def check(self, kind: str, right: bool, told: object) -> None:
        """Count an answer."""
        self.tally.answers[kind] += 1
        if not right:
            self.tally.wrong.append(f"user {self.number}, {kind}: {str(told)[:300]}")
            print(self.tally.wrong[-1], file=sys.stderr)


def content_of(kind: str, user: User) -> tuple[str, bytes]:
    """Name and bytes of a file of a kind."""
    if kind in ("whole", "large", "broken off"):
        return f"{user.sample}.h5ad", user.file
    if kind == "cut":
        return "cut.h5ad", user.file[: len(user.file) // 2]
    if kind == "page":
        return "page.h5ad", b"<html>not found</html>"
    if kind == "foreign":
        return "object.rds", b"RDX3"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA if kind == "locked out" else zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("../../evil.h5ad" if kind == "traversal" else f"x/{user.sample}.h5ad", user.file)
    return f"{kind.replace(' ', '_')}.zip", buffer.getvalue()


EXPECTED = {
    "cut": "cut.h5ad",
    "page": "is a web page, not data",
    "traversal": "points out of its folder",
    "locked out": "packed by a method that is not read",
    "large": "this page takes 4 MB",
    "foreign": "is an R object",
    "broken off": "broke off",
}


async def one_file(user: User, kind: str, rng: random.Random, end: float) -> None:
    """Give a file, and compare what becomes of it."""
    name, content = content_of(kind, user)
    size = LIMIT_MB * 3 << 19 if kind == "large" else len(content)
    announced = await user.ask("POST", "/api/jobs", json={"files": [{"name": name, "size": size}]})
    if kind in ("large", "foreign"):
        user.check(kind, announced.status_code == 400 and EXPECTED[kind] in announced.text, announced.text)
        return
    job = announced.json()["id"]
    await send(user, job, content, broken=kind == "broken off")
    told = await until(user, job, {"ready", "failed"}, end)
    if told is None:
        user.tally.waiting += 1
    elif kind in ("whole", "zipped"):
        right = told["state"] == "ready" and told["found"]["samples"] == {user.sample: user.n_cells}
        user.check(kind, right, told["error"] or told["found"])
        others = set((told["found"] or {}).get("samples", ())) - {user.sample}
        user.tally.mixed += bool(others)
        if right and rng.random() < LABELLED_TO_THE_END:
            await to_the_end(user, job, end)
    else:
        user.check(kind, told["state"] == "failed" and EXPECTED[kind] in told["error"], told)
    own = {listed["id"] for listed in (await user.ask("GET", "/api/jobs")).json()["jobs"]}
    user.check("list", own == {job}, own)
    await user.ask("DELETE", f"/api/jobs/{job}")


async def send(user: User, job: str, content: bytes, *, broken: bool) -> None:
    """Upload; with ``broken`` the connection is closed half-way."""

    async def half() -> Any:
        yield content[: len(content) // 2]
        raise ConnectionError

    path = f"/api/jobs/{job}/files/0"
    for _ in range(20):
        try:
            headers = {"content-length": str(len(content))} if broken else {}
            answer = await user.ask("PUT", path, content=half() if broken else content, headers=headers)
        except (ConnectionError, httpx.TransportError):
            return
        if answer.status_code != 503:
            return
        await asyncio.sleep(1)


async def to_the_end(user: User, job: str, end: float) -> None:
    """Have it labelled, and compare the table of samples."""
    await user.ask("POST", f"/api/jobs/{job}/start", json={})
    told = await until(user, job, {"done", "failed"}, end)
    if told is None:
        user.tally.waiting += 1
        return
    table = await user.ask("GET", f"/jobs/{job}/files/samples")
    samples = pd.read_csv(io.BytesIO(table.content)) if told["state"] == "done" else pd.DataFrame()
    right = [(row.sample, row.n_cells) for row in samples.itertuples()] == [(user.sample, user.n_cells)]
    user.tally.mixed += told["state"] == "done" and not right
    user.tally.done += right
    user.check("labelled", right, told["error"] or samples)


async def until(user: User, job: str, states: set[str], end: float) -> dict[str, Any] | None:
    """What is told of a job in one of the states; None where time is over before."""
    while True:
        told: dict[str, Any] = (await user.ask("GET", f"/api/jobs/{job}")).json()
        if told.get("state") in states:
            return told
        if time.monotonic() > end:
            return None
        await asyncio.sleep(1)


async def use(user: User, url: str, seconds: float) -> None:
    """Give files until time is over."""
    rng, end = random.Random(user.number), time.monotonic() + seconds
    async with user.client:
        await user.client.get(url)
        while time.monotonic() < end:
            await one_file(user, rng.choice(KINDS), rng, end)


def file_of(genes: tuple[str, ...], number: int) -> bytes:
    """A small .h5ad with a number of cells and a sample that no other user has."""
    rng, n_cells = np.random.default_rng(number), CELLS + number
    mean_G = rng.gamma(0.3, 2.0, len(genes))
    obs = pd.DataFrame({"sample": pd.Categorical([f"user{number}"] * n_cells)})
    obs.index = pd.Index([f"u{number}c{n}" for n in range(n_cells)], dtype=object)
    counts = sp.csr_matrix(rng.poisson(mean_G, (n_cells, len(genes))).astype(np.int32))
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as file:
        ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=object))).write_h5ad(file.name)
        return Path(file.name).read_bytes()


def memory_mb(process: int) -> float:
    """Resident memory of a process."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def watch(server: int, tally: Tally) -> None:
    """Keep the peaks of memory."""
    while True:
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        own = memory_mb(server)
        tally.server_mb = max(tally.server_mb, own)
        tally.all_mb = max(tally.all_mb, own + sum(memory_mb(int(child)) for child in children))
        await asyncio.sleep(0.5)


async def storm(url: str, server: int, genes: tuple[str, ...], users: int, seconds: float) -> Tally:
    """All users at once."""
    tally, base = Tally(), url.partition("/?")[0]
    watching = asyncio.create_task(watch(server, tally))
    everyone = []
    for number in range(users):
        client = httpx.AsyncClient(base_url=base, headers={"origin": base}, timeout=WAIT_S)
        everyone.append(User(number, client, file_of(genes, number), CELLS + number, tally))
    results = await asyncio.gather(*(use(user, url, seconds) for user in everyone), return_exceptions=True)
    tally.wrong += [f"a user met {error!r}" for error in results if isinstance(error, BaseException)]
    watching.cancel()
    return tally


def main() -> None:
    """Start the page, let the users in, and print the tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600)
    asked = parser.parse_args()
    genes = load(asked.model).genes
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "carvae", "app", "--model", str(asked.model), "--port", "0", "--no-browser"]
        process = subprocess.Popen(
            [*command, "-q", "--max-upload", f"{LIMIT_MB}MB"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        tally = asyncio.run(storm(url, process.pid, genes, asked.users, asked.seconds))
        alive = process.poll() is None and httpx.get(url, timeout=60).status_code == httpx.codes.OK
        process.send_signal(signal.SIGTERM)
        status, left = process.wait(timeout=60), len(list(Path(folder).glob("carvae-app-*")))
    found = {
        "users": asked.users,
        "seconds": asked.seconds,
        "answers": dict(tally.answers),
        "labelled": tally.done,
        "waiting_at_the_end": tally.waiting,
        "wrong": len(tally.wrong),
        "mix_ups": tally.mixed,
        "slowest_answer_s": round(tally.slowest_s, 2),
        "server_peak_mb": round(tally.server_mb),
        "all_peak_mb": round(tally.all_mb),
        "alive": alive,
        "exit_status": status,
        "folders_left": left,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
