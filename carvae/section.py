"""What a section of settings is, how YAML and the command line become one, and what is said of a wrong key.

The settings themselves stand in `carvae.config`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from carvae.errors import ConfigError, join_problems, nearest


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _from_home(cls, value: Any) -> Any:
        """A path's ``~``, which no shell expands in YAML or behind ``key=``: a folder called ``~`` would be made."""
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def noting_repeats(base: type[Any]) -> type[Any]:
    """A loader of YAML whose keys are text (``no`` and ``2024.10`` are names of studies), and no key is there twice.

    Of those that are YAML would keep the last; ``problems`` names them.
    """

    class Noting(base):  # type: ignore[misc]
        def __init__(self, stream: bytes | str) -> None:
            super().__init__(stream)
            self.problems: list[str] = []

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = Counter(str(key.value) for key, _ in node.value)
            line = node.start_mark.line + 1
            self.problems += [
                f"{key!r} occurs {n} times in the block at line {line}" for key, n in keys.items() if n > 1
            ]
            if base is yaml.SafeLoader:
                self.flatten_mapping(node)  # what ``<<`` brings in
            return {str(key.value): self.construct_object(value, deep=deep) for key, value in node.value}

    return Noting


_Loader = noting_repeats(yaml.SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; raises ConfigError where there is none, or where a key is there twice."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        settings = loader.get_single_data()
    except FileNotFoundError:
        raise ConfigError(
            f"config file {str(path)!r} does not exist; see configs/reference.yaml for an example"
        ) from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-13-45, and bytes
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if loader.problems:
        raise ConfigError(join_problems(f"{path} says things twice", loader.problems))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold `section: {{key: value}}`, found a {type(settings).__name__}")
    return settings


def apply(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each ``section.key=value`` in nested settings; raises ConfigError where one is not of that form, or twice."""
    keys = [override.partition("=")[0] for override in overrides]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{', '.join(twice)} is given more than once; give each setting once")
    for override in overrides:
        _set(settings, override)


def _set(settings: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"the value of {override!r} cannot be read as YAML; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{override!r}: {parent!r} is a value, not a section")
    settings[last] = value


def sentence(model: type[Section], location: tuple[int | str, ...], kind: str, message: str) -> str:
    """A problem that pydantic found, in words; for an unknown key the nearest that exists."""
    key = " ".join(".".join(str(part) for part in location).split())  # one line, whatever the file's keys hold
    if kind != "extra_forbidden":
        return f"{key}: {message[0].lower()}{message[1:]}" if key else message.removeprefix("Value error, ")
    known = _keys_at(model, location[:-1])
    return f"{key} is not a key{nearest(str(location[-1]), known)}"


def _keys_at(model: type[Section], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:  # inside a dict of sections: the key names an entry
            continue
        model = _section_in(field.annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in {dict, Union, tuple}:
        return next((s for a in get_args(annotation) if (s := _section_in(a))), None)
    return None
