"""What a section of the report is made of; `render` knows how each kind looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Absent:
    """One sentence in place of a picture that the file has no data for."""

    kind: ClassVar[str] = "absent"
    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """Sentences that stand in a list."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Names with their values."""

    kind: ClassVar[str] = "pairs"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Text to copy as it is; ``name`` says what it is."""

    kind: ClassVar[str] = "code"
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; index and columns are shown."""

    kind: ClassVar[str] = "grid"
    title: str
    frame: pd.DataFrame
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure as SVG, in which colours of the page stand as variables (see `picture`)."""

    kind: ClassVar[str] = "picture"
    name: str
    """File name without its ending, for downloads."""
    title: str
    shows: str
    """What the reader sees in it, in a sentence or two; the alternative text."""
    svg: str
    instead: bool = False
    """Whether it is shown only in print, and where the interactive map cannot be."""


@dataclass(frozen=True, slots=True)
class Light:
    """The verdict on a sample."""

    sample: str
    verdict: str
    level: str
    """``good``, ``care``, ``out`` or ``none``."""
    reason: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Lights:
    """Verdicts, the worst first."""

    kind: ClassVar[str] = "lights"
    items: tuple[Light, ...]


@dataclass(frozen=True, slots=True)
class Map:
    """The interactive map: names of its columns and layouts, and the packed values."""

    kind: ClassVar[str] = "map"
    header: str
    """JSON."""
    values: str
    """Gzipped bytes in base64."""
    layouts: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """A file that the page carries."""

    name: str
    content: str
    """Text."""
    mime: str
    shows: str


@dataclass(frozen=True, slots=True)
class Files:
    """Files to download."""

    kind: ClassVar[str] = "files"
    items: tuple[File, ...]


Block = Text | Absent | Bullets | Pairs | Code | Grid | Picture | Lights | Map | Files


@dataclass(frozen=True, slots=True)
class Section:
    """A numbered part of the report."""

    key: str
    """Anchor."""
    title: str
    blocks: tuple[Block, ...]
