"""Many studies to one store: read, check, match genes, choose the panel, write.

Two passes over the input, each a chunk of cells at a time: the first checks every count and draws cells for the
choice of genes, the second writes. Cells are never all in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae import __version__
from carvae.config import Config, IngestConfig, StudyConfig, label_file
from carvae.data.atomic import alone, clear, replacing_file, replacing_folder
from carvae.data.genes import GeneTable, ResolvedGenes, align, mouse_genes_beside_human
from carvae.data.panel import Panel, choose_panel
from carvae.data.readers import CountsSource, open_samples
from carvae.data.schema import check_studies, inspect_obs
from carvae.data.store import FORMAT, CellStore, StoreHeader, StoreWriter
from carvae.errors import CarvaeError, ConfigError, GeneError, ReadError, SchemaError, join_problems
from carvae.labels.signatures import Signatures, score
from carvae.model.cohort import LABEL, SCORE, SOURCE

log = logging.getLogger(__name__)

POOR_OVERLAP = 0.6
"""A study that measures less of the panel is named."""
DRAFTED = 64
"""Cells of every file at least in a store to try training with."""


@dataclass(slots=True)
class Part:
    """One opened file of a study, its cells' contract columns, and which of them stay."""

    study: str
    source: CountsSource
    genes: ResolvedGenes
    obs: pd.DataFrame
    keep: NDArray[np.bool_]
    n_shallow: int = 0


def work_folder(output: Path) -> Path:
    """Folder beside a bundle for what never leaves with it: the store, checkpoints, logs, the resolved config."""
    return output.with_name(f"{output.name}.work")


def store_path(output: Path) -> Path:
    """Store of all cells that the bundle ``output`` is trained on."""
    return work_folder(output) / "store.zarr"


def run(config: Config) -> Path:
    """Return the path of the store of ``config``, built only when inputs or settings changed.

    Raises
    ------
    CarvaeError
        A study cannot be read or does not meet the contract; nothing is written then.
    """
    work, store = work_folder(config.output), store_path(config.output)
    fingerprint = _fingerprint(config)
    with alone(config.output):
        if store.exists() and _is_current(store, fingerprint):
            log.info("store is up to date: %s", store)
            clear(store)  # of a run that died when the store was there, but not yet what goes with it
        else:
            _build(store, fingerprint, config)
        with replacing_file(work / "receipt.json") as scratch:
            scratch.write_text(json.dumps(CellStore(store).header.receipt, indent=1), encoding="utf-8")
        with replacing_file(work / "config.yaml") as scratch:
            scratch.write_text(config.to_yaml(), encoding="utf-8")
    return store


def _build(store: Path, fingerprint: str, config: Config) -> None:
    """Read everything, choose the panel, and put a complete store in place."""
    parts = open_all(config.ingest)
    signatures = Signatures.read(label_file(config.labels.signatures))
    universe = np.array(sorted({str(s) for part in parts for s in part.genes.symbols}), dtype=object)
    drawn, batch = _first_pass(parts, universe, config)
    studies = tuple(config.ingest.studies)
    measured = _measured(parts, studies, universe)
    panel = choose_panel(drawn, batch, universe, measured, signatures.genes, config.ingest)
    log.info("panel: %d genes (%d variable, %d of signatures)", len(panel.genes), panel.n_variable, panel.n_signature)
    measured = measured[:, np.isin(universe, panel.genes)]
    _warn_of_genes(panel, measured, config.ingest)
    header = StoreHeader(fingerprint, panel.genes, studies, _receipt(parts, panel))
    with replacing_folder(store) as scratch:
        writer = StoreWriter(scratch, header, measured)
        for part in parts:
            _write_part(writer, part, panel, signatures if config.labels.weak else None, config.ingest.chunk_size)
        writer.close()


