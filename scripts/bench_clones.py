"""Clones, CAR and order on CARPALL against the authors' own clonotypes, scikit-bio and scirpy.

``python scripts/bench_clones.py --data ../shared/data --out DIR [--model BUNDLE]``

Recovered is a clonotype of the authors (beta chain, or both chains) whose cells are all in one clone of ours, which
holds no cell of another, in the samples that have contigs. Indices are compared on every
sample of the authors' table. The CAR is called without what the cells were sorted for, and then judged by it; mixtures
of CAR-T cells and unsorted cells in known shares say whether intervals hold the truth. With a bundle, whose training
saw the same states, the order of cells is compared with the author's labels. ``DIR`` receives what ``carvae clones``
writes of ``carpall_clonotypes.csv.gz``. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from carvae.clones import run as follow
from carvae.config import PredictConfig
from carvae.data import diversity
from carvae.data.clonotypes import find_clones
from carvae.data.transgene import UNKNOWN, call_car
from carvae.predict import annotate
from carvae.section_patient import ClonesConfig

SKBIO = {
    "shannon": ("shannon", {"base": np.e}),
    "inverse_simpson": ("inv_simpson", {}),
    "gini_simpson": ("simpson", {}),
    "gini": ("gini_index", {"method": "trapezoids"}),
    "chao1": ("chao1", {}),
    "ace": ("ace", {}),
}
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
DRAWS, CELLS = 10, 600
SORTED = "CD3+CAT+"
MEMORY, EFFECTOR = ("CD4 Naive/TCM", "CD8 Naive/TCM"), ("CD4 CTL", "CD8 CTL")


def recovered(author: pd.Series[str], own_N: np.ndarray[Any, Any]) -> float:
    """Share of the author's clonotypes that are exactly one of our clones."""
    table = pd.DataFrame({"author": author.to_numpy(), "own": own_N})
    has = table[table["author"].fillna("") != ""]
    whole = has.groupby("author")["own"].agg(lambda own: own.min() >= 0 and own.nunique() == 1)
    alone = has[has["own"] >= 0].groupby("own")["author"].nunique() == 1
    mixed = set(has.loc[~has["own"].map(alone).fillna(value=True).astype(bool), "author"])
    return float((whole & ~whole.index.isin(mixed)).mean())


def clonotypes(data: Path, query: ad.AnnData) -> dict[str, Any]:
    """Clones of the contigs beside the authors' clonotypes."""
    obs = query.obs
    table = pd.read_csv(data / "carpall_clonotypes.csv.gz", low_memory=False).set_index("CellID")
    pairs = table["clonotype_ab"].reindex(obs.index)
    with_contigs = [path.parent.name for path in data.glob("carpall_10x/*/filtered_contig_annotations.csv")]
    here = obs["sample"].isin(with_contigs).to_numpy()
    arrays = [obs.index.to_numpy(object), obs["sample"].to_numpy(object), obs["patient"].to_numpy(object)]
    found: dict[str, Any] = {}
    for chains in ("beta", "pair"):
        start = time.perf_counter()
        clones = find_clones(data / "carpall_10x", *arrays, ClonesConfig(chains=chains))
        assert clones.report is not None
        print(f"{chains}: {clones.report.sentence()} ({time.perf_counter() - start:.1f} s)")
        found[f"recovered_{chains}"] = recovered(obs["clonotype"].astype(str)[here], clones.code_N[here])
        found[f"clones_{chains}"] = clones.report.n_clones
    # Where the authors know both chains, by both.
    found["recovered_pairs_of_authors"] = recovered(pairs[here].fillna(""), clones.code_N[here])
    return found


def indices(data: Path) -> dict[str, Any]:
    """Greatest relative difference of each index from scikit-bio's and scirpy's over the samples of the table."""
    import scirpy
    from skbio.diversity import alpha

    table = pd.read_csv(data / "carpall_clonotypes.csv.gz", low_memory=False).dropna(subset=["clonotype"])
    worst = dict.fromkeys([*SKBIO, "evenness"], 0.0)
    for _, cells in table.groupby("gex_sample"):
        count = cells["clonotype"].value_counts().to_numpy()
        for name, (theirs, settings) in SKBIO.items():
            try:
                expected = float(getattr(alpha, theirs)(count, **settings))
            except ValueError:
                assert np.isnan(diversity.INDICES[name](count)), "not defined there either"
                continue
            gap = abs(float(diversity.INDICES[name](count)) - expected) / max(1.0, abs(expected))
            worst[name] = max(worst[name], gap)
    adata = ad.AnnData(obs=table.set_index("CellID")[["gex_sample", "clonotype"]].astype(object))
    adata.obsm["airr"] = _no_chains(adata.n_obs)
    theirs = scirpy.tl.alpha_diversity(adata, "gex_sample", target_col="clonotype", inplace=False)[0]
    for sample, cells in table.groupby("gex_sample"):
        count = cells["clonotype"].value_counts().to_numpy()
        worst["evenness"] = max(worst["evenness"], abs(float(diversity.evenness(count)) - theirs[sample]))
    return {"samples": int(table["gex_sample"].nunique()), "index_gap": max(worst.values())}


