"""The journeys of docs/journeys.md, typed in as they stand there: lines, CPU time and time to a labelled map.

python scripts/bench_journeys.py REFERENCE.h5ad QUERY.h5 [carvae] [CellTypist] [scANVI]

REFERENCE has raw counts and the columns patient, sample and cell_type (`Unlabelled` where there is no label); QUERY is
a 10x file. Each journey runs in new processes, one thread each, with CellTypist and scvi-tools as installed here.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "journeys.md"
FENCE = re.compile(r"^```(yaml|bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Journey:
    """What a user types, block by block."""

    name: str
    blocks: tuple[tuple[str, str], ...]

    @property
    def lines(self) -> int:
        """Lines typed, without blank ones and comments."""
        lines = [line.strip() for _, code in self.blocks for line in code.splitlines()]
        return sum(bool(line) and not line.startswith("#") for line in lines)


def journeys() -> list[Journey]:
    """Those of the page: a section each."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    found = [Journey(text.partition("\n")[0], tuple(FENCE.findall(text))) for text in sections]
    return [journey for journey in found if journey.blocks]


def run(journey: Journey, folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of CPU; stops where a block fails."""
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"MPLBACKEND": "Agg"}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for language, code in journey.blocks:
        if language == "yaml":
            (folder / code.split("\n")[0].removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu


def main() -> None:
    """Run the journeys that are asked for, all by default."""
    reference, query, *asked = sys.argv[1:]
    for journey in journeys():
        if asked and journey.name not in asked:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(reference, Path(scratch) / "reference.h5ad")
            shutil.copy(query, Path(scratch) / "query.h5")
            seconds, cpu = run(journey, Path(scratch))
        print(f"{journey.name}: {journey.lines} lines, {seconds / 60:.1f} min, {cpu / 60:.1f} min of CPU", flush=True)


if __name__ == "__main__":
    main()
