"""``carvae check``: what would happen with a query or a config, without doing it; ``--dry-run`` says the same.

A query is opened, its columns, genes, clones and the model are matched as `carvae annotate` would, and some cells are
labelled, from which time and memory are foretold. Of a config the studies are read and their labels mapped as
`carvae train` would. What would be refused is refused here, with the same sentence.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from carvae.config import Config, label_file
from carvae.data.genes import GeneTable
from carvae.data.memory import free_bytes
from carvae.data.readers import CountsSource, open_samples
from carvae.doctor import Finding, report
from carvae.errors import ConfigError, CountsError
from carvae.ingest import Part, open_all
from carvae.labels.axis import RESERVED
from carvae.labels.cohort import CohortLabels, refuse_confounded
from carvae.labels.signatures import Signatures
from carvae.model.about import about_cells
from carvae.model.bundle import Bundle
from carvae.model.bundle_files import check_place
from carvae.model.cell_clones import Asked
from carvae.model.cohort import SOURCE, check_covariates, labels_of
from carvae.model.query_pass import TOLD, Pass
from carvae.model.teaching import teaching_folds, uncalibrated

CELLS_TRIED = 2048
"""Cells that are labelled to foretell time and memory."""
BYTES_PER_CELL = 128
"""Kept of each cell until the end: its sample, totals, print, and what tables of samples are made of."""
SHOWN = 12
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    """The same for programs."""

    def text(self) -> str:
        """For a person, a line per finding."""
        return report(list(self.findings))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not a number is null."""
        found: dict[str, Any] = json.loads(json.dumps(self.facts), parse_constant=lambda _: None)
        return found


def of_query(query: Path, config: Config, bundle: Bundle | None, asked: Asked, *, label: bool = True) -> Checked:
    """What would happen with a query.

    Parameters
    ----------
    bundle
        The model; without one the query alone is looked at.

    Raises
    ------
    CarvaeError
        The query would be refused.
    """
    if bundle is None:
        sources = open_samples(query, counts=config.predict.counts)
        obs, _ = about_cells(sources, config.predict, asked.config, set())
        return _joined(query, _of_cells(sources, obs), _of_genes(sources))
    try:
        return _with_model(query, Pass(query, bundle, config.predict, label=label, whole=False, asked=asked), config)
    except CountsError:  # not where the first cells pointed to: all places are looked through
        return _with_model(query, Pass(query, bundle, config.predict, label=label, whole=True, asked=asked), config)


def of_config(config: Config) -> Checked:
    """What would happen in training.

    Raises
    ------
    CarvaeError
        A study or setting would be refused; the problems of all studies are told at once.
    """
    check_place(config.output)
    parts = open_all(config.ingest)
    obs = pd.concat([part.obs[part.keep] for part in parts], ignore_index=True)
    check_covariates(obs, config)
    studies = []
    for name, study in config.ingest.studies.items():
        own = [part for part in parts if part.study == name]
        cells = pd.concat([part.obs[part.keep] for part in own])
        studies.append(
            {
                "study": name,
                "files": len(own),
                "cells": len(cells),
                "patients": int(cells["patient"].nunique()),
                "samples": int(cells["sample"].nunique()),
                "labelled": int((~cells["label"].isin(["", *study.missing_labels])).sum()),
                "genes": len(set.intersection(*(set(map(str, part.genes.symbols)) for part in own))),
                "counts_in": sorted({part.source.where for part in own}),
            }
        )
    findings = [Finding(f"study {found['study']}", _study_sentence(found)) for found in studies]
    labels_found = _labels(obs, config)
    labels, said = _of_labels(labels_found, config)
    n_folds, lacking = _of_confidence(obs, labels_found, config)
    work, cost = _of_training(parts, labels_found, config, n_folds)
    return Checked((*findings, *said, *lacking, *cost), {"studies": studies, "labels": labels, **work})


def _study_sentence(study: Mapping[str, Any]) -> str:
    labelled = f"{study['labelled']:,} labelled" if study["labelled"] else "no labels"
    return (
        f"{study['cells']:,} cells ({labelled}), {study['patients']} patients, {study['samples']} samples, "
        f"{study['genes']:,} genes; counts in {', '.join(study['counts_in'])}"
    )


def _labels(obs: pd.DataFrame, config: Config) -> CohortLabels | None:
    """The authors' labels on the tree; raises LabelError where they do not fit it, or say no more than the study."""
    by_author = config.model_copy(update={"labels": config.labels.model_copy(update={"weak": False})})
    found = labels_of(obs, by_author)
    if found is not None:
        refuse_confounded(found.labels, obs[SOURCE].astype(str), obs["patient"].astype(str))
    return found


