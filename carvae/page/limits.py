"""Section 10: what this report cannot say."""

from __future__ import annotations

from typing import Any

from carvae.model.card import INTENDED_USE, SAME_STUDIES
from carvae.page.blocks import Bullets, Section
from carvae.page.facts import Facts, percent, several


def section(facts: Facts) -> Section:
    """Limits of the model, of these data, and of the figures."""
    said = [" ".join(INTENDED_USE.split()), SAME_STUDIES, *_scores(facts), *_unknown(facts)]
    if facts.cells.made["weak_labels"]:
        said.append(
            "Weak labels: some of the labels that the model learned were derived from gene signatures, not given by an "
            "author; where states agree with those signatures, that is no evidence."
        )
    overlap = facts.cells.receipt["overlap"]
    if overlap < 1:
        said.append(f"{percent(1 - overlap)} of the model's genes are missing here, which makes states less sure.")
    said.append(
        "A state is a name from the training studies for how a cell's genes look; it is no proof of what the cell "
        "does. "
        "Shares compare cells that were caught and sequenced, not numbers in the body."
    )
    said.append(
        "The unit of every conclusion on patients is the patient: many cells of few patients remain few patients."
    )
    return Section("limits", "Limits", (Bullets(tuple(said)),))


def _scores(facts: Facts) -> list[str]:
    metrics: dict[str, Any] = {} if facts.bundle is None else facts.bundle.metrics
    found = metrics.get("held_out", {}).get(facts.cells.main)
    if found is None:
        if facts.bundle is None:
            return ["How right the model was on held-out patients is in its card; give --model BUNDLE to see it here."]
        return ["No labelled patient was held out when this model was trained, so how right it is was not measured."]
    worst = sorted(found["recall"].items(), key=lambda item: item[1])[:3]
    return [
        f"On {several(int(metrics['held_out_patients']), 'held-out patient')} ({found['n_cells']:,} cells) "
        f"{found['accuracy']:.0%} of the cells got the author's label (macro-F1 {found['macro_f1']:.2f}); the states "
        "least "
        f"often found: {', '.join(f'{state} {value:.0%}' for state, value in worst)}."
    ]


def _unknown(facts: Facts) -> list[str]:
    if "carvae_novelty" not in facts.cells.obs:
        return ["This model cannot tell strange cells: cells of kinds that it never saw get the nearest known label."]
    return [
        "A state that was not in the training data, but looks like one that was, may get that one's label; cells "
        "that look "
        "like nothing known are called unknown."
    ]
