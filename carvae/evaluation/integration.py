"""How well batches mix in a latent space, beside how much of the states it keeps: scib-metrics, and a held-out vote.

A correction that mixes everything scores well on mixing alone. So beside the scores stands what it conserved: the
macro-F1 by which held-out cells get their author's label from their neighbours among the training cells.

Axes: N cells, L labelled cells, K latent.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from carvae.evaluation.answers import Answer
from carvae.evaluation.cells import MISSING, Cells

log = logging.getLogger(__name__)

BIO_WEIGHT = 0.6
"""As in scIB (Luecken et al. 2022)."""
N_NEIGHBORS = 90
"""For LISI; kBET looks at the first 50 of them and graph connectivity at the first 15, as in the Benchmarker."""
VOTES = 15
MIN_CELLS = 200
"""Fewer cells than this are no place to look for 90 neighbours."""
Embedding = NDArray[np.float32]
Strings = NDArray[np.str_]


def scores(z_NK: Embedding, batch_N: Strings, label_N: Strings, plain_NK: Embedding) -> dict[str, float]:
    """All scores of one embedding, and their means: ``bio``, ``batch`` and ``total``.

    Parameters
    ----------
    z_NK
        The embedding.
    batch_N, label_N
        Batch and label of each cell; `MISSING` where it has none.
    plain_NK
        Uncorrected principal components of the same cells.
    """
    import scib_metrics
    from scib_metrics.nearest_neighbors import pynndescent

    scib_metrics.settings.verbosity = logging.ERROR  # it sets its own when it is imported
    known_N = label_N != MISSING
    z_LK, batch_L, label_L = z_NK[known_N], batch_N[known_N], label_N[known_N]
    near_N = pynndescent(z_NK, N_NEIGHBORS)
    near_L = near_N if known_N.all() else pynndescent(z_LK, N_NEIGHBORS)
    kmeans = scib_metrics.nmi_ari_cluster_labels_kmeans(z_LK, label_L)
    bio = {
        "isolated labels": scib_metrics.isolated_labels(z_LK, label_L, batch_L),
        "NMI": kmeans["nmi"],
        "ARI": kmeans["ari"],
        "silhouette": scib_metrics.silhouette_label(z_LK, label_L),
        "cLISI": scib_metrics.clisi_knn(near_L, label_L),
    }
    batch = {
        "iLISI": scib_metrics.ilisi_knn(near_N, batch_N),
        "graph connectivity": scib_metrics.graph_connectivity(near_L.subset_neighbors(15), label_L),
        "PCR": scib_metrics.pcr_comparison(plain_NK, z_NK, batch_N, categorical=True),
    }
    if len(set(batch_L)) > 1:
        batch["BRAS"] = scib_metrics.bras(z_LK, label_L, batch_L)
        batch["kBET"] = scib_metrics.kbet_per_label(near_L.subset_neighbors(50), batch_L, label_L)
    else:
        batch["kBET"] = scib_metrics.kbet(near_N.subset_neighbors(50), batch_N)[0]
    means = {"bio": float(np.mean(list(bio.values()))), "batch": float(np.mean(list(batch.values())))}
    total = BIO_WEIGHT * means["bio"] + (1 - BIO_WEIGHT) * means["batch"]
    return {name: float(value) for name, value in (means | {"total": total} | bio | batch).items()}


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """A method's coordinates of the labelled cells of one fold, training cells first."""

    z_NK: Embedding
    rows_N: NDArray[np.int64]
    n_train: int

    @classmethod
    def of(cls, answer: Answer, cells: Cells) -> Space | None:
        """None where the method has no space."""
        if answer.latent_NK is None or answer.train_latent_MK is None or answer.train_rows_M is None:
            return None
        known = cells.truth_N[answer.rows_N] >= 0
        z = np.concatenate([answer.train_latent_MK, answer.latent_NK[known]])
        return cls(z, np.concatenate([answer.train_rows_M, answer.rows_N[known]]), answer.train_rows_M.size)


def vote(space: Space, truth_N: NDArray[np.integer]) -> NDArray[np.integer]:
    """Label of each asked cell by its neighbours among the training cells."""
    z, n = space.z_NK / np.maximum(space.z_NK[: space.n_train].std(0), 1e-6), space.n_train
    model = KNeighborsClassifier(min(VOTES, n)).fit(z[:n], truth_N[space.rows_N[:n]])
    found: NDArray[np.integer] = model.predict(z[n:])
    return found


def table_of(answers: Mapping[str, Sequence[Answer]], cells: Cells, batch: str, n_cells: int) -> list[dict[str, Any]]:
    """A row per method with a space: scores in the fold that asks most cells, and what all folds together conserved.

    ``knn`` is among the methods: its space is the plain principal components. ``over_corrected`` is true where a method
    mixes batches better than they do and conserves less. Empty with too few labelled cells for scib-metrics.
    """
    spaces = {name: [Space.of(answer, cells) for answer in folds] for name, folds in answers.items()}
    plain_spaces = [space for space in spaces["knn"] if space is not None]
    if min(n_cells, *(space.rows_N.size for space in plain_spaces)) < MIN_CELLS:
        log.warning("fewer than %d labelled cells: the mixing of batches is not scored", MIN_CELLS)
        return []
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, found in spaces.items():
            own = [space for space in found if space is not None]
            if own and len(own) == len(found):
                rows.append(_row(name, own, plain_spaces, (cells, batch, n_cells)))
    plain = next(row for row in rows if row["method"] == "knn")
    for row in rows:
        row["over_corrected"] = bool(row["batch"] > plain["batch"] and row["conserved"] < plain["conserved"])
    return rows


def _row(name: str, own: list[Space], plain: list[Space], how: tuple[Cells, str, int]) -> dict[str, Any]:
    cells, batch, n_cells = how
    batch_N = cells.obs[batch].astype(str).to_numpy(dtype=str)
    label_N = np.array(cells.leaves, dtype=str)[cells.truth_N]
    f = int(np.argmax([space.rows_N.size - space.n_train for space in own]))
    space, reference = own[f], plain[f]
    chosen = np.sort(np.random.default_rng(6).permutation(space.rows_N.size)[:n_cells])
    names, n_of = np.unique(label_N[space.rows_N[chosen]], return_counts=True)
    chosen = chosen[np.isin(label_N[space.rows_N[chosen]], names[n_of > 1])]  # of one cell nothing can be said
    rows = space.rows_N[chosen]
    found = scores(space.z_NK[chosen], batch_N[rows], label_N[rows], reference.z_NK[chosen])
    truth = np.concatenate([cells.truth_N[space.rows_N[space.n_train :]] for space in own])
    guess = np.concatenate([vote(space, cells.truth_N) for space in own])
    conserved = f1_score(truth, guess, labels=np.unique(truth), average="macro", zero_division=0)
    return {"method": name, "conserved": float(conserved)} | found
