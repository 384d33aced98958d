"""Does carvae know what it does not know? States held out in turn, and cells that are no T cells.

``python scripts/bench_novelty.py --data carpall_cart.h5ad --foreign pbmc_sorted_multibatch.h5ad --out DIR``

Three groups of patients are held out in turn. In each, every author state with at least five held-out cells is taken
from the training patients, cells and labels, and a network is trained without it: are the held-out patients' cells of
that state stranger than their other labelled cells? (AUROC, the mean over groups weighs them by cells.) Simple scores
of peers are computed on the same training cells. The panel of genes is chosen once, over all cells without labels.
A network with all states then meets B cells, monocytes, NK and T cells of another laboratory; its threshold is learned
on the other groups' held-out patients. The peers of `carvae evaluate` (``--peers`` names them) meet the same B cells,
monocytes and NK cells, over the genes that both files have, each with its usual score: one minus the greatest
probability, of kNN the distance of neighbours. Figures of each fit are kept in ``DIR``; a second call computes what is
absent.
The last line is one line of JSON. Axes: N cells, T scores, G genes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from carvae.config import Config
from carvae.data.genes import GeneTable, align
from carvae.data.split import PatientSplit, patient_folds
from carvae.data.store import CellStore
from carvae.evaluation.baselines import logistic
from carvae.evaluation.cells import WHOLE, Cells
from carvae.evaluation.folds import Fold, checked
from carvae.evaluation.runs import ALL
from carvae.evaluation.task import Task
from carvae.ingest import run as ingest
from carvae.model.bundle import leaf_parts
from carvae.model.cohort import LABEL, Cohort, labels_of
from carvae.model.network import Network
from carvae.model.novelty import VIEWS, observe, views
from carvae.model.trainer import quiet_lightning
from carvae.model.trust import Trust
from carvae.model.witness import Witness, learn, reference_of, witness
from carvae.train import fit

MIN_CELLS = 5
"""Held-out cells of a state that a group needs for it to be tried there."""
PEERS = ("logreg_maxprob", "logreg_entropy", "pca_knn_distance")
METHODS = ("logistic", "knn", "celltypist", "scanvi")
T_STATES = ("CD4", "CD8", "Treg")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for."""

    config: Config
    foreign: Path
    out: Path
    peers: tuple[str, ...]


def author_labels(cohort: Cohort) -> NDArray[np.str_]:
    """Label of each cell, empty where its author gave none."""
    label = cohort.obs[LABEL].astype("string").fillna("").to_numpy(dtype=str)
    return np.where(cohort.labelled_N, label, "")


def without(cohort: Cohort, state: str, config: Config) -> tuple[Cohort, NDArray[np.bool_]]:
    """The cohort with a state's labels gone from the tree, and which cells bore them."""
    label = cohort.obs[LABEL].astype("string").fillna("")
    bore = (label == state).to_numpy(dtype=bool)
    obs = cohort.obs.assign(**{LABEL: label.mask(pd.Series(bore, index=label.index), "")})
    return dataclasses.replace(cohort, obs=obs, cohort_labels=labels_of(obs, config)), bore


def peer_scores(
    train: sp.csr_matrix, label_N: NDArray[np.str_], query: sp.csr_matrix
) -> dict[str, NDArray[np.floating]]:
    """Strangeness by the usual means: logistic regression on genes, and neighbours in 50 principal components."""
    x, q = (np.log1p(m.multiply(1e4 / np.maximum(m.sum(1), 1)).toarray()).astype(np.float32) for m in (train, query))
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-3)
    x, q = (np.clip((m - mean) / scale, -10, 10) for m in (x, q))
    p = logistic(0.01, None).fit(x, label_N).predict_proba(q)
    pca = PCA(50, svd_solver="randomized", random_state=0).fit(x)
    far, _ = NearestNeighbors(n_neighbors=15).fit(pca.transform(x)).kneighbors(pca.transform(q))
    return dict(zip(PEERS, (1 - p.max(1), -(p * np.log(p + 1e-12)).sum(1), far.mean(1)), strict=True))


