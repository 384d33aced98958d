"""Map a query onto a model for good: rows for its batches in the decoder, trained alone, kept only where they help.

A query is embedded and labelled without any of this (`carvae annotate`). Rows are for what is decoded: likelihood,
normalised and differential expression in scvi-tools (`carvae.model.scvi_bridge`).

Axes: N cells, C covariates, B samples.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from carvae import __version__
from carvae.config import MapConfig, PredictConfig
from carvae.data.atomic import replacing_file
from carvae.data.readers import CountsSource, open_samples
from carvae.data.schema import inspect_obs, raise_problems
from carvae.data.spreadsheet import write_table
from carvae.errors import BundleError, ConfigError, CountsError
from carvae.model.bundle import Bundle
from carvae.model.bundle_files import check_outside, check_place
from carvae.model.machine import load_on
from carvae.model.mapping import Cells, RowFit
from carvae.model.query import Query, Samples, order_within, read

log = logging.getLogger(__name__)

MIN_HELD_OUT = 10
"""Held-out cells without which nothing can be said."""
SURE = 2.0
"""Standard errors by which the gain on held-out cells must be above zero for rows to be kept."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """What came of mapping a query."""

    bundle: Bundle
    """With the new rows if they helped, else with those of the model."""
    samples: pd.DataFrame
    """Per sample: cells, held-out cells, their mean negative log likelihood (nats) by the model and with the rows, and
    the rows that its cells have."""
    helped: bool


@dataclass(frozen=True, slots=True)
class _Batches:
    """The categories of a query's cells, as rows of a model's tables."""

    code_NC: NDArray[np.int64]
    new: dict[str, tuple[str, ...]]
    """Covariate -> names that the model has no row for."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """What rows do for held-out cells."""

    samples: pd.DataFrame
    gain_N: NDArray[np.float64]
    """Nats per held-out cell."""


def run(query: Path, model: Path, out: Path, config: MapConfig, predict: PredictConfig, seed: int = 0) -> Path:
    """Map a file or folder, and write the bundle ``out`` and, beside it, ``out``.samples.csv; returns ``out``.

    Where the rows do not help, ``out`` is the model without them, and says so.

    Raises
    ------
    CarvaeError
        The query, the model or a setting cannot be used; nothing is written then.
    """
    bundle = load_on(model, predict)
    refuse(bundle, model, out)
    mapped = _mapped(query, bundle, config, predict, seed)
    with replacing_file(samples_path(out)) as table:
        write_table(mapped.samples, table)
        mapped.bundle.save(out)
    log.info("wrote %s and %s", out, samples_path(out))
    return out


def samples_path(out: Path) -> Path:
    """Where the table of samples lies: ``new`` -> ``new.samples.csv``."""
    return out.with_name(f"{out.name}.samples.csv")


def refuse(bundle: Bundle, model: Path, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    check_place(out)
    check_outside(out, model)
    _refuse_model(bundle)


def _refuse_model(bundle: Bundle) -> None:
    bundle.refuse_without_decoder("mapping")
    if not bundle.n_categories:
        raise BundleError("this model corrects for no covariate, so there are no rows to add; use it as it is")


def map_query(
    adata: AnnData,
    model: Bundle | Path | str,
    config: MapConfig | None = None,
    predict: PredictConfig | None = None,
    seed: int = 0,
) -> Mapped:
    """Map an AnnData with raw counts onto a model; neither is changed, and nothing is written.

    Raises
    ------
    CarvaeError
        As `run`.
    """
    predict = predict or PredictConfig()
    bundle = model if isinstance(model, Bundle) else load_on(model, predict)
    return _mapped(adata, bundle, config or MapConfig(), predict, seed)


def _mapped(query: Path | AnnData, bundle: Bundle, config: MapConfig, predict: PredictConfig, seed: int) -> Mapped:
    _refuse_model(bundle)
    sources = open_samples(query, counts=predict.counts)
    batches = _batches(query, sources, bundle, config, predict)
    samples = Samples.of(sources, config.obs.get("sample", predict.sample))
    rng = np.random.default_rng(seed)
    taken_N = samples.evenly(config.max_cells, rng)
    read_in = read(sources, bundle, predict, samples, taken_N)
    cells = Cells(read_in.panel, ~read_in.present_G, batches.code_NC[taken_N])
    held_N = _held_out(read_in.sample_N, config.held_out, rng)
    fit = RowFit(bundle.network, {name: len(names) for name, names in batches.new.items()})
    found = _measured(fit, cells, held_N, read_in, seed)
    gain, error = float(found.gain_N.mean()), float(found.gain_N.std(ddof=1) / np.sqrt(found.gain_N.size))
    helped = gain > SURE * error
    record = {
        "carvae_version": __version__,
        "cells": len(held_N),
        "held_out_cells": int(held_N.sum()),
        "rows": {name: len(names) for name, names in batches.new.items()},
        "gain": gain,
        "standard_error": error,
        "kept": helped,
    }
    added = fit.fit(cells, seed) if helped else {}
    _say(found.samples, record)
    made = _with_rows(bundle, added, batches.new if helped else {}, record)
    return Mapped(made, found.samples.assign(**_rows_of_samples(cells, read_in, made)), helped)


def _batches(
    query: Path | AnnData, sources: Sequence[CountsSource], bundle: Bundle, config: MapConfig, predict: PredictConfig
) -> _Batches:
    """Each cell's row in every table, new rows being numbered on from the table's end."""
    if unknown := sorted({*config.obs, *config.constants} - set(bundle.n_categories)):
        raise ConfigError(
            f"map names {', '.join(map(repr, unknown))}, which the model does not correct for; its covariates are "
            f"{', '.join(bundle.n_categories)}"
        )
    name = sources[0].name if len(sources) == 1 else Path(str(query)).resolve().name
    name = "" if isinstance(query, AnnData) else name
    obs = pd.concat([_contract(source, name, config, predict) for source in sources], ignore_index=True)
    code_NC, new = np.full((len(obs), len(bundle.n_categories)), -1, np.int64), {}
    for c, covariate in enumerate(bundle.n_categories):
        if covariate not in obs or obs[covariate].isna().all():
            log.info("the query names no %s; it stays at the mean of the training's", covariate)
            continue
        named_N = obs[covariate].notna().to_numpy()
        code_V, values = pd.factorize(obs.loc[named_N, covariate].astype(str), sort=True)
        row_V = bundle.rows_of(covariate, values)
        unseen = np.flatnonzero(row_V < 0)
        if known := [repr(value) for value, row in zip(values, row_V, strict=True) if row >= 0]:
            log.info("%s %s: mapped before, with rows that stay as they are", covariate, ", ".join(known))
        row_V[unseen] = bundle.n_rows[covariate] + np.arange(unseen.size)
        code_NC[named_N, c] = row_V[code_V]
        if unseen.size:
            new[covariate] = tuple(map(str, values[unseen]))
    if new:
        return _Batches(code_NC, new)
    asked = ", ".join(bundle.n_categories)
    if (code_NC < 0).all():
        raise ConfigError(f"the query names no {asked}; name columns with map.obs, or values with map.constants")
    raise BundleError(
        f"every batch of the query ({asked}) was mapped before; the model has their rows, use it as it is"
    )


def _contract(source: CountsSource, name: str, config: MapConfig, predict: PredictConfig) -> pd.DataFrame:
    """The contract's columns of a source, as text where they are named."""
    obs = source.obs
    columns = ({"sample": predict.sample} if predict.sample else {}) | config.obs
    own = "" if "study" in obs else name
    found = inspect_obs(obs, own, columns, config.constants, require=())
    raise_problems(found.problems)
    return found.obs.reset_index(drop=True).astype(object)


