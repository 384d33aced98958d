"""The script that repeats a job on the command line, to be kept with its results."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from carvae import __version__
from carvae.web.names import ARCHIVE, ending
from carvae.web.task import Task

HEAD = """#!/bin/sh
# Repeats on the command line what the page of carvae {version} did. Run it where the file is that you gave to the page;
# another place of the model {model} can be given: sh {script} MODEL
set -eu
model=${{1:-{path}}}
same() {{ if command -v sha256sum >/dev/null; then sha256sum -c -; else shasum -a 256 -c -; fi; }}
"""


def repeat_script(task: Task) -> str:
    """A shell script; what was uploaded must be as it was, which it checks first."""
    stem, given = task.stem, list(task.hashes)
    model = Path(task.model)
    quoted = {"script": shlex.quote(f"{stem}_repeat.sh"), "path": shlex.quote(str(model))}
    lines = [HEAD.format(version=__version__, model=re.sub(r"[^\w.-]", "_", model.name), **quoted).rstrip()]
    if given:
        sums = "\n".join(f"{digest}  {name}" for name, digest in task.hashes.items())
        lines.append(f"printf '%s\\n' {shlex.quote(sums)} | same")
    query = _query(given, stem, lines)
    out = shlex.quote(f"{stem}_again.h5ad")
    settings = "".join(f" {shlex.quote(setting)}" for setting in _settings(task.settings))
    lines.append(f'carvae annotate {shlex.quote(query)} --model "$model" --out {out}{settings}')
    lines.append(f'carvae report {out} --model "$model" --out {shlex.quote(f"{stem}_report_again.html")}')
    return "\n".join(lines) + "\n"


def _query(given: list[str], stem: str, lines: list[str]) -> str:
    """What is labelled, and what must be done before to have it."""
    if not given:
        lines.append("# the simulated cells are taken from the results")
        return f"{stem}_carvae.h5ad"
    if len(given) > 1:
        top = {name.split("/")[0] for name in given}
        if len(top) == 1:
            return top.pop()
        lines.append(f"mkdir -p {shlex.quote(stem)} && cp -- {' '.join(map(shlex.quote, given))} {shlex.quote(stem)}/")
        return stem
    if ending(given[0], (ARCHIVE,)):
        lines.append(f"python3 -m zipfile -e {shlex.quote(given[0])} {shlex.quote(stem)}")
        return stem
    return given[0]


def _settings(settings: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Nested settings as the command line takes them."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={json.dumps(value)}"
