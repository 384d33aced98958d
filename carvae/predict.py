"""Embed and label new samples with a bundle: no training, no batch names, any number of cells.

Cells stream through in chunks; what is kept per cell is its row of the result, never its counts.

Axes: N cells, K latent, S leaves of one label axis.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from carvae import __version__
from carvae.config import PredictConfig
from carvae.data.genes import GeneReceipt, GeneTable
from carvae.data.readers import CountsSource, open_samples, open_source
from carvae.data.results import CellResults, add_results, check_output, samples_path, write_results
from carvae.data.schema import query_samples
from carvae.errors import BundleError
from carvae.labels.axis import RESERVED, main_first
from carvae.labels.signatures import coverage, score
from carvae.model.bundle import Bundle, load
from carvae.model.network import Prediction
from carvae.model.trust import Judged, sample_verdicts, set_columns

log = logging.getLogger(__name__)

MARKERS = ("LAG3", "PDCD1", "HAVCR2")
"""Exhaustion markers whose detection (one count or more) is reported per sample."""


def annotate(adata: AnnData, model: Bundle | Path | str, config: PredictConfig | None = None) -> AnnData:
    """Return a copy of ``adata`` with states, confidence, novelty, signature scores and the embedding.

    Added are ``obs["carvae_state"]`` (``unknown`` for cells with too few counts, and for those stranger than the model
    allows for), ``obs["carvae_state_best"]`` (the likeliest state of every cell), ``obs["carvae_confidence"]``,
    ``obs["carvae_novelty"]`` (share of held-out training cells that look less strange), with ``predict.coverage``
    ``obs["carvae_set"]`` and ``obs["carvae_state_sure"]``, ``obs["carvae_score_<signature>"]``,
    ``obsm["carvae_probability"]``, ``obsm["X_carvae"]`` and ``uns["carvae"]``; a tree with several axes adds
    ``carvae_<axis>`` and the like for the others.

    Raises
    ------
    CarvaeError
        The counts are no raw counts, too few of the model's genes are there, or the model has no labels.
    """
    return _in_memory(adata, model, config, label=True)


def embed(adata: AnnData, model: Bundle | Path | str, config: PredictConfig | None = None) -> AnnData:
    """Return a copy of ``adata`` with ``obsm["X_carvae"]`` and ``uns["carvae"]``; raises as `annotate`."""
    return _in_memory(adata, model, config, label=False)


def run(query: Path, model: Path, out: Path, config: PredictConfig, *, label: bool) -> Path:
    """Embed (and with ``label`` annotate) a file or folder, and write ``out``; returns its path.

    Parameters
    ----------
    query
        .h5ad, zarr, 10x .h5, 10x mtx folder, or a folder of those.
    out
        ``.h5ad`` or ``.zarr`` for an AnnData, ``.csv`` or ``.csv.gz`` for a table of cells. With ``label`` a table of
        samples, ``<out>.samples.csv``, is written beside it.

    Raises
    ------
    CarvaeError
        The query or the model cannot be used; nothing is written then.
    """
    check_output(query, out)
    bundle = load(model)
    sources = open_samples(query, counts=config.counts)
    results, samples = _results(sources, bundle, config, label=label)
    write_results(query, sources, results, out, samples)
    log.info("wrote %s%s", out, "" if samples is None else f" and {samples_path(out)}")
    return out


def _in_memory(adata: AnnData, model: Bundle | Path | str, config: PredictConfig | None, *, label: bool) -> AnnData:
    bundle = model if isinstance(model, Bundle) else load(model)
    config = config or PredictConfig()
    results, _ = _results([open_source(adata, counts=config.counts)], bundle, config, label=label)
    result = adata.to_memory() if adata.isbacked else adata.copy()
    add_results(result, results)
    return result


def _results(
    sources: Sequence[CountsSource], bundle: Bundle, config: PredictConfig, *, label: bool
) -> tuple[CellResults, pd.DataFrame | None]:
    """What is said of every cell of every source, and the table of samples where cells are labelled."""
    if label and bundle.tree is None:
        raise BundleError("this model was trained without labels; use `carvae embed`, or train with labels")
    if label and config.coverage is not None and bundle.trust is None:
        raise BundleError(
            "predict.coverage asks for sets of states, and this model was trained without patients held out to learn "
            "them on; leave it out, or train with train.calibration_folds"
        )
    parts = [_Stream(source, bundle, config, label=label).run() for source in sources]
    receipts = [part.receipt for part in parts]
    worst = min(receipts, key=lambda receipt: receipt.overlap)
    log.info("genes: %s", worst.sentence())
    if worst.overlap < config.warn_overlap:
        log.warning("%s", _missing_gene_warning(worst, bundle))
    cells = pd.concat([part.cells for part in parts])
    sample = np.concatenate([part.sample for part in parts])
    states = {axis.name: axis.leaves for axis in bundle.tree.axes} if label and bundle.tree else {}
    obs = cells.drop(columns=_marker_columns(), errors="ignore")
    results = CellResults(
        obs=obs,
        sample=sample,
        latent=np.concatenate([part.latent for part in parts]),
        probability={
            "carvae_probability" if axis == bundle.axes[0] else f"carvae_{axis}_probability": np.concatenate(
                [part.probability[axis] for part in parts]
            )
            for axis in states
        },
        uns=_provenance(bundle, config, worst, states) | _counts_from(sources),
    )
    if not label:
        return results, None
    results.uns["columns"] = np.array(list(obs), dtype=object)  # a later run replaces these and no others
    table = _sample_table(cells, sample, states)
    if bundle.trust is None:
        return results, table
    overlap = np.concatenate([np.full(len(part.cells), part.receipt.overlap) for part in parts])
    return results, table.join(sample_verdicts(bundle.trust, results, overlap, config.warn_overlap), on="sample")


@dataclass(slots=True)
class _Part:
    """Results of one source."""

    cells: pd.DataFrame
    sample: NDArray[np.object_]
    latent: NDArray[np.float32]
    probability: dict[str, NDArray[np.float32]]
    receipt: GeneReceipt


class _Stream:
    """One source on its way through the network."""

    def __init__(self, source: CountsSource, bundle: Bundle, config: PredictConfig, *, label: bool) -> None:
        self.source, self.bundle, self.config, self.label = source, bundle, config, label
        self.sample, notes = query_samples(source.obs, source.name, config.sample)
        for note in (*source.notes, *notes):
            log.info("%s: %s", source.name, note)
        resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
        alignment = bundle.align(resolved, config.min_overlap)
        self.matrix, self.present, self.receipt = alignment.matrix, alignment.present, alignment.receipt
        self.symbols = [str(symbol) for symbol in resolved.symbols]
        unscored = [s.signature for s in coverage(self.symbols, bundle.signatures) if not s.scored]
        if label and unscored:
            log.info("%s: too few genes to score %s; those columns are empty", source.name, ", ".join(unscored))
        columns = [np.flatnonzero(resolved.symbols == gene) for gene in MARKERS]
        self.markers = {gene: column for gene, column in zip(MARKERS, columns, strict=True) if column.size}

    def run(self) -> _Part:
        """Read, align, embed and label every chunk."""
        latent, probability, tables = [], [], []
        for chunk in self.source.chunks(self.config.chunk_size):
            panel = (chunk @ self.matrix).tocsr()
            prediction = self._predict(panel)
            latent.append(prediction.latent_NK)
            if self.label:
                probability.append(prediction.probability_NS)
                tables.append(self._table(chunk, panel, prediction))
        cells = pd.concat(tables, ignore_index=True) if self.label else pd.DataFrame(index=range(self.source.n_cells))
        cells.index = self.source.obs.index
        axes = probability[0] if probability else ()
        scored = {a: np.concatenate([p[a] for p in probability]) for a in axes}
        return _Part(cells, self.sample, np.concatenate(latent), scored, self.receipt)

    def _predict(self, panel: sp.csr_matrix) -> Prediction | Judged:
        trust, network = self.bundle.trust, self.bundle.network
        return trust.judge(network, panel, self.present) if trust and self.label else network.predict(panel)

    def _table(self, chunk: sp.csr_matrix, panel: sp.csr_matrix, prediction: Prediction | Judged) -> pd.DataFrame:
        assert self.bundle.tree is not None
        panel_counts = np.asarray(panel.sum(axis=1)).ravel()
        seen = panel_counts >= self.config.min_counts
        main = self.bundle.axes[0]
        table: dict[str, Any] = {}
        known = seen
        if self.bundle.trust is not None and isinstance(prediction, Judged):
            known = seen & ~self.bundle.trust.unknown(prediction)
            table["carvae_novelty"] = np.where(seen, prediction.novelty_N, np.nan).astype(np.float32)
            if self.config.coverage is not None:
                table |= set_columns(self.bundle.trust, self.bundle.tree, prediction, known, self.config.coverage)
        for axis in map(self.bundle.tree.__getitem__, self.bundle.axes):
            probability = prediction.probability_NS[axis.name]
            names = np.array([*axis.leaves, RESERVED])
            code = np.where(known, probability.argmax(1), len(axis.leaves))
            table[f"carvae_{axis.name}"] = pd.Categorical(names[code], categories=names)
            table[f"carvae_{axis.name}_best"] = pd.Categorical(names[probability.argmax(1)], categories=names[:-1])
            confidence = "carvae_confidence" if axis.name == main else f"carvae_{axis.name}_confidence"
            table[confidence] = np.where(seen, probability.max(1), 0.0).astype(np.float32)
        table["carvae_n_counts"] = np.asarray(chunk.sum(axis=1)).ravel()
        table["carvae_n_panel_counts"] = panel_counts
        for gene, columns in self.markers.items():
            table[f"{gene}+"] = np.asarray(chunk[:, columns].sum(axis=1)).ravel() > 0
        scores = score(chunk, self.symbols, self.bundle.signatures)
        return pd.DataFrame(table).assign(
            **{f"carvae_score_{name}": scores[name].to_numpy(np.float32) for name in scores}
        )


def _marker_columns() -> list[str]:
    return [f"{gene}+" for gene in MARKERS]


def _sample_table(cells: pd.DataFrame, sample: NDArray[np.object_], states: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """One row per sample: cells, depth, composition over states, mean signature scores, marker-positive fractions.

    Fractions and means are over the cells used, those that are not ``unknown``.
    """
    main = f"carvae_{main_first(states)[0]}"
    rows = []
    for name, group in cells.groupby(sample, sort=True):
        used = group[group[main] != RESERVED]
        row: dict[str, Any] = {"sample": name, "n_cells": len(group), "n_cells_used": len(used)}
        row["median_counts"] = float(group["carvae_n_counts"].median())
        row["mean_confidence"] = float(used["carvae_confidence"].mean())
        for axis, leaves in states.items():
            row |= {f"fraction {leaf}": float((used[f"carvae_{axis}"] == leaf).mean()) for leaf in leaves}
        row |= {f"fraction {marker}": float(used[marker].mean()) for marker in _marker_columns() if marker in used}
        scores = [c for c in map(str, used) if c.startswith("carvae_score_")]
        row |= {f"mean {c.removeprefix('carvae_')}": float(used[c].mean()) for c in scores}
        rows.append(row)
    shallow = sum(row["n_cells"] - row["n_cells_used"] for row in rows)
    if shallow:
        log.info(
            "%s of %s cells are unknown: too few counts over the model's genes, or unlike what the model knows",
            f"{shallow:,}",
            f"{len(cells):,}",
        )
    return pd.DataFrame(rows)


def _counts_from(sources: Sequence[CountsSource]) -> dict[str, Any]:
    """Which matrix was read, and what was found or assumed on the way."""
    return {
        "counts_in": "; ".join(sorted({source.where for source in sources})),
        "notes": "\n".join(f"{source.name}: {note}" for source in sources for note in source.notes),
    }


def _provenance(
    bundle: Bundle, config: PredictConfig, receipt: GeneReceipt, states: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """``uns["carvae"]``: where every column comes from."""
    return {
        "bundle_id": bundle.bundle_id,
        "carvae_version": __version__,
        "trained_with": bundle.provenance.carvae_version,
        "seed": bundle.provenance.seed,
        "weak_labels": bundle.provenance.weak_labels,
        "settings": config.model_dump_json(),
        "genes": json.dumps(receipt.to_dict()),
        "states": {axis: np.array(names, dtype=object) for axis, names in states.items()},
    }


def _missing_gene_warning(receipt: GeneReceipt, bundle: Bundle) -> str:
    """What the missing genes cost, as measured on held-out patients when the model was trained."""
    missing = 1 - receipt.overlap
    text = f"{missing:.0%} of the model's genes are missing from the query"
    measured = {float(k): v for k, v in bundle.metrics.get("macro_f1_by_missing_genes", {}).items()}
    if not measured:
        return f"{text}; labels will be less sure, by how much was not measured for this model"
    expected = np.interp(missing, sorted(measured), [measured[k] for k in sorted(measured)])
    return (
        f"{text}; on held-out patients macro-F1 was {measured[0.0]:.2f} with all genes and about {expected:.2f} with "
        "this share taken away at random"
    )
