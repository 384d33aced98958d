"""Kill each verb at random, and let every call that changes a file fail: python scripts/kill_test.py --seed 0.

Every output must be the old one or the complete new one, no input may change, the same command must go on and end with
what an undisturbed run gives (training: the very bytes), and nothing may be left lying about. Prints one line of JSON;
the exit code is 1 where anything was wrong.

The verbs run in children that are forked from this process, which has the libraries loaded: a trial costs a second.
Half of the kills fall on a random call that changes a file, half on a random moment of the processor's time. Calls are
those of failing_calls.c, which gcc compiles here: writes, fsyncs, renames, new files and folders, changes of length.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # GNU OpenMP ends a process that forks

from carvae.cli import main as command_line
from carvae.data.simulate import SimulationSettings, simulate_studies, write_studies
from carvae.demo import programmes

KEPT = Path(__file__).resolve().parents[1] / "tests" / "bundles" / "0.1.0-layout5"
KINDS = ("write", "fsync", "rename", "new file or folder", "length")
"""As failing_calls.c counts them."""
KILLED = (-signal.SIGKILL, -signal.SIGPROF)


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


def calls() -> ctypes.CDLL:
    """What counts the calls of this process and lets them fail."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.seen.restype = ctypes.c_long
    library.arm.argtypes = [ctypes.c_long, ctypes.c_int]
    return library


def child(folder: Path, verb: Verb, before: Callable[[], object]) -> tuple[int, str, list[int]]:
    """Run a verb in a forked child with ``folder`` as its working folder.

    Returns its exit code (or -signal), what it said, and how many calls of each kind it made.
    """
    said, into = os.pipe()
    counted, count = os.pipe()
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
            os.write(count, json.dumps([calls().seen(kind) for kind in range(len(KINDS))]).encode())
            os._exit(code)
    os.close(into)
    os.close(count)
    with os.fdopen(said, errors="replace") as errors, os.fdopen(counted) as numbers:
        text, seen = errors.read(), json.loads(numbers.read() or "[]")
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), text, seen


def failing(number: int, code: int) -> Callable[[], None]:
    """What makes the call of that number fail in this process, or kills it there where ``code`` is 0."""
    return lambda: calls().arm(number, code)


