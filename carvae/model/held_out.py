"""What a trained network scores on the patients it never saw.

Axes: N cells, S leaves of one label axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from carvae.data.split import PatientSplit
from carvae.labels.axis import main_first
from carvae.model.cohort import Cohort
from carvae.model.metrics import AxisScores, score_axis
from carvae.model.network import Network

GENE_LOSS_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of panel genes taken from held-out cells, to state what a query with missing genes loses."""
GENE_LOSS_DRAWS = 5
"""Random choices of the missing genes per share."""
MAX_CELLS = 5000
"""Held-out cells used for it."""
CELLS_AT_A_TIME = 8192
"""Held-out cells in memory together."""


def held_out_metrics(network: Network, cohort: Cohort, split: PatientSplit, seed: int) -> dict[str, Any]:
    """Label scores on the held-out patients, and how they fall as genes go missing; empty without them."""
    if not split.validation.size or cohort.tree is None:
        return {}
    parts = np.split(split.validation, np.arange(CELLS_AT_A_TIME, split.validation.size, CELLS_AT_A_TIME))
    measured_SG, study_N = cohort.store.measured, cohort.study_N
    found = [
        network.predict_studies(cohort.store.counts(part), measured_SG, study_N[part]).probability_NS for part in parts
    ]
    scores: dict[str, AxisScores] = {}
    for axis in cohort.tree.axes:
        probability_NS = np.concatenate([part[axis.name] for part in found])
        score = score_axis(probability_NS, cohort.true_leaf(axis.name)[split.validation], axis.leaves)
        if score is not None:
            scores[axis.name] = score
    if not scores:
        return {}
    main = main_first(scores)[0]
    return {
        "held_out": {name: score.to_dict() for name, score in scores.items()},
        "held_out_patients": len(split.validation_patients),
        "macro_f1_by_missing_genes": _by_missing_genes(network, cohort, split, main, np.random.default_rng((seed, 3))),
    }


def _by_missing_genes(
    network: Network, cohort: Cohort, split: PatientSplit, axis: str, rng: np.random.Generator
) -> dict[str, float]:
    """Share of the panel's genes that is missing -> macro-F1, the mean over random choices of the genes."""
    assert cohort.tree is not None
    truth = cohort.true_leaf(axis)
    labelled = split.validation[truth[split.validation] >= 0]
    cells = np.sort(rng.permutation(labelled)[:MAX_CELLS])
    counts = cohort.store.counts(cells)
    means = {}
    for share in GENE_LOSS_GRID:
        found = []
        for _ in range(GENE_LOSS_DRAWS if share else 1):
            present_G = rng.random(counts.shape[1]) >= share
            poorer = counts.multiply(present_G[None, :]).tocsr()
            said = network.predict_studies(poorer, cohort.store.measured & present_G, cohort.study_N[cells])
            score = score_axis(said.probability_NS[axis], truth[cells], cohort.tree[axis].leaves)
            found.append(0.0 if score is None else score.macro_f1)
        means[f"{share:g}"] = float(np.mean(found))
    return means