def _of_labels(found: CohortLabels | None, config: Config) -> tuple[dict[str, Any], list[Finding]]:
    """How the authors' labels map onto the tree."""
    weak = "cells of studies without labels are labelled by signatures, and marked weak" if config.labels.weak else ""
    if found is None:
        return {}, [Finding("labels", weak or "none: the model embeds and labels nothing")]
    axes, findings = {}, []
    for axis in found.labels.axes:
        leaf = axis.leaf[axis.code >= 0]
        leaves = found.tree[axis.axis].leaves
        single = {name: int((leaf == i).sum()) for i, name in enumerate(leaves)}
        axes[axis.axis] = {"cells": single, "of_several_states": int((leaf < 0).sum())}
        said = ", ".join(f"{name} {n:,}" for name, n in single.items())
        coarse = f"; {int((leaf < 0).sum()):,} cells of coarser labels" if (leaf < 0).any() else ""
        findings.append(Finding(f"labels, {axis.axis}", f"{said}{coarse}"))
    return axes, [*findings, *([Finding("labels, weak", weak)] if weak else [])]


def _of_confidence(obs: pd.DataFrame, found: CohortLabels | None, config: Config) -> tuple[int, list[Finding]]:
    """Networks that are trained to learn how sure labels are, and what they cannot learn."""
    n_folds = config.train.calibration_folds
    if found is None or not n_folds or config.labels.weak:  # which cells bear weak labels is not known yet
        return n_folds, []
    folds = teaching_folds(obs, found.labels, n_folds)
    lacking = uncalibrated(found.labels, folds)
    return len(folds), [Finding("confidence", *lacking.rsplit("; ", 1))] if lacking else []