def _held_out(sample_N: NDArray[np.intp], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The stated share of each sample's cells."""
    n_B = np.bincount(sample_N)
    held_N: NDArray[np.bool_] = order_within(sample_N, rng) < np.floor(share * n_B)[sample_N]
    if held_N.sum() < MIN_HELD_OUT or held_N.all():
        raise CountsError(
            f"the query has {len(sample_N):,} cells, too few to hold {MIN_HELD_OUT} out and tell whether rows help; "
            "map more cells, raise map.held_out, or use the model as it is"
        )
    return held_N


def _measured(fit: RowFit, cells: Cells, held_N: NDArray[np.bool_], query: Query, seed: int) -> _Measured:
    """Likelihood of each sample's held-out cells without and with rows fitted on its other cells."""
    rows = fit.fit(cells.some(np.flatnonzero(~held_N)), seed)
    held = cells.some(np.flatnonzero(held_N))
    n_rows = np.array([len(table) for table in fit.network.vae.decoder.rows().values()])
    zero_shot = replace(held, code_NC=np.where(held.code_NC >= n_rows, -1, held.code_NC))
    before_N, after_N = fit.nll(zero_shot, {}, seed + 1), fit.nll(held, rows, seed + 1)
    of_N = query.sample_N[held_N]
    n_B, held_B = (np.bincount(sample, minlength=len(query.samples)) for sample in (query.sample_N, of_N))

    def mean_B(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.bincount(of_N, weights=value_N, minlength=len(query.samples))
        return np.where(held_B > 0, sums / np.maximum(held_B, 1), np.nan)

    table = pd.DataFrame({"sample": query.samples, "n_cells": n_B, "n_held_out": held_B})
    table = table.assign(nll=mean_B(before_N), nll_mapped=mean_B(after_N), gain=mean_B(before_N - after_N))
    return _Measured(table, before_N - after_N)


def _rows_of_samples(cells: Cells, query: Query, bundle: Bundle) -> dict[str, list[str]]:
    """Column -> the rows of each sample's cells in a covariate's table."""
    columns = {}
    for c, (covariate, n_rows) in enumerate(bundle.n_rows.items()):
        row_N = np.where(cells.code_NC[:, c] < n_rows, cells.code_NC[:, c], -1)  # new ones that were not kept
        pairs = pd.DataFrame({"sample": query.sample_N, "row": row_N}).drop_duplicates()
        rows = pairs.sort_values("row").groupby("sample")["row"].agg(lambda row: " ".join(map(str, row)))
        columns[f"row_{covariate}"] = [str(rows[b]) for b in range(len(query.samples))]
    return columns


def _say(table: pd.DataFrame, record: dict[str, Any]) -> None:
    for row in table.itertuples():
        if row.n_held_out:
            log.info(
                "sample %s: %+.2f nats per held-out cell (%d of %d)", row.sample, row.gain, row.n_held_out, row.n_cells
            )
    n_rows = ", ".join(f"{n} of {name}" for name, n in record["rows"].items())
    text = f"{record['gain']:+.2f} nats per held-out cell, standard error {record['standard_error']:.2f}"
    if record["kept"]:
        log.info("the rows help (%s) and are kept: %s", text, n_rows)
    else:
        log.warning("the rows do not help (%s); none is kept, the model is as it was", text)
    log.info(
        "embedding, labels, novelty and verdicts do not depend on the rows: they are those of the model, bit by bit"
    )


def _with_rows(
    bundle: Bundle, added: dict[str, torch.Tensor], new: dict[str, tuple[str, ...]], record: dict[str, Any]
) -> Bundle:
    """A bundle of its own with the rows in it."""
    network = copy.deepcopy(bundle.network)
    network.vae.decoder.add_rows(added)
    digests = {name: tuple(bundle.digest(name, value) for value in values) for name, values in new.items()}
    both = [name for name in bundle.n_categories if name in bundle.mapped or name in digests]
    metrics = bundle.metrics | {"mapped": [*bundle.metrics.get("mapped", []), record]}
    return replace(
        bundle,
        network=network,
        mapped={name: bundle.mapped.get(name, ()) + digests.get(name, ()) for name in both},
        metrics=metrics,
        card=bundle.card + _card(record),
        bundle_id="",
    )


def _card(record: dict[str, Any]) -> str:
    rows = ", ".join(f"{n} of {name}" for name, n in record["rows"].items())
    return (
        f"\n## Mapped by carvae {record['carvae_version']}\n\n"
        f"{record['cells']:,} cells, rows: {rows}; {record['gain']:+.2f} nats per held-out cell (standard error "
        f"{record['standard_error']:.2f}, {record['held_out_cells']:,} cells): "
        f"{'kept' if record['kept'] else 'not kept'}. Embedding and labels are those of the model without them.\n"
    )
