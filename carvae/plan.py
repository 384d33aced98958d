"""How many cells, and how many counts of each, are enough: tried by thinning the user's own data.

Sequencing is what a product's report costs most. A design is a number of cells per sample and a mean number of UMIs per
cell; cells are left out at random and counts are thinned binomially, as shallower sequencing would, and what the model
then says is compared with what it says of all the data.

Axes: N cells, B samples, S labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import PlanConfig, PredictConfig
from carvae.data.atomic import replacing_file
from carvae.data.readers import open_samples
from carvae.data.spreadsheet import write_table
from carvae.errors import ConfigError, CountsError
from carvae.model.bundle import Bundle
from carvae.model.machine import load_on
from carvae.model.query import UNKNOWN, Calls, Query, Samples, calls, order_within, read, refuse_place

log = logging.getLogger(__name__)

TABLE, PLOT = "plan.csv", "plan.png"
NEAR = 1.3  # depths nearer to each other than by this factor share one tick of the plot


def run(query: Path, model: Path, out: Path, config: PlanConfig, predict: PredictConfig, seed: int = 0) -> Path:
    """Try every design on a query; write ``plan.csv`` and ``plan.png`` to the folder ``out``, and return it.

    Raises
    ------
    CarvaeError
        The query, the model or a setting cannot be used; nothing is written then.
    """
    bundle = load_on(model, predict)
    refuse(bundle, out)
    rng = np.random.default_rng(seed)
    sources = open_samples(query, counts=predict.counts)
    samples = Samples.of(sources, predict.sample)
    cells = read(sources, bundle, predict, samples, samples.evenly(config.max_cells, rng))
    main = bundle.axes[0]
    table = designs(cells, lambda panel: calls(panel, bundle, predict, cells.present_G)[main], config, rng)
    chosen = cheapest(table, config.max_error)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        places = [stack.enter_context(replacing_file(out / name)) for name in (TABLE, PLOT)]
        write_table(table.assign(cheapest=table.index == chosen), places[0])
        draw(table, chosen, config, places[1])
    log.info("%s", sentence(table, chosen, config))
    log.info("wrote %s and %s", out / TABLE, out / PLOT)
    return out


def refuse(bundle: Bundle, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    refuse_place(bundle, out, "plan")


def designs(
    cells: Query, calls_of: Callable[[sp.csr_matrix], Calls], config: PlanConfig, rng: np.random.Generator
) -> pd.DataFrame:
    """One row per design: what it costs, and how far its answers are from those of all the data.

    A sample that is shallower than a design's depth, or has fewer cells, enters with what it has. The error of a
    composition is the total variation distance from that of all the sample's cells at full depth, half the sum of
    absolute differences; unknown cells are left out of both. Columns:

    ``umis_per_cell``, ``cells_per_sample``
        The means that the design comes to.
    ``cost``
        Cells x UMIs, or cells x reads where ``plan.reads_per_cell`` says how many reads the data took.
    ``error_worst``, ``error_median``
        The worst, and the median sample's median error over the draws.
    ``agreement``
        Share of cells with the label that they have at full depth, of those that have one there.
    ``confidence_change``, ``unknown``
        Mean confidence less that at full depth; share of cells with too few counts.
    """
    full = calls_of(cells.panel)
    if (full.label_N == UNKNOWN).all():
        raise CountsError(
            "every cell of the query is unknown to the model, so there is no composition to keep; look at what `carvae "
            "annotate` says of it, or lower predict.min_counts"
        )
    reads_of = saturation(float(cells.total_N.mean()), config.reads_per_cell)
    depth_B, n_B = cells.depth_B(), np.bincount(cells.sample_N)
    depths = [float(d) for d in sorted(set(config.umis)) if d < depth_B.max()] + [np.inf]
    sizes = [int(n) for n in sorted(set(config.cells)) if n < n_B.max()] + [int(n_B.max())]
    rows = []
    for depth in depths:
        share_B = np.minimum(1.0, depth / depth_B)
        tried = _tried(cells, full, calls_of, share_B, sizes, config.draws, rng)
        for size, measured in zip(sizes, tried, strict=True):
            taken_B = np.minimum(size, n_B)
            umis = float((taken_B * share_B * depth_B).sum() / taken_B.sum())
            cost = float((taken_B * [reads_of(umi) for umi in share_B * depth_B]).sum())
            design = {"umis_per_cell": umis, "cells_per_sample": float(taken_B.mean()), "n_cells": int(taken_B.sum())}
            rows.append(design | {"cost": cost} | measured)
        log.info("tried %.0f UMIs per cell", rows[-1]["umis_per_cell"])
    return pd.DataFrame(rows)


def _tried(
    cells: Query,
    full: Calls,
    calls_of: Callable[[sp.csr_matrix], Calls],
    share_B: NDArray[np.float64],
    sizes: Sequence[int],
    draws: int,
    rng: np.random.Generator,
) -> list[dict[str, float]]:
    """What each number of cells gives at one depth."""
    whole_BS = composition(cells, full.label_N, np.ones(len(full.label_N), bool))
    errors = np.empty((draws, len(sizes), len(cells.samples)))
    others: list[list[tuple[float, float, float]]] = [[] for _ in sizes]
    for draw_number in range(draws):
        said = full if share_B.min() == 1 else calls_of(thinned(cells, share_B, rng))
        order_N = order_within(cells.sample_N, rng)
        for i, size in enumerate(sizes):
            taken_N = order_N < size
            errors[draw_number, i] = distance(composition(cells, said.label_N, taken_N), whole_BS)
            others[i].append(_compared(said, full, taken_N))
    median = np.median(errors, axis=0)
    found = []
    for i in range(len(sizes)):
        agreement, confidence, unknown = np.mean(others[i], axis=0)
        errors_of = {"error_worst": float(median[i].max()), "error_median": float(np.median(median[i]))}
        rest = {"agreement": float(agreement), "confidence_change": float(confidence), "unknown": float(unknown)}
        found.append(errors_of | rest)
    return found


def _compared(calls: Calls, full: Calls, taken_N: NDArray[np.bool_]) -> tuple[float, float, float]:
    known_N, used_N = taken_N & (full.label_N != UNKNOWN), taken_N & (calls.label_N != UNKNOWN)
    agreement = float((calls.label_N == full.label_N)[known_N].mean()) if known_N.any() else np.nan
    at_full = full.confidence_N[full.label_N != UNKNOWN]
    change = float(calls.confidence_N[used_N].mean() - at_full.mean()) if used_N.any() else np.nan
    return agreement, change, 1 - float(used_N.sum() / taken_N.sum())


def thinned(cells: Query, share_B: NDArray[np.float64], rng: np.random.Generator) -> sp.csr_matrix:
    """The panel's counts, each kept with its sample's probability."""
    share_M = np.repeat(share_B[cells.sample_N], np.diff(cells.panel.indptr))
    data = rng.binomial(cells.panel.data, share_M).astype(cells.panel.dtype)
    return sp.csr_matrix((data, cells.panel.indices, cells.panel.indptr), shape=cells.panel.shape)


def composition(cells: Query, label_N: NDArray[np.intp], taken_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of each label among the known cells of each sample, [B, S]; a sample without known cells is all zero."""
    used_N = taken_N & (label_N != UNKNOWN)
    n_labels = int(label_N.max(initial=0)) + 1
    flat = np.bincount(cells.sample_N[used_N] * n_labels + label_N[used_N], minlength=len(cells.samples) * n_labels)
    n_BS = flat.reshape(len(cells.samples), n_labels).astype(np.float64)
    share_BS: NDArray[np.float64] = n_BS / np.maximum(n_BS.sum(1, keepdims=True), 1)
    return share_BS


