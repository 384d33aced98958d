"""What a trained network scores on the patients it never saw.

Axes: N cells, S leaves of one label axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.metrics import AxisScores, score_axis
from carvae.model.network import Network

GENE_LOSS_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of panel genes taken from held-out cells, to state what a query with missing genes loses."""


def held_out_metrics(network: Network, cohort: Cohort, split: PatientSplit, seed: int) -> dict[str, Any]:
    """Label scores on the held-out patients, and how they fall as genes go missing; empty without them."""
    if not split.validation.size or cohort.cohort_labels is None or cohort.tree is None:
        return {}
    counts = cohort.counts.rows(torch.from_numpy(split.validation)).to_scipy()
    prediction = network.predict(counts)
    scores: dict[str, AxisScores] = {}
    for axis, labels in zip(cohort.tree.axes, cohort.cohort_labels.labels.axes, strict=True):
        found = score_axis(prediction.probability_NS[axis.name], labels.leaf[split.validation], axis.leaves)
        if found is not None:
            scores[axis.name] = found
    if not scores:
        return {}
    first = next(iter(scores))
    leaf_N = cohort.cohort_labels.labels[first].leaf[split.validation]
    rng = np.random.default_rng((seed, 3))
    kept = {}
    for share in GENE_LOSS_GRID:
        masked = counts.multiply((rng.random(counts.shape[1]) >= share)[None, :]).tocsr()
        found = score_axis(network.predict(masked).probability_NS[first], leaf_N, cohort.tree[first].leaves)
        kept[f"{share:g}"] = found.macro_f1 if found else 0.0
    return {
        "held_out": {axis: score.to_dict() for axis, score in scores.items()},
        "held_out_patients": len(split.validation_patients),
        "macro_f1_by_missing_genes": kept,
    }