def _of_training(
    parts: Sequence[Part], labels: CohortLabels | None, config: Config, n_folds: int
) -> tuple[dict[str, Any], list[Finding]]:
    """Device, memory, work and time."""
    settings = config.train
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.accelerator is cuda, but torch finds no CUDA device here; set train.accelerator=auto")
    device = torch.device("cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    n_cells = sum(int(part.keep.sum()) for part in parts)
    reading, counts = _reading([part.source for part in parts], n_cells)
    batches = math.ceil(n_cells / settings.batch_size)
    epochs = max(settings.max_epochs, math.ceil(settings.min_steps / batches))
    networks = 1 + n_folds + settings.refit
    from carvae.forecast import Work, labelled, paced  # it trains, which a look at a query need not load

    work = Work(n_cells, 0 if labels is None else labelled(labels), epochs, batches, networks)
    pace, why = paced(parts, labels, config)
    free = free_bytes(device)
    facts: dict[str, Any] = {"device": str(device), "counts_bytes": int(counts), "free_bytes": int(free)}
    facts |= {"epochs": epochs, "steps": epochs * batches, "networks": networks, "reading_seconds": round(reading, 1)}
    more = f", for {networks} networks" if networks > 1 else ""
    findings = [
        Finding("device", f"{device}, {free / GIGABYTE:.1f} GB free"),
        Finding("memory", f"counts take at most {counts / GIGABYTE:.2f} GB where they are resident (train.data)"),
        Finding(
            "training",
            f"about {epochs} epochs of {batches:,} minibatches{more} (more and shorter ones where cells are held out)",
        ),
    ]
    if pace is None:
        return facts, [*findings, Finding("time", f"not foretold, {why}; progress tells it")]
    seconds = reading + pace.of(work, settings.batch_size)
    facts |= {"seconds": round(seconds, 1), "step_seconds": round(pace.step, 4)}
    told = f"({_duration(reading)} of it to read the studies), as some steps foretell"
    return facts, [*findings, Finding("time", f"at most about {_duration(seconds)} {told}")]


def _reading(sources: Sequence[CountsSource], n_cells: int) -> tuple[float, float]:
    """Seconds of the two passes that make the store, and bytes of the counts at most."""
    begun, n_read, entries = time.perf_counter(), 0, 0
    for source in sources:
        block = next(source.chunks(CELLS_TRIED))
        n_read, entries = n_read + block.shape[0], entries + block.nnz
    return 2 * (time.perf_counter() - begun) / n_read * n_cells, 4 * entries / n_read * n_cells


def _with_model(query: Path, work: Pass, config: Config) -> Checked:
    cells = _of_cells(work.sources, work.about)
    return _joined(query, cells, _of_model(work, config), _tried(work))


def _joined(query: Path, *parts: tuple[dict[str, Any], list[Finding]]) -> Checked:
    facts: dict[str, Any] = {"query": str(query)}
    for part, _ in parts:
        facts |= part
    return Checked(tuple(finding for _, findings in parts for finding in findings), facts)


def _of_cells(sources: Sequence[CountsSource], obs: pd.DataFrame) -> tuple[dict[str, Any], list[Finding]]:
    """Where the counts are, and whose cells they are."""
    samples = {str(name): int(n) for name, n in obs["sample"].astype(str).value_counts(sort=False).sort_index().items()}
    sizes = [f"{name} ({n:,})" for name, n in list(samples.items())[:SHOWN]]
    facts: dict[str, Any] = {
        "cells": sum(source.n_cells for source in sources),
        "sources": [
            {"name": s.name, "cells": s.n_cells, "genes": len(s.genes), "counts_in": s.where, "notes": list(s.notes)}
            for s in sources
        ],
        "samples": samples,
    }
    where = sorted({source.where for source in sources})
    findings = [
        Finding("cells", f"{facts['cells']:,} in {len(sources)} file{'s' * (len(sources) > 1)}"),
        Finding("counts", f"in {', '.join(where)}"),
        *(Finding("note", f"{source.name}: {note}") for source in sources for note in source.notes),
        Finding("samples", f"{len(samples)}: {', '.join(sizes)}{' ...' if len(samples) > SHOWN else ''}"),
    ]
    for column in TOLD[1:]:
        if column in obs and obs[column].notna().any():
            values = sorted(obs[column].dropna().astype(str).unique())
            facts[f"{column}s"] = values
            findings.append(
                Finding(f"{column}s", f"{len(values)}: {', '.join(values[:SHOWN])}{' ...' * (len(values) > SHOWN)}")
            )
    if "patients" not in facts:
        findings.append(Finding("patients", "not named", "predict.sheet=TABLE says who the patient of each sample is"))
    return facts, findings


def _of_genes(sources: Sequence[CountsSource]) -> tuple[dict[str, Any], list[Finding]]:
    """Genes that have a name in the human table; without a model there is nothing else to match."""
    known = []
    for source in sources:
        resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
        known.append(int(np.isin(resolved.symbols.astype(str), list(GeneTable.default().symbols)).sum()))
    least = int(np.argmin(known))
    n = len(sources[least].genes)
    text = f"{known[least]:,} of {n:,} are human genes that are known by name or Ensembl id"
    return {"genes": {"known": known[least], "all": n}}, [
        Finding("genes", text, "" if 2 * known[least] > n else "look at var_names, or var['gene_ids']")
    ]


def _of_model(work: Pass, config: Config) -> tuple[dict[str, Any], list[Finding]]:
    """How the genes meet the model, and what can be told with them."""
    receipt, bundle = work.worst, work.bundle
    worst = min(work.labellers, key=lambda labeller: labeller.alignment.receipt.overlap)
    markers = [gene for panel in Signatures.read(label_file(config.explain.markers)).items for gene in panel.genes]
    absent = [gene for gene in dict.fromkeys(markers) if gene not in set(worst.symbols)]
    car = sorted({str(s.genes[at]) for s, own in zip(work.sources, work.labellers, strict=True) for at in own.car})
    facts = {
        "bundle_id": bundle.bundle_id,
        "states": {axis: list(names) for axis, names in work.states.items()},
        "genes": receipt.to_dict(),
        "markers_missing": absent,
        "signatures_unscored": worst.unscored,
        "car_features": car,
        "clones": work.late is not None and work.late.clones is not None,
    }
    low = receipt.overlap < config.predict.warn_overlap
    findings = [
        Finding("model", f"{bundle.bundle_id or 'not saved'}, {len(bundle.genes):,} genes"),
        Finding("genes", receipt.sentence(), "labels are less sure than the model card says" if low else ""),
    ]
    if absent:
        findings.append(Finding("markers", f"{len(absent)} are missing: {', '.join(absent)}"))
    if not work.label:
        return facts, findings
    for axis, names in work.states.items():
        findings.append(Finding(f"states, {axis}", ", ".join(names)))
    if worst.unscored:
        findings.append(Finding("signatures", f"too few genes to score {', '.join(worst.unscored)}"))
    findings.append(Finding("CAR", f"told from {', '.join(car)}" if car else "no feature of it is known"))
    findings.append(Finding("clones", "known" if facts["clones"] else "not known"))
    return facts, findings


def _tried(work: Pass) -> tuple[dict[str, Any], list[Finding]]:
    """Label some cells twice, the second time by the clock: the first time kernels are compiled."""
    source, labeller = work.sources[0], work.labellers[0]
    some = slice(0, min(CELLS_TRIED, source.n_cells))
    labeller(next(source.blocks(CELLS_TRIED, some)))
    begun = time.perf_counter()
    labelled = labeller(next(source.blocks(CELLS_TRIED, some)))
    n_tried, n_cells = len(labelled.total_N), sum(s.n_cells for s in work.sources)
    seconds = (time.perf_counter() - begun) / n_tried * n_cells
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage tells bytes there and KiB here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + BYTES_PER_CELL * n_cells
    device = next(work.bundle.network.parameters()).device
    free = free_bytes(torch.device("cpu"))
    facts: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}
    facts |= {"memory_bytes": int(peak), "free_bytes": int(free), "tried": n_tried}
    findings = [
        Finding("device", f"{device}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"),
        Finding("memory", f"about {peak / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB are free"),
        Finding("time", f"about {_duration(seconds)}, as the first {n_tried:,} cells foretell"),
    ]
    if work.label:
        state = labelled.results.obs[f"carvae_{work.bundle.axes[0]}"]
        facts["unknown_of_tried"] = float((state == RESERVED).mean())
        findings.append(Finding("unknown", f"{facts['unknown_of_tried']:.0%} of those cells would be"))
    return facts, findings


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(1, math.ceil(seconds))} s"
