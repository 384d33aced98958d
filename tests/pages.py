"""The pages for users as sessions: their code blocks in order, and how each is run on small data.

A block of ``python`` runs in the page's one namespace. In a block of ``bash``, ``carvae ...`` runs in this process, and
every other line, and what stands behind a pipe, in a shell. A block of ``yaml`` whose first line is ``# NAME.yaml`` is
the file of that name; its training is cut to some steps. A block below ``<!-- not run: REASON -->`` is not run, but
compiles all the same.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from trained import carvae

CODE = ("bash", "python", "r", "yaml")
MARK = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*$")
FILE = re.compile(r"# (?P<name>[\w./-]+\.(yaml|csv))\n")
SMALL: dict[str, dict[str, Any]] = {
    "ingest": {"n_top_genes": 300},
    "model": {"n_hidden": 16, "n_latent": 8},
    "train": {"min_steps": 30, "max_epochs": 2, "wandb": "disabled", "accelerator": "cpu"},
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    not_run: str | None
    """Why it is not run."""


def blocks_of(path: Path) -> list[Block]:
    """Blocks of code, in order; what is shown as ``text`` is none."""
    found, mark = [], None
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type == "html_block" and (match := MARK.match(token.content)):
            mark = match["reason"]
        elif token.type == "fence" and token.info in CODE:
            assert token.map is not None
            found.append(Block(token.info, token.content, token.map[0] + 1, mark))
            mark = None
        else:
            assert mark is None, f"{path.name}: {mark!r} does not stand above a block of code"
    return found


class Session:
    """A reader who types a page's blocks one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        """Run one block; raises where the reader would see an error."""
        {"python": self._python, "bash": self._bash, "yaml": self._yaml}[block.language](block.code)

    def _python(self, code: str) -> None:
        exec(compile(code, "<page>", "exec"), self.names)

    def _bash(self, code: str) -> None:
        for line in code.replace("\\\n", " ").splitlines():
            head, _, rest = line.partition(" | ")
            words, shown = shlex.split(head, comments=True), ""
            if words[:1] == ["carvae"]:
                answer = carvae(*words[1:])
                assert answer.code == 0, f"{line}\n{answer.err}"
                shown = answer.out
            else:
                rest = line
            if words and rest:
                command = ["bash", "-ec", rest]
                done = subprocess.run(
                    command, cwd=self.folder, input=shown, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"

    def _yaml(self, code: str) -> None:
        config = yaml.safe_load(code)
        if (named := FILE.match(code)) is None:
            return
        if "ingest" in config:
            config = {**config, **{name: config.get(name, {}) | small for name, small in SMALL.items()}}
            code = yaml.safe_dump(config, sort_keys=False)
        path = self.folder / named["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
