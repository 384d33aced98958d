"""Marker genes by state: a table of dots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from carvae.data.markers import PREDICTED

SHARES = (0.1, 0.5, 1.0)
"""Sizes of dots that the legend shows."""
AREA = 150
"""Of the dot of a gene that all cells express, in square points."""


def draw_markers(table: pd.DataFrame, panels: Sequence[tuple[str, Sequence[str]]]) -> Canvas:
    """The table of `data.markers.marker_table` as dots: size the share of cells, colour the mean.

    The mean is shown relative to the gene's greatest. Genes stand in the groups of ``panels``, (name, genes).
    """
    genes = list(dict.fromkeys(gene for _, names in panels for gene in names))
    top = table.groupby("gene")["mean"].max().reindex(genes)
    groups = [(by, rows) for by, rows in table.groupby("by", sort=False)]
    n_rows = [rows["state"].nunique() for _, rows in groups]
    size = (0.27 * len(genes) + 4.2, 0.27 * sum(n_rows) + 1.2 * len(groups) + 1.2)
    figure = Canvas(figsize=size, layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(len(groups), 1, sharex=True, height_ratios=n_rows))
    for axes, (by, rows) in zip(all_axes, groups, strict=True):
        states = list(dict.fromkeys(rows["state"]))
        x, y = rows["gene"].map(genes.index), rows["state"].map(states.index)
        shade = rows["mean"] / rows["gene"].map(top).where(lambda value: value > 0)
        area = AREA * rows["share_expressing"].fillna(0)
        dots = axes.scatter(x, y, s=area, c=shade, cmap="viridis_r", vmin=0, vmax=1, edgecolors="0.4", linewidths=0.3)
        n_cells = rows.groupby("state")["n_cells"].first()
        axes.set_yticks(range(len(states)), [f"{state} ({n_cells[state]:,})" for state in states])
        axes.set(ylim=(len(states) - 0.4, -0.6), xlim=(-0.7, len(genes) - 0.3))
        title = "as called by carvae" if by == PREDICTED else "as labelled by the author"
        axes.set_title(title, loc="left", fontsize=10)
        for edge in np.cumsum([len(names) for _, names in panels])[:-1]:
            axes.axvline(edge - 0.5, color="0.85", linewidth=0.8, zorder=0)
    unmeasured = set(top.index[top.isna()])
    ticks = [f"{gene} (absent)" if gene in unmeasured else gene for gene in genes]
    all_axes[-1].set_xticks(range(len(genes)), ticks, rotation=90, fontsize=8)
    figure.colorbar(dots, ax=list(all_axes), label="mean / greatest mean", shrink=0.6, pad=0.01)
    handles = [all_axes[0].scatter([], [], s=AREA * s, c="0.6", label=f"{s:.0%}") for s in SHARES]
    figure.legend(handles=handles, title="cells with a count", loc="outside right upper", fontsize=8, title_fontsize=8)
    return figure
