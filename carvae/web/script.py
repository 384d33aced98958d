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
    query = _query(task, lines)
    out = shlex.quote(f"{stem}_again.h5ad")
    settings = "".join(f" {shlex.quote(setting)}" for setting in _settings(task.settings))
    lines.append(f'carvae annotate {shlex.quote(query)} --model "$model" --out {out}{settings}')
    lines.append(f'carvae report {out} --model "$model" --out {shlex.quote(f"{stem}_report_again.html")}')
    return "\n".join(lines) + "\n"


def _query(task: Task, lines: list[str]) -> str:
    """What is labelled, and what must be done before to have it: it is to lie as it lay here, by which it is called."""
    given = list(task.hashes)
    if not given:
        lines.append("# the simulated cells are taken from the results")
        return f"{task.stem}_carvae.h5ad"
    inner = Path(task.query).relative_to(Path(task.result).parent / "query")
    tops = list(dict.fromkeys(name.replace("\\", "/").split("/")[0] for name in given))
    packed = ending(given[0], (ARCHIVE,)) != ""
    if len(inner.parts) == 1 and len(tops) == 1 and not packed:
        return tops[0]
    folder = f"{task.stem}_query/{inner.parts[0]}"
    lines.append(f"mkdir -p {shlex.quote(folder)}")
    if packed:
        lines.append(f"python3 -m zipfile -e {shlex.quote(given[0])} {shlex.quote(folder)}")
        return f"{task.stem}_query/{inner}"
    lines.append(f"cp -R -- {' '.join(map(shlex.quote, tops))} {shlex.quote(folder)}/")
    return f"{folder}/{tops[0]}" if len(inner.parts) > 1 else folder


def _settings(settings: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Nested settings as the command line takes them."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={json.dumps(value)}"
