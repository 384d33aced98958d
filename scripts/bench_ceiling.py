"""How much a classifier with advantages that carvae does not have loses in shallow cells and without genes.

``python scripts/bench_ceiling.py [--data ../shared/data/carpall_cart.h5ad] [--genes 2000] [--draws 3]``

`carvae evaluate` asks how much of macro-F1 is kept where held-out patients' cells are shallow or lack genes, and how
much surer labels are more often right. A logistic regression is asked the same here with three advantages: it has seen
other cells of the same patients (five folds over cells), it is trained at the very depth, and over the very genes, that
it is tested at, and its regularisation is the best for the answer. What it loses even so is a mark to hold carvae's
losses against, and no bound: its macro-F1 is higher throughout, since it knows the patients, and another classifier or
panel may keep more. These are no results of carvae, and nothing is fitted to them. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from bench_data import CARPALL, carpall, most_variable
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from carvae.evaluation.cells import WHOLE, Point, thinned

POINTS = (WHOLE, Point("umi", 1000), Point("umi", 500), Point("missing", 0.2), Point("missing", 0.5))
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Inverse regularisation."""
SUREST = 0.8
LINEAGE = ("CD4", "CD8A", "CD8B", "TRDC", "TRGC1", "TRGC2")
"""Genes that the authors' labels are named by; in the panel at all events."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the classifier reaches at one point."""

    macro_f1: float
    accuracy: float
    gain_of_surest: float


def features(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Log of counts per thousand."""
    total_N = np.maximum(np.asarray(counts.sum(axis=1), np.float64).ravel(), 1)
    scaled = (sp.diags_array(1e3 / total_N) @ counts).tocsr()
    return scaled.log1p()


def asked(value: sp.csr_matrix, truth_N: NDArray[np.str_], strength: float) -> Figures:
    """Five folds over cells, pooled."""
    leaves, truth = np.unique(truth_N, return_inverse=True)
    probability = np.zeros((len(truth), len(leaves)))
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(value, truth):
        model = LogisticRegression(C=strength, max_iter=300, class_weight="balanced")
        probability[test] = model.fit(value[train], truth[train]).predict_proba(value[test])
    right_N = probability.argmax(1) == truth
    surest = np.argsort(-probability.max(1), kind="stable")[: int(SUREST * len(truth))]
    f1, accuracy = f1_score(truth, probability.argmax(1), average="macro"), right_N.mean()
    return Figures(float(f1), float(accuracy), float(right_N[surest].mean() - accuracy))


def at_point(adata: ad.AnnData, genes: NDArray[np.intp], point: Point) -> Figures:
    """The best of all strengths by macro-F1."""
    counts, rng = adata.X.tocsr(), point.rng()
    if point.kind == "umi":  # of all genes' counts, as carvae evaluate has it
        counts = thinned(counts, point, rng)
    if point.kind == "missing":
        genes = rng.permutation(genes)[: round((1 - point.value) * genes.size)]
    value, truth_N = features(counts[:, genes]), adata.obs["cell_type"].astype(str).to_numpy()
    return max((asked(value, truth_N, strength) for strength in STRENGTHS), key=lambda figures: figures.macro_f1)


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CARPALL)
    parser.add_argument("--genes", type=int, default=2000, help="most variable genes, beside those of the lineages")
    parser.add_argument("--draws", type=int, default=3, help="draws of molecules or genes per point")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    adata = carpall(given.data)
    adata = adata[adata.obs["cell_type"].astype(str) != "Unlabelled"].copy()
    panel = {*most_variable(adata.copy(), given.genes).var_names, *LINEAGE} & set(adata.var_names)
    genes = np.flatnonzero(adata.var_names.isin(panel))
    print(f"{adata.n_obs} labelled cells, {genes.size} genes", flush=True)
    results: dict[str, dict[str, float]] = {}
    for point in POINTS:
        draws = [replace(point, draw=d) for d in range(given.draws if point != WHOLE else 1)]
        found = [at_point(adata, genes, draw) for draw in draws]
        row = {name: float(np.mean([getattr(figures, name) for figures in found])) for name in Figures.__slots__}
        row["kept"] = row["macro_f1"] / results.get(WHOLE.name, row)["macro_f1"]
        results[point.name] = row
        print(
            f"{point.name}: macro-F1 {row['macro_f1']:.3f} ({row['kept']:.0%} kept), accuracy {row['accuracy']:.3f}, "
            f"of the surest {SUREST:.0%} {100 * row['gain_of_surest']:+.1f} points",
            flush=True,
        )
    print(json.dumps({"data": str(given.data), "cells": adata.n_obs, "draws": given.draws, "points": results}))


if __name__ == "__main__":
    main()
