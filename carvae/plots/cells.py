"""Pictures of annotated cells: the map, states per sample, signatures by state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from carvae.data.palette import GREY
from carvae.plots.look import (
    finish,
    heat_map,
    legend_beside,
    new_axes,
    ordered,
    styles,
    with_count,
    wrapped,
)


def plot_umap(
    coordinates: NDArray[np.floating[Any]],
    categories: Sequence[str] | pd.Series,
    title: str,
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw cells in two dimensions, coloured by category, with the number of cells of each in the legend.

    Parameters
    ----------
    coordinates
        [n_cells, 2].
    categories
        One per cell; a missing value counts as ``unlabelled``.
    title
        Heading of the Axes.
    order
        Categories in the order of legend and colours; by default sorted.
    ax
        Axes to draw into; a new figure by default.
    """
    ax = ax or new_axes(height=5.6)
    category = pd.Series(categories).astype(object).fillna("unlabelled").astype(str).to_numpy()
    shown = ordered(category, order)
    style = styles(shown)
    point = float(np.clip(6e4 / max(len(category), 1), 2.0, 22.0))
    # Unlabelled cells below the others; those in random order, so that no category hides another by its name.
    above = np.array([style[c].colour != GREY for c in category])
    shuffled = np.argsort(above + np.random.default_rng(0).random(len(category)))
    colour = np.array([style[c].colour for c in category], dtype=object)
    marker = np.array([style[c].marker for c in category], dtype=object)
    for shape in dict.fromkeys(marker.tolist()):
        cells = shuffled[marker[shuffled] == shape]
        x, y = coordinates[cells, 0], coordinates[cells, 1]
        ax.scatter(x, y, s=point, c=list(colour[cells]), marker=shape, linewidths=0, alpha=0.85, rasterized=True)
    handles = [
        Line2D(
            [], [], linestyle="", marker=style[c].marker, color=style[c].colour, markersize=7, label=with_count(c, n)
        )
        for c, n in ((c, int((category == c).sum())) for c in shown)
    ]
    legend_beside(ax, handles)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    return finish(ax, title)


def plot_composition(
    table: pd.DataFrame,
    title: str = "States per sample",
    order: Sequence[str] | None = None,
    n_cells: pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one stacked bar per sample: the share of its cells in every state.

    Parameters
    ----------
    table
        Samples x states, as cell counts or shares; each row is scaled to 100%.
    title
        Heading of the Axes.
    order
        States in the order of bars, legend and colours; by default the table's columns.
    n_cells
        Cells per sample (index as in ``table``), written beside the sample's name.
    ax
        Axes to draw into; a new figure by default.
    """
    shown = [str(c) for c in table.columns] if order is None else ordered(np.array(table.columns, dtype=str), order)
    values = table.set_axis(table.columns.astype(str), axis=1).reindex(columns=shown, fill_value=0.0).to_numpy(float)
    total = values.sum(axis=1, keepdims=True)
    share = values / np.where(total > 0, total, 1.0)
    ax = ax or new_axes(height=float(np.clip(1.6 + 0.3 * len(table), 3.2, 40.0)))
    position, left = np.arange(len(table)), np.zeros(len(table))
    for (state, style), width in zip(styles(shown).items(), share.T, strict=True):
        look: dict[str, Any] = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.6}
        ax.barh(position, width, left=left, height=0.8, label=wrapped(state), **look)
        left += width
    names = [str(s) if n_cells is None else f"{s} ({int(n_cells.loc[s]):,})" for s in table.index]
    ax.set_yticks(position, [wrapped(name, 34) for name in names])
    ax.set(xlim=(0, 1), ylim=(len(table) - 0.4, -0.6), xlabel="Share of cells")
    ax.set_ylabel("Sample" if n_cells is None else "Sample (cells)")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    legend_beside(ax, ax.containers)
    return finish(ax, title)


def plot_signatures_by_state(
    scores: pd.DataFrame,
    states: Sequence[str] | pd.Series,
    title: str = "Mean signature score per predicted state",
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean score of every signature in every state; colour compares states within one signature.

    Parameters
    ----------
    scores
        Cells x signatures; a signature without any score is left out.
    states
        State of each cell.
    title
        Heading of the Axes.
    order
        States from top to bottom; by default sorted. States without cells are left out.
    ax
        Axes to draw into; a new figure by default.
    """
    state = pd.Series(states).astype(str).to_numpy()
    shown = [s for s in ordered(state, order) if (state == s).any()]
    scores = scores.dropna(axis="columns", how="all")
    means = scores.groupby(state).mean().loc[shown].to_numpy()
    relative = (means - means.mean(axis=0)) / np.where(means.std(axis=0) > 0, means.std(axis=0), 1.0)
    ax = ax or new_axes(height=float(np.clip(2.2 + 0.42 * len(shown), 3.6, 14.0)))
    names = [with_count(s, int((state == s).sum())) for s in shown]
    texts = np.array([[f"{value:.2f}" for value in row] for row in means])
    bound = max(float(np.nanmax(np.abs(relative), initial=0.0)), 1e-6)
    columns = [str(c) for c in scores.columns]
    heat_map(ax, relative, texts, (names, columns), "Below or above the mean of states (s.d.)", (-bound, bound))
    ax.set(ylabel="Predicted state (cells)")
    return finish(ax, title)
