"""Write configs/reference.yaml from carvae/config.py: every setting, its default, and what it means.

python scripts/reference_yaml.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from carvae.config import Config, StudyConfig
from carvae.section import Section

TARGET = Path(__file__).resolve().parent.parent / "configs" / "reference.yaml"
WIDTH = 118
HEADER = """\
Every setting of carvae with its default and its meaning, written by scripts/reference_yaml.py from carvae/config.py.
Your own config holds only what differs, as carpall.yaml beside this file does, and the command line what differs
from that: carvae train my.yaml output=runs/mine train.max_epochs=5. A key that is not here is refused.
"""


def render() -> str:
    """The text of the file."""
    lines = [*_comment(HEADER, 0), "", *_section(Config(), 0)]
    return "\n".join(lines) + "\n"


def _section(section: Section, depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from ("", *_comment(type(value).__doc__ or "", depth), f"{pad}{name}:")
            yield from _section(value, depth + 1)
            continue
        yield from _comment(_meaning(field), depth)
        if name == "studies":
            yield from _comment("A study has these keys; only path has no default:", depth)
            study = StudyConfig(path=Path("data/my_study.h5ad"))
            example = ["studies:", "  my_study:", *_section(study, 2)]
            yield from (f"{pad}# {line}" for line in example)
        yield f"{pad}{name}: {_value(section.model_dump(mode='json')[name])}"


def _meaning(field: FieldInfo) -> str:
    meaning = (field.description or "").replace("``", "`")
    choice = field.annotation
    if get_origin(choice) is tuple:
        choice, several = get_args(choice)[0], "Any of"
    else:
        several = "One of"
    if get_origin(choice) is Literal:
        meaning += f" {several}: {', '.join(map(str, get_args(choice)))}."
    return meaning


def _comment(text: str, depth: int) -> list[str]:
    pad = "  " * depth
    return [f"{pad}# {line}" for part in text.splitlines() for line in textwrap.wrap(part, WIDTH - len(pad) - 2)]


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
