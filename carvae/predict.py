"""Embed and label new samples with a bundle: no training, no batch names, any number of cells.

Cells stream through in chunks, read by a thread, written by another, or labelled by the workers of a Dask cluster;
every file is read once, and what is kept of a cell is some bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData

from carvae.config import PredictConfig
from carvae.data.atomic import replacing_file
from carvae.data.results import (
    CellResults,
    add_results,
    cells_path,
    check_output,
    samples_path,
    writing_results,
)
from carvae.data.spreadsheet import write_table
from carvae.errors import BundleError, ConfigError, CountsError, ReadError
from carvae.model.ahead import Behind
from carvae.model.bundle import Bundle
from carvae.model.card import calibrated
from carvae.model.cell_clones import Asked, check_given
from carvae.model.machine import load_on
from carvae.model.query_pass import Pass
from carvae.model.verdict import IN_RANGE
from carvae.section_patient import ClonesConfig

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Takes the number of cells that are done, and of all cells."""


def annotate(
    adata: AnnData,
    model: Bundle | Path | str,
    config: PredictConfig | None = None,
    *,
    clones: AnnData | Path | str | None = None,
    clones_config: ClonesConfig | None = None,
    seed: int = 0,
) -> AnnData:
    """Return a copy of ``adata`` with states, confidence, novelty, signature scores and the embedding.

    Added are ``obs["carvae_state"]`` (``unknown`` for cells with too few counts, and for those stranger than the model
    allows for), ``obs["carvae_state_best"]`` (the likeliest state of every cell), ``obs["carvae_confidence"]``,
    ``obs["carvae_novelty"]`` (share of held-out training cells that look less strange), with ``predict.coverage``
    ``obs["carvae_set"]`` and ``obs["carvae_state_sure"]``, ``obs["carvae_score_<signature>"]``,
    ``obsm["carvae_probability"]``, ``obsm["X_carvae"]`` and ``uns["carvae"]``; a tree with several axes adds
    ``carvae_<axis>`` and the like for the others. Where there are clones, ``obs["clone_id"]`` (within the patient) and
    ``obs["clone_size"]``; where the CAR is among the features, ``obs["carvae_car_probability"]``; with ``predict.root``
    ``obs["carvae_pseudotime"]``.

    Parameters
    ----------
    clones
        T-cell receptors: 10x contigs, an AIRR table, a folder of those, or an AnnData of scirpy. By default the query's
        own column ``clone_id``, else its ``obsm["airr"]``.
    clones_config
        What makes a clone; `ClonesConfig`.
    seed
        Of the random draws.

    Raises
    ------
    CarvaeError
        The counts are no raw counts, too few of the model's genes are there, the model has no labels, or the receptors
        fit no cell.
    """
    asked = Asked(check_given(clones), clones_config or ClonesConfig(), seed)
    return _in_memory(adata, model, config, label=True, asked=asked)


def embed(adata: AnnData, model: Bundle | Path | str, config: PredictConfig | None = None) -> AnnData:
    """Return a copy of ``adata`` with ``obsm["X_carvae"]`` and ``uns["carvae"]``; raises as `annotate`."""
    return _in_memory(adata, model, config, label=False, asked=Asked())


def run(
    query: Path,
    model: Path,
    out: Path,
    config: PredictConfig,
    *,
    label: bool,
    asked: Asked | None = None,
    progress: Progress | None = None,
) -> Path:
    """Embed (and with ``label`` annotate) a file or folder, and write ``out``; returns its path.

    Parameters
    ----------
    query
        .h5ad, zarr, 10x .h5, 10x mtx folder, or a folder of those.
    out
        ``.h5ad`` or ``.zarr`` for an AnnData, ``.csv`` or ``.csv.gz`` for a table of cells. With ``label`` tables of
        samples, ``<out>.samples.csv``, and of cells, ``<out>.cells.csv.gz``, are written beside it.
    asked
        Where clones are, and what makes one.
    progress
        Is told after every chunk how many cells are done, and how many there are.

    Raises
    ------
    CarvaeError
        The query or the model cannot be used; nothing is written then.
    """
    check_output(query, out)  # a name is looked at before a model is read
    bundle, asked = load_on(model, config), asked or Asked()
    refuse(bundle, query, out, config, label=label)
    try:
        _write(Pass(query, bundle, config, label=label, whole=False, asked=asked), model, out, progress)
    except CountsError:  # not where the first cells pointed to: all places are looked through
        _write(Pass(query, bundle, config, label=label, whole=True, asked=asked), model, out, progress)
    log.info("wrote %s", ", ".join(map(str, written(out, label=label))))
    return out