def state_held_out(cohort: Cohort, fold: PatientSplit, state: str, settings: Settings, path: Path) -> None:
    """Train without a state, and keep the views of the held-out labelled cells and the peers' scores."""
    start, config = time.perf_counter(), settings.config
    poorer, bore = without(cohort, state, config)
    rows = fold.train[~bore[fold.train]]
    network = fit(poorer, PatientSplit(rows, rows[:0], ()), config, settings.out / "fit").network
    label = author_labels(cohort)
    query, taught = fold.validation[label[fold.validation] != ""], rows[label[rows] != ""]
    counts = cohort.store.counts(query)
    present = np.ones(counts.shape[1], np.bool_)
    reference = reference_of(network, poorer, rows, config.ingest.identity_genes)
    found = views(observe(network, counts, present), reference, counts, present)
    peers = peer_scores(cohort.store.counts(taught), label[taught], counts)
    table = pd.DataFrame(found, columns=list(VIEWS)).assign(**peers, counts=counts.sum(1), new=label[query] == state)
    table.to_csv(path.with_suffix(".partial"), index=False)
    path.with_suffix(".partial").replace(path)
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def network_of(cohort: Cohort, fold: PatientSplit, config: Config, place: Path) -> Network:
    """The network of a group of patients, trained once: ``place`` keeps its weights."""
    if not place.exists():
        found = fit(cohort, PatientSplit(fold.train, fold.train[:0], ()), config, place.parent / "fit").network
        torch.save(found.state_dict(), place)
    parts = leaf_parts(cohort.tree, config.model)
    network = Network(len(cohort.store.header.genes), cohort.n_categories, parts, config.model)
    network.load_state_dict(torch.load(place, weights_only=True))
    return network.eval()


def with_all_states(cohort: Cohort, fold: PatientSplit, settings: Settings, place: Path) -> tuple[Network, Witness]:
    """The network of a group with all states, and what its held-out patients show."""
    network, rng = network_of(cohort, fold, settings.config, place), np.random.default_rng((settings.config.seed, 4))
    return network, witness(network, cohort, fold, settings.config.ingest.identity_genes, rng)


def auroc(known: NDArray[np.floating], strange: NDArray[np.floating]) -> float:
    """Of strange cells against known ones."""
    return float(roc_auc_score(np.repeat([0, 1], [known.size, strange.size]), np.append(known, strange)))


def aurocs(tables: list[pd.DataFrame], trust: list[Trust]) -> dict[str, dict[str, float]]:
    """Score -> state -> AUROC, the mean over groups weighed by the held-out state's cells."""
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for table in tables:
        known = trust[int(table["group"].iloc[0])]
        bins = known.bins.of(table["counts"].to_numpy(float), 1.0)
        scores = table[[*VIEWS, *PEERS]].assign(carvae=known.scale.novelty(table[list(VIEWS)].to_numpy(), bins))
        for name in scores:
            own = float(roc_auc_score(table["new"], scores[name]))
            found.setdefault(str(name), {}).setdefault(table["state"].iloc[0], []).append((own, table["new"].sum()))
    return {
        name: {state: round(sum(a * n for a, n in runs) / sum(n for _, n in runs), 3) for state, runs in states.items()}
        for name, states in found.items()
    }


def foreign_cells(path: Path, genes: tuple[str, ...]) -> tuple[sp.csr_matrix, NDArray[np.bool_], NDArray[np.str_]]:
    """Counts over the panel, which genes were measured, and the kind of each labelled cell."""
    adata = ad.read_h5ad(path)
    kind = adata.obs["cell_type"].astype(str).to_numpy(dtype=str)
    alignment = align(GeneTable.default().resolve(tuple(adata.var_names), None), genes)
    counts = alignment.apply(sp.csr_matrix(adata.X))
    labelled = kind != "Unlabelled"
    return counts[labelled], np.asarray(alignment.present), kind[labelled]


def foreign(
    network: Network, trust: Trust, seen: Witness, settings: Settings, genes: tuple[str, ...]
) -> dict[str, Any]:
    """How B cells, monocytes and NK cells are told from T cells, and how many are called one."""
    counts, present, kind = foreign_cells(settings.foreign, genes)
    is_t = np.array([name.startswith(T_STATES) for name in kind])
    judged = trust.judge(network, counts, present)
    own = seen.cells.take(np.flatnonzero(seen.cells.known_N & seen.cells.whole_N))
    held = trust.scale.novelty(own.view_NT, trust.bins.of(own.counts_N, own.overlap_N))
    unknown = trust.unknown(judged)
    kinds = {name: round(float(1 - unknown[kind == name].mean()), 3) for name in np.unique(kind[~is_t])}
    return {
        "auroc_against_held_out_car_t": round(auroc(held, judged.novelty_N[~is_t]), 3),
        "auroc_against_their_t_cells": round(auroc(judged.novelty_N[is_t], judged.novelty_N[~is_t]), 3),
        "called_a_t_state": round(float(1 - unknown[~is_t].mean()), 3),
        "called_a_t_state_by_kind": kinds,
        "their_t_cells_unknown": round(float(unknown[is_t].mean()), 3),
        "held_out_car_t_unknown": round(float((held > 1 - trust.unknown_rate).mean()), 3),
        "gene_overlap": round(float(present.mean()), 3),
    }


