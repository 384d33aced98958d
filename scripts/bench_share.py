"""What sharing a model without its decoder costs, and whether it still tells whom it was trained on.

``python scripts/bench_share.py --data carpall_cart.h5ad --foreign pbmc_sorted_multibatch.h5ad --out DIR``

Novelty: each CARPALL patient is held out in turn; thresholds are learned on the other patients, and the network then
meets B cells, monocytes, NK and T cells of another laboratory. All views beside those that need no decoder.
Membership: the attack of ``carvae.model.membership`` on the same networks, and on networks of simulated studies with
more patients. The last line is one line of JSON. Axes: N cells, T views.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

import carvae
from carvae.config import Config
from carvae.data.genes import GeneTable, align
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.data.split import PatientSplit, patient_folds
from carvae.data.store import CellStore
from carvae.demo import programmes
from carvae.ingest import run as ingest
from carvae.model.bundle import leaf_parts
from carvae.model.cohort import Cohort
from carvae.model.membership import Faced, face, membership
from carvae.model.network import Network
from carvae.model.novelty import observe, views, without_decoded
from carvae.model.trust import Trust
from carvae.model.witness import Witness, learn, reference_of, witness
from carvae.train import fit

T_STATES = ("CD4", "CD8", "Treg")
SIMULATED = ((20, 60), (60, 60))
"""Patients, and cells of each, in the simulated studies."""
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Foreign:
    """Cells of another laboratory, over the panel."""

    counts: sp.csr_matrix
    present_G: NDArray[np.bool_]
    kind_N: NDArray[np.str_]

    @classmethod
    def read(cls, path: Path, genes: tuple[str, ...]) -> Foreign:
        """The labelled cells of a file."""
        adata = ad.read_h5ad(path)
        kind_N = adata.obs["cell_type"].astype(str).to_numpy(dtype=str)
        alignment = align(GeneTable.default().resolve(tuple(adata.var_names), None), genes)
        labelled_N = kind_N != "Unlabelled"
        counts = alignment.apply(sp.csr_matrix(adata.X))[labelled_N]
        return cls(counts, np.asarray(alignment.present), kind_N[labelled_N])


def network_of(cohort: Cohort, fold: PatientSplit, config: Config, place: Path) -> Network:
    """The network of a fold, trained once."""
    if not place.exists():
        found = fit(cohort, PatientSplit(fold.train, fold.train[:0], ()), config, place.parent / "fit").network
        torch.save(found.state_dict(), place)
    parts = leaf_parts(cohort.tree, config.model)
    network = Network(len(cohort.store.header.genes), cohort.n_categories, parts, config.model)
    network.load_state_dict(torch.load(place, weights_only=True))
    return network.eval()


def auroc(known: NDArray[np.floating], strange: NDArray[np.floating]) -> float:
    """Of strange cells against known ones."""
    return float(roc_auc_score(np.repeat([0, 1], [known.size, strange.size]), np.append(known, strange)))


def strangers(trust: Trust, seen: Witness, network: Network, foreign: Foreign) -> dict[str, float]:
    """How one network tells foreign cells from known ones, by the views of ``trust``."""
    found = views(
        observe(network, foreign.counts, foreign.present_G), seen.reference, foreign.counts, foreign.present_G
    )
    bins = trust.bins.of(np.asarray(foreign.counts.sum(1)).ravel(), float(foreign.present_G.mean()))
    strange_N = trust.scale.novelty(found if trust.decodes else without_decoded(found), bins)
    is_t = np.array([name.startswith(T_STATES) for name in foreign.kind_N])
    own = seen.cells.take(np.flatnonzero(seen.cells.known_N))
    view_NT = own.view_NT if trust.decodes else without_decoded(own.view_NT)
    held_N = trust.scale.novelty(view_NT, trust.bins.of(own.counts_N, own.overlap_N))
    most = 1 - trust.unknown_rate
    return {
        "auroc_against_held_out_car_t": auroc(held_N[own.whole_N], strange_N[~is_t]),
        "auroc_against_their_t_cells": auroc(strange_N[is_t], strange_N[~is_t]),
        "called_a_t_state": float((strange_N[~is_t] <= most).mean()),
        "their_t_cells_unknown": float((strange_N[is_t] > most).mean()),
        "held_out_unknown": float((held_N[own.whole_N] > most).mean()),
        "held_out_poorer_unknown": float((held_N[~own.whole_N] > most).mean()),
    }


def real(config: Config, foreign_path: Path, out: Path) -> dict[str, Any]:
    """CARPALL: novelty with and without the decoder, and the attack."""
    cohort = Cohort.assemble(CellStore(ingest(config)), config)
    foreign = Foreign.read(foreign_path, cohort.store.header.genes)
    folds = patient_folds(cohort.obs["patient"], cohort.labelled_N, config.train.calibration_folds)
    networks = [network_of(cohort, fold, config, out / f"net{k}.pt") for k, fold in enumerate(folds)]
    seen: list[Witness] = []
    faced: list[Faced] = []
    for k, (network, fold) in enumerate(zip(networks, folds, strict=True)):
        rng = np.random.default_rng((config.seed, 5, k))
        seen.append(witness(network, cohort, fold, config.ingest.identity_genes, rng))
        faced.append(face(network, cohort, fold, seen[-1].reference, rng))
    rows: dict[str, list[dict[str, float]]] = {"whole": [], "shared": []}
    for k, network in enumerate(networks):
        reference = reference_of(network, cohort, folds[k].train, config.ingest.identity_genes)
        taught = learn([w for j, w in enumerate(seen) if j != k], reference, config.train.unknown_rate)
        assert taught is not None
        for name, trust in (("whole", taught), ("shared", taught.shared())):
            rows[name].append(strangers(trust, seen[k], network, foreign))
    novelty = {
        name: {key: round(float(np.mean([r[key] for r in all_])), 3) for key in all_[0]} for name, all_ in rows.items()
    }
    return {"novelty": novelty, "membership": membership(faced, taught, np.random.default_rng(0))["attacks"]}


def simulated(n_patients: int, n_cells: int, out: Path) -> dict[str, Any]:
    """The attack on a model of one simulated study, as `carvae train` measures it."""
    folder = out / f"simulated{n_patients}"
    folder.mkdir(parents=True, exist_ok=True)
    design = replace(STUDIES[0], n_patients=n_patients, days=(0,))
    settings = SimulationSettings((design,), n_cells=n_patients * n_cells)
    write_studies(simulate_studies(np.random.default_rng(1), programmes(), settings), folder)
    obs = {"patient": "donor_id", "sample": "sample_id"}
    study = {"path": str(folder / f"{design.name}.h5ad"), "obs": obs, "label": "cell_type"}
    config = Config.parse(
        {
            "output": str(folder / "model"),
            "ingest": {"n_top_genes": 1000, "studies": {design.name: study}},
            "train": {"wandb": "disabled", "accelerator": "cpu", "calibration_folds": FOLDS, "refit": True},
        }
    )
    return dict(carvae.load(carvae.train(config)).metrics["membership"]["attacks"])


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/carpall.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_share"))
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    overrides = [f"output={given.out / 'model'}", f"ingest.studies.carpall.path={given.data}", "train.wandb=disabled"]
    result = real(Config.read(given.config, overrides), given.foreign, given.out)
    result["simulated"] = {str(n): simulated(n, cells, given.out) for n, cells in SIMULATED}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
