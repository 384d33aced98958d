"""How many cells, and how many counts of each, are enough: tried by thinning the user's own data.

Sequencing is what a product's report costs most. A design is a number of cells per sample and a mean number of UMIs per
cell; cells are left out at random and counts are thinned binomially, as shallower sequencing would, and what the model
then says is compared with what it says of all the data. One set of data is sequenced once, so a design is judged by the
worst sample of each random draw, and by nearly all draws.

Axes: N cells, B samples, J samples that are judged, S labels, T thinnings, D draws, K numbers of cells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import PredictConfig
from carvae.data.atomic import replacing_file
from carvae.data.readers import open_samples
from carvae.data.spreadsheet import write_table
from carvae.errors import ConfigError, CountsError
from carvae.model.bundle import Bundle
from carvae.model.machine import load_on
from carvae.model.query import UNKNOWN, Calls, Query, Samples, calls, order_within, read, refuse_place
from carvae.section_plan import PlanConfig

log = logging.getLogger(__name__)

TABLE, PLOT = "plan.csv", "plan.png"
SURE = 0.95
"""How sure it is that so many draws stay within the error as were asked for: one design of many is chosen, so one that
was lucky in its draws must not be taken for a good one."""
NAMED = 10  # samples named in a message
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

    def calls_of(panel: sp.csr_matrix) -> Calls:
        return calls(panel, bundle, predict, cells.present_G)[main]

    place_of_bound(config)  # refuses before the work
    whole = Whole.of(cells, calls_of(cells.panel), config)
    if left_out := whole.left_out(cells):
        log.warning("%s", left_out)
    table = designs(cells, whole, calls_of, config, rng)
    chosen = cheapest(table, config.max_error)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        places = [stack.enter_context(replacing_file(out / name)) for name in (TABLE, PLOT)]
        write_table(table.assign(cheapest=table.index == chosen), places[0])
        draw(table, chosen, config, places[1])
    log.info("%s", sentence(table, chosen, config, int(whole.judged_B.sum())))
    for note in limits(cells, whole, table["cells_per_sample"][chosen], table["umis_per_cell"][chosen]):
        log.info("%s", note)
    log.info("wrote %s and %s", out / TABLE, out / PLOT)
    return out


def refuse(bundle: Bundle, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    refuse_place(bundle, out, "plan")


@dataclass(frozen=True, slots=True)
class Whole:
    """What the model says of all the data, with which every design is compared."""

    calls: Calls
    composition_BS: NDArray[np.float64]
    known_B: NDArray[np.intp]
    """Cells with a label in each sample."""
    judged_B: NDArray[np.bool_]
    """Samples of which enough cells have one."""

    @classmethod
    def of(cls, cells: Query, calls: Calls, config: PlanConfig) -> Whole:
        """From what the model says of all cells; raises CountsError where no sample can be judged."""
        known_N = calls.label_N != UNKNOWN
        if not known_N.any():
            raise CountsError(
                "every cell of the query is unknown to the model, so there is no composition to keep; look at what "
                "`carvae annotate` says of it, or lower predict.min_counts"
            )
        known_B = np.bincount(cells.sample_N[known_N], minlength=len(cells.samples))
        judged_B = known_B >= config.min_known
        if not judged_B.any():
            most = int(known_B.argmax())
            raise CountsError(
                f"no sample has plan.min_known={config.min_known} cells that the model knows (most has "
                f"{cells.samples[most]}, {known_B[most]}), so no composition can be judged; plan with larger samples, "
                "or raise plan.max_cells if it left cells out"
            )
        return cls(calls, composition(cells, calls.label_N, np.ones(len(known_N), bool)), known_B, judged_B)

    def left_out(self, cells: Query) -> str:
        """The samples that are not judged, in words; empty where all are."""
        names = [f"{cells.samples[b]} ({self.known_B[b]})" for b in np.flatnonzero(~self.judged_B)]
        return (
            f"too few cells that the model knows to be judged, and left out of the error: {_some(names)}"
            if names
            else ""
        )


def designs(
    cells: Query,
    whole: Whole,
    calls_of: Callable[[sp.csr_matrix], Calls],
    config: PlanConfig,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """One row per design: what it costs, and how far its answers are from those of all the data.

    A sample that is shallower than a design's depth, or has fewer cells, enters with what it has. The error of a
    composition is the total variation distance from that of all the sample's cells at full depth, half the sum of
    absolute differences; unknown cells are left out of both. Columns:

    ``umis_per_cell``, ``cells_per_sample``
        Mean UMIs per cell, and cells, of each sample that has so many; the last of each are what the data has most of.
    ``n_cells``, ``cost``
        Cells in all; cells x UMIs, or cells x reads where ``plan.reads_per_cell`` says how many reads the data took.
    ``error_worst``
        The worst judged sample's error stays at or below this in the share ``plan.chance`` of draws: the upper 95%
        confidence bound of that quantile.
    ``error_median``
        Median over draws and judged samples.
    ``draws_within``
        Share of the draws in which every judged sample is within ``plan.max_error``.
    ``agreement``
        Share of cells with the label that they have at full depth, of those that have one there.
    ``confidence_change``, ``unknown``
        Mean confidence less that at full depth; share of cells with too few counts.
    """
    reads_of = saturation(float(cells.total_N.mean()), config.reads_per_cell)
    depth_B, n_B = cells.depth_B(), np.bincount(cells.sample_N)
    depths = [float(d) for d in sorted(set(config.umis)) if d < depth_B.max()] + [float(depth_B.max())]
    sizes = [int(n) for n in sorted(set(config.cells)) if n < n_B.max()] + [int(n_B.max())]
    rows = []
    for depth in depths:
        share_B = np.minimum(1.0, depth / depth_B)
        tried = _tried(cells, whole, _thinnings(cells, whole, calls_of, share_B, config, rng), sizes, config, rng)
        for size, measured in zip(sizes, tried, strict=True):
            taken_B = np.minimum(size, n_B)
            cost = float((taken_B * [reads_of(umi) for umi in share_B * depth_B]).sum())
            design = {"umis_per_cell": depth, "cells_per_sample": size, "n_cells": int(taken_B.sum()), "cost": cost}
            rows.append(design | measured)
        log.info("tried %s UMIs per cell", f"{depth:,.0f}")
    return pd.DataFrame(rows)


def _thinnings(
    cells: Query,
    whole: Whole,
    calls_of: Callable[[sp.csr_matrix], Calls],
    share_B: NDArray[np.float64],
    config: PlanConfig,
    rng: np.random.Generator,
) -> list[Calls]:
    if share_B.min() == 1:
        return [whole.calls]
    return [calls_of(thinned(cells, share_B, rng)) for _ in range(config.thinnings)]


def _tried(
    cells: Query,
    whole: Whole,
    thinnings: Sequence[Calls],
    sizes: Sequence[int],
    config: PlanConfig,
    rng: np.random.Generator,
) -> list[dict[str, float]]:
    """What each number of cells gives at one depth.

    Counts are thinned, and labels told, of each cell apart from the others, so taking every cell from a thinning of its
    own at random is one more draw of the whole: a few thinnings, which take time, serve for many draws.
    """
    label_TN, confidence_TN = (np.stack([getattr(c, name) for c in thinnings]) for name in ("label_N", "confidence_N"))
    errors_DKJ = np.empty((config.draws, len(sizes), int(whole.judged_B.sum())))
    others: list[list[tuple[float, float, float]]] = [[] for _ in sizes]
    every_N = np.arange(len(cells.sample_N))
    for draw_number in range(config.draws):
        from_N = rng.integers(len(thinnings), size=len(every_N))
        said = Calls(label_TN[from_N, every_N], confidence_TN[from_N, every_N])
        order_N = order_within(cells.sample_N, rng)
        for i, size in enumerate(sizes):
            taken_N = order_N < size
            error_B = distance(composition(cells, said.label_N, taken_N), whole.composition_BS)
            errors_DKJ[draw_number, i] = error_B[whole.judged_B]
            others[i].append(_compared(said, whole.calls, taken_N))
    return [_summary(errors_DKJ[:, i], others[i], config) for i in range(len(sizes))]


def _summary(
    errors_DJ: NDArray[np.float64], others: list[tuple[float, float, float]], config: PlanConfig
) -> dict[str, float]:
    worst_D = np.sort(errors_DJ.max(1))
    agreement, confidence, unknown = np.mean(others, axis=0)
    return {
        "error_worst": float(worst_D[place_of_bound(config)]),
        "error_median": float(np.median(errors_DJ)),
        "draws_within": float((worst_D <= config.max_error).mean()),
        "agreement": float(agreement),
        "confidence_change": float(confidence),
        "unknown": float(unknown),
    }


def place_of_bound(config: PlanConfig) -> int:
    """Where, from 0, in the sorted errors of the draws is the upper confidence bound of the ``plan.chance`` quantile.

    Fewer than ``place`` + 1 draws lie below the true quantile with the probability `SURE` or more, whatever the errors'
    distribution is (Conover 1999, Practical Nonparametric Statistics, 3.2).

    Raises
    ------
    ConfigError
        The draws are too few for any of them to be that bound.
    """
    from scipy.stats import binom

    place = int(binom.ppf(SURE, config.draws, config.chance))
    if place >= config.draws:
        enough = int(np.ceil(np.log(1 - SURE) / np.log(config.chance)))
        raise ConfigError(
            f"plan.draws={config.draws} are too few to tell what holds in {config.chance:.0%} of draws; take {enough} "
            "or more"
        )
    return place


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


def sentence(table: pd.DataFrame, chosen: int, config: PlanConfig, n_judged: int) -> str:
    """The choice in words."""
    row, most = table.loc[chosen], table["cost"].max()
    whose = "the judged sample's composition" if n_judged == 1 else f"the compositions of all {n_judged} judged samples"
    keeps = f"keeps {whose} within {config.max_error:g} in {config.chance:.0%} of draws"
    if row["cost"] == most:
        return f"no design smaller than all the data at hand {keeps}; nothing here can be saved, and more may be needed"
    unit = "UMIs" if config.reads_per_cell is None else "reads"
    return (
        f"cheapest design that {keeps}: {row['cells_per_sample']:,.0f} cells per sample at "
        f"{row['umis_per_cell']:,.0f} UMIs per cell, {row['cost']:,.0f} {unit} in all, {row['cost'] / most:.0%} of the "
        f"data at hand (worst sample's error at most {row['error_worst']:.3f} in {config.chance:.0%} of draws, "
        f"{row['agreement']:.0%} of the labels as at full depth)"
    )


def limits(cells: Query, whole: Whole, size: int, depth: float) -> list[str]:
    """What the data at hand cannot tell of a design, in words: the judged samples that have less than it asks for."""
    judged = np.flatnonzero(whole.judged_B)
    n_B, depth_B = np.bincount(cells.sample_N), cells.depth_B()
    fewer = [f"{cells.samples[b]} ({n_B[b]:,})" for b in judged if n_B[b] < size]
    shallower = [f"{cells.samples[b]} ({depth_B[b]:,.0f})" for b in judged if depth_B[b] < depth]
    notes = []
    if fewer:
        notes.append(f"fewer than {size:,} cells, so all were taken and only the depth was tried: {_some(fewer)}")
    if shallower:
        notes.append(f"fewer than {depth:,.0f} UMIs per cell, so the depth was left as it is: {_some(shallower)}")
    return notes


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def draw(table: pd.DataFrame, chosen: int, config: PlanConfig, path: Path) -> None:
    """The table as a picture: error against depth for every number of cells; labels and confidence against depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = list(table.groupby("cells_per_sample"))
    for i, (size, rows) in enumerate(groups):
        shade = str(0.8 * (1 - i / max(1, len(groups) - 1)))
        left.plot(rows["umis_per_cell"], rows["error_worst"], "o-", color=shade, label=f"{size:,.0f}", markersize=4)
    left.axhline(config.max_error, color="C3", linestyle="--", linewidth=1)
    row = table.loc[chosen]
    left.plot(row["umis_per_cell"], row["error_worst"], "o", markersize=12, markerfacecolor="none", color="C3")
    left.legend(title="cells per sample", fontsize="small", title_fontsize="small")
    left.set(xscale="log", xlabel="UMIs per cell", ylim=(0, None))
    left.set_ylabel(f"error of composition, worst sample\nin {config.chance:.0%} of draws at most")
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
