"""Coverage-guided fuzzing of what opens files: python scripts/fuzz.py --target hdf5 --seconds 1200 --seed 0.

atheris (libFuzzer for Python: ``pip install atheris``) changes inputs so that they reach new branches of carvae;
tests/robustness/hostile.py makes hostile files of them and says what is a finding: an exception that is no
`CarvaeError`, a signal, more than ten seconds, memory far beyond the file, or a changed model that loads. Inputs that
were kept (tests/robustness/corpus) are where a run starts from; ``--keep`` adds what this one found worth keeping.
``--case FILE`` tries one input again. Prints one line of JSON; the exit code is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "robustness"
CORPUS = SUITE / "corpus"
LIMIT = 60
"""Seconds by the clock after which an input hangs, on a machine that may be busy; hostile.py limits the processor's."""
TURN = 300
"""Seconds after which a worker begins anew, as after a signal; what libraries leak is no finding of ours."""
MOST_KEPT = 40
COMPILED = [
    "carvae.data.rows",
    "carvae.labels.ucell",
    "carvae.model.kernels",
    "carvae.model.large_counts",
    "carvae.model.vector",
]
"""Modules whose functions numba compiles, which cannot be followed."""
sys.path[:0] = [str(SUITE), str(SUITE.parent)]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def worker(target: str, state: Path, flags: list[str]) -> None:
    """Fuzz in this process until libFuzzer ends it; findings and the count of executions go to ``state``."""
    import atheris

    with atheris.instrument_imports(include=["carvae"], exclude=COMPILED):
        import hostile
    warnings.simplefilter("ignore")
    logging.disable()
    with scratch() as folder:
        sources, place = Path(folder) / "sources", Path(folder) / "place"
        sources.mkdir()
        opened = hostile.open_target(target, sources)
        count = 0

        def one(data: bytes) -> None:
            nonlocal count
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            try:
                opened.run(data, place)
            except Exception as error:  # noqa: BLE001 - this is what is sought
                note(state, hostile.where(error), error, data)
            count += 1
            (state / "count").write_bytes(struct.pack("<q", count))

        atheris.Setup([sys.argv[0], *flags], one)
        atheris.Fuzz()


def note(state: Path, where: str, error: Exception, data: bytes) -> None:
    """Keep the first input that leads to an error at a place, and its traceback."""
    name = "".join(c if c.isalnum() else "-" for c in where)
    if not (state / "found" / name).exists():
        (state / "found" / name).write_bytes(data)
        (state / f"{name}.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def turn(given: argparse.Namespace, state: Path, number: int, left: tuple[float, int]) -> int:
    """One worker; how many inputs it tried."""
    (state / "count").write_bytes(struct.pack("<q", 0))
    flags = [f"-max_total_time={max(1, min(TURN, int(left[0])))}", f"-runs={left[1]}", f"-timeout={LIMIT}"]
    flags += [f"-seed={given.seed * 1000 + number + 1}", "-rss_limit_mb=6000", f"-artifact_prefix={state}/found/"]
    flags += ["-max_len=4096", "-report_slow_units=600", "-verbosity=1", str(state / "corpus")]
    command = [sys.executable, __file__, "--target", given.target, "--worker", str(state), *flags]
    with (state / f"log{number}.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
    count: int = struct.unpack("<q", (state / "count").read_bytes())[0]
    return count


def keep(given: argparse.Namespace, state: Path) -> None:
    """Add the shortest inputs that together reach what all reach."""
    kept = CORPUS / given.target
    kept.mkdir(parents=True, exist_ok=True)
    least = state / "least"
    least.mkdir()
    command = [sys.executable, __file__, "--target", given.target, "--worker", str(state), "-merge=1"]
    command += [f"-timeout={LIMIT}", str(least), str(state / "corpus")]
    subprocess.run(command, check=False, capture_output=True)
    for file in sorted(least.iterdir(), key=lambda file: (file.stat().st_size, file.name))[:MOST_KEPT]:
        shutil.copyfile(file, kept / file.name[:12])


def fuzz(given: argparse.Namespace) -> None:
    """Fuzz in workers until the time or the executions are over."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        for name in ("found", "corpus"):
            (state / name).mkdir()
        start_from(given.target, state / "corpus")
        began, done, number = time.monotonic(), 0, 0
        while (left := given.seconds - (time.monotonic() - began)) > 1 and done < given.runs:
            tried = turn(given, state, number, (left, given.runs - done))
            done, number = done + tried, number + 1
            if not tried:
                sys.exit(f"the worker tried nothing:\n{(state / f'log{number - 1}.txt').read_text()[-3000:]}")
        found = sorted((state / "found").iterdir())
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = {"target": given.target, "seed": given.seed, "executions": done, "found": [f.name for f in found]}
        told |= {"seconds": round(time.monotonic() - began), "cpu_seconds": round(used.ru_utime + used.ru_stime)}
        if given.keep:
            keep(given, state)
        if given.findings and found:
            given.findings.mkdir(parents=True, exist_ok=True)
            for file in [*found, *state.glob("*.txt")]:
                shutil.copyfile(file, given.findings / f"{given.target}-{file.name}")
    print(json.dumps(told))
    sys.exit(int(bool(found)))


def start_from(target: str, corpus: Path) -> None:
    """The target's own seeds and what was kept of earlier runs."""
    import hostile

    with scratch() as folder:
        for number, data in enumerate(hostile.TARGETS[target](Path(folder)).seeds()):
            (corpus / f"seed{number}").write_bytes(data)
    for file in sorted((CORPUS / target).glob("*")):
        shutil.copyfile(file, corpus / file.name)


def again(target: str, case: Path) -> None:
    """Try one input and say what comes of it."""
    import hostile

    with scratch() as folder:
        opened = hostile.TARGETS[target](Path(folder))
        place = Path(folder) / "place"
        place.mkdir()
        print(opened.run(case.read_bytes(), place))


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=["hdf5", "zarr", "mtx", "text", "bundle"], required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add inputs to tests/robustness/corpus")
    parser.add_argument("--findings", type=Path, help="folder for what was found")
    parser.add_argument("--case", type=Path, help="this input alone")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args()
    if given.worker:
        worker(given.target, given.worker, flags)
    elif given.case:
        again(given.target, given.case)
    else:
        fuzz(given)


if __name__ == "__main__":
    main()
