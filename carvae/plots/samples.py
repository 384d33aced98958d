"""Pictures of samples: what their verdicts rest on, quality of their cells, shares of states with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from carvae.data.palette import EIGHT_COLOURS
from carvae.plots.look import finish, new_axes, wrapped

BLUE, ORANGE, RED = EIGHT_COLOURS[0], EIGHT_COLOURS[1], EIGHT_COLOURS[5]
CARE, OUT = "#E69F0033", "#D55E0044"
USUAL = "#0072B233"
"""Shade of what is usual among the training samples."""
FEW_TICKS = 3
FEW_CELLS = 10
"""Cells below which each is a dot: of so few a violin would be made up."""
COLUMNS = 4
"""Panels side by side."""
MOST_CELLS = 3000
"""Cells of a sample that its violin is drawn from; more would not change it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far the training samples went in one figure, and how far beyond that is out of range."""

    care: float
    out: float


def plot_limits(values: pd.Series[float], title: str, limits: Limits | None = None, ax: Axes | None = None) -> Axes:
    """Draw one figure of each sample as a dot, on the shades of where care is due and where it is out of range.

    Dots are blue circles within, orange triangles with care, red squares beyond. A sample without a value has none.
    """
    ax = ax or new_axes(height=float(np.clip(1.2 + 0.3 * len(values), 2.0, 30.0)))
    y, x = np.arange(len(values)), values.to_numpy(float)
    level = np.zeros(len(values), int)
    if limits is not None:
        sign = 1 if limits.out >= limits.care else -1  # of depth, less is worse
        level = (sign * x > sign * limits.care).astype(int) + (sign * x > sign * limits.out)
    for grade, (colour, marker) in enumerate(((BLUE, "o"), (ORANGE, "^"), (RED, "s"))):
        own = (level == grade) & np.isfinite(x)
        ax.scatter(x[own], y[own], c=colour, marker=marker, s=38, zorder=3, linewidths=0)
    ends = [*x[np.isfinite(x)], *([] if limits is None else [limits.care, limits.out])]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = 0.12 * (high - low) or 0.1
    low, high = low - room, high + room
    if limits is not None:
        far = high if limits.out >= limits.care else low
        ax.axvspan(limits.care, limits.out, color=CARE, linewidth=0, zorder=0)
        ax.axvspan(limits.out, far, color=OUT, linewidth=0, zorder=0)
    ax.set_xlim(low, high)
    ax.set_yticks(y, [wrapped(str(name), 34) for name in values.index], fontsize=8)
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="y", linewidth=0.4, alpha=0.4)
    return finish(ax, title)


def plot_violins(
    values: NDArray[np.floating[Any]],
    group: Sequence[str] | pd.Series[Any],
    title: str,
    order: Sequence[str] | None = None,
    colours: Mapping[str, str] | None = None,
    *,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the distribution of a number in each group of cells, a violin per row with its median as a line.

    Parameters
    ----------
    values
        One per cell; missing ones are left out, as are groups without any.
    group
        Group of each cell.
    order
        Groups from top to bottom; by default sorted.
    colours
        Colour of each group; by default one for all.
    log
        Draw log10 of 1 + the value, with the value's own numbers on the axis.
    """
    name_N = pd.Series(group).astype(str).to_numpy()
    known = np.isfinite(np.asarray(values, float))
    shown = [name for name in (order or sorted(set(name_N))) if (known & (name_N == name)).any()]
    ax = ax or new_axes(height=float(np.clip(1.2 + 0.34 * len(shown), 2.0, 30.0)))
    rng = np.random.default_rng(0)
    for y, name in enumerate(shown):
        own = np.asarray(values, float)[known & (name_N == name)]
        own = np.log10(1 + own) if log else own
        colour = (colours or {}).get(name, BLUE)
        if own.size < FEW_CELLS:
            ax.scatter(own, np.full(own.size, y), color=colour, s=14, linewidths=0)
        elif np.ptp(own) > 0:
            drawn = rng.permutation(own)[:MOST_CELLS]
            parts: Any = ax.violinplot([drawn], [y], orientation="horizontal", widths=0.85, showextrema=False)
            parts["bodies"][0].set(facecolor=colour, alpha=0.75, edgecolor="none")
        middle = float(np.median(own))
        ax.plot([middle, middle], [y - 0.3, y + 0.3], color=ax.xaxis.label.get_color(), linewidth=1.6, zorder=3)
    ax.set_yticks(range(len(shown)), [wrapped(name, 34) for name in shown], fontsize=8)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.tick_params(axis="x", labelsize=8)
    if log:
        _powers(ax)
    return finish(ax, title)


def _powers(ax: Axes) -> None:
    """Ticks at round numbers: steps of three where the axis is long, of two where it is short."""
    low, high = ax.get_xlim()
    for steps in ((1, 3), (1, 2, 5), range(1, 10)):
        ticks = [0, *(step * 10**power for power in range(6) for step in steps)]
        shown = [tick for tick in ticks if low <= np.log10(1 + tick) <= high]
        if len(shown) >= FEW_TICKS:
            break
    ax.set_xticks([float(np.log10(1 + tick)) for tick in shown], [f"{tick:,}" for tick in shown])


def draw_shares(
    shares: pd.DataFrame,
    low: pd.DataFrame,
    high: pd.DataFrame,
    usual: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
) -> Canvas:
    """The share of each state in each sample with its interval, a panel per state.

    Parameters
    ----------
    shares, low, high
        Samples x states.
    usual
        States x ``low``, ``middle``, ``high``: where the training samples lie, as a band with a line.
    """
    rows = -(-shares.shape[1] // COLUMNS)
    each = float(np.clip(6 / max(len(shares), 1), 0.15, 0.24))  # many samples close together, so that they print
    canvas = Canvas(figsize=(11.0, rows * (1.1 + each * len(shares))), layout="constrained")
    panels = np.asarray(canvas.subplots(rows, COLUMNS, sharey=True, squeeze=False)).ravel()
    y = np.arange(len(shares))
    for ax, state in zip(panels, map(str, shares.columns), strict=False):
        colour, top = (colours or {}).get(state, BLUE), float(np.nanmax(high[state].to_numpy(float), initial=0.05))
        if usual is not None and state in usual.index:
            ends = usual.loc[[state], ["low", "middle", "high"]].to_numpy(float)[0]
            top = max(top, float(ends[2]))
            ax.axvspan(ends[0], ends[2], color=USUAL, linewidth=0, zorder=0)
            ax.axvline(ends[1], color=BLUE, linewidth=0.8, linestyle="--", zorder=1)
        ax.hlines(y, low[state], high[state], color=colour, linewidth=2, zorder=2)
        ax.scatter(shares[state], y, c=colour, s=24, zorder=3, linewidths=0)
        ax.set_title(wrapped(state, 26), loc="left", fontsize=9)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlim(-0.02 * top, min(1.02, top * 1.08))
        ax.tick_params(labelsize=8)
        ax.grid(axis="y", linewidth=0.4, alpha=0.4)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[shares.shape[1] :]:
        ax.set_visible(False)
    panels[0].set_yticks(y, [wrapped(str(name), 28) for name in shares.index])
    panels[0].set_ylim(len(shares) - 0.4, -0.6)
    return canvas
