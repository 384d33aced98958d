"""What sharing a model without its decoder costs, and whether it still tells whom it was trained on.

``python scripts/bench_share.py --data carpall_cart.h5ad --foreign pbmc_sorted_multibatch.h5ad --out DIR``

Novelty: each CARPALL patient is held out in turn; thresholds are learned on the other patients, and the network then
meets B cells, monocytes, NK and T cells of another laboratory. All views beside those that need no decoder.
Membership: the attack of ``carvae.model.membership`` on the same networks, and on networks of simulated studies with
more patients. The last line is one line of JSON. Axes: N cells, T views.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from bench_novelty import T_STATES, auroc, foreign_cells, network_of, settings_of
from numpy.typing import NDArray

import carvae
from carvae.config import Config
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.data.split import patient_folds
from carvae.data.store import CellStore
from carvae.demo import programmes
from carvae.ingest import run as ingest
from carvae.model.cohort import Cohort
from carvae.model.membership import Faced, face, membership
from carvae.model.network import Network
from carvae.model.novelty import observe, views, without_decoded
from carvae.model.trust import Trust
from carvae.model.witness import Witness, learn, reference_of, witness

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
        return cls(*foreign_cells(path, genes))


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
    asked = settings_of(__doc__, "bench_share")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    result = real(asked.config, asked.foreign, asked.out)
    result["simulated"] = {str(n): simulated(n, cells, asked.out) for n, cells in SIMULATED}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
