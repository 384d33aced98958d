"""Which genes speak for a call, per state and per cell, and marker genes by state: tables and a picture.

Axes: N cells, G genes of the model, E marker genes, S states.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.config import ExplainConfig, PredictConfig, label_file
from carvae.data.atomic import replacing_file
from carvae.data.markers import AUTHOR, PREDICTED, Grouping, marker_table
from carvae.data.readers import CountsSource, open_samples
from carvae.data.spreadsheet import write_table
from carvae.errors import ConfigError, CountsError, SchemaError
from carvae.labels.axis import RESERVED
from carvae.labels.signatures import Signatures
from carvae.model.attribution import Asked, Attribution, Baseline, attribute, baseline, measured_share, normalised
from carvae.model.bundle import Bundle
from carvae.model.machine import load_on
from carvae.model.query import UNKNOWN, Calls, Query, Samples, calls, read, refuse_place
from carvae.plots.markers import draw_markers

log = logging.getLogger(__name__)

GENES, CELLS, MARKERS, PLOT, MISSING = "genes.csv", "cells.csv", "markers.csv", "markers.png", "missing.csv"
CELLS_AT_A_TIME = 256
MIN_CELLS = 5
"""Cells of a state without which it is no part of the baseline."""
MIN_STATES = 2
"""States with that many cells, below which there is nothing to tell a state from."""
REST = "(all other genes)"
NO_AUTHOR = "(none)"
"""Where the author's column is empty."""


@dataclass(frozen=True, slots=True)
class Read:
    """The cells that are looked at."""

    query: Query
    barcode_N: NDArray[np.object_]
    author_N: NDArray[np.object_] | None
    """Author's label of each cell."""
    asked_N: NDArray[np.bool_]
    """Cells to explain one by one."""
    drawn_N: NDArray[np.bool_]
    """Cells of the tables by state."""
    markers: tuple[str, ...]


def run(query: Path, model: Path, out: Path, config: ExplainConfig, predict: PredictConfig, seed: int = 0) -> Path:
    """Explain the calls of a query; write tables and a picture to the folder ``out``, and return it.

    ``genes.csv``
        Per state of each label axis the genes that add most to its log-odds (see `model.attribution`), the mean over
        the cells that were called it, from the mean of all states to the cell; and whether they do so by being there
        more than in that mean, or less (CD8A speaks for a CD4 state by its absence).
    ``cells.csv``
        The same of each cell of ``explain.barcodes``; the terms of a cell add up to the change of its log-odds.
    ``markers.csv``, ``markers.png``
        Mean log1p(CP10k) of marker genes, and the share of cells with a count, by state and by the author's label.
    ``missing.csv``
        Genes of the model, and markers, that the query does not have.

    Raises
    ------
    CarvaeError
        The query, the model or a setting cannot be used; nothing is written then.
    """
    bundle = load_on(model, predict)
    refuse(bundle, out)
    assert bundle.tree is not None
    panels = Signatures.read(label_file(config.markers)).items
    cells = _read(query, bundle, config, predict, tuple(dict.fromkeys(g for p in panels for g in p.genes)), seed)
    said = calls(cells.query.panel, bundle, predict, cells.query.present_G)
    states, singles = _explained(bundle, cells, said, config)
    table = _marker_table(cells, _called(bundle, said), [*bundle.tree[bundle.axes[0]].leaves, RESERVED])
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        names = [GENES, *([CELLS] if config.barcodes else []), MARKERS, MISSING, PLOT]
        place = {name: stack.enter_context(replacing_file(out / name)) for name in names}
        write_table(states, place[GENES])
        if config.barcodes:
            write_table(singles, place[CELLS])
        write_table(table, place[MARKERS])
        write_table(_missing(bundle, cells), place[MISSING])
        draw_markers(table, [(p.name, p.genes) for p in panels]).savefig(place[PLOT], dpi=150)
    log.info("wrote %s to %s", ", ".join(names), out)
    return out