def _no_chains(n: int) -> Any:
    import awkward

    return awkward.Array([[]] * n)


def tracking(data: Path, out: Path) -> dict[str, Any]:
    """What ``carvae clones`` finds in the table without expression."""
    start = time.perf_counter()
    follow(data / "carpall_clonotypes.csv.gz", out, ClonesConfig())
    seconds = time.perf_counter() - start
    table, lasting = pd.read_csv(out / "tracked.csv"), pd.read_csv(out / "persistence.csv")
    changed = table["state_changed"].eq("yes").sum() / table["state_changed"].isin(["yes", "no"]).sum()
    print(
        table.groupby("patient").agg(clones=("clone", "size"), changed=("state_changed", lambda s: (s == "yes").mean()))
    )
    ratio = lasting["seen_again"].sum() / lasting["expected_seen_again"].sum()
    return {
        "tracked_clones": len(table),
        "tracked_patients": int(table["patient"].nunique()),
        "state_changed": float(changed),
        "seen_again_over_expected": float(ratio),
        "clones_seconds": seconds,
    }


def car(query: ad.AnnData) -> dict[str, Any]:
    """Fraction of CAR+ cells by sample, and in mixtures of known shares."""
    obs = query.obs
    count = obs["CAT_scFv_umi"].to_numpy(np.int64)
    depth = np.asarray(query.X.sum(axis=1)).ravel().astype(np.int64) - count
    code, samples = pd.factorize(obs["sample"])
    everything = (np.ones(len(obs), np.bool_), np.full(len(obs), UNKNOWN), 0.95)
    called = call_car(count, depth, code, len(samples), *everything)
    assert called is not None
    table = called.frame().set_index(pd.Index(samples))
    table["sorted"] = obs.groupby("sample", observed=True)["sort"].first().reindex(samples) == SORTED
    table["cells"] = np.bincount(code)
    print(table.round(3).to_string())
    large = table[table["cells"] >= 100]
    rng, held, gaps = np.random.default_rng(0), 0, []
    carriers, others = (np.flatnonzero(obs["is_CART"]), np.flatnonzero(obs["sort"] != SORTED))
    for share in SHARES:
        for _ in range(DRAWS):
            n = int(CELLS * share)
            rows = np.append(rng.choice(carriers, n, replace=False), rng.choice(others, CELLS - n, replace=False))
            unknown = (np.ones(CELLS, np.bool_), np.full(CELLS, UNKNOWN), 0.95)
            mixed = call_car(count[rows], depth[rows], np.zeros(CELLS, np.int64), 1, *unknown)
            assert mixed is not None
            held += bool(mixed.low_B[0] <= share <= mixed.high_B[0])
            gaps.append([abs(mixed.fraction_B[0] - share), abs(mixed.detected_B[0] - share)])
    by_kind = large.groupby("sorted")[["car_detected", "car_fraction"]].mean()
    return {
        "sorted_detected": float(by_kind.loc[True, "car_detected"]),
        "sorted_car_fraction": float(by_kind.loc[True, "car_fraction"]),
        "unsorted_car_fraction": float(by_kind.loc[False, "car_fraction"]),
        "mixtures_covered": held / (len(SHARES) * DRAWS),
        "mixtures_error": float(np.mean(gaps, axis=0)[0]),
        "mixtures_error_of_detection": float(np.mean(gaps, axis=0)[1]),
    }


def order(query: ad.AnnData, model: Path) -> dict[str, Any]:
    """How well the order from the memory-like end parts the author's memory from effector cells."""
    from sklearn.metrics import roc_auc_score

    found = annotate(query, model, PredictConfig(root="auto"))
    place = found.obs["carvae_pseudotime"]
    print(place.groupby(query.obs["cell_type"], observed=True).describe()[["count", "50%"]].sort_values("50%"))
    known = found.obs["cell_type"].isin([*MEMORY, *EFFECTOR]) & place.notna()
    effector = found.obs.loc[known, "cell_type"].isin(EFFECTOR)
    return {"order_auroc_memory_effector": float(roc_auc_score(effector, place[known]))}


def main() -> None:
    """Measure, print, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the files")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--model", type=Path, help="bundle for the order of cells")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    query = ad.read_h5ad(given.data / "carpall_cart.h5ad")
    figures = clonotypes(given.data, query) | indices(given.data) | tracking(given.data, given.out) | car(query)
    if given.model is not None:
        figures |= order(query, given.model)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
