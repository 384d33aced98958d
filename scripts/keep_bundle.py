"""Keep a small model of this version for ever: python scripts/keep_bundle.py writes tests/bundles/VERSION-layoutN.

Run once for each released version, and for each new layout of bundles before it. ``tests/test_kept_bundles.py`` opens
every one of them with the carvae of its day, whole (``model``) and as ``carvae export --share`` wrote it (``shared``),
and compares the answers on the query beside them with those of the version that wrote it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import carvae
from carvae.config import Config, PredictConfig
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.demo import programmes
from carvae.export import run as export
from carvae.model.bundle import Bundle
from carvae.model.bundle_files import FORMAT

KEPT = Path(__file__).resolve().parents[1] / "tests" / "bundles"
LABELLED = "sim_lymphoma"
N_PATIENTS, N_HELD_OUT, N_QUERY = 8, 2, 60
N_OTHER_GENES = 150
"""Genes of the query beside the model's."""


def settings(folder: Path, held_out: list[str]) -> Config:
    """A model with everything that a bundle can hold but outcomes, small enough to be kept."""
    columns = {
        "sim_lymphoma": {"patient": "donor_id", "sample": "sample_id"},
        "sim_leukaemia": {"patient": "patient", "sample": "orig.ident"},
        "sim_paediatric": {"patient": "PatientID", "sample": "Sample"},
    }
    labels = {LABELLED: {"label": "cell_type", "mapping": "demo_lymphoma"}}
    studies = {
        name: {"path": str(folder / f"{name}.h5ad"), "obs": obs} | labels.get(name, {}) for name, obs in columns.items()
    }
    return Config.parse(
        {
            "output": str(folder / "model"),
            "ingest": {"n_top_genes": 250, "studies": studies, "exclude_patients": held_out},
            "labels": {"tree": "tree"},
            "model": {"n_latent": 10, "n_hidden": 32},
            "train": {
                "wandb": "disabled", "accelerator": "cpu", "min_steps": 400, "calibration_folds": 3,
                "gene_dropout": 0.6, "label_weight": 2, "refit": True,
            },
        }
    )  # fmt: skip


def query_of(study: ad.AnnData, genes: frozenset[str]) -> ad.AnnData:
    """Some cells of patients that were not trained on: the model's genes, and some others."""
    from carvae.data.genes import GeneTable

    symbols = GeneTable.default().resolve(list(study.var_names), None).symbols
    inside = np.array([symbol in genes for symbol in symbols])
    keep = np.sort(np.append(np.flatnonzero(inside), np.flatnonzero(~inside)[:N_OTHER_GENES]))
    cells = np.linspace(0, study.n_obs - 1, N_QUERY).astype(int)
    part = study[cells, keep]
    obs = part.obs[["donor_id", "sample_id", "true_state"]].astype(str).astype(object)
    return ad.AnnData(sp.csr_matrix(part.X).astype(np.int32), obs=obs, var=part.var[[]])


def answers(query: ad.AnnData, bundle: Bundle) -> pd.DataFrame:
    """What a model says of each cell, and the start of its embedding."""
    result = carvae.annotate(query, bundle, PredictConfig(coverage=0.9))
    found = result.obs[[c for c in result.obs if c.startswith("carvae_")]].copy()
    for k in range(3):
        found[f"X_carvae_{k + 1}"] = result.obsm["X_carvae"][:, k]
    return found


def main() -> None:
    """Simulate, train, share, and write both models, query and answers."""
    target = KEPT / f"{carvae.__version__}-layout{FORMAT}"
    if target.exists():
        sys.exit(f"{target} exists; what a released version wrote is never written again")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        designs = tuple(
            replace(design, n_patients=N_PATIENTS) if design.name == LABELLED else design for design in STUDIES
        )
        studies = simulate_studies(np.random.default_rng(1), programmes(), SimulationSettings(designs, n_cells=600))
        write_studies(studies, folder)
        labelled = next(study for study in studies if study.uns["title"] == LABELLED)
        held_out = sorted(labelled.obs["donor_id"].astype(str).unique())[-N_HELD_OUT:]
        whole = carvae.train(settings(folder, held_out))
        models = {"model": whole, "shared": export(whole, folder / "shared", share=True)}
        asked = labelled[labelled.obs["donor_id"].astype(str).isin(held_out)]
        query = query_of(asked, frozenset(carvae.load(whole).genes))
        said = {name: answers(query, carvae.load(path)) for name, path in models.items()}
        target.mkdir(parents=True)
        for name, path in models.items():
            shutil.copytree(path, target / name)
            said[name].to_csv(target / f"{name}.csv", index_label="cell")
        with ad.settings.override(allow_write_nullable_strings=False):
            query.write_h5ad(target / "query.h5ad", compression="gzip")
    for name, table in said.items():
        right = (table["carvae_state"].astype(str) == query.obs["true_state"]).mean()
        print(f"{target / name}: {right:.0%} of {N_QUERY} cells right")


if __name__ == "__main__":
    main()
