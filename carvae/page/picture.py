"""Figures of the report: SVG that follows the reader's light or dark setting.

A figure is drawn with one ink on nothing; in the SVG the ink and the faint grey become variables with a value for each
setting, so that one picture serves both. The page turns them back into colours where a picture is downloaded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from carvae.page.blocks import Picture
from carvae.plots.look import canvas_of

INK, FAINT, GREY = "#1b1f24", "#e6e6e6", "#d9d9d9"
DARK_INK, DARK_FAINT = "#e6edf3", "#2b313a"
SETTINGS: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.facecolor": "none",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name with dollars is a name
}
STYLE = (
    f"<style>:root{{--ink:{INK};--faint:{FAINT}}}@media screen and "
    f"(prefers-color-scheme:dark){{:root{{--ink:{DARK_INK};"
    f"--faint:{DARK_FAINT}}}}}</style>"
)
DPI = 130
"""Of the parts that are dots, which would be too many as shapes."""


def picture(
    name: str,
    title: str,
    shows: str,
    draw: Callable[[], Axes | Canvas],
    *,
    instead: bool = False,
) -> Picture:
    """The figure that ``draw`` makes. Equal figures give equal text; ``name`` is a file name without its ending."""
    with rc_context({**SETTINGS, "svg.hashsalt": name}):
        drawn = draw()
        canvas = canvas_of(drawn) if isinstance(drawn, Axes) else drawn
        file = io.StringIO()
        # Neither date nor version in the file.
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.savefig(file, format="svg", transparent=True, dpi=DPI, metadata=metadata)
    return Picture(name, title, shows, _themed(file.getvalue()), instead)


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]  # without the preamble, which names a DTD on the web
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace(GREY, "var(--faint)")
    # Hundredths of a point are enough for outlines; the scales of transforms want all their digits.
    svg = re.sub(r' d="[^"]*"', lambda outline: re.sub(r"(\.\d\d)\d+", r"\1", outline[0]), svg)
    return svg.replace(">", f">{STYLE}", 1)