def with_foreign(settings: Settings) -> tuple[Cells, NDArray[np.bool_]]:
    """The cells of the config and the foreign ones, of which no label is read; and which are no T cells."""
    plain = settings.config.model_dump(mode="json")
    plain["ingest"]["studies"]["foreign"] = {
        "path": str(settings.foreign),
        "obs": {"sample": "batch", "patient": "patient"},
    }
    cells = Cells.read(Config.parse(plain))
    kind = ad.read_h5ad(settings.foreign, backed="r").obs["cell_type"].astype(str)
    is_strange = np.zeros(len(cells.obs), np.bool_)
    is_foreign = (cells.obs["study"] == "foreign").to_numpy(dtype=bool)
    is_strange[is_foreign] = ~kind.str.startswith(
        (*T_STATES, "Unlabelled")
    ).to_numpy()  # fails where a cell is left out
    return cells, is_strange


def peers_on_foreign(
    cells: Cells, is_strange: NDArray[np.bool_], held_out: set[str], group: int, settings: Settings
) -> dict[str, float]:
    """Peer -> AUROC of foreign cells that are no T cells against labelled cells of the patients held out."""
    is_foreign = (cells.obs["study"] == "foreign").to_numpy(dtype=bool)
    is_held_out = np.isin(cells.patient_N.astype(str), list(held_out))
    asked = np.flatnonzero(is_strange | (is_held_out & (cells.truth_N >= 0)))
    fold = Fold("foreign", str(group), np.flatnonzero(~is_foreign & ~is_held_out), asked)
    folder = settings.out / f"foreign{group}"
    task = Task(cells, checked(fold, cells), settings.config, settings.config.seed, folder, cells.fingerprint)
    found = {}
    for name in settings.peers:
        place = folder / f"{name}.npy"
        if not place.exists():
            folder.mkdir(exist_ok=True)
            with quiet_lightning():
                np.save(place, ALL[name](task).says(asked, WHOLE).novelty_N)
        novelty_N = np.load(place)
        found[name] = round(auroc(novelty_N[~is_strange[asked]], novelty_N[is_strange[asked]]), 3)
    return found


def run(settings: Settings) -> dict[str, Any]:
    """All fits, then the figures."""
    settings.out.mkdir(parents=True, exist_ok=True)
    config = settings.config
    cohort = Cohort.assemble(CellStore(ingest(config)), config)
    folds = patient_folds(cohort.obs["patient"], cohort.labelled_N, 3)
    seen = [with_all_states(cohort, fold, settings, settings.out / f"{g}.pt") for g, fold in enumerate(folds)]
    trust = []
    for g, (network, _) in enumerate(seen):
        reference = reference_of(network, cohort, folds[g].train, config.ingest.identity_genes)
        taught = learn([w for other, (_, w) in enumerate(seen) if other != g], reference, config.train.unknown_rate)
        assert taught is not None
        trust.append(taught)
    tables, label = [], author_labels(cohort)
    for g, fold in enumerate(folds):
        names, sizes = np.unique(label[fold.validation], return_counts=True)
        for state in names[(sizes >= MIN_CELLS) & (names != "")]:
            path = settings.out / f"{g}_{state.replace('/', '-').replace(' ', '_')}.csv"
            if not path.exists():
                state_held_out(cohort, fold, str(state), settings, path)
            tables.append(pd.read_csv(path).assign(state=state, group=g))
    scores = aurocs(tables, trust)
    genes, patient_N = cohort.store.header.genes, cohort.obs["patient"].astype(str)
    peers = []
    if settings.peers:
        both = with_foreign(settings)
        held_out = [set(patient_N.iloc[fold.validation]) for fold in folds]
        peers = [peers_on_foreign(*both, patients, g, settings) for g, patients in enumerate(held_out)]
    return {
        "states": scores,
        "mean": {name: round(float(np.mean(list(states.values()))), 3) for name, states in scores.items()},
        "foreign": [
            foreign(network, known, w, settings, genes) for known, (network, w) in zip(trust, seen, strict=True)
        ],
        "foreign_auroc_of_peers": peers,
    }


def settings_of(doc: str | None, name: str, peers: tuple[str, ...] = ()) -> Settings:
    """What the command line asks of a bench on CARPALL and foreign cells."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/carpall.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    if peers:
        parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    given = parser.parse_args()
    overrides = [f"output={given.out / 'model'}", f"ingest.studies.carpall.path={given.data}", "train.wandb=disabled"]
    return Settings(Config.read(given.config, overrides), given.foreign, given.out, tuple(given.peers) if peers else ())


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    result = run(settings_of(__doc__, "bench_novelty", METHODS))
    print(pd.DataFrame(result["states"]).T.assign(mean=pd.Series(result["mean"])).to_string())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
