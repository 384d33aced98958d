"""Pages that are written from the code, so that they cannot fall behind it: commands, settings, plots, floors."""

from __future__ import annotations

import ast
import html
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent


def write_all(folder: Path) -> None:
    """Write every page into ``folder``; files that would not change keep their time."""
    folder.mkdir(exist_ok=True)
    pages = {"commands": commands(), "settings": settings(), "plots": plots(), "floors": floors(read_floors())}
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands() -> str:
    """A section per verb of the command line: usage, what it does, arguments and options."""
    from typer.main import get_command

    from carvae.cli import app

    return "\n".join(_verb("carvae", get_command(app), depth=2)).strip() + "\n"


def _verb(path: str, command: Any, depth: int) -> Iterator[str]:
    below = getattr(command, "commands", {})
    if depth > 2:
        yield from (f"{'#' * depth} `{path}`", "", command.help or "", "")
    if not below:
        yield from _usage(path, command)
    for name, verb in below.items():
        yield from _verb(f"{path} {name}", verb, depth + 1 if depth == 2 else depth)


def _usage(path: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    required = [f"{p.opts[0]} {_metavar(p)}" for p in options if p.required]
    words = [path, *(_metavar(p) for p in arguments), *required, "[options]" if len(required) < len(options) else ""]
    yield from ("```text", " ".join(filter(None, words)), "```", "")
    if arguments or options:
        yield from ("| argument | meaning |", "|---|---|")
    for p in arguments:
        yield f"| `{_cell(_metavar(p))}` | {_cell(p.help or '')} |"
    for p in options:
        name = ", ".join([*p.opts, *p.secondary_opts])
        value = "" if p.is_flag else f" {_metavar(p)}"
        default = f" Default: `{p.default}`." if p.default not in (None, False, ()) and not p.required else ""
        yield f"| `{name}{_cell(value)}` | {_cell(p.help or '')}{default} |"
    yield ""


def _metavar(parameter: Any) -> str:
    if parameter.metavar or parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    kinds = {Path: "PATH", int: "N", float: "NUMBER"}
    annotation = parameter.type_descriptor.annotation
    return next((kinds[kind] for kind in (annotation, *get_args(annotation)) if kind in kinds), "VALUE")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def settings() -> str:
    """A section per section of the config: key, default, meaning."""
    from carvae.config import Config, StudyConfig

    lines = ["## Top level", "", *_table(Config()), *_sections(Config(), "")]
    study = StudyConfig(path=Path("data/my_study.h5ad"))
    lines += ["## `ingest.studies.NAME`", "", _words(StudyConfig.__doc__), "", *_table(study)]
    return "\n".join(lines)


def _sections(section: Any, prefix: str) -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from (f"## `{prefix}{name}`", "", _words(type(value).__doc__), "")
            yield from _table(value)
            yield from _sections(value, f"{prefix}{name}.")


def _table(section: Any) -> Iterator[str]:
    yield from ("| setting | default | meaning |", "|---|---|---|")
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if hasattr(type(getattr(section, name)), "model_fields"):
            continue
        default = yaml.safe_dump(values[name], default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        meaning = _words(field.description) + _choices(field.annotation)
        yield f"| `{name}` | {'required' if field.is_required() else f'`{_cell(default)}`'} | {_cell(meaning)} |"
    yield ""


def _choices(annotation: Any) -> str:
    several = get_origin(annotation) is tuple
    choice = get_args(annotation)[0] if several else annotation
    if get_origin(choice) is not Literal:
        return ""
    return f" {'Any of' if several else 'One of'}: {', '.join(f'`{value}`' for value in get_args(choice))}."


def _words(text: str | None) -> str:
    """RST's double backticks are Markdown's single ones."""
    return " ".join((text or "").split()).replace("``", "`")


def plots() -> str:
    """The API of every module of ``carvae.plots`` that draws something."""
    import carvae.plots

    lines = ["```{eval-rst}"]
    for module in pkgutil.iter_modules(carvae.plots.__path__, "carvae.plots."):
        public = vars(importlib.import_module(module.name))
        own = [n for n, v in public.items() if n.startswith("plot_") and v.__module__ == module.name]
        lines += [f".. autofunction:: {module.name}.{name}" for name in own]
    return "\n".join([*lines, ".. autofunction:: carvae.plots.look.save", "```", ""])


def read_floors() -> dict[str, int]:
    """``FLOOR`` of tests/test_floors.py, which asserts that imports point downwards."""
    for node in ast.parse((ROOT / "tests" / "test_floors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOOR":
            names = {"dict": dict, "__builtins__": {}}
            found: dict[str, int] = eval(compile(ast.Expression(node.value), "FLOOR", "eval"), names)
            return found
    raise LookupError("tests/test_floors.py has no FLOOR")


def floors(floor: Mapping[str, int]) -> str:
    """A drawing of the house, top floor first; each room bears what it is for."""
    built = {name: level for name, level in floor.items() if _source(name).exists() and name != "__main__"}
    lines = ["<div class='house'>"]
    for level in sorted(set(built.values()), reverse=True):
        lines.append(f"<div class='floor'><span class='level'>{level}</span>")
        lines += [_room(name) for name in sorted(n for n, f in built.items() if f == level)]
        lines.append("</div>")
    return "\n".join([*lines, "</div>", ""])


def _source(name: str) -> Path:
    folder = ROOT / "carvae" / name
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _room(name: str) -> str:
    path = _source(name)
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    purpose = said.split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".").replace("`", "")
    shown = f"{name}/" if path.name == "__init__.py" else f"{name}.py"
    return f"<span class='room'><code>{shown}</code> {html.escape(purpose)}</span>"