def distance(a_BS: NDArray[np.float64], b_BS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Total variation distance of each sample's two compositions; 1 where only one of the two has known cells."""
    width = max(a_BS.shape[1], b_BS.shape[1])
    a_BS, b_BS = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a_BS, b_BS))
    only_one = a_BS.any(1) != b_BS.any(1)
    return np.where(only_one, 1.0, np.abs(a_BS - b_BS).sum(1) / 2)


def saturation(umis: float, reads: float | None) -> Callable[[float], float]:
    """Reads per cell that it takes to see so many UMIs per cell; UMIs themselves where ``reads`` is not known.

    With C molecules of a cell in the library, each read drawing one of them, ``umis = C (1 - exp(-reads / C))``
    (Lander and Waterman 1988, doi 10.1016/0888-7543(88)90007-9).

    Raises
    ------
    ConfigError
        The reads are not more than the UMIs that they gave.
    """
    if reads is None:
        return lambda wanted: wanted
    if reads <= umis:
        raise ConfigError(
            f"plan.reads_per_cell={reads:,.0f} is not above the {umis:,.0f} UMIs per cell of the query; give the mean "
            "reads per cell of Cell Ranger's summary"
        )
    from scipy.optimize import brentq

    def excess(molecules: float) -> float:
        return -molecules * float(np.expm1(-reads / molecules)) - umis

    largest = 2 * umis
    while excess(largest) < 0:
        largest *= 2
    molecules = float(brentq(excess, umis, largest))
    return lambda wanted: float(-molecules * np.log1p(-min(wanted / molecules, 1 - 1e-9)))


