"""A model as it may leave the house: encoder and heads, without the decoder, and without what is of single samples.

The decoder can tell patients that it was trained on from others (scVI's does, with an AUROC of 0.99 on simulated ones),
and neither embedding nor labels need it. Novelty is then judged by the views that need no decoder, on thresholds that
training learned for them. Left out besides: rows of batches, latent means of the training samples (their middle
stays), what predicts outcomes, and the counts behind the scores of held-out patients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from carvae.errors import BundleError
from carvae.model.bundle import DECODER, Bundle, leaf_parts
from carvae.model.card import write_card
from carvae.model.network import Network


def shareable(bundle: Bundle) -> Bundle:
    """The model without its decoder; its embedding, probabilities and confidence are those of ``bundle``, bit by bit.

    Raises
    ------
    BundleError
        It has none already, or was trained before novelty without a decoder was learned.
    """
    if not bundle.decodes:
        raise BundleError("the model has no decoder any more; share it as it is")
    trust = None if bundle.trust is None else bundle.trust.shared()
    parts = leaf_parts(bundle.tree, bundle.config)
    network = Network(len(bundle.genes), {}, parts, bundle.config, decodes=False)
    weights = bundle.network.state_dict()
    network.load_state_dict({name: weights[name] for name in weights if not name.startswith(DECODER)})
    found = replace(
        bundle,
        network=network.eval(),
        trust=trust,
        responder=None,
        metrics=_without_counts(bundle.metrics),
        mapped={},
        bundle_id="",
    )
    found.card = write_card(found)
    return found


def _without_counts(metrics: dict[str, Any]) -> dict[str, Any]:
    """The scores without the numbers of cells of each state, which a single held-out patient could be told by."""
    held_out = {
        axis: {name: value for name, value in score.items() if name != "confusion"}
        | {"n_cells": int(float(f"{score['n_cells']:.1e}"))}
        for axis, score in metrics.get("held_out", {}).items()
    }
    return metrics | ({"held_out": held_out} if held_out else {})