def _warn_of_genes(panel: Panel, measured: NDArray[np.bool_], config: IngestConfig) -> None:
    """Say which identity genes are not in the panel, and which studies (rows of ``measured``) lack much of it."""
    if lost := sorted(set(config.identity_genes).difference(panel.genes)):
        log.warning(
            "ingest.identity_genes: %s not in the panel; give HGNC symbols of genes that a study measured and "
            "ingest.exclude_genes leaves in, else no cell looks strange for want of them",
            f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'}",
        )
    share = measured.mean(axis=1)
    if poor := [f"{name} {own:.0%}" for name, own in zip(config.studies, share, strict=True) if own < POOR_OVERLAP]:
        log.warning(
            "of the %d genes of the panel %d are measured by all studies (%s): what a study lacks is expected from "
            "others; check that all files name genes alike, or raise ingest.min_study_share",
            len(panel.genes),
            int(measured.all(axis=0).sum()),
            ", ".join(poor),
        )


def draft(parts: Sequence[Part], config: Config, n_cells: int, store: Path) -> NDArray[np.int64]:
    """Write a small store of the first cells of every file, to try training with; the panel is chosen from them.

    Returns
    -------
    NDArray
        Number of each of its cells among all that are kept, part after part.
    """
    universe = np.array(sorted({str(s) for part in parts for s in part.genes.symbols}), dtype=object)
    studies, each = tuple(config.ingest.studies), max(DRAFTED, n_cells // len(parts))
    drawn, obs, rows, first = [], [], [], 0
    for part in parts:
        counts, cells = _first_cells(part, each)
        drawn.append((counts @ _columns(part.genes.symbols, universe)).tocsr())
        obs.append(part.obs.iloc[cells].reset_index(drop=True))
        rows.append(first + np.searchsorted(np.flatnonzero(part.keep), cells))
        first += int(part.keep.sum())
    measured = _measured(parts, studies, universe)
    signatures = Signatures.read(label_file(config.labels.signatures))
    together = sp.vstack(drawn).tocsr()
    batch = np.full(together.shape[0], "all", dtype=object)
    panel = choose_panel(together, batch, universe, measured, signatures.genes, config.ingest)
    chosen = np.isin(universe, panel.genes)
    writer = StoreWriter(store, StoreHeader("draft", panel.genes, studies, {}), measured[:, chosen])
    for part_counts, part_obs in zip(drawn, obs, strict=True):
        writer.append(part_counts[:, chosen].tocsr().astype(np.int64), part_obs)
    writer.close()
    return np.concatenate(rows)


def _first_cells(part: Part, n_cells: int) -> tuple[sp.csr_matrix, NDArray[np.int64]]:
    """Counts and numbers of the first cells of a file that stay."""
    found, start = [], 0
    for chunk in part.source.chunks(n_cells):
        own = np.flatnonzero(part.keep[start : start + chunk.shape[0]])
        found.append((chunk[own], start + own))
        start += chunk.shape[0]
        if sum(len(cells) for _, cells in found) >= n_cells:
            break
    counts, cells = sp.vstack([c for c, _ in found]).tocsr(), np.concatenate([n for _, n in found])
    return counts[:n_cells], cells[:n_cells]


def _is_current(store: Path, fingerprint: str) -> bool:
    try:
        return CellStore(store).header.fingerprint == fingerprint
    except ReadError:
        return False  # half a store or an older layout: built again


def _fingerprint(config: Config) -> str:
    """Hash of the settings and of every input file's path, size and time of change."""
    files = []
    for name, study in config.ingest.studies.items():
        if not study.path.exists():
            raise ReadError(f"study {name!r}: {study.path} does not exist; correct ingest.studies.{name}.path")
        inside = sorted(study.path.rglob("*")) if study.path.is_dir() else [study.path]
        files += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in inside if p.is_file()]
    signatures = label_file(config.labels.signatures).read_text(encoding="utf-8")
    # what is read from the studies; how their labels map onto the tree is decided when training
    ingest = config.ingest.model_dump(mode="json")
    for study in ingest["studies"].values():
        study.pop("mapping"), study.pop("missing_labels")
    settings = [__version__, FORMAT, ingest, config.labels.weak, signatures, config.seed, files]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_all(config: IngestConfig) -> list[Part]:
    """Every file of every study, opened and harmonised; the problems of all studies are raised at once."""
    if not config.studies:
        raise ConfigError("ingest.studies is empty; name at least one study, as in configs/reference.yaml")
    sources: dict[str, list[tuple[CountsSource, ResolvedGenes]]] = {}
    problems: list[CarvaeError] = []
    for name, study in config.studies.items():
        log.info("checking study %s: %s", name, study.path)
        try:
            sources[name] = [(source, _genes(source)) for source in open_samples(study.path, counts=study.counts)]
        except CarvaeError as error:
            problems.append(type(error)(f"study {name!r}: {error}"))
    _raise_all("studies cannot be read", problems)
    raw = {name: pd.concat([source.obs for source, _ in opened]) for name, opened in sources.items()}
    harmonised = [inspect_obs(raw[name], name, study.obs, study.constants) for name, study in config.studies.items()]
    check_studies(harmonised)
    parts: list[Part] = []
    for found in harmonised:
        for note in found.notes:
            log.info("%s", note)
        try:
            label = _label(raw[found.study], found.study, config.studies[found.study])
            obs = found.obs.copy()
            obs[LABEL], obs[SOURCE] = label, found.study
            parts += _parts(found.study, sources[found.study], obs)
        except SchemaError as error:
            problems.append(error)
    _raise_all("labels cannot be read", problems)
    return _without(config.exclude_patients, parts)


