"""The report as one HTML file that needs no network and can reach none.

The page's own policy (CSP) forbids every connection, and every script and style but the ones whose hashes it names:
whatever a sample is called, it is text. One thing is let through: regl, which draws the map, writes its drawing code at
run time (``'unsafe-eval'``); what it writes is made of our own script alone, which no data of the page enters.

regl 2.1.1 has no other way. Its functions could be written once and shipped (12 of them, 273 kB, the same in each run
of one browser), but what they are follows the extensions that a driver offers: on a graphics card where one differs
there would be no map, and of such cards none could be tried.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from carvae.page.blocks import Section

HERE = Path(__file__).parent
ASSETS = HERE.parent / "web" / "assets"


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above the sections."""

    title: str
    introduction: str
    footer: str


def render(head: Head, sections: Sequence[Section]) -> str:
    """The page."""
    script = _inline(ASSETS / "report.js", "script")
    style = _inline(ASSETS / "report.css", "style")
    policy = (
        f"default-src 'none'; script-src {_hash(script)} 'unsafe-eval'; style-src {_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "data": _data, "image": _image}
    return environment.get_template("report.html").render(
        head=head, sections=sections, policy=policy, script=Markup(script), style=Markup(style)
    )


def cell(value: object) -> str:
    """A table value as text: three decimals, a dash for a missing value."""
    if value is None or value is pd.NA or (isinstance(value, (float, np.floating)) and not math.isfinite(value)):
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if value != int(value) else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else str(value)


def _inline(path: Path, tag: str) -> str:
    """A script or style as it stands in the page; ours never hold the end of their own element."""
    text = path.read_text(encoding="utf-8").strip()
    assert f"</{tag}" not in text.lower(), f"{path} would end its own element"
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(text: str, mime: str) -> str:
    """A text as a data URI."""
    return f"data:{mime};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def _image(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
