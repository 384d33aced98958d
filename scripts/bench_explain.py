"""Are the genes that `carvae explain` names the known ones? Markers among the first genes of each held-out state.

``python scripts/bench_explain.py --data carpall_cart.h5ad --models DIR --out DIR``

``DIR/PATIENT/carvae`` is a bundle trained without that patient, as `bench_labels.py` writes it. Its calls on the
patient's cells are explained; a state's known genes are those of the packaged groups of markers that its name asks for
(`GROUPS`) and that the model has. They count where they speak by their presence. Beside it Wilcoxon's rank sum test
(scanpy, genes that are higher) of the same cells grouped by the same calls, and what genes drawn at random would give.
The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from carvae.config import ExplainConfig, PredictConfig, label_file
from carvae.explain import run
from carvae.labels.signatures import Signatures
from carvae.model.bundle import load
from carvae.predict import annotate

GROUPS = {"CTL": "effector", "TEM": "effector memory", "TCM": "naive and memory", "Proliferating": "cycling"}
"""Word of a state's name -> group of markers; CD4 and CD8 are genes themselves."""
LINEAGE = {"CD4": ("CD4",), "CD8": ("CD8A", "CD8B")}
FIRST = 50
"""Genes of a state that are looked at."""
MIN_CELLS = 10
"""Cells of a state in a patient below which it is not looked at."""


def known(state: str, panel: set[str]) -> set[str]:
    """The markers of a state that the model has."""
    groups = {item.name: item.genes for item in Signatures.read(label_file("markers")).items}
    words = state.replace("/", " ").split()
    genes = [gene for word in words for gene in (*groups.get(GROUPS.get(word, ""), ()), *LINEAGE.get(word, ()))]
    return set(genes) & panel


def wilcoxon(adata: ad.AnnData, panel: set[str], counts: dict[str, int]) -> dict[str, list[str]]:
    """The first genes of each state by the rank sum test."""
    cells = adata[adata.obs["carvae_state"].isin(counts), [g for g in adata.var_names if g in panel]].copy()
    cells.obs["carvae_state"] = cells.obs["carvae_state"].cat.remove_unused_categories()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.tl.rank_genes_groups(cells, "carvae_state", groups=list(counts), method="wilcoxon", n_genes=FIRST)
    names = cells.uns["rank_genes_groups"]["names"]
    return {state: list(names[state]) for state in counts}


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    adata, rows = ad.read_h5ad(given.data), []
    for patient in sorted(adata.obs["patient"].unique()):
        bundle_path, query = given.models / patient / "carvae", given.out / f"{patient}.h5ad"
        cells = adata[adata.obs["patient"] == patient].copy()
        cells.write_h5ad(query)
        start = time.perf_counter()
        config = ExplainConfig(max_cells=10**6, n_genes=FIRST, label="cell_type")
        run(query, bundle_path, given.out / patient, config, PredictConfig())
        seconds = time.perf_counter() - start
        table, panel = pd.read_csv(given.out / patient / "genes.csv"), set(load(bundle_path).genes)
        n_cells = table.groupby("state")["n_cells"].first()
        counts = {s: int(n) for s, n in n_cells.items() if n >= MIN_CELLS and known(str(s), panel)}
        tested = wilcoxon(annotate(cells, bundle_path), panel, counts)
        for state, n in counts.items():
            wanted, found = (
                known(state, panel),
                set(table.loc[(table["state"] == state) & (table["speaks_by"] == "presence"), "gene"]),
            )
            rows.append(
                {"patient": patient, "state": state, "n_cells": n, "known": len(wanted), "seconds": seconds}
                | {"explain": len(wanted & found) / len(wanted), "random": FIRST / len(panel)}
                | {"wilcoxon": len(wanted & set(tested[state])) / len(wanted)}
                | {"found": " ".join(sorted(wanted & found)), "not_found": " ".join(sorted(wanted - found))}
            )
    result = pd.DataFrame(rows)
    result.to_csv(given.out / "known.csv", index=False)
    print(result.drop(columns=["seconds", "not_found"]).round(2).to_string(index=False))
    means = result[["explain", "wilcoxon", "random"]].mean().round(3).to_dict()
    seconds = result.groupby("patient")["seconds"].first()
    print(json.dumps({"share_of_known_markers_in_first_50": means, "seconds": round(float(np.median(seconds)), 1)}))


if __name__ == "__main__":
    main()
