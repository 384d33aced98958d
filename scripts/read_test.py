"""Readers beside writers of one model: python scripts/read_test.py [--reads 10000] [--readers 4] [--writers 2].

The writers put one of two models (the whole one and the shared one that tests/bundles keeps) in the same place, in turn
and without a pause, each unaware of the other. Every read must give one of the two, whole: its identity, and weights
that are its own to the bit. Prints one line of JSON; the exit code is 1 where a read or a write failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from carvae.errors import CarvaeError
from carvae.model.bundle import Bundle, load

KEPT = Path(__file__).resolve().parents[1] / "tests" / "bundles" / "0.1.0-layout5"
MODELS = ("model", "shared")
WAIT = 0.5
"""Seconds after which it is looked whether a reader died."""


def weights_of(bundle: Bundle) -> int:
    """Stands for all weights of a network, to the bit."""
    state = bundle.network.state_dict()
    return hash(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))


def write(place: Path, first: int, done: Event, told: Any) -> None:
    """Save both models in turn until the readers are done."""
    bundles = [load(KEPT / name, "cpu") for name in MODELS]
    n = 0
    while not done.is_set():
        try:
            bundles[(first + n) % 2].save(place)
            n += 1
        except (CarvaeError, OSError) as error:
            told.put(("failed", f"write: {type(error).__name__}: {error}"))
    told.put(("writes", n))


def read(place: Path, n_reads: int, told: Any) -> None:
    """Load so often, and tell what was read."""
    torch.set_num_threads(1)
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(n_reads):
        try:
            bundle = load(place, "cpu")
            seen[bundle.bundle_id, weights_of(bundle)] += 1
        except (CarvaeError, OSError) as error:
            told.put(("failed", f"read: {type(error).__name__}: {error}"))
    told.put(("reads", dict(seen)))


def answers(readers: list[Any], told: Any) -> list[tuple[str, Any]]:
    """What readers and writers told until every reader told its reads, or died without."""
    found: list[tuple[str, Any]] = []
    while sum(kind == "reads" for kind, _ in found) < len(readers):
        try:
            found.append(told.get(timeout=WAIT))
        except Empty:
            if any(reader.exitcode for reader in readers):
                return [*found, ("failed", "a reader died")]
    return found


def main() -> None:
    """Start writers and readers, and count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reads", type=int, default=10_000, help="over all readers")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--writers", type=int, default=2)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")  # the children hash alike, and need not import anything
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        own = {}
        for name in MODELS:  # as the writers will save them
            load(KEPT / name, "cpu").save(place)
            saved = load(place, "cpu")
            own[saved.bundle_id] = (name, weights_of(saved))
        done, told = context.Event(), context.Queue()
        writers = [context.Process(target=write, args=(place, n % 2, done, told)) for n in range(given.writers)]
        readers = [
            context.Process(target=read, args=(place, given.reads // given.readers, told)) for _ in range(given.readers)
        ]
        began = time.monotonic()
        for process in (*writers, *readers):
            process.start()
        found = answers(readers, told)
        done.set()
        while sum(kind == "writes" for kind, _ in found) < len(writers):
            found.append(told.get(timeout=60))
        for process in (*writers, *readers):
            process.join()
        litter = sorted(path.name for path in Path(scratch).iterdir() if path != place)
    wrong = [said for kind, said in found if kind == "failed"]
    counts: Counter[str] = Counter()
    for (identity, weights), n in (item for kind, seen in found if kind == "reads" for item in seen.items()):
        name, expected = own.get(identity, ("", 0))
        counts[name if weights == expected else "neither"] += n
    report = {"reads": counts.total(), "by model": dict(counts), "failed": len(wrong) + counts["neither"]}
    report |= {"writes": sum(n for kind, n in found if kind == "writes"), "left": litter, "said": wrong[:5]}
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report))
    sys.exit(int(bool(wrong or counts["neither"] or litter)))


if __name__ == "__main__":
    main()
