"""Pictures of how sure a model is: confidence, sizes of sets of states, cells called unknown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from carvae.data.palette import EIGHT_COLOURS, GREY
from carvae.plots.look import finish, new_axes

N_BINS = 20
UNKNOWN_LABEL = "unknown"


def plot_confidence(
    confidence: NDArray[np.floating[Any]], unknown: NDArray[np.bool_], title: str = "", ax: Axes | None = None
) -> Axes:
    """Draw how many cells have which confidence, the unknown on top in grey; dashed, the median of the known."""
    ax = ax or new_axes(height=3.4)
    parts, edges = [confidence[~unknown], confidence[unknown]], np.linspace(0, 1, N_BINS + 1)
    labels = [f"with a state ({parts[0].size:,})", f"{UNKNOWN_LABEL} ({parts[1].size:,})"]
    ax.hist(parts, bins=list(edges), stacked=True, color=[EIGHT_COLOURS[0], GREY], label=labels)
    if parts[0].size:
        ax.axvline(float(np.median(parts[0])), color=EIGHT_COLOURS[5], linestyle="--", linewidth=1.4)
    ax.set(xlim=(0, 1), xlabel="confidence in the likeliest state", ylabel="cells")
    ax.legend(loc="upper left", frameon=False, fontsize=8)
    return finish(ax, title)


def plot_set_sizes(sizes: pd.Series[int], title: str = "", ax: Axes | None = None) -> Axes:
    """Draw how many states the sets of the cells hold, as shares of the cells that have a set."""
    ax = ax or new_axes(height=3.0)
    share = sizes.value_counts(normalize=True).sort_index()
    ax.bar(share.index.astype(str), share.to_numpy(), color=EIGHT_COLOURS[0])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlabel="states in the set", ylabel="share of cells")
    return finish(ax, title)


def plot_unknown(table: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the share of each sample's cells that are unknown, by reason.

    ``table`` has samples x reasons, as shares of all cells of the sample.
    """
    ax = ax or new_axes(height=float(np.clip(1.4 + 0.3 * len(table), 2.2, 30.0)))
    left, y = np.zeros(len(table)), np.arange(len(table))
    for colour, hatch, reason in zip((EIGHT_COLOURS[1], EIGHT_COLOURS[4]), ("", "///"), table, strict=False):
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
        ax.barh(y, table[reason], left=left, height=0.7, label=str(reason), **look)
        left += table[reason].to_numpy()
    ax.set_yticks(y, [str(name) for name in table.index], fontsize=8)
    ax.set(ylim=(len(table) - 0.4, -0.6), xlim=(0, max(0.05, float(left.max()) * 1.05)), xlabel="share of cells")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    return finish(ax, title, pad=24)
