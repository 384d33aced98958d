"""Small stores, cohorts and bundles, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from carvae.config import Config, ModelConfig
from carvae.data.store import CellStore, StoreHeader, StoreWriter
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.model.bundle import Bundle, Provenance, leaf_parts
from carvae.model.network import Network

GENES = tuple(f"GENE{i}" for i in range(12))
SIGNATURES = Signatures.from_dict(
    {"signatures": [{"name": "memory", "genes": ["CCR7"], "sources": [{"citation": "Doe 2020", "doi": "10.1/x"}]}]}
)


def counts_of(n_cells: int, n_genes: int = len(GENES), seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.4, 3.0, (n_cells, n_genes)))
    dense[:, 0] += 1
    return sp.csr_matrix(dense.astype(np.int64))


def obs_of(patients: dict[str, int], study: str = "s", label: str = "") -> pd.DataFrame:
    """Cells of each patient, one sample each."""
    patient = np.repeat(list(patients), list(patients.values()))
    sample = [f"{p}-d0" for p in patient]
    return pd.DataFrame({"study": study, "source": study, "sample": sample, "patient": patient, "label": label})


def write_store(
    path: Path, counts: sp.csr_matrix, obs: pd.DataFrame, chunk: int = 7, measured: np.ndarray | None = None
) -> CellStore:
    studies = tuple(dict.fromkeys(obs["study"]))
    genes = tuple(f"GENE{i}" for i in range(counts.shape[1]))
    if measured is None:
        measured = np.ones((len(studies), len(genes)), np.bool_)
    writer = StoreWriter(path, StoreHeader("print", genes, studies, {"note": 1}), measured)
    for start in range(0, len(obs), chunk):
        writer.append(counts[start : start + chunk].tocsr(), obs.iloc[start : start + chunk])
    writer.close()
    return CellStore(path)


def config_of(study: str = "s", **sections: Any) -> Config:
    given: dict[str, Any] = {"ingest": {"studies": {study: {"path": "nowhere.h5ad", "label": "label"}}}} | sections
    return Config.parse(given)


def tiny_bundle(
    tree: LabelTree | None, genes: tuple[str, ...] = GENES, n_categories: dict[str, int] | None = None
) -> Bundle:
    config = ModelConfig(n_latent=2, n_hidden=4)
    n_categories = {"sample": 3} if n_categories is None else n_categories
    torch.manual_seed(0)
    return Bundle(
        network=Network(len(genes), n_categories, leaf_parts(tree, config), config).eval(),
        genes=genes,
        tree=tree,
        signatures=SIGNATURES,
        config=config,
        n_categories=n_categories,
        gene_policy=("transgene",),
        provenance=Provenance("0.1", 0, "f" * 64, 30, 3, 1, False, {"torch": "2"}),
        metrics={"epochs": 3},
        card="# card\n",
    )
