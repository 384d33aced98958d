"""What does `carvae map` give, and would refining the embedding by the mapped decoder help? Each patient in turn.

``python scripts/bench_map.py --data carpall_cart.h5ad --models DIR``

``DIR/PATIENT/carvae`` is a bundle trained without that patient, as `bench_labels.py` writes it. Printed are the gain of
the rows on held-out cells, whether labels and embedding are those of before, bit by bit, and what 30
gradient steps on q(z|x) under the mapped decoder would do to labels (accuracy of the head's latent view), to mixing
(share of reference cells among the 30 nearest neighbours of the query's, over what chance gives), and to nearness of
states (labelled neighbours that bear the same label). carvae does not offer that refinement: this is why. The last line
is one line of JSON. Axes: N cells, K latent.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from carvae.data.genes import GeneTable
from carvae.data.readers import open_source
from carvae.data.sparse import CountsCSR
from carvae.map import map_query
from carvae.model.bundle import Bundle, load

MISSING = "Unlabelled"
NEAR, NEAR_LABELLED = 30, 15
STEPS, LEARNING_RATE = 30, 0.05


def panel_of(bundle: Bundle, adata: ad.AnnData) -> sp.csr_matrix:
    """Counts over the model's genes."""
    source = open_source(adata)
    alignment = bundle.align(GeneTable.default().resolve(source.genes, source.gene_ids), 0.4)
    return sp.vstack([alignment.apply(chunk) for chunk in source.chunks()]).tocsr()


def refined(bundle: Bundle, panel: sp.csr_matrix, code_NC: torch.Tensor) -> torch.Tensor:
    """Means of q(z|x) after gradient steps on each cell's ELBO, from where the encoder puts them, [N, K]."""
    vae, cells = bundle.network.vae, CountsCSR.from_scipy(panel)
    with torch.no_grad():
        start = vae.encoder(cells)
    mean_NK = start.mean_NK.clone().requires_grad_(True)
    log_variance_NK = start.variance_NK.log().requires_grad_(True)
    optimizer = torch.optim.Adam([mean_NK, log_variance_NK], lr=LEARNING_RATE)
    noise = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        posterior = type(start)(mean_NK, log_variance_NK.exp())
        loss = vae.elbo(cells, posterior, posterior.sample(noise), code_NC).loss() * cells.n_cells
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mean_NK.detach()


def scores(
    bundle: Bundle, query_NK: torch.Tensor, reference_NK: NDArray[np.float32], truth: tuple[pd.Series, pd.Series]
) -> dict[str, float]:
    """Accuracy of the latent view, mixing with the reference, and nearness of states."""
    axis = bundle.axes[0]
    with torch.inference_mode():
        best_N = bundle.network.head.latent_view(query_NK)[axis].argmax(1).numpy()
    known_N, known_M = (labels.to_numpy() != MISSING for labels in truth)
    own, reference = truth[0].to_numpy(str)[known_N], truth[1].to_numpy(str)[known_M]
    assert bundle.tree is not None
    called = np.array(bundle.tree[axis].leaves)[best_N][known_N]
    all_NK = np.concatenate([query_NK.numpy(), reference_NK])
    near = NearestNeighbors(n_neighbors=NEAR + 1).fit(all_NK).kneighbors(query_NK.numpy(), return_distance=False)[:, 1:]
    labelled_NK = np.concatenate([query_NK.numpy()[known_N], reference_NK[known_M]])
    search = NearestNeighbors(n_neighbors=NEAR_LABELLED + 1).fit(labelled_NK)
    beside = search.kneighbors(labelled_NK[: known_N.sum()], return_distance=False)[:, 1:]
    return {
        "accuracy": float((called == own).mean()),
        "mixing": float((near >= len(query_NK)).mean() / (len(reference_NK) / len(all_NK))),
        "nearness": float((np.concatenate([own, reference])[beside] == own[:, None]).mean()),
    }


def one(adata: ad.AnnData, patient: str, model: Path) -> dict[str, Any]:
    """All figures of one patient."""
    bundle = load(model, device="cpu")
    is_query = (adata.obs["patient"] == patient).to_numpy()
    query, others = adata[is_query].copy(), adata[~is_query].copy()
    mapped = map_query(query, bundle)
    panel = panel_of(bundle, query)
    before, after = bundle.network.predict(panel), mapped.bundle.network.predict(panel)
    same = np.array_equal(before.latent_NK, after.latent_NK) and all(
        np.array_equal(before.probability_NS[axis], after.probability_NS[axis]) for axis in bundle.axes
    )
    codes = [
        mapped.bundle.rows_of(name, query.obs[name]) if name in query.obs else np.full(len(panel), -1)
        for name in bundle.n_categories
    ]
    reference_NK = bundle.network.predict(panel_of(bundle, others)).latent_NK
    truth = (query.obs["cell_type"], others.obs["cell_type"])
    z_NK = refined(mapped.bundle, panel, torch.from_numpy(np.stack(codes, axis=1)))
    record = mapped.bundle.metrics["mapped"][-1]
    zero_shot = scores(bundle, torch.from_numpy(before.latent_NK), reference_NK, truth)
    after_steps = {f"{name}_refined": value for name, value in scores(bundle, z_NK, reference_NK, truth).items()}
    gains = {"gain": record["gain"], "standard_error": record["standard_error"], "kept": record["kept"], "same": same}
    return {"patient": patient, "cells": int(is_query.sum())} | gains | zero_shot | after_steps


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    adata = ad.read_h5ad(given.data)
    patients = sorted(adata.obs["patient"].unique())
    table = pd.DataFrame([one(adata, patient, given.models / patient / "carvae") for patient in patients])
    print(table.round(3).to_string(index=False))
    means = table.drop(columns=["patient", "cells"]).mean().round(3).to_dict()
    print(json.dumps(means))


if __name__ == "__main__":
    main()
