"""Pictures of what speaks for the states: inhibitory receptors together, signatures by state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from carvae.plots.look import finish, heat_map, new_axes, with_count
from carvae.plots.samples import plot_violins


def coexpression(
    detected: Mapping[str, NDArray[np.bool_]], group: Sequence[str] | pd.Series[Any], order: Sequence[str]
) -> pd.DataFrame:
    """Share of each group's cells in which exactly these of some genes are detected.

    Parameters
    ----------
    detected
        Gene (as it is to be written) -> whether it is detected in each cell; at least two.
    group
        Group of each cell.
    order
        Groups in the order of rows; those without cells are left out.

    Returns
    -------
    Groups x combinations ("none", "LAG3", ..., "LAG3 + PD-1", ...); each row sums to 1. ``n_cells`` is the index's
    second level.
    """
    genes, name_N = list(detected), pd.Series(group).astype(str).to_numpy()
    combinations = sorted(product((False, True), repeat=len(genes)), key=lambda has: (sum(has), [not h for h in has]))
    code_N = np.array([sum(1 << g for g, h in enumerate(has) if h) for has in combinations])
    own_N = sum((detected[gene].astype(int) << g for g, gene in enumerate(genes)), np.zeros(len(name_N), int))
    shown = [name for name in order if (name_N == name).any()]
    names = [" + ".join(g for g, h in zip(genes, has, strict=True) if h) or "none" for has in combinations]
    share = [[float((own_N[name_N == name] == code).mean()) for code in code_N] for name in shown]
    count = [int((name_N == name).sum()) for name in shown]
    index = pd.MultiIndex.from_arrays([shown, count], names=["state", "n_cells"])
    return pd.DataFrame(share, index=index, columns=names)


def plot_coexpression(table: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw a table of `coexpression` as tiles with the share on each."""
    ax = ax or new_axes(height=float(np.clip(2.0 + 0.36 * len(table), 3.0, 14.0)))
    values = table.to_numpy(float)
    texts = np.array([[f"{v:.0%}" if v >= 0.005 else "·" for v in row] for row in values])  # noqa: PLR2004
    names = [with_count(str(state), int(n)) for state, n in table.index]
    bound = max(0.05, float(values[:, 1:].max(initial=0.0)))
    heat_map(ax, values, texts, (names, list(map(str, table.columns))), "share of the state's cells", (0.0, bound))
    return finish(ax, title)


def draw_signatures(
    scores: pd.DataFrame, states: Sequence[str] | pd.Series[Any], order: Sequence[str], colours: Mapping[str, str]
) -> Canvas:
    """Violins of each signature's score by state, a panel per signature; cells x signatures."""
    columns = 3
    n_states = len([s for s in order if (pd.Series(states).astype(str) == s).any()])
    rows = -(-scores.shape[1] // columns)
    canvas = Canvas(figsize=(11.0, rows * (0.8 + 0.25 * n_states)), layout="constrained")
    panels = np.asarray(canvas.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
    for ax, name in zip(panels, scores, strict=False):
        plot_violins(
            scores[name].to_numpy(float), pd.Series(states), str(name).replace("_", " "), order, colours, ax=ax
        )
    for ax in panels[scores.shape[1] :]:
        ax.set_visible(False)
    return canvas
