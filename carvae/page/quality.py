"""Section 3: the quality of the cells and samples, beside what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from carvae.page.blocks import Absent, Block, Picture, Section, Text
from carvae.page.facts import Facts, percent
from carvae.page.picture import picture
from carvae.plots.samples import Limits, plot_limits, plot_violins

FIGURES = {
    "panel counts, median": "shallowness",
    "cells unknown": "fraction_unknown",
    "mean novelty": "mean_novelty",
    "distance to training": "batch_distance",
}


def section(facts: Facts) -> Section:
    """Depth, genes, mitochondrial share; and the figures of the verdict with their limits."""
    blocks: list[Block] = [_depth(facts)]
    table = facts.cells.samples
    if table is None or "mean_novelty" not in table:
        blocks.append(
            Absent("There is no range of the model to compare with, since no sample has a verdict (see above).")
        )
    else:
        if facts.limits is None:
            blocks.append(
                Text("The limits of the model are not drawn; give --model BUNDLE to carvae report to see them.")
            )
        blocks.append(_range(facts, table))
    return Section("quality", "Quality by sample, within the model's range", tuple(blocks))


def _depth(facts: Facts) -> Picture:
    cells, expression, order = facts.cells, facts.expression, facts.largest_samples
    panels = [("counts per cell", cells.obs["carvae_n_counts"].to_numpy(float), True)]
    if expression is not None:
        panels.append(("genes per cell", expression.n_genes_N.astype(float), True))
        if expression.mito_N is not None:
            panels.append(("mitochondrial counts, %", 100 * expression.mito_N, False))

    def draw() -> Canvas:
        canvas = Canvas(figsize=(11.0, float(np.clip(1.3 + 0.34 * len(order), 2.2, 26))), layout="constrained")
        for ax, (title, values, log) in zip(
            np.ravel(canvas.subplots(1, len(panels), sharey=True, squeeze=False)), panels, strict=True
        ):
            plot_violins(values, pd.Series(cells.sample_N), title, order, log=log, ax=ax)
        return canvas

    counts = cells.obs["carvae_n_counts"]
    shows = f"The median over all cells is {counts.median():,.0f} counts"
    if expression is not None:
        shows += f" and {np.median(expression.n_genes_N):,.0f} genes"
        if expression.mito_N is not None:
            shows += f"; {percent(float(np.median(expression.mito_N)))} of counts are mitochondrial in the median cell"
    return picture("quality", "Depth and quality of the cells", f"{shows}. Bars are medians.{facts.not_shown}", draw)


def _range(facts: Facts, table: pd.DataFrame) -> Picture:
    order = [sample for sample in facts.largest_samples if sample in table.index]
    limits = facts.limits or {}
    panel = pd.Series(facts.cells.obs["carvae_n_panel_counts"].to_numpy(float)).groupby(facts.cells.sample_N).median()

    def draw() -> Canvas:
        canvas = Canvas(figsize=(11.0, float(np.clip(1.5 + 0.3 * len(order), 2.2, 24))), layout="constrained")
        axes = np.ravel(canvas.subplots(1, len(FIGURES), sharey=True, squeeze=False))
        for ax, (title, name) in zip(axes, FIGURES.items(), strict=True):
            # Shallowness is -log2 of the median counts: shown as counts, of which too few are bad.
            shown: Callable[[float], float] = (lambda v: 2.0**-v) if name == "shallowness" else float
            values = panel.reindex(order) if name == "shallowness" else table.loc[order, name]
            ends = Limits(*map(shown, limits[name])) if name in limits else None
            plot_limits(values, title, ends, ax)
        return canvas

    shows = "What the verdicts rest on, a dot per sample."
    if limits:
        shows += (
            " On the plain ground a sample is within what nine in ten labelled training samples showed when held "
            "out; on "
            "the orange care is due, on the red it is out of range."
        )
    return picture("range", "Inside the model's range?", shows + facts.not_shown, draw)
