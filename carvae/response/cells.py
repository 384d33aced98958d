"""From the cells of samples to what a prediction of outcomes reads: bags of cells, and a table of samples.

Axes: N cells, G genes of the model, K latent, S leaves, R samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import Config, PredictConfig
from carvae.data.patients import Bag, Patients, check_patients, patients_of
from carvae.data.readers import CountsSource, open_samples
from carvae.data.schema import NAMES, harmonise
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.model.bundle import Bundle, load
from carvae.model.cohort import Cohort
from carvae.model.network import Network, Prediction
from carvae.model.query import Samples, order_within, read
from carvae.model.responder import FRACTION
from carvae.response.heads import EXPRESSION, LATENT
from carvae.section_respond import RespondConfig

log = logging.getLogger(__name__)

MAX_CELLS = 500
"""Cells taken of each sample, drawn at random."""
PSEUDOBULK, SIGNATURE = "pseudobulk ", "mean score_"


@dataclass(frozen=True, slots=True)
class Model:
    """What is needed of a model to describe samples."""

    network: Network
    genes: tuple[str, ...]
    tree: LabelTree
    signatures: Signatures

    @property
    def leaves(self) -> list[str]:
        """Leaves of all axes, in the order of the columns of a bag that follow the latent ones."""
        return [leaf for axis in self.tree.axes for leaf in axis.leaves]


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """Samples as they are read: a row of the table and a bag for each."""

    table: pd.DataFrame
    """``sample``, cells, depth, composition over all axes, and mean expression of signatures."""
    bags: Mapping[str, tuple[Bag, ...]]


def describe(
    model: Model,
    panel: sp.csr_matrix,
    code_N: NDArray[np.intp],
    samples: Sequence[str],
    said: Prediction,
    *,
    expression: bool = False,
) -> Described:
    """Bags and features of samples from counts over the model's genes [N, G].

    Parameters
    ----------
    said
        What the network says of these cells.
    expression
        Also the mean of every gene, and a bag of the genes of signatures, as baselines read them: log1p of counts per
        ten thousand.
    """
    probability_NS = np.hstack([said.probability_NS[axis.name] for axis in model.tree.axes])
    cell = np.hstack([said.latent_NK, probability_NS]).astype(np.float32)
    total_N = np.asarray(panel.sum(axis=1)).ravel()
    log_NG = panel.astype(np.float32).multiply((1e4 / np.maximum(total_N, 1))[:, None]).tocsr()
    log_NG.data = np.log1p(log_NG.data)
    place = {gene: g for g, gene in enumerate(model.genes)}
    known = {s.name: [place[gene] for gene in s.genes if gene in place] for s in model.signatures.items}
    shown = sorted({g for genes in known.values() for g in genes})
    rows, bags, expressed = [], [], []
    for r, name in enumerate(samples):
        own = np.flatnonzero(code_N == r)
        mean_G = np.asarray(log_NG[own].mean(axis=0)).ravel() if own.size else np.full(len(model.genes), np.nan)
        row: dict[str, Any] = {"sample": name, "n_cells": own.size}
        row["median_counts"] = float(np.median(total_N[own])) if own.size else np.nan
        row |= _composition(model, said.probability_NS, own)
        row |= {f"{SIGNATURE}{name}": float(mean_G[genes].mean()) for name, genes in known.items() if genes}
        if expression:
            row |= {f"{PSEUDOBULK}{gene}": float(v) for gene, v in zip(model.genes, mean_G, strict=True)}
            expressed.append(log_NG[own][:, shown].toarray().astype(np.float32))
        rows.append(row)
        bags.append(cell[own])
    found = {LATENT: tuple(bags)} | ({EXPRESSION: tuple(expressed)} if expression and shown else {})
    return Described(pd.DataFrame(rows), found)


def _composition(
    model: Model, probability_NS: Mapping[str, NDArray[np.float32]], own: NDArray[np.intp]
) -> dict[str, float]:
    """Share of the cells that each state is likeliest in, on every axis."""
    found: dict[str, float] = {}
    for axis in model.tree.axes:
        n_S = np.bincount(probability_NS[axis.name][own].argmax(1), minlength=len(axis.leaves))
        found |= {f"{FRACTION}{leaf}": float(n / max(1, own.size)) for leaf, n in zip(axis.leaves, n_S, strict=True)}
    return found


def with_outcomes(described: Described, obs: pd.DataFrame, config: RespondConfig) -> Patients:
    """Patients from described samples, with what the cells' ``obs`` (one row per sample) or a clinical table tells.

    Raises
    ------
    SchemaError
        No outcome is there, or a patient has several; or two patients share cells.
    """
    kept = described.table[described.table["n_cells"] > 0]
    columns = ["sample", *(c for c in obs if c not in kept)]
    patients = patients_of(kept.merge(obs.reset_index()[columns], on="sample", how="left"), config)
    place = {name: r for r, name in enumerate(described.table["sample"])}
    rows = [place[name] for name in patients.sample_R]
    bags = {space: tuple(own[r] for r in rows) for space, own in described.bags.items()}
    patients = replace(patients, bags=bags)
    check_patients(patients)
    return patients


def of_samples(obs: pd.DataFrame) -> pd.DataFrame:
    """One row per sample of what its cells' ``obs`` says of all of them; empty where they differ."""
    columns = [name for name in NAMES if name in obs and name not in {"sample", "clone_id", "clone_size"}]
    by_sample = obs[columns].astype(object).groupby(obs["sample"].astype(str).rename("sample"), sort=True)
    return by_sample.agg(_one)


