"""The measured figures of the README, each kept in docs/figures.json with how it was made.

``python scripts/figures.py`` says which figure of the README (section Measured) is not in the file. ``--accept`` writes
the README's figures into the file, with today's date and commit where they changed: after a bench was run again, edit
the README and give this command. ``--run [NAME ...] --data FOLDER`` runs the commands of some blocks (all by default:
hours), keeps what they print under ``runs/figures`` and says which figures come out again. Date and commit are those at
which a figure entered the README; DATA in a command stands for the folder.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, FILE, RUNS = ROOT / "README.md", ROOT / "docs" / "figures.json", ROOT / "runs" / "figures"
NUMBER = re.compile(r"(?<![\w.\-])[+-]?\d[\d,]*(?:\.\d+)?%?(?![\w])")
LEAD = re.compile(r"^\*\*(.+?)\*\*", re.DOTALL)
WANTED = ("command", "data", "patients", "studies", "interval", "configurations", "date", "commit")
"""What a block must say beside its figures; null where there is none, as of patients in a test of speed."""
CONTEXT = 40
"""Characters before a figure that tell which it is."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of the README."""

    of: str
    """Row and column of its table, or the words before it."""
    value: str


def blocks(text: str) -> dict[str, str]:
    """Bold lead of each block of the section Measured -> its text."""
    section = text.partition("\n## Measured\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    name = "Measured"
    for paragraph in section.split("\n\n"):
        if lead := LEAD.match(paragraph):
            name = " ".join(lead.group(1).split()).rstrip(".")
        found[name] = found.get(name, "") + paragraph + "\n\n"
    return found


def figures(block: str) -> list[Figure]:
    """The numbers of a block in order; those in code are none."""
    found: list[Figure] = []
    for paragraph in block.split("\n\n"):
        plain = re.sub(r"`[^`]*`", lambda code: " " * len(code.group()), paragraph)
        is_table = paragraph.lstrip().startswith("|")
        found += _of_table(paragraph) if is_table else _of_text(" ".join(plain.split()))
    return found


def _of_text(text: str) -> Iterator[Figure]:
    for match in NUMBER.finditer(text):
        yield Figure(text[max(0, match.start() - CONTEXT) : match.start()].strip(), match.group().rstrip(","))


def _of_table(table: str) -> Iterator[Figure]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()]
    head = rows[0]
    for row in rows[2:]:
        for column, cell in zip(head[1:], row[1:], strict=True):
            for match in NUMBER.finditer(cell.replace("*", "")):
                yield Figure(f"{row[0]} | {column}", match.group().rstrip(","))


def check(readme: str, kept: dict[str, Any]) -> list[str]:
    """What is wrong: a figure that is not in the file, or a block that does not say how it was made."""
    wrong = []
    said = blocks(readme)
    for name, text in said.items():
        own = figures(text)
        if own and name not in kept:
            wrong.append(f"{name!r} has {len(own)} figures and is not in the file")
            continue
        held = [Figure(**figure) for figure in kept.get(name, {}).get("figures", ())]
        new = [figure for figure in own if figure not in held]
        wrong += [f"{name!r}: {figure.value} (after {figure.of!r}) is not in the file" for figure in new]
        wrong += [f"{name!r}: {figure.value} ({figure.of!r}) is no longer said" for figure in held if figure not in own]
        wrong += [f"{name!r} does not say its {word}" for word in WANTED if own and word not in kept[name]]
    return wrong + [
        f"{name!r} is not in the README" for name in kept if name not in said and not kept[name].get("card")
    ]


def accept(readme: str, kept: dict[str, Any]) -> dict[str, Any]:
    """The file with the README's figures; blocks that changed get today's date and commit."""
    found = {name: block for name, block in kept.items() if block.get("card")}
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    for name, text in blocks(readme).items():
        own = [{"of": figure.of, "value": figure.value} for figure in figures(text)]
        if not own:
            continue
        old = kept.get(name, {})
        made = {word: old.get(word) for word in WANTED}
        if own != old.get("figures"):
            made |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit}
        found[name] = made | ({"varies": True} if old.get("varies") else {}) | {"figures": own}
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def value_of(text: str) -> tuple[float, float]:
    """A figure as a number, and half of its last place."""
    digits = text.rstrip("%").replace(",", "")
    places = len(digits.partition(".")[2])
    scale = 0.01 if text.endswith("%") else 1.0
    return float(digits) * scale, 0.5 * 10.0**-places * scale


def comes_out(figure: str, printed: list[float]) -> bool:
    """Whether any printed number rounds to the figure."""
    value, half = value_of(figure)
    return any(abs(abs(number) - abs(value)) <= half * 1.001 for number in printed)


def again(name: str, block: dict[str, Any], data: Path) -> str:
    """Run a block's command and say which of its figures come out."""
    if not block.get("command"):
        return f"{name}: no command"
    wrong = [file for file, sha in (block["data"] or {}).items() if _sha256(data / file) != sha]
    if wrong:
        return f"{name}: {', '.join(wrong)} is not the file that was used; nothing was run"
    RUNS.mkdir(parents=True, exist_ok=True)
    words = [word.replace("DATA", str(data)) for word in shlex.split(block["command"])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    kept = RUNS / (re.sub(r"\W+", "_", name)[:60] + ".txt")
    kept.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        return f"{name}: exit code {done.returncode}, see {kept}"
    printed = [value_of(text)[0] for text in re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?%?", done.stdout)]
    absent = [figure["value"] for figure in block["figures"] if not comes_out(figure["value"], printed)]
    said = f"{len(block['figures']) - len(absent)} of {len(block['figures'])} figures come out again"
    return (
        f"{name}: {said}"
        + (f"; not {', '.join(absent)}" if absent else "")
        + (" (time varies)" if block.get("varies") else "")
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def main() -> None:
    """Check, accept or run; the exit code is 1 where a figure is not in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the README's figures into docs/figures.json")
    parser.add_argument("--run", nargs="*", metavar="NAME", help="start of the names of blocks whose commands are run")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real data")
    given = parser.parse_args()
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    readme = README.read_text(encoding="utf-8")
    if given.accept:
        kept = accept(readme, kept)
        FILE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.run is not None:
        for name, block in kept.items():
            if not given.run or name.startswith(tuple(given.run)):
                print(again(name, block, given.data), flush=True)
        return
    wrong = check(readme, kept)
    print("\n".join(wrong) or f"every figure of the README is in {FILE.relative_to(ROOT)}")
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
