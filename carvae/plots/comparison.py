"""Two sides of a comparison as a picture: their figures with intervals, and the differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from carvae.data.palette import EIGHT_COLOURS
from carvae.plots.look import wrapped

A_COLOUR, B_COLOUR, DIFFERENCE = EIGHT_COLOURS[0], EIGHT_COLOURS[5], EIGHT_COLOURS[7]
SHOWN = {
    "composition": "composition",
    "sureness": "how sure the labels are",
    "CAR": "CAR",
    "markers": "markers detected",
    "signatures": "mean signature scores",
    "clones": "clones",
}
"""Group of figures -> its heading; depth is on another scale."""
ROW, HEAD, WIDTH = 0.27, 1.7, 11.0
APART = 0.18
"""Distance of the sides of one figure, in rows."""
NAME_WIDTH, NOTE_WIDTH = 40, 130


def draw(table: pd.DataFrame, names: tuple[str, str], note: str, path: Path) -> None:
    """Write the picture of a table of `carvae.compare`: one row per figure between 0 and 1.

    Parameters
    ----------
    names
        Of the sides.
    note
        What intervals are over.
    """
    rows = _rows(table)
    figure = Canvas(figsize=(WIDTH, ROW * len(rows) + HEAD), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    first, second = (wrapped(name, NAME_WIDTH) for name in names)
    _dots(left, rows, "a", A_COLOUR, -APART, "o", f"A: {first}")
    _dots(left, rows, "b", B_COLOUR, APART, "s", f"B: {second}")
    _dots(right, rows, "difference", DIFFERENCE, 0.0, "D", "")
    right.axvline(0, color="0.6", linewidth=1, zorder=0)
    left.set_yticks(range(len(rows)), list(rows["text"]), fontsize=9)
    for tick, head in zip(left.get_yticklabels(), rows["head"], strict=True):
        tick.set_fontweight("bold" if head else "normal")
    left.set(ylim=(len(rows) - 0.4, -0.8), xlim=(-0.02, 1.02), xlabel="value, 95% interval")
    reach = np.nanmax(np.abs(rows[["difference", "difference_low", "difference_high"]].to_numpy(float)), initial=0.05)
    reach = min(reach, 1.0)  # an interval over three patients may be wider than anything that can be
    right.set(xlim=(-1.08 * reach, 1.08 * reach), xlabel="B less A, 95% interval")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(wrapped(note, NOTE_WIDTH), fontsize=9, color="0.3")
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _rows(table: pd.DataFrame) -> pd.DataFrame:
    """The figures that are drawn, under headings."""
    values = table[["a", "b"]]
    drawn = (values.isna() | ((values >= 0) & (values <= 1))).all(axis=1) & values.notna().any(axis=1)
    parts = []
    depth = table["figure"].str.endswith("_at_depth")
    if depth.any():  # of clones, what does not hang on the cells counted
        drawn = drawn & (depth | (table["group"] != "clones"))
    drawn = drawn & ~((table["group"] == "clones") & table["difference"].isna())  # of other depths
    for group, heading in SHOWN.items():
        own = table[(table["group"] == group) & drawn]
        if len(own):
            parts += [pd.DataFrame({"text": [heading], "head": [True]})]
            parts += [own.assign(text=own["figure"].map(_label), head=False)]
    return pd.concat(parts, ignore_index=True)


def _label(figure: str) -> str:
    for prefix in ("fraction ", "fraction_", "mean score_", "mean_", "clone_"):
        figure = figure.removeprefix(prefix)
    return wrapped(figure.replace("_", " "), 40)


def _dots(axes: Axes, rows: pd.DataFrame, name: str, colour: str, up: float, marker: str, label: str) -> None:
    drawn = rows[~rows["head"].astype(bool)]
    value, low, high = (drawn[column].to_numpy(float) for column in (name, f"{name}_low", f"{name}_high"))
    y = drawn.index.to_numpy() + up
    known = ~np.isnan(low)
    axes.hlines(y[known], low[known], high[known], color=colour, linewidth=1.6)
    axes.scatter(value, y, s=22, color=colour, marker=marker, label=label or None, zorder=3)
