"""What carvae raises when the caller's input, files or settings are wrong.

Each message is one sentence for a person: what was found, where, and the remedy. The command line prints
it and exits with 1; anything else that escapes is a fault of carvae and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
"""Control characters but the newline, which parts several problems."""


class CarvaeError(Exception):
    """A problem that the caller can remedy; the message says how."""

    def __str__(self) -> str:
        """The message, in which what a file holds of control characters cannot reach a terminal."""
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())


class ConfigError(CarvaeError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class SchemaError(CarvaeError):
    """A study's ``obs`` does not meet the data contract."""


class CountsError(CarvaeError):
    """The matrix does not hold raw counts."""


class GeneError(CarvaeError):
    """The genes do not match: too little overlap, another species, or unknown identifiers."""


class ReadError(CarvaeError):
    """A file is missing, truncated, or of a kind that carvae does not read."""


class LabelError(CarvaeError):
    """Labels, label tree, mapping or signatures do not fit together."""


class BundleError(CarvaeError):
    """A model bundle is incomplete, altered, or too new for this version."""


class TrainError(CarvaeError):
    """Training cannot start or cannot go on with these data and settings."""


class CatalogueError(CarvaeError):
    """The catalogue of studies does not know a study, or its files cannot be fetched."""


class EvaluateError(CarvaeError):
    """An evaluation cannot be made of these data and settings, or would not be an honest one."""


class LeakError(EvaluateError):
    """What is learned from and what is asked are not apart."""


class LeakSuspected(EvaluateError):
    """A figure is better than these data can honestly give, and the checks for leaks have not all passed."""


class RespondError(CarvaeError):
    """Outcomes cannot be predicted from these patients, or with this model."""


def refuse_stream(path: Path) -> None:
    """Raise ReadError where a path is a pipe, a socket or a device: it cannot be read twice, or waits for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ReadError(f"{path} is a pipe or a device, not a file; write it to a file and give that")


def join_problems(head: str, problems: Sequence[str]) -> str:
    """One message for several problems: ``head`` with a single problem after it, or a list below it.

    Parameters
    ----------
    head
        What the problems have in common, without a closing colon.
    problems
        One clear sentence each, at least one.
    """
    assert problems, "join_problems needs a problem"
    if len(problems) == 1:
        return f"{head}: {problems[0]}"
    return "\n- ".join([f"{head} ({len(problems)} problems):", *problems])


def nearest(name: str, known: Iterable[str]) -> str:
    """``; the nearest is 'x'`` for the end of a sentence; empty where nothing is known."""
    lower = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), lower, n=1, cutoff=0.0)
    return f"; the nearest is {lower[near[0]]!r}" if near else ""
