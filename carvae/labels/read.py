"""Reading of label YAML: every scalar is text, keys are unique, and faults become sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from carvae.errors import LabelError, join_problems, nearest
from carvae.section import noting_repeats

_Loader = noting_repeats(yaml.BaseLoader)
"""YAML in which every scalar is text, so that labels such as ``1``, ``no`` and ``null`` stay labels."""


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises LabelError, saying ``what`` the file should be, if there is none."""
    try:
        loader = _Loader(path.read_bytes())
        spec = loader.get_single_data()
    except FileNotFoundError:
        raise LabelError(f"{what} {str(path)!r} does not exist; give the path of a YAML file") from None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise LabelError(f"{what} {str(path)!r} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if loader.problems:
        raise LabelError(join_problems(f"{what} {str(path)!r} says things twice", loader.problems))
    if not isinstance(spec, dict):
        raise LabelError(f"{what} {str(path)!r} must hold `key: value` at its top, found a {type(spec).__name__}")
    return spec


def wrong_keys(spec: object, known: Iterable[str], where: str) -> list[str]:
    """One sentence for each key of ``spec`` that is not known, or one saying that ``spec`` has no keys at all."""
    if not isinstance(spec, dict):
        return [f"{where} must be `key: value`, found {spec!r}"]
    return [f"{where} has the unknown key {key!r}{nearest(str(key), known)}" for key in spec if key not in known]


def entries(value: object, where: str, problems: list[str]) -> list[dict[str, Any]]:
    """The dictionaries in a list; what is no dictionary, or no list, becomes a problem."""
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        problems.append(f"{where} must be a list, found {value!r}")
        return []
    problems += [f"{where} holds {item!r} where `name: ...` is needed" for item in value if not isinstance(item, dict)]
    return [item for item in value if isinstance(item, dict)]


def texts(value: object) -> tuple[str, ...]:
    """A list as texts; a single value as one text; nothing as none."""
    if value is None or value == "":
        return ()
    return tuple(str(item) for item in value) if isinstance(value, list | tuple) else (str(value),)


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, each once."""
    return [name for name, count in Counter(names).items() if count > 1]
