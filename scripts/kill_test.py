"""Kill each verb at random, and let each call that makes writing safe fail: python scripts/kill_test.py --seed 0.

Every output must be the old one or the complete new one, no input may change, the same command must go on and end with
what an undisturbed run gives (training: the very bytes), and nothing may be left lying about. Prints one line of JSON;
the exit code is 1 where anything was wrong.

The verbs run in children that are forked from this process, which has the libraries loaded: a kill costs a second.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # GNU OpenMP ends a process that forks

from carvae.cli import main as command_line
from carvae.data import atomic
from carvae.data.simulate import SimulationSettings, simulate_studies, write_studies
from carvae.demo import programmes

KEPT = Path(__file__).resolve().parents[1] / "tests" / "bundles" / "0.1.0"
CALLS = {"fsync": "fsync", "replace": "replace", "rename": "rename", "mkdir": "mkdir", "exchange": ""}
SIZES = (0, 1, 100, 1_000, 4_000, 10_000, 20_000, 40_000, 80_000, 150_000)
"""Bytes after which the disk is full: one of them falls into the writing of every file."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A command, what it writes, and what it reads."""

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]


def digest(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names; empty where there is none."""
    if not path.exists():
        return ""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def names(folder: Path) -> set[str]:
    """Everything in a folder that a user sees, and hidden files; logs and checkpoints of a run apart."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not {"fit", "refit", "store.zarr"} & set(path.relative_to(folder).parts)
    }


def child(folder: Path, verb: Verb, before: Callable[[], object], kill_after: float | None = None) -> tuple[int, str]:
    """Run a verb in a forked child with ``folder`` as its working folder; its exit code (or -signal) and stderr."""
    said, into = os.pipe()
    process = os.fork()
    if process == 0:
        code = 70
        try:
            os.chdir(folder)
            os.dup2(into, 2)
            sys.argv = ["carvae", *verb.arguments]
            before()
            command_line()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - whatever it is, it is told and counted
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(into)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(said, errors="replace") as errors:
        text = errors.read()
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), text


def failing(call: str, number: int, code: int) -> Callable[[], None]:
    """What makes the call of that number fail in this process."""

    def prepare() -> None:
        seen = 0

        def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
            def either(*arguments: Any, **named: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == number:
                    raise OSError(code, os.strerror(code))
                return real(*arguments, **named)

            return either

        if call == "exchange":
            atomic._exchange = wrapped(atomic._exchange)
        else:
            setattr(os, CALLS[call], wrapped(getattr(os, CALLS[call])))

    return prepare


def full_disk(size: int) -> Callable[[], None]:
    """What makes every write beyond so many bytes of a file fail."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def setting(folder: Path) -> tuple[Verb, ...]:
    """Inputs, configs and the verbs."""
    studies = simulate_studies(np.random.default_rng(0), programmes(), SimulationSettings(n_cells=60))
    write_studies(studies, folder / "in")
    shutil.copytree(KEPT / "model", folder / "in" / "model")
    shutil.copyfile(KEPT / "query.h5ad", folder / "in" / "query.h5ad")
    config = {
        "output": "out/model",
        "ingest": {
            "n_top_genes": 300,
            "studies": {
                "sim_lymphoma": {
                    "path": "in/sim_lymphoma.h5ad",
                    "obs": {"patient": "donor_id", "sample": "sample_id"},
                    "label": "cell_type",
                }
            },
        },
        "model": {"n_latent": 8, "n_hidden": 16},
        "train": {"wandb": "disabled", "accelerator": "cpu", "max_epochs": 30, "min_steps": 0, "patience": 30},
    }
    (folder / "in" / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    asked = ("in/query.h5ad", "--model", "in/model", "--quiet")
    store = "out/model.work/store.zarr"
    read = ("in",)
    return (
        Verb("ingest", ("ingest", "in/c.yaml", "--quiet"), (store, "out/model.work/receipt.json"), read),
        Verb("train", ("train", "in/c.yaml", "--quiet"), ("out/model",), read),
        Verb("annotate", ("annotate", *asked, "--out", "out/A.h5ad"), ("out/A.h5ad", "out/A.samples.csv"), read),
        Verb("annotate to csv", ("annotate", *asked, "--out", "out/A.csv"), ("out/A.csv", "out/A.samples.csv"), read),
        Verb("map", ("map", *asked, "--out", "out/B"), ("out/B", "out/B.samples.csv"), read),
    )


def warm(folder: Path, verbs: Sequence[Verb]) -> None:
    """Run every verb once in this process, so that its children need neither import nor compile anything."""
    start = Path.cwd()
    os.chdir(folder)
    for verb in verbs:
        sys.argv = ["carvae", *verb.arguments]
        with suppress(SystemExit):
            command_line()
    os.chdir(start)
    shutil.rmtree(folder / "out")


OLDER = {
    "ingest": ("ingest.n_top_genes=200",),
    "train": ("seed=1", "train.max_epochs=1"),
    "map": ("map.held_out=0.3",),
}
"""Settings of an older run of the same verb, whose output is another."""


def older(folder: Path, verb: Verb) -> None:
    """Put an older output in place."""
    more = OLDER.get(verb.name, ("predict.coverage=0.5",))
    code, said = child(folder, replace(verb, arguments=(*verb.arguments, *more)), lambda: None)
    assert code == 0, said


class Trial:
    """A verb with its old and new outputs, on which it is disturbed again and again."""

    def __init__(self, root: Path, verb: Verb) -> None:
        self.verb, self.folder, self.start = verb, root / "work", root / f"start {verb.name}"
        self.wrong: list[str] = []
        shutil.copytree(root / "in", self.start / "in")
        older(self.start, verb)
        self.old = [digest(self.start / out) for out in verb.outputs]
        assert all(self.old), f"{verb.name} wrote no older output"
        self.reset()
        began = time.monotonic()
        code, said = self.run(lambda: None)
        self.seconds = time.monotonic() - began
        assert code == 0, said
        self.new = [digest(self.folder / out) for out in verb.outputs]
        self.inputs, self.names = digest(self.folder / "in"), names(self.folder)
        assert self.new != self.old, f"{verb.name} gives the same with other settings"

    def reset(self) -> None:
        """Inputs and the older output, as before any run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder, symlinks=True)

    def run(self, before: Callable[[], object], kill_after: float | None = None) -> tuple[int, str]:
        """Run the verb in the working folder."""
        return child(self.folder, self.verb, before, kill_after)

    def check(self, what: str, code: int, said: str) -> None:
        """Old or new, inputs as they were, and the same command goes on to the end."""
        for out, old, new in zip(self.verb.outputs, self.old, self.new, strict=True):
            if digest(self.folder / out) not in (old, new):
                self.wrong.append(f"{what}: {out} is neither old nor new")
        if code == 1 and (said.count("carvae: ") != 1 or "Traceback" in said):
            self.wrong.append(f"{what}: said {said[-300:]!r}")
        if code not in (0, 1, -signal.SIGKILL):
            self.wrong.append(f"{what}: ended with {code}: {said[-300:]!r}")
        if code == 1 and (litter := {n for n in names(self.folder) if ".tmp" in n}):
            self.wrong.append(f"{what}: left {sorted(litter)}")
        again, said = self.run(lambda: None)
        if again or [digest(self.folder / out) for out in self.verb.outputs] != self.new:
            self.wrong.append(f"{what}: the same command did not end with the new output: {said[-300:]!r}")
        if digest(self.folder / "in") != self.inputs:
            self.wrong.append(f"{what}: an input changed")
        if names(self.folder) != self.names:
            self.wrong.append(f"{what}: left {sorted(names(self.folder) ^ self.names)}")


