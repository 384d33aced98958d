"""Section 6: how sure the states are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from carvae.labels.axis import RESERVED
from carvae.model.trust import JOIN
from carvae.page.blocks import Absent, Block, Picture, Section, Text
from carvae.page.facts import Facts, percent
from carvae.page.picture import picture
from carvae.plots.sureness import plot_confidence, plot_set_sizes, plot_unknown

FEW, STRANGE = "too few counts over the model's genes", "unlike what the model knows"


def section(facts: Facts) -> Section:
    """Confidence, sets of states, and cells without a state."""
    blocks: list[Block] = [_confidence(facts), *_calibration(facts), _sets(facts), *_unknown(facts)]
    return Section("confidence", "How sure the states are", tuple(blocks))


def _confidence(facts: Facts) -> Picture:
    confidence, unknown = facts.cells.obs["carvae_confidence"].to_numpy(float), facts.unknown_N

    def draw() -> Axes:
        return plot_confidence(confidence, unknown)

    sure = confidence[~unknown]
    middle = f" Half of the cells with a state have {np.median(sure):.2f} or more." if sure.size else ""
    shows = "Confidence is the probability of the likeliest state, as the model has it."
    return picture("confidence", "Confidence", shows + middle, draw)


def _calibration(facts: Facts) -> list[Block]:
    """How true confidence was on held-out patients."""
    found: Any = {} if facts.bundle is None else facts.bundle.metrics.get("trust", {}).get(facts.cells.main, {})
    if "whole" in found:
        whole = found["whole"]
        text = (
            f"On {whole['n_cells']:,} cells of patients held out of training, confidence was off by "
            f"{whole['ece']:.3f} on "
            f"average (calibration error; {whole['ece_before']:.3f} before calibration)."
        )
        return [Text(text)]
    if "carvae_novelty" in facts.cells.obs:
        return [Text("The model calibrated its confidence on held-out patients; its card says how well.")]
    return [
        Text("This model's confidence is as trained and not calibrated: read it as an order, not as a probability.")
    ]


def _sets(facts: Facts) -> Block:
    obs = facts.cells.obs
    if "carvae_set" not in obs:
        text = "No sets of states were asked for; annotate with predict.coverage=0.9 to get, for each cell, the states"
        return Absent(f"{text} of which one is right nine times in ten.")
    known = obs["carvae_set"].astype(str)
    sizes = known[known != RESERVED].map(lambda names: len(names.split(JOIN)))
    if sizes.empty:
        return Absent("Every cell is unknown, so no cell has a set of states.")

    def draw() -> Axes:
        return plot_set_sizes(sizes)

    coverage = facts.cells.settings.get("coverage")
    shows = (
        f"For each cell the states of which one is right with probability {coverage}; "
        f"{percent(float((sizes == 1).mean()))} "
        f"of the cells have a single one, the mean is {sizes.mean():.1f}."
    )
    return picture("sets", "How many states a cell may be", shows, draw)


def _unknown(facts: Facts) -> list[Block]:
    cells, unknown = facts.cells, facts.unknown_N
    if not unknown.any():
        return [Absent("No cell is unknown.")]
    least = cells.settings.get("min_counts", 0)
    few = unknown & (cells.obs["carvae_n_panel_counts"].to_numpy() < least)
    table = pd.DataFrame({FEW: few, STRANGE: unknown & ~few}).groupby(cells.sample_N).mean()
    table = table.reindex(facts.largest_samples)[[name for name in table if table[name].any()]]

    def draw() -> Axes:
        return plot_unknown(table)

    shows = f"{int(unknown.sum()):,} of {cells.n_cells:,} cells ({percent(float(unknown.mean()))}) have no state: "
    shows += f"{int(few.sum()):,} by {FEW} (fewer than {least}), {int((unknown & ~few).sum()):,} as {STRANGE}."
    if "carvae_novelty" in cells.obs and facts.bundle is not None and facts.bundle.trust is not None:
        shows += f" Of cells like the training cells, {percent(facts.bundle.trust.unknown_rate)} are expected."
    return [picture("unknown", "Cells without a state", shows + facts.not_shown, draw)]