def written(out: Path, *, label: bool) -> list[Path]:
    """The files of a result, ``out`` itself first."""
    return [path for path in (out, *((cells_path(out), samples_path(out)) if label else ())) if path is not None]


def _in_memory(
    adata: AnnData, model: Bundle | Path | str, config: PredictConfig | None, *, label: bool, asked: Asked
) -> AnnData:
    config = config or PredictConfig()
    if not isinstance(adata, AnnData):
        raise ReadError(
            f"annotate and embed take an AnnData, not a {type(adata).__name__}; read the file (anndata.read_h5ad), or "
            "use the command line, which reads any format"
        )
    bundle = model if isinstance(model, Bundle) else load_on(model, config)
    _refuse_model(bundle, config, label)
    if config.dask is not None:
        raise ConfigError(
            "predict.dask works on files, not on an AnnData in memory; leave it out, or write the AnnData"
        )
    try:
        results, late, uns = _results(Pass(adata, bundle, config, label=label, whole=False, asked=asked))
    except CountsError:
        results, late, uns = _results(Pass(adata, bundle, config, label=label, whole=True, asked=asked))
    result = adata.to_memory() if adata.isbacked else adata.copy()
    add_results(result, results, late, uns)
    return result


def refuse(bundle: Bundle, query: Path, out: Path, config: PredictConfig, *, label: bool) -> None:
    """Raise what `run` would raise before it looks at the query's cells."""
    check_output(query, out)
    _refuse_model(bundle, config, label)


def _refuse_model(bundle: Bundle, config: PredictConfig, label: bool) -> None:
    if label and bundle.tree is None:
        raise BundleError("this model was trained without labels; use `carvae embed`, or train with labels")
    if label and config.coverage is not None and not calibrated(bundle):
        raise BundleError(
            "predict.coverage asks for sets of states, and this model's confidence is not calibrated: no labelled "
            "patients were held out to learn them on; leave it out, or train with train.calibration_folds on labels of "
            "at least two patients"
        )


def _results(work: Pass) -> tuple[CellResults, pd.DataFrame, dict[str, Any]]:
    parts = []
    for part in work.labelled():
        work.add(part)
        parts.append(part.results)
    sources, late = work.confirmed(), work.late_results().obs
    return CellResults.joined(parts), late, work.uns(sources, late)


def _write(work: Pass, model: Path, out: Path, progress: Progress | None) -> None:
    """All results to ``out``, and the table of samples beside it; both appear when both are complete."""
    assert isinstance(work.query, Path)
    n_done = 0
    with ExitStack() as stack:
        table = stack.enter_context(replacing_file(samples_path(out))) if work.label else None
        cells = cells_path(out) if work.label else None
        writer = stack.enter_context(writing_results(work.query, work.sources, work.sample, out, cells))
        dask = work.config.dask
        found = work.labelled() if dask is None else work.labelled_on_dask(dask, model, writer)
        # closed before the writer: no worker of a local cluster is left that writes where an output was given up
        parts = stack.enter_context(closing(found))
        with Behind(writer.append) as write:
            for part in parts:
                work.add(part)
                write(part.results)
                n_done += len(part.total_N)
                if progress is not None:
                    progress(n_done, len(work.sample))
        sources, late = work.confirmed(), work.late_results()
        writer.finish(sources, late.obs, work.uns(sources, late.obs))
        if table is not None and work.table is not None:
            frame = work.table.frame(late.samples).assign(model=work.bundle.bundle_id)
            write_table(frame, table)
            if "verdict" in frame:
                for row in frame[frame["verdict"] != IN_RANGE].itertuples():
                    log.warning("sample %s is %s: %s", row.sample, row.verdict, row.verdict_reason)