def kills(trial: Trial, n: int, rng: random.Random) -> Counter[str]:
    """Kill a verb at random times over its run."""
    counts = Counter[str]()
    for k in range(n):
        trial.reset()
        after = rng.uniform(0, 1.05 * trial.seconds)
        code, said = trial.run(lambda: None, after)
        counts["died" if code == -signal.SIGKILL else "ended before"] += 1
        trial.check(f"{trial.verb.name}, kill {k} after {after:.2f} s", code, said)
    return counts


def failures(trial: Trial, most: int) -> Counter[str]:
    """Let each call fail in its turn until a run has no more of them, and the disk be full after so many bytes."""
    counts = Counter[str]()
    for call in CALLS:
        for number in range(1, most + 1):
            trial.reset()
            code = errno.EIO if number % 2 else errno.ENOSPC
            ended, said = trial.run(failing(call, number, code))
            trial.check(f"{trial.verb.name}, {call} {number} fails", ended, said)
            if ended == 0:
                break
            counts[call] += 1
    for size in SIZES:
        trial.reset()
        ended, said = trial.run(full_disk(size))
        trial.check(f"{trial.verb.name}, full after {size} bytes", ended, said)
        counts["write"] += ended == 1
    return counts


def main() -> None:
    """Try every verb."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="over all verbs")
    parser.add_argument("--most", type=int, default=200, help="most calls of a kind that fail in turn")
    parser.add_argument("--verbs", nargs="*", help="only these")
    given = parser.parse_args()
    ctypes.CDLL(None)  # loaded before any fork
    rng, found, wrong = random.Random(given.seed), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        verbs = [verb for verb in setting(root) if not given.verbs or verb.name in given.verbs]
        warm(root, verbs)
        for verb in verbs:
            trial = Trial(root, verb)
            killed = kills(trial, given.kills // len(verbs), rng)
            failed = failures(trial, given.most)
            found[verb.name] = {"kills": dict(killed), "failures": dict(failed), "seconds": round(trial.seconds, 2)}
            wrong += trial.wrong
            print(json.dumps({verb.name: found[verb.name], "wrong": trial.wrong}), file=sys.stderr, flush=True)
    n_killed = sum(entry["kills"].get("died", 0) for entry in found.values())
    n_failed = sum(sum(entry["failures"].values()) for entry in found.values())
    told = {"seed": given.seed, "killed": n_killed, "failed calls": n_failed, "wrong": wrong, "by verb": found}
    print(json.dumps(told))
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
