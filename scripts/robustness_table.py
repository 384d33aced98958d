"""Run the robustness suite and write docs/robustness.md: python scripts/robustness_table.py [--from REPORT.xml].

The cases are in tests/robustness/cases.yaml, the goals in goals.yaml beside it. Each row is decided by tests: those
that the file names, and those of tests/robustness that bear the case. A row without a passing test is not reached.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "robustness"
PAGE = ROOT / "docs" / "robustness.md"
HEAD = """# Robustness

Made by `python scripts/robustness_table.py`, which runs every test named here; nothing is written by hand. What
scvi-tools 1.4.2 (with anndata, scanpy, zarr and wandb where it relies on them) made of a case was measured by the same
inputs. {counts}

"""
FURTHER = """
## Longer runs

They need `pip install 'carvae[test,dev]'`, and gcc on Linux for the first.

| what | command |
|---|---|
| kills at random, and every call that changes a file failing in turn | `python scripts/kill_test.py --kills 200` |
| fuzzing by coverage (targets `hdf5 zarr mtx text bundle`) | `python scripts/fuzz.py --target hdf5 --seconds 1200` |
| mutants of gene names, label tree, splits, calibration, bundle | `python scripts/mutation.py --per-file 40` |
| 10,000 reads of a model beside writers of two others in its place | `python scripts/read_test.py` |
| 50 users of the web page at once, good and bad files | `python scripts/bench_app.py --model BUNDLE` |
| the tests where nothing but the loopback can be reached (Linux) | `bash scripts/no_network.sh -n 2 --dist loadfile` |
| lowest and highest versions of Python and of what carvae needs | `python scripts/matrix.py --torch 2.13.0` |
| lines that tests reach | `pytest -n 2 --dist loadfile --cov carvae --cov-report term-missing --cov-fail-under 90` |
"""


@dataclass(slots=True)
class Ran:
    """The tests of one row."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    says: list[str] = field(default_factory=list)

    def add(self, other: Ran) -> None:
        """Take in the tests of another."""
        self.passed, self.skipped = self.passed + other.passed, self.skipped + other.skipped
        self.failed += other.failed
        self.says += [text for text in other.says if text not in self.says]

    @property
    def summary(self) -> str:
        """As pytest would sum it up."""
        parts = [f"{self.passed} passed", f"{len(self.failed)} failed", f"{self.skipped} skipped"]
        return ", ".join(part for part in parts if not part.startswith("0 ")) or "no test"


def run(tests: list[str], report: Path) -> None:
    """Run the tests, each file in one process, and write pytest's report."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-o", "junit_family=xunit1", f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=ROOT, check=False)


def read(report: Path) -> tuple[dict[str, Ran], dict[str, Ran]]:
    """The tests by case, and by file and name without parameters."""
    by_case: dict[str, Ran] = defaultdict(Ran)
    by_test: dict[str, Ran] = defaultdict(Ran)
    for test in ElementTree.parse(report).iter("testcase"):
        name = str(test.get("name")).partition("[")[0]
        file = str(test.get("classname")).replace(".", "/") + ".py"
        properties = [(p.get("name"), str(p.get("value"))) for p in test.iter("property")]
        one = Ran(says=[value for key, value in properties if key == "says"])
        if test.find("failure") is not None or test.find("error") is not None:
            one.failed.append(f"{file}::{test.get('name')}")
        elif test.find("skipped") is not None:
            one.skipped = 1
        else:
            one.passed = 1
        for place in (f"{file}::{name}", file):
            by_test[place].add(one)
        for case in (value for key, value in properties if key == "case"):
            by_case[case].add(one)
    return by_case, by_test


def cell(text: object) -> str:
    """Text that is one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def case_row(case: dict[str, Any], by_case: dict[str, Ran], by_test: dict[str, Ran]) -> tuple[str, str]:
    """The verdict on carvae and the row of a case."""
    ran = Ran()
    ran.add(by_case.get(case["case"], Ran()))
    for test in case.get("tests", ()):
        ran.add(by_test.get(test, Ran()))
    if ran.failed:
        verdict, told = "wrong", f"failed: {ran.failed[0]}"
    elif ran.passed:
        verdict, told = "right", case.get("carvae") or (ran.says[0] if ran.says else "")
    else:
        verdict, told = "open", case.get("open", "no test ran")
    row = [case["case"], case["what"], f"**{case['scvi']}**: {case['evidence']}", f"**{verdict}**: {told}"]
    return verdict, "| " + " | ".join(map(cell, row)) + " |"


def goal_row(name: str, goal: dict[str, Any], by_test: dict[str, Ran]) -> str:
    """The row of a goal: reached only where its tests passed and nothing is said to be missing."""
    ran = Ran()
    for test in goal.get("tests", ()):
        ran.add(by_test.get(test, Ran()))
    commands = [f"`pytest {' '.join(goal['tests'])}`: {ran.summary}"] if goal.get("tests") else []
    commands += [f"`{command}`: {said}" for command, said in goal.get("commands", {}).items()]
    short = goal.get("missing")
    reached = "no" if ran.failed or not commands else "in part" if short else "yes"
    row = [name, goal["goal"], reached, "; ".join(commands), short or ""]
    return "| " + " | ".join(map(cell, row)) + " |"


def main() -> None:
    """Run, or read a report, and write the page; the exit code is 1 where a case is wrong or undecided."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="report", type=Path, help="report of an earlier run (--junitxml of pytest)")
    parser.add_argument("--keep", type=Path, help="where to keep the report of this run")
    given = parser.parse_args()
    cases = yaml.safe_load((SUITE / "cases.yaml").read_text(encoding="utf-8"))
    goals = yaml.safe_load((SUITE / "goals.yaml").read_text(encoding="utf-8"))
    named = [test for row in (*cases, *goals.values()) for test in row.get("tests", ())]
    with tempfile.TemporaryDirectory() as folder:
        report = given.report or given.keep or Path(folder) / "report.xml"
        if given.report is None:
            run(["tests/robustness", *sorted({t for t in named if not t.startswith("tests/robustness/")})], report)
        by_case, by_test = read(report)
    rows = [case_row(case, by_case, by_test) for case in cases]
    counts = Counter(verdict for verdict, _ in rows)
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    scvi = Counter(case["scvi"] for case in cases)
    theirs = ", ".join(f"{n} {verdict}" for verdict, n in scvi.most_common())
    text = HEAD.format(counts=f"Of {len(cases)} cases carvae: {said}. scvi-tools: {theirs}.")
    text += "## Cases\n\n| case | what is done | scvi-tools | carvae |\n|---|---|---|---|\n"
    text += "\n".join(row for _, row in rows)
    text += "\n\n## Goals\n\n| | goal | reached | shown by | what is missing |\n|---|---|---|---|---|\n"
    text += "\n".join(goal_row(name, goal, by_test) for name, goal in goals.items()) + "\n"
    text += FURTHER
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {said}")
    sys.exit(int(bool(counts["wrong"] or counts["open"])))


if __name__ == "__main__":
    main()