def cheapest(table: pd.DataFrame, max_error: float) -> int:
    """Row of the cheapest design whose worst sample is within the error; all the data is one, so there is one."""
    within = np.flatnonzero(table["error_worst"] <= max_error)
    return int(within[np.argmin(table["cost"].to_numpy()[within])])


def sentence(table: pd.DataFrame, chosen: int, config: PlanConfig) -> str:
    """The choice in words."""
    row, most = table.loc[chosen], table["cost"].max()
    unit = "UMIs" if config.reads_per_cell is None else "reads"
    return (
        f"cheapest design that keeps every sample's composition within {config.max_error:g}: "
        f"{row['cells_per_sample']:,.0f} cells per sample at {row['umis_per_cell']:,.0f} UMIs per cell, "
        f"{row['cost']:,.0f} {unit} in all, {row['cost'] / most:.0%} of the data at hand "
        f"(worst sample's error {row['error_worst']:.3f}, "
        f"{row['agreement']:.0%} of the labels as at full depth)"
    )


def draw(table: pd.DataFrame, chosen: int, config: PlanConfig, path: Path) -> None:
    """The table as a picture: error against depth for every number of cells; labels and confidence against depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = list(table.groupby(table["cells_per_sample"].round(1)))
    for i, (size, rows) in enumerate(groups):
        shade = str(0.8 * (1 - i / max(1, len(groups) - 1)))
        left.plot(rows["umis_per_cell"], rows["error_worst"], "o-", color=shade, label=f"{size:,.0f}", markersize=4)
    left.axhline(config.max_error, color="C3", linestyle="--", linewidth=1)
    row = table.loc[chosen]
    left.plot(row["umis_per_cell"], row["error_worst"], "o", markersize=12, markerfacecolor="none", color="C3")
    left.legend(title="cells per sample (mean)", fontsize="small", title_fontsize="small")
    left.set(xscale="log", xlabel="UMIs per cell", ylabel="error of composition, worst sample", ylim=(0, None))
    left.set_title("ring: the cheapest within the dashed line", fontsize="medium")
    deepest = groups[-1][1]
    for name, values, mark in (
        ("label as at full depth", deepest["agreement"], "o-"),
        ("no label: unknown", deepest["unknown"], "s--"),
        ("loss of mean confidence", -deepest["confidence_change"], "^:"),
    ):
        right.plot(deepest["umis_per_cell"], values, mark, label=name, markersize=4)
    right.set(xscale="log", xlabel="UMIs per cell", ylabel="share of cells", ylim=(min(0, *right.get_ylim()), 1.02))
    depths = sorted(set(deepest["umis_per_cell"].round()))
    shown = [d for d, deeper in zip(depths, [*depths[1:], np.inf], strict=True) if deeper > NEAR * d]
    for axes in (left, right):
        axes.set_xticks(shown, [f"{depth:,.0f}" for depth in shown])
        axes.minorticks_off()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=150)
