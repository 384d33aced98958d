"""The demo's page: numbers, figures and tables of a run in a folder, one HTML file beside its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd

from carvae.data.atomic import replacing_file
from carvae.errors import ReadError


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture of the page."""

    file: str
    """Name of the PNG, relative to the page."""
    title: str
    shows: str
    """What the reader sees in it, in a sentence or two."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page; index and columns are shown."""

    title: str
    frame: pd.DataFrame
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """Another page beside this one."""

    file: str
    """Its name, relative to the page."""
    title: str
    shows: str


@dataclass(frozen=True, slots=True)
class Number:
    """A figure at the top of the page, with what it means."""

    value: str
    name: str
    meaning: str = ""


def write_index(
    folder: Path,
    title: str,
    figures: Sequence[Figure],
    tables: Sequence[Table] = (),
    numbers: Sequence[Number] = (),
    introduction: str = "",
    link: Link | None = None,
) -> Path:
    """Write ``folder/index.html`` with numbers, figures and tables, and return its path.

    The page needs no network and no other file than the PNGs beside it, follows the reader's light or dark setting,
    and reads well without styles. Every value is escaped.

    Raises
    ------
    ReadError
        The file of a figure or of the link is not in ``folder``.
    """
    files = [*(figure.file for figure in figures), *([] if link is None else [link.file])]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ReadError(f"{folder} lacks {', '.join(missing)}; save it there before writing the page")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["link"] = lambda file: quote(Path(file).as_posix())
    environment.filters["cell"] = _cell
    page = environment.get_template("demo.html").render(
        title=title, introduction=introduction, figures=figures, tables=tables, numbers=numbers, page=link
    )
    with replacing_file(folder / "index.html") as scratch:
        scratch.write_text(page, encoding="utf-8")
    return folder / "index.html"


def _cell(value: object) -> str:
    """A table value as text: at most three decimals, nothing for a missing value."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.3f}" if isinstance(value, (float, np.floating)) else str(value)