def refuse(bundle: Bundle, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    refuse_place(bundle, out, "explain")


def _read(
    query: Path, bundle: Bundle, config: ExplainConfig, predict: PredictConfig, markers: tuple[str, ...], seed: int
) -> Read:
    sources = open_samples(query, counts=predict.counts)
    samples = Samples.of(sources, predict.sample)
    barcode_N = np.concatenate([source.cells.names() for source in sources]).astype(str).astype(object)
    asked_N = np.isin(barcode_N, list(config.barcodes))
    if absent := [name for name in config.barcodes if name not in set(barcode_N[asked_N])]:
        raise ConfigError(
            f"explain.barcodes names {absent[0]!r}{f' and {len(absent) - 1} more' if absent[1:] else ''}, and no cell "
            f"of the query is called that; its first is {barcode_N[0]!r}"
        )
    author_N = None if config.label is None else _author(sources, config.label)
    drawn_N = samples.evenly(config.max_cells, np.random.default_rng(seed))
    taken_N = drawn_N | asked_N
    return Read(
        query=read(sources, bundle, predict, samples, taken_N, markers),
        barcode_N=barcode_N[taken_N],
        author_N=None if author_N is None else author_N[taken_N],
        asked_N=asked_N[taken_N],
        drawn_N=drawn_N[taken_N],
        markers=markers,
    )


def _author(sources: Sequence[CountsSource], column: str) -> NDArray[np.object_]:
    found = []
    for source in sources:
        obs = source.obs
        if column not in obs:
            raise SchemaError(
                f"{source.name} has no column {column!r} for explain.label; it has {', '.join(map(str, obs.columns))}"
            )
        found.append(obs[column].astype("string").fillna(NO_AUTHOR).to_numpy(dtype=object))
    return np.concatenate(found)


def _called(bundle: Bundle, said: Mapping[str, Calls]) -> NDArray[np.object_]:
    """State of each cell on the main axis, or `RESERVED`."""
    assert bundle.tree is not None
    main = bundle.axes[0]
    return np.array([*bundle.tree[main].leaves, RESERVED], dtype=object)[said[main].label_N]  # unknown is -1, the last


def _explained(
    bundle: Bundle, cells: Read, said: Mapping[str, Calls], config: ExplainConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of states and of single cells."""
    assert bundle.tree is not None
    panel = cells.query.panel
    found = bundle.network.predict(panel, present_G=cells.query.present_G)
    best = {axis: p_NS.argmax(1) for axis, p_NS in found.probability_NS.items()}
    states, singles, errors = [], [], [np.zeros(0)]
    for axis in bundle.axes:
        label_N, leaves = np.where(cells.drawn_N, said[axis].label_N, UNKNOWN), bundle.tree[axis].leaves
        if (label_N == UNKNOWN).all():
            raise CountsError(
                "every cell of the query is unknown to the model, so there is no call to explain; look at what `carvae "
                "annotate` says of it, or lower predict.min_counts"
            )
        if sum((label_N == state).sum() >= MIN_CELLS for state in range(len(leaves))) < MIN_STATES:
            log.warning(
                "axis %s: fewer than two states have %d cells in the query; genes are told against the mean of its own "
                "states, so what all its cells share is not among them",
                axis,
                MIN_CELLS,
            )
        start = baseline(panel, label_N, MIN_CELLS, measured_share(bundle.network, cells.query.present_G))
        sums = _Sums.empty(len(leaves), panel.shape[1])
        for part, rows in _attributed(bundle, cells, start, axis, best[axis]):
            sums.add(part, label_N[rows])
            errors.append(np.abs(part.error()))
            for i in np.flatnonzero(cells.asked_N[rows]).tolist():
                row, leaf = int(rows[i]), leaves[best[axis][rows[i]]]
                singles.append(_cell_table(bundle, cells, part, i, row, config.n_genes).assign(axis=axis, state=leaf))
        states.append(_state_table(bundle, cells, sums, start, label_N, axis, config.n_genes))
    error_N = np.concatenate(errors)
    log.info(
        "genes add up to the change of the log-odds within %.1g in half of the cells, %.1g in all",
        np.median(error_N),
        error_N.max(),
    )
    return pd.concat(states, ignore_index=True), pd.concat([pd.DataFrame(), *singles], ignore_index=True)


def _attributed(
    bundle: Bundle, cells: Read, start: Baseline, axis: str, leaf_N: NDArray[np.intp]
) -> Iterator[tuple[Attribution, NDArray[np.intp]]]:
    """Some cells at a time, with their places."""
    for first in range(0, len(leaf_N), CELLS_AT_A_TIME):
        rows = np.arange(first, min(first + CELLS_AT_A_TIME, len(leaf_N)))
        asked = Asked(cells.query.panel[rows], axis, leaf_N[rows], cells.query.present_G)
        yield attribute(bundle.network, asked, start), rows


@dataclass(frozen=True, slots=True)
class _Sums:
    """Attributions added up over the cells of each state."""

    gene_SG: NDArray[np.float64]
    latent_SG: NDArray[np.float64]

    @classmethod
    def empty(cls, n_states: int, n_genes: int) -> _Sums:
        return cls(np.zeros((n_states, n_genes)), np.zeros((n_states, n_genes)))

    def add(self, part: Attribution, label_N: NDArray[np.intp]) -> None:
        for state in np.unique(label_N[label_N != UNKNOWN]):
            self.gene_SG[state] += part.gene_NG[label_N == state].sum(0)
            self.latent_SG[state] += part.latent_NG[label_N == state].sum(0)


def _state_table(
    bundle: Bundle,
    cells: Read,
    sums: _Sums,
    start: Baseline,
    label_N: NDArray[np.intp],
    axis: str,
    n_genes: int,
) -> pd.DataFrame:
    """The genes that add most to each state that was called, the greatest first."""
    assert bundle.tree is not None
    share = measured_share(bundle.network, cells.query.present_G)
    has, value = cells.query.panel.astype(bool).tocsr(), normalised(cells.query.panel, share)
    tables = []
    for s, state in enumerate(bundle.tree[axis].leaves):
        own, others = label_N == s, (label_N != s) & (label_N != UNKNOWN)
        if not own.any():
            continue
        gene_G, latent_G = sums.gene_SG[s] / own.sum(), sums.latent_SG[s] / own.sum()
        top = np.argsort(-(gene_G + latent_G), kind="stable")[:n_genes]
        over_G = np.asarray(value[own].mean(axis=0)).ravel() > start.normalised_G
        columns = {
            "axis": axis,
            "state": state,
            "n_cells": int(own.sum()),
            "rank": np.arange(1, len(top) + 1),
            "gene": np.array(bundle.genes, dtype=object)[top],
            "attribution": (gene_G + latent_G)[top],
            "gene_view": gene_G[top],
            "latent_view": latent_G[top],
            "speaks_by": np.where(over_G, "presence", "absence")[top],
            "share_expressing": np.asarray(has[own].mean(axis=0)).ravel()[top],
            "share_elsewhere": np.asarray(has[others].mean(axis=0)).ravel()[top] if others.any() else np.nan,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _cell_table(bundle: Bundle, cells: Read, part: Attribution, i: int, row: int, n_genes: int) -> pd.DataFrame:
    """The genes that add or take most of a cell's log-odds, and the sum of all others."""
    both_G = part.gene_NG[i] + part.latent_NG[i]
    order = np.argsort(-np.abs(both_G), kind="stable")
    top, rest = order[:n_genes], order[n_genes:]
    counts_G = cells.query.panel[row].toarray().ravel()

    def with_rest(value_G: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.append(value_G[top], value_G[rest].sum(dtype=np.float64))

    return pd.DataFrame(
        {
            "barcode": cells.barcode_N[row],
            "sample": cells.query.samples[cells.query.sample_N[row]],
            "axis": "",
            "state": "",
            "log_odds": part.log_odds_N[i],
            "baseline_log_odds": part.baseline_N[i],
            "gene": [*np.array(bundle.genes, dtype=object)[top], REST],
            "attribution": with_rest(both_G),
            "gene_view": with_rest(part.gene_NG[i]),
            "latent_view": with_rest(part.latent_NG[i]),
            "counts": with_rest(counts_G.astype(np.float64)).astype(np.int64),
        }
    )


def _marker_table(cells: Read, called_N: NDArray[np.object_], order: Sequence[str]) -> pd.DataFrame:
    """Markers by state and by the author's label, of the cells that were drawn."""
    drawn, query = np.flatnonzero(cells.drawn_N), cells.query
    groupings = [Grouping(PREDICTED, called_N[drawn], order)]
    if cells.author_N is not None:
        groupings.append(Grouping(AUTHOR, cells.author_N[drawn], sorted(set(cells.author_N))))
    return marker_table(query.other[drawn], query.total_N[drawn], query.measured_E, cells.markers, groupings)


def _missing(bundle: Bundle, cells: Read) -> pd.DataFrame:
    """Genes that the query does not have; said, too, where they are markers."""
    panel = [gene for gene, there in zip(bundle.genes, cells.query.present_G, strict=True) if not there]
    markers = [gene for gene, there in zip(cells.markers, cells.query.measured_E, strict=True) if not there]
    if panel:
        log.info("%d genes of the model are not in the query and explain nothing; %s names them", len(panel), MISSING)
    if markers:
        log.info("markers that the query does not have: %s", ", ".join(markers))
    return pd.DataFrame({"gene": panel + markers, "what": ["model"] * len(panel) + ["marker"] * len(markers)})