def _raise_all(head: str, problems: Sequence[CarvaeError]) -> None:
    """Raise one error for the problems of all studies, of their own kind where they are of one; nothing for none."""
    if problems:
        kinds = {type(problem) for problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else CarvaeError
        sentences = [str(problem) for problem in problems]
        raise kind(sentences[0] if len(sentences) == 1 else join_problems(head, sentences))


def _genes(source: CountsSource) -> ResolvedGenes:
    """The genes of a file; raises GeneError where they are no human genes."""
    table = GeneTable.default()
    resolved = table.resolve(source.genes, source.gene_ids)
    if n_mouse := mouse_genes_beside_human(resolved):
        raise GeneError(
            f"{source.name} holds {n_mouse:,} mouse genes beside its human ones; keep the human genes, and the cells "
            "that have counts in them"
        )
    try:
        align(resolved, sorted(table.symbols))
    except GeneError as error:
        cause = str(error).split(": ", 1)[-1]  # before it stands the overlap with all human genes, which says little
        raise GeneError(f"the genes of {source.name} cannot be matched: {cause}") from None
    return resolved


def _label(obs: pd.DataFrame, name: str, study: StudyConfig) -> NDArray[np.object_]:
    """Author's label of each cell, empty where missing."""
    if study.label is None:
        return np.full(len(obs), "", dtype=object)
    if study.label not in obs:
        raise SchemaError(
            f"study {name!r}: obs has no column {study.label!r}, which ingest.studies.{name}.label names; "
            f"it has {', '.join(map(str, obs.columns))}"
        )
    return obs[study.label].astype("string").fillna("").to_numpy(dtype=object)


def _parts(name: str, sources: Sequence[tuple[CountsSource, ResolvedGenes]], obs: pd.DataFrame) -> Iterator[Part]:
    start = 0
    for source, genes in sources:
        own = obs.iloc[start : start + source.n_cells].copy()
        start += source.n_cells
        yield Part(name, source, genes, own, np.ones(source.n_cells, np.bool_))


def _without(patients: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """The parts with the cells of some patients left out."""
    everyone = {str(p) for part in parts for p in part.obs["patient"].unique()}
    if unknown := sorted(set(patients) - everyone):
        raise ConfigError(
            f"ingest.exclude_patients names {', '.join(map(repr, unknown))}, who are in no study; "
            f"there are {', '.join(sorted(everyone)[:20])}"
        )
    for part in parts:
        part.keep = ~part.obs["patient"].astype(str).isin(patients).to_numpy()
    kept = [part for part in parts if part.keep.any()]
    if not kept:
        raise ConfigError("ingest.exclude_patients leaves no patient; keep at least one")
    return kept


def _first_pass(
    parts: Sequence[Part], universe: NDArray[np.object_], config: Config
) -> tuple[sp.csr_matrix, NDArray[np.object_]]:
    """Check every count, total each cell, drop what is too shallow, and draw cells for the choice of genes."""
    rng = np.random.default_rng((config.seed, 1))
    n_studies = len({part.study for part in parts})
    drawn, batch = [], []
    for part in parts:
        log.info("reading %s", part.source.name)
        study_size = sum(int(p.keep.sum()) for p in parts if p.study == part.study)
        chance = config.ingest.hvg_cells / n_studies / study_size
        spread = _columns(part.genes.symbols, universe)
        names = _batch(part, config.ingest)
        totals, start = [], 0
        for chunk in part.source.chunks(config.ingest.chunk_size):
            totals.append(np.asarray(chunk.sum(axis=1), dtype=np.float64).ravel())
            deep = totals[-1] >= config.ingest.min_counts
            part.keep[start : start + chunk.shape[0]] &= deep
            picked = part.keep[start : start + chunk.shape[0]] & (rng.random(chunk.shape[0]) < chance)
            drawn.append((chunk[picked] @ spread).tocsr())
            batch.append(names[start : start + chunk.shape[0]][picked])
            start += chunk.shape[0]
        part.obs["n_counts"] = np.concatenate(totals)
        part.n_shallow = int((part.obs["n_counts"] < config.ingest.min_counts).sum())
    return sp.vstack(drawn).tocsr(), np.concatenate(batch)


def _batch(part: Part, config: IngestConfig) -> NDArray[np.object_]:
    """Batch of each cell of a file, for the choice of genes."""
    if config.hvg_batch == "none":
        return np.full(len(part.obs), "all", dtype=object)
    return part.obs[config.hvg_batch].astype(str).to_numpy(object)


def _columns(symbols: NDArray[np.object_], target: NDArray[np.object_]) -> sp.csr_matrix:
    """Matrix [len(symbols), len(target)] that moves and sums columns; symbols that are not in ``target`` go."""
    position = pd.Index(target).get_indexer(pd.Index(symbols))
    rows = np.flatnonzero(position >= 0)
    ones = np.ones(rows.size, np.int64)
    return sp.csr_matrix((ones, (rows, position[rows])), shape=(len(symbols), len(target)))


def _measured(parts: Sequence[Part], studies: Sequence[str], universe: NDArray[np.object_]) -> NDArray[np.bool_]:
    """Bool [n_studies, universe]: genes that every file of the study holds."""
    measured = np.zeros((len(studies), len(universe)), np.bool_)
    for row, study in enumerate(studies):
        held = [np.isin(universe, part.genes.symbols) for part in parts if part.study == study]
        measured[row] = np.logical_and.reduce(held) if held else False
    return measured


def _write_part(writer: StoreWriter, part: Part, panel: Panel, signatures: Signatures | None, chunk_size: int) -> None:
    spread = _columns(part.genes.symbols, np.array(panel.genes, dtype=object))
    start = 0
    for chunk in part.source.chunks(chunk_size):
        keep = part.keep[start : start + chunk.shape[0]]
        obs = part.obs.iloc[start : start + chunk.shape[0]][keep].reset_index(drop=True)
        start += chunk.shape[0]
        if not keep.any():
            continue
        if signatures is not None:
            scores = score(chunk[keep], [str(s) for s in part.genes.symbols], signatures)
            obs = obs.assign(**{f"{SCORE}{name}": scores[name].to_numpy() for name in scores})
        writer.append((chunk[keep] @ spread).tocsr().astype(np.int64), obs)


def _receipt(parts: Sequence[Part], panel: Panel) -> dict[str, Any]:
    """What came in, per study."""
    studies: dict[str, Any] = {}
    for part in parts:
        genes = align(part.genes, panel.genes).receipt
        kept = int(part.keep.sum())
        log.info(
            "%s: %s cells kept, counts in %s; %s", part.source.name, f"{kept:,}", part.source.where, genes.sentence()
        )
        for note in part.source.notes:
            log.info("%s: %s", part.source.name, note)
        studies.setdefault(part.study, []).append(
            {
                "file": part.source.name,
                "counts_in": part.source.where,
                "cells": kept,
                "cells_left_out": int((~part.keep).sum()),
                "cells_below_min_counts": part.n_shallow,
                "notes": list(part.source.notes),
                "genes": genes.to_dict(),
            }
        )
    chosen = {"variable": panel.n_variable, "signature": panel.n_signature, "excluded": panel.excluded}
    return {"studies": studies, "panel": chosen}
