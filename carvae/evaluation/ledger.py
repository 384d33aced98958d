"""A log of every evaluation, which is only ever added to: the best of fifty settings is told from the only one tried.

``evaluations.jsonl`` lies beside the output folder. Each line holds what was evaluated, a digest of the settings, the
headline, and the hash of the line before it, so that a line that was altered or taken out is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from carvae import __version__
from carvae.data.atomic import alone, replacing_file
from carvae.errors import EvaluateError

NAME = "evaluations.jsonl"
FIRST = "0" * 64
"""In place of a hash before the first line."""


@dataclass(frozen=True, slots=True)
class Tried:
    """How often these data have been evaluated, as far as one log knows."""

    evaluations: int
    """With the present one."""
    settings: int
    """Different settings among them."""
    log: Path

    @property
    def sentence(self) -> str:
        """For the screen and the card."""
        several = "setting" if self.settings == 1 else "different settings"
        return (
            f"evaluation {self.evaluations} of these data, {self.settings} {several} tried so far, as {self.log.name} "
            "knows; the best of many settings looks better than it is"
        )


def digest(*parts: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def check(output: Path) -> None:
    """Raise EvaluateError where the log beside an output cannot be added to, since it was altered."""
    _read(place(output))


def place(output: Path) -> Path:
    """Where the log of an output is."""
    return Path(os.path.realpath(output)).with_name(NAME)


def record(output: Path, data: str, what: str, settings: Mapping[str, Any], headline: Mapping[str, Any]) -> Tried:
    """Add an evaluation to the log beside its output, and count.

    Parameters
    ----------
    output
        Folder of the evaluation.
    data
        Fingerprint of what was evaluated on.
    what
        Design.
    settings, headline
        Everything that was chosen, and the figures by which it would be chosen.

    Raises
    ------
    EvaluateError
        The log was altered; nothing is written then.
    """
    path = place(output)
    with alone(path):
        lines = _read(path)
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "carvae": __version__,
            "data": data,
            "what": what,
            "settings": digest(settings),
            "headline": dict(headline),
            "previous": lines[-1]["hash"] if lines else FIRST,
        }
        lines.append(entry | {"hash": digest(entry)})
        with replacing_file(path) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    same = [line for line in lines if line["data"] == data and line["what"] == what]
    return Tried(len(same), len({line["settings"] for line in same}), path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines, before = [], FIRST
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            rest = {key: value for key, value in entry.items() if key != "hash"}
            right = entry["previous"] == before and entry["hash"] == digest(rest)
            before = entry["hash"]
        except (ValueError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise EvaluateError(
                f"line {number} of {path} was altered, or a line before it taken out; evaluations are only ever added "
                "to it, so restore it, or move it away to begin a new count"
            )
        lines.append(entry)
    return lines
