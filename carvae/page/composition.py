"""Section 5: which states each sample is made of, how sure that is, and what is usual among the training samples."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from carvae.data.composition import fraction_interval
from carvae.page.blocks import Absent, Block, Grid, Section, Text
from carvae.page.facts import Facts, percent
from carvae.page.picture import picture
from carvae.plots.cells import plot_composition
from carvae.plots.samples import draw_shares

INTERVAL = (
    "Bars are 95% intervals for the cells drawn (Dirichlet-multinomial): they say how far the cells may be from the "
    "specimen, not whether their labels are right."
)


def section(facts: Facts) -> Section:
    """Composition of the samples on the main axis, with intervals."""
    cells = facts.cells
    known = ~facts.unknown_N
    if not known.any():
        text = "No cell has a state: every one is unknown to the model, so there is no composition."
        return Section("states", "States per sample", (Absent(text),))
    count = pd.crosstab(
        pd.Series(cells.sample_N[known], name="sample"),
        pd.Categorical(cells.state_N[known], cells.states),
        dropna=False,
    )
    count = count.set_axis([str(c) for c in count.columns], axis=1).reindex(cells.sample_names, fill_value=0)
    total = count.sum(axis=1).to_numpy()
    share = count.div(np.where(total > 0, total, np.nan), axis=0)
    low, high = (share.copy(), share.copy())
    for state in share:
        ends = fraction_interval(count[state].to_numpy(float), total, len(cells.states))
        low[state], high[state] = ends
    shown = [sample for sample in facts.largest_samples if count.loc[sample].sum() > 0]
    usual = usual_shares(facts)
    there = [
        state for state in map(str, share) if count[state].sum() > 0 or (usual is not None and state in usual.index)
    ]

    def bars() -> Axes:
        return plot_composition(count.loc[shown], "", list(cells.states), n_cells=count.loc[shown].sum(axis=1))

    def dots() -> Canvas:
        parts = [frame[there].reindex(shown) for frame in (share, low, high)]
        return draw_shares(parts[0], parts[1], parts[2], usual, facts.colours)

    beside = (
        ""
        if usual is None
        else (" The blue band holds nine in ten of the training samples when they were held out, dashed their median.")
    )
    blocks: list[Block] = [
        Text(_most(share, total)),
        picture("states", "States per sample", f"Shares of the cells with a state.{facts.not_shown}", bars),
        picture("shares", "Each state with its interval", INTERVAL + beside, dots),
    ]
    if usual is None:
        blocks.append(Text(_no_usual(facts)))
    blocks.append(_table(share, low, high, there, total))
    return Section("states", "States per sample", tuple(blocks))


def _table(
    share: pd.DataFrame, low: pd.DataFrame, high: pd.DataFrame, states: list[str], total: NDArray[np.int64]
) -> Grid:
    """Shares with their intervals, as text."""
    columns: dict[str, object] = {}
    for state in states:
        ends = zip(share[state], low[state], high[state], strict=True)
        columns[state] = [
            f"{_hundredths(v)} ({_hundredths(a)}–{_hundredths(b)})" if v >= 0 else "–" for v, a, b in ends
        ]
    columns["cells with a state"] = total
    return Grid("Shares with 95% intervals, in percent", pd.DataFrame(columns, index=share.index.rename("sample")))


def _hundredths(share: float) -> str:
    return f"{100 * share:.0f}" if share == 0 or share >= 0.1 else f"{100 * share:.1f}"  # noqa: PLR2004


def usual_shares(facts: Facts) -> pd.DataFrame | None:
    """Where the shares of states of the training samples lie: states x low, middle, high; None where not known."""
    found = {} if facts.bundle is None else facts.bundle.metrics.get("composition", {}).get(facts.cells.main, {})
    return pd.DataFrame(found["states"]).T[["low", "middle", "high"]] if found else None


def _most(share: pd.DataFrame, total: NDArray[np.int64]) -> str:
    mean = share[total > 0].mean().sort_values(ascending=False)
    first = ", ".join(f"{state} {percent(float(value))}" for state, value in mean[:3].items())
    return f"The commonest states, as means over samples: {first}."


def _no_usual(facts: Facts) -> str:
    if facts.bundle is None:
        return "What is usual among the training samples is not drawn; give --model BUNDLE to carvae report to see it."
    return (
        "This model does not say what is usual among its training samples, because it was trained by an older carvae "
        "or "
        "without train.calibration_folds."
    )
