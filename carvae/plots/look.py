"""How pictures look: colours that stay apart for colour-blind readers, Axes that clip nothing, files that are the same.

Nothing touches pyplot, so no window, backend or global state is involved. Give ``order`` (or ``labels``) the same list
everywhere and a state has one colour in every figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from carvae.data.atomic import replacing_file
from carvae.data.palette import EIGHT_COLOURS, GREY, TWELVE_COLOURS

WIDTH_PX = 1200
WIDTH_INCHES = 8.0

NO_LABEL = ("unknown", "Unlabelled", "unlabelled", "missing", "other studies")
MARKERS = ("o", "^", "s", "D")
HATCHES = ("", "///", "...", "xxx")
LEGEND_ROWS = 28
FEW_ROWS = 16
LABEL_WIDTH = 24
TITLE_WIDTH = 60
DARK = 0.55


@dataclass(frozen=True, slots=True)
class Style:
    """How one category looks: colours first, then shapes and hatches where colours run out."""

    colour: str
    marker: str = "o"
    hatch: str = ""


def styles(categories: Sequence[str]) -> dict[str, Style]:
    """Return one style per category, in order; categories that mean "no label" are grey and take no colour."""
    named = [c for c in dict.fromkeys(categories) if c not in NO_LABEL]
    colours = EIGHT_COLOURS if len(named) <= len(EIGHT_COLOURS) else TWELVE_COLOURS
    chosen = {}
    for i, category in enumerate(named):
        turn = (i // len(colours)) % len(MARKERS)
        chosen[category] = Style(colours[i % len(colours)], MARKERS[turn], HATCHES[turn])
    return {c: chosen.get(c, Style(GREY)) for c in dict.fromkeys(categories)}


def new_axes(height: float) -> Axes:
    """New Axes of the page's width, ``height`` inches high."""
    # Constrained layout makes room for legends and long labels, so that nothing is clipped.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Canvas(figsize=(WIDTH_INCHES, height), layout=layout).add_subplot()


def canvas_of(ax: Axes) -> Canvas:
    """The figure that Axes are in."""
    canvas = ax.get_figure(root=True)
    assert canvas is not None, "these Axes were removed from their figure"
    return canvas


def finish(ax: Axes, title: str, pad: float = 8) -> Axes:
    """Give Axes their title, and take away the lines above and to the right."""
    ax.set_title(textwrap.fill(title, TITLE_WIDTH), loc="left", fontsize=11, fontweight="bold", pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def ordered(found: NDArray[Any], order: Sequence[str] | None) -> list[str]:
    """The categories of ``order`` in its order, then those found beyond it; "no label" comes last."""
    present = sorted(set(found.tolist()))
    return sorted(dict.fromkeys([*(order or ()), *present]), key=lambda category: category in NO_LABEL)


def wrapped(name: str, width: int = LABEL_WIDTH) -> str:
    """A name on at most three lines."""
    return textwrap.fill(name, width, max_lines=3, placeholder=" …", break_on_hyphens=False)


def with_count(category: str, n_cells: int) -> str:
    """A category with its number of cells, on at most three lines."""
    return wrapped(f"{category} ({n_cells:,})", LABEL_WIDTH + 4)


def legend_beside(ax: Axes, handles: Sequence[Artist | Container]) -> None:
    """Put a legend to the right of the Axes, in columns where it is long."""
    columns, size = -(-len(handles) // LEGEND_ROWS), 9 if len(handles) <= FEW_ROWS else 8
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns, fontsize=size, frameon=False
    )


def heat_map(
    ax: Axes,
    values: NDArray[np.floating[Any]],
    texts: NDArray[np.str_],
    names: tuple[list[str], list[str]],
    legend: str,
    limits: tuple[float, float],
) -> None:
    """Draw values as tiles with a text on each, dark on light tiles and light on dark ones."""
    lowest, highest = limits
    image = ax.imshow(values, cmap="Blues" if lowest == 0 else "PuOr_r", vmin=lowest, vmax=highest, aspect="auto")
    size = float(np.clip(76 / max(values.shape[1], 1), 5.5, 9.0))
    for (row, column), text in np.ndenumerate(texts):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < DARK
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    # Slanted names stay on one line each: wrapped ones would run into their neighbours.
    rows, columns = names[0], [textwrap.shorten(name, 36, placeholder=" …") for name in names[1]]
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    ax.tick_params(length=0)
    bar = canvas_of(ax).colorbar(image, ax=ax, shrink=0.8, label=legend)
    bar.outline.set_visible(False)


def save(ax: Axes, path: Path) -> Path:
    """Write the Axes' figure as a PNG that is 1,200 pixels wide and return its path."""
    canvas = canvas_of(ax)
    with replacing_file(path) as scratch:
        # No software version in the file: the same figure gives the same bytes.
        canvas.savefig(scratch, dpi=WIDTH_PX / canvas.get_figwidth(), facecolor="white", metadata={"Software": None})
    return path