def killed_after(seconds: float) -> Callable[[], None]:
    """What ends this process after some time on the processor, without a chance to tidy up."""
    return lambda: signal.setitimer(signal.ITIMER_PROF, max(seconds, 0.001))


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
        "train": {"wandb": "disabled", "accelerator": "cpu", "max_epochs": 8, "min_steps": 0, "patience": 8},
    }
    (folder / "in" / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    store = "out/model.work/store.zarr"
    read = ("in",)
    return (
        Verb("ingest", ("ingest", "in/c.yaml", "--quiet"), (store, "out/model.work/receipt.json"), read),
        Verb("train", ("train", "in/c.yaml", "--quiet"), ("out/model",), read),
        Verb("annotate", ("annotate", *ASKED, "--out", "out/A.h5ad"), ("out/A.h5ad", "out/A.samples.csv"), read),
        Verb("annotate to csv", ("annotate", *ASKED, "--out", "out/A.csv"), ("out/A.csv", "out/A.samples.csv"), read),
        Verb("map", ("map", *ASKED, "--out", "out/B"), ("out/B", "out/B.samples.csv"), read),
        Verb("embed", ("embed", *ASKED, "--out", "out/E.h5ad"), ("out/E.h5ad",), read),
        Verb("export", ("export", "in/model", "--share", "--out", "out/S", "--quiet"), ("out/S",), read),
        Verb("annotate and report", ("annotate", *ASKED, *PAGE), ("out/A.h5ad", "out/A.samples.csv", PAGE[-1]), read),
        Verb("report", ("report", "in/annotated.h5ad", "--out", "out/R.html", "--quiet"), ("out/R.html",), read),
    )


def warm(folder: Path, verbs: Sequence[Verb]) -> None:
    """Run every verb once in this process, so that its children need neither import nor compile anything."""
    start = Path.cwd()
    os.chdir(folder)
    for verb in (ANNOTATED, *verbs):
        sys.argv = ["carvae", *verb.arguments]
        with suppress(SystemExit):
            command_line()
    os.chdir(start)
    shutil.rmtree(folder / "out")


ASKED = ("in/query.h5ad", "--model", "in/model", "--quiet")
PAGE = ("--out", "out/A.h5ad", "--report", "out/A.html")
ANNOTATED = Verb("annotate", ("annotate", *ASKED, "--out", "in/annotated.h5ad"), (), ())
"""What the report is of."""
OLDER = {
    "ingest": ("ingest.n_top_genes=200",),
    "train": ("seed=1", "train.max_epochs=1"),
    "map": ("map.held_out=0.3",),
    "export": (),
    "report": ("report.max_cells=100",),
}
"""Settings of an older run of the same verb, whose output is another."""


def older(folder: Path, verb: Verb) -> None:
    """Put an older output in place."""
    more = OLDER.get(verb.name, ("predict.coverage=0.5",))
    own = [argument for argument in verb.arguments if argument != "--share"]  # the older one is the whole model
    code, said, _ = child(folder, replace(verb, arguments=(*own, *more)), lambda: None)
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
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        code, said, self.calls = self.run(failing(0, 0))
        self.seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
        assert code == 0, said
        self.new = [digest(self.folder / out) for out in verb.outputs]
        self.inputs, self.names = digest(self.folder / "in"), names(self.folder)
        assert self.new != self.old, f"{verb.name} gives the same with other settings"

    def reset(self) -> None:
        """Inputs and the older output, as before any run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder, symlinks=True)

    def run(self, before: Callable[[], object]) -> tuple[int, str, list[int]]:
        """Run the verb in the working folder."""
        return child(self.folder, self.verb, before)

    def check(self, what: str, code: int, said: str) -> None:
        """Old or new, inputs as they were, and the same command goes on to the end."""
        for out, old, new in zip(self.verb.outputs, self.old, self.new, strict=True):
            if digest(self.folder / out) not in ((old, new) if code else (new,)):
                self.wrong.append(f"{what}: {out} is neither old nor new")
        if code == 1 and (said.count("carvae: ") != 1 or "Traceback" in said):
            self.wrong.append(f"{what}: said {said[-300:]!r}")
        if code not in (0, 1, *KILLED):
            self.wrong.append(f"{what}: ended with {code}: {said[-300:]!r}")
        if code == 1 and (litter := {n for n in names(self.folder) if ".tmp" in n}):
            self.wrong.append(f"{what}: left {sorted(litter)}")
        again, said, _ = self.run(lambda: None)
        if again or [digest(self.folder / out) for out in self.verb.outputs] != self.new:
            self.wrong.append(f"{what}: the same command did not end with the new output: {said[-300:]!r}")
        if digest(self.folder / "in") != self.inputs:
            self.wrong.append(f"{what}: an input changed")
        if names(self.folder) != self.names:
            self.wrong.append(f"{what}: left {sorted(names(self.folder) ^ self.names)}")


def kills(trial: Trial, n: int, rng: random.Random) -> int:
    """Kill a verb at random; how often it died."""
    died = 0
    for k in range(n):
        trial.reset()
        if k % 2:
            after = rng.uniform(0, trial.seconds)
            what, before = f"killed after {after:.2f} s", killed_after(after)
        else:
            number = rng.randint(1, sum(trial.calls))
            what, before = f"killed at call {number}", failing(number, 0)
        code, said, _ = trial.run(before)
        died += code in KILLED
        trial.check(f"{trial.verb.name}, {what}", code, said)
    return died


def failures(trial: Trial, most: int, rng: random.Random) -> Counter[str]:
    """Let each call fail in its turn, by a broken disk and a full one; how often the verb was refused, and went on."""
    counts = Counter[str]()
    n_calls = sum(trial.calls)
    for number in range(1, n_calls + 1) if n_calls <= most else sorted(rng.sample(range(1, n_calls + 1), most)):
        trial.reset()
        code = errno.EIO if number % 2 else errno.ENOSPC
        ended, said, _ = trial.run(failing(number, code))
        trial.check(f"{trial.verb.name}, call {number} fails by {errno.errorcode[code]}", ended, said)
        counts["refused" if ended else "went on"] += 1
    return counts


def preloaded() -> None:
    """Begin this process anew with failing_calls.c loaded before the C library."""
    if "LD_PRELOAD" in os.environ:
        return
    source = Path(__file__).with_name("failing_calls.c")
    library = Path(tempfile.mkdtemp()) / "failing_calls.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"LD_PRELOAD": str(library)})


def main() -> None:
    """Try every verb."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="over all verbs")
    parser.add_argument("--most", type=int, default=10_000, help="most calls that fail in turn; more are drawn from")
    parser.add_argument("--verbs", nargs="*", help="only these")
    given = parser.parse_args()
    preloaded()
    rng, found = random.Random(given.seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        verbs = [verb for verb in setting(root) if not given.verbs or verb.name in given.verbs]
        warm(root, verbs)
        for verb in verbs:
            trial, began = Trial(root, verb), time.monotonic()
            died = kills(trial, given.kills // len(verbs), rng)
            failed = failures(trial, given.most, rng)
            found[verb.name] = {"kills": died, "calls": dict(zip(KINDS, trial.calls, strict=True)), "failed": failed}
            found[verb.name] |= {"wrong": trial.wrong, "seconds": round(time.monotonic() - began)}
            print(json.dumps({verb.name: found[verb.name]}), file=sys.stderr, flush=True)
    wrong = sum(len(entry["wrong"]) for entry in found.values())
    told = {"seed": given.seed, "killed": sum(entry["kills"] for entry in found.values()), "wrong": wrong}
    told |= {"failed calls": sum(entry["failed"].total() for entry in found.values()), "by verb": found}
    print(json.dumps(told))
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
