"""Change the code in small ways and see whether the tests notice: python scripts/mutation.py --per-file 40 --seed 0.

mutmut (``pip install mutmut``, for developers alone) makes the mutants and runs the tests of the file on each; of many
mutants some are drawn. Writes docs/mutation.md: how many were killed, and each survivor with what is to be said of it.
That is written by hand in tests/mutation.yaml, by what a survivor's line matches, since mutants are numbered anew with
every change. The exit code is 1 where fewer than 80% were killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE, SAID = ROOT / "docs" / "mutation.md", ROOT / "tests" / "mutation.yaml"
FILES = {
    "carvae/data/genes.py": ("tests/test_genes.py", "tests/test_alignment.py"),
    "carvae/labels/tree.py": ("tests/test_tree.py",),
    "carvae/data/split.py": ("tests/test_split.py",),
    "carvae/response/splits.py": ("tests/test_response.py",),
    "carvae/model/calibration.py": ("tests/test_calibration.py",),
    "carvae/model/bundle.py": ("tests/test_bundle.py", "tests/test_kept_bundles.py"),
}
"""File -> the tests that are to notice."""
COPIED = ("carvae", "configs", "tests", "scripts", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
SETTINGS = """[mutmut]
source_paths=carvae
only_mutate={file}
also_copy=
    configs
    docs
    scripts
    README.md
    CHANGELOG.md
pytest_add_cli_args=
    -q
    -x
    -n0
    -pno:cacheprovider
pytest_add_cli_args_test_selection=
    {tests}
track_dependencies=False
use_git_change_detection=False
timeout_constant=60
"""
BAR = 0.8
UNEXPLAINED = "Not explained."
HEAD = """# Mutation testing

Made by `python scripts/mutation.py --per-file {n} --seed {seed}`: mutmut changes one thing in a function, and the tests
of the file must fail. Of the mutants of a file up to {n} are drawn. What is said of survivors is in
`tests/mutation.yaml`.

| file | mutants | tried | killed | |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of the mutants of a file."""

    file: str
    n_all: int
    killed: list[str]
    survived: dict[str, str]
    """Mutant -> the change."""

    @property
    def share(self) -> float:
        """Killed, of those that were tried."""
        return len(self.killed) / max(1, len(self.killed) + len(self.survived))


def mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut in the copy; what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    program = str(Path(sys.executable).with_name("mutmut"))
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def tried(file: str, tests: tuple[str, ...], n: int, seed: int) -> Tried:
    """Try mutants of one file in a copy of the project."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, folder / name)
        (folder / "setup.cfg").write_text(SETTINGS.format(file=file, tests="\n    ".join(tests)), encoding="utf-8")
        said = mutmut(folder, "run", "--max-children", "1", "no.such.mutant")  # makes them, and follows the tests
        known = folder / "mutants" / f"{file}.meta"
        if not known.exists():
            sys.exit(f"mutmut made no mutants of {file}:\n{said[-3000:]}")
        names = sorted(json.loads(known.read_text(encoding="utf-8"))["exit_code_by_key"])
        drawn = sorted(random.Random(seed).sample(names, min(n, len(names))))
        mutmut(folder, "run", "--max-children", "1", *drawn)
        codes = json.loads(known.read_text(encoding="utf-8"))["exit_code_by_key"]
        survived = {name: mutmut(folder, "show", name) for name in drawn if codes[name] in (0, 33)}
        killed = [name for name in drawn if codes[name] not in (0, 33, None)]
        if undone := [name for name in drawn if codes[name] is None]:
            sys.exit(f"{len(undone)} mutants of {file} were not tried:\n{said[-3000:]}")
        return Tried(file, len(names), killed, survived)


def change(shown: str) -> str:
    """The lines of a mutant's difference that say what changed."""
    lines = [line for line in shown.splitlines() if re.match(r"[-+](?![-+])", line)]
    return " → ".join(f"`{line[1:].strip()}`" for line in lines).replace("|", "\\|")


def main() -> None:
    """Try all files and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--per-file", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=list(FILES))
    parser.add_argument("--print", action="store_true", dest="only_print", help="leave docs/mutation.md as it is")
    given = parser.parse_args()
    comments = yaml.safe_load(SAID.read_text(encoding="utf-8"))
    text, below, kept = HEAD.format(n=given.per_file, seed=given.seed), "", True
    for file in given.files:
        found = tried(file, FILES[file], given.per_file, given.seed)
        n = len(found.killed) + len(found.survived)
        text += f"| {file} | {found.n_all} | {n} | {len(found.killed)} | {found.share:.0%} |\n"
        kept &= found.share >= BAR
        for name, shown in found.survived.items():
            line = f"`{name}`: {change(shown)}"
            why = next((why for part, why in comments.items() if re.search(part, line)), UNEXPLAINED)
            below += f"- {line}. {why}\n"
        print(f"{file}: {len(found.killed)} of {n} killed", file=sys.stderr, flush=True)
    text += f"\n## Survivors\n\n{below or 'None.'}"
    if given.only_print:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
    sys.exit(int(not kept))


if __name__ == "__main__":
    main()