def _one(values: pd.Series[Any]) -> object:
    return values.dropna().iloc[0] if values.nunique(dropna=True) == 1 else np.nan


def patients_of_cohort(network: Network, cohort: Cohort, config: Config, signatures: Signatures) -> Patients:
    """The patients that a model was trained on."""
    assert cohort.tree is not None
    rng = np.random.default_rng((config.seed, 41))
    names, code_N = np.unique(cohort.obs["sample"].astype(str), return_inverse=True)
    taken = np.flatnonzero(order_within(code_N, rng) < MAX_CELLS)
    model = Model(network, cohort.store.header.genes, cohort.tree, signatures)
    counts = cohort.store.counts(taken)
    said = network.predict_studies(counts, cohort.store.measured, cohort.study_N[taken])
    described = describe(model, counts, code_N[taken], [str(name) for name in names], said)
    return with_outcomes(described, of_samples(cohort.obs), config.respond)


def patients_of_studies(config: Config) -> Patients:
    """The patients of ``ingest.studies``, described by the model that ``respond.model`` names."""
    assert config.respond.model is not None
    bundle = load(config.respond.model)
    tables, bags, obs = [], [], []
    for name, study in config.ingest.studies.items():
        sources = open_samples(study.path, counts=study.counts)
        found = [harmonise(s.obs, name, study.obs, study.constants).assign(study=name) for s in sources]
        own = pd.concat(found, ignore_index=True)
        own["sample"] = own["sample"].astype(str)
        part = described_query(bundle, sources, own["sample"].to_numpy(str), config.predict, config.seed, True)
        tables.append(part.table)
        bags.append(part.bags)
        obs.append(of_samples(own))
    whole = {space: tuple(bag for part in bags for bag in part[space]) for space in bags[0]}
    return with_outcomes(Described(pd.concat(tables, ignore_index=True), whole), pd.concat(obs), config.respond)


def described_query(
    bundle: Bundle,
    sources: Sequence[CountsSource],
    sample_N: NDArray[np.str_],
    predict: PredictConfig,
    seed: int,
    expression: bool = False,
) -> Described:
    """Samples of a query, described by a model; cells with too few counts are left out."""
    assert bundle.tree is not None
    names, code_N = np.unique(sample_N, return_inverse=True)
    taken_N = order_within(code_N, np.random.default_rng((seed, 42))) < MAX_CELLS
    query = read(sources, bundle, predict, Samples(code_N, tuple(map(str, names))), taken_N)
    enough = np.asarray(query.panel.sum(axis=1)).ravel() >= predict.min_counts
    if not enough.all():
        log.info("%s of %s cells have too few counts and are left out", f"{(~enough).sum():,}", f"{enough.size:,}")
    model = Model(bundle.network, bundle.genes, bundle.tree, bundle.signatures)
    panel, code = query.panel[enough], query.sample_N[enough]
    said = bundle.network.predict(panel, present_G=query.present_G)
    return describe(model, panel, code, query.samples, said, expression=expression)
