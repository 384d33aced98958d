"""The model card: what a bundle is for, what it was trained on, and what it scored; every number is the run's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carvae.model.bundle import Bundle
from carvae.model.membership import ATTACKS

INTENDED_USE = (
    "Embedding and cell-state labelling of T cells in CAR-T single-cell RNA-seq, for research. Not a diagnostic,\n"
    "and not validated for decisions on patients."
)
SAME_STUDIES = "Scores are of patients held out of the same studies; another laboratory's data may do worse."
UNDECODED = (
    "Measured on CARPALL, each of six patients held out in turn, against B cells, monocytes and NK cells of another "
    "laboratory: AUROC 0.993 (whole model: 0.989), 1.4% of those cells called a T state (1.3%)."
)
"""What novelty without the decoder costs; from ``scripts/bench_share.py``, kept in ``docs/figures.json``."""
FEW_PATIENTS = 20
"""Patients below which the interval of an attack is too wide to say much."""
LICENCES = "The licences of the training data apply to this model;"


def write_card(bundle: Bundle) -> str:
    """Return the card of a bundle as Markdown."""
    made = bundle.provenance
    lines = [
        "# carvae model card",
        "",
        f"Written by carvae {made.carvae_version}, seed {made.seed}, training data `{made.data_fingerprint[:16]}`.",
        "",
        "## Intended use",
        "",
        f"{INTENDED_USE} {_strangers(bundle)}",
        "",
        *_shared(bundle),
        "## Training data",
        "",
        f"{made.n_cells:,} cells of {made.n_patients} patients in {made.n_studies} "
        f"{'study' if made.n_studies == 1 else 'studies'}; {len(bundle.genes):,} genes. Left out of the panel: "
        f"{', '.join(bundle.gene_policy) or 'nothing'}.",
        "Corrected for: " + (", ".join(f"{name} ({n})" for name, n in bundle.n_categories.items()) or "nothing") + ".",
        "",
        *_labels(bundle),
        "",
        "## Scores on held-out patients",
        "",
        *_scores(bundle),
        "",
        *_trust(bundle),
        *_membership(bundle),
        *_response(bundle),
        "## Limits",
        "",
        f"- {SAME_STUDIES}",
        *(
            ["- The confidence is the softmax probability as trained; see the calibration error above."]
            if not calibrated(bundle)
            else []
        ),
        f"- {LICENCES} carvae cannot know them: name them before sharing.",
        "",
    ]
    return "\n".join(lines)


def _shared(bundle: Bundle) -> list[str]:
    """What a model lacks that was shared without its decoder."""
    if bundle.decodes:
        return []
    lines = [
        "## Shared without its decoder",
        "",
        "Embedding, states and confidence are those of the whole model. It cannot be mapped, converted for scvi-tools "
        "or asked for outcomes.",
    ]
    if bundle.trust is not None:
        lines.append(f"Novelty is judged without the misfit of decoded counts, on thresholds of its own. {UNDECODED}")
        if found := bundle.metrics.get("trust", {}).get("undecoded"):
            whole = bundle.metrics["trust"]["unknown_rate"]
            lines.append(
                f"Of held-out cells of known states {found['whole']:.1%} are called unknown (by the whole model "
                f"{whole['whole']:.1%}), with counts and genes taken away {found['poorer']:.1%} "
                f"({whole['poorer']:.1%})."
            )
    return [*lines, ""]


def _response(bundle: Bundle) -> list[str]:
    """What predicts outcomes, if anything does."""
    found = bundle.responder
    if found is None:
        return []
    inner = ", ".join(f"{name} {value:.2f}" for name, value in found.inner.items())
    what = found.levels[-1] if found.levels else "time to an event"
    return [
        "## Outcomes",
        "",
        f"Predicted by {found.method} ({what}), learned from {found.n_patients} patients of {found.n_studies} "
        f"{'study' if found.n_studies == 1 else 'studies'}.",
        f"Concordance within study in the folds by which it was chosen, and so too good: {inner}.",
        "The latent space was learned from the same patients' cells, without their outcomes.",
        "`carvae evaluate` with the design `response` gives an honest figure.",
        "",
    ]


def _strangers(bundle: Bundle) -> str:
    if bundle.trust is None:
        return "Cells of kinds that were not in the training data get the nearest known label."
    return (
        "Cells that look stranger than all but "
        f"{bundle.trust.unknown_rate:.0%} of held-out training cells are called unknown; a state that was not in the "
        "training data, but looks like one that was, may still get that one's label."
    )


def _trust(bundle: Bundle) -> list[str]:
    """What was measured of calibration, sets and unknown cells, or that nothing was."""
    found = bundle.metrics.get("trust")
    if bundle.tree is None or (calibrated(bundle) and not found):
        return []
    lines = ["## How sure it is", "", *([] if calibrated(bundle) else [f"{_uncalibrated(bundle)}", ""])]
    if not found:
        return lines
    rate = found["unknown_rate"]
    lines += [
        f"Each group of the {found['patients']} held-out patients tested what the others taught. Of cells of known "
        f"states {rate['whole']:.1%} were called unknown ({rate['asked']:.0%} asked for); of the same cells with "
        f"counts and genes taken away {rate['poorer']:.1%}.",
        "",
    ]
    axes = [name for name in found if name not in {"patients", "unknown_rate", "undecoded"}]
    if axes:
        lines += ["| axis | cells | calibration error before | after | coverage of 90% sets | mean size |"]
        lines += ["|---|---|---|---|---|---|"]
    for axis in axes:
        lines += [
            f"| {axis} | {'whole' if name == 'whole' else 'counts and genes taken away'} | {score['ece_before']:.3f} | "
            f"{score['ece']:.3f} | {score['coverage']:.3f} | {score['set_size']:.2f} |"
            for name, score in found[axis].items()
        ]
    return [*lines, ""]


def calibrated(bundle: Bundle) -> bool:
    """Whether confidence on any label axis means what it says."""
    return bundle.trust is not None and bool(bundle.trust.calibration)


def _uncalibrated(bundle: Bundle) -> str:
    """What a model lacks that met no labels of patients held out."""
    more = (
        " Only cells with too few counts are called unknown, and samples get no verdict."
        if bundle.trust is None
        else ""
    )
    return (
        "**Its confidence is not calibrated**: no network trained on authors' labels of some patients was shown those "
        f"of others. Confidence is as trained, usually too sure, and there are no sets of states.{more} Labels of at "
        "least two patients and `train.calibration_folds` would teach it."
    )


def _membership(bundle: Bundle) -> list[str]:
    """What was measured of whether a patient can be told who was trained on."""
    found = bundle.metrics.get("membership")
    if not found:
        return []
    attacks = found["attacks"]
    worst = max(attacks, key=lambda name: attacks[name]["auroc"])
    kept = attacks[worst]["auroc"] <= found["bar"]
    return [
        "## Can it be told whom it was trained on?",
        "",
        "Whoever holds a patient's cells may ask the model whether it was trained on that patient. AUROC of such an "
        "attack by threshold on what the model says without its decoder, on networks of which it is known whom they "
        "saw (a half: nothing can be told; interval over patients):",
        "",
        "| by | AUROC | 95% interval | patients |",
        "|---|---|---|---|",
        *(
            f"| {ATTACKS[name]} | {a['auroc']:.2f} | {a['low']:.2f} to {a['high']:.2f} | {a['patients']} |"
            for name, a in attacks.items()
        ),
        "",
        f"At most {found['bar']:.2f} was aimed at, and is {'kept' if kept else 'not kept'}."
        + ("" if kept else " Treat the model as telling who was in the training data.")
        + (" The patients are so few that this says little." if attacks[worst]["patients"] < FEW_PATIENTS else ""),
        "",
    ]


def _labels(bundle: Bundle) -> list[str]:
    if bundle.tree is None:
        return ["Trained without labels: the model embeds and does not label."]
    lines = [f"- {axis.name}: {', '.join(axis.leaves)}" for axis in bundle.tree.axes]
    if bundle.provenance.weak_labels:
        lines.append("- **Weak labels**: some labels were derived from gene signatures, not given by an author.")
    return ["Labels:", "", *lines]


def _scores(bundle: Bundle) -> list[str]:
    held_out = bundle.metrics.get("held_out")
    if not held_out:
        return ["None: no labelled patient was held out of this training."]
    lines = [
        f"{bundle.metrics['held_out_patients']} patient(s) that this training did not see, except that their loss also "
        "chose the epoch: the scores are slightly optimistic.",
        "",
    ]
    if bundle.metrics.get("refit"):
        lines[0] += (
            " The weights were then trained again on all patients, these included; the scores are of the run before."
        )
    for axis, score in held_out.items():
        lines += _axis_scores(axis, score)
    kept = bundle.metrics["macro_f1_by_missing_genes"]
    if len(held_out.get("state", next(iter(held_out.values())))["recall"]) > 1:
        lines += [
            "Macro-F1 with a share of the panel's genes missing: " + ", ".join(f"{k}: {v:.3f}" for k, v in kept.items())
        ]
    return lines


def _axis_scores(axis: str, score: Mapping[str, Any]) -> list[str]:
    """Tables of one axis; the means over states are left out where only one state was there to be told."""
    recall, leaves = score["recall"], score["leaves"]
    counted = zip(leaves, score["confusion"], strict=True) if "confusion" in score else ()
    n_cells = {leaf: f"{sum(row):,}" for leaf, row in counted}
    unscored = [leaf for leaf in leaves if leaf not in recall]
    means = {"macro-F1": "macro_f1", "balanced accuracy": "balanced_accuracy"} if len(recall) > 1 else {}
    shown = {"accuracy": "accuracy", **means, "calibration error": "ece"}
    return [
        f"### {axis} ({score['n_cells']:,} cells)",
        "",
        "| " + " | ".join(shown) + " |",
        "|---" * len(shown) + "|",
        "| " + " | ".join(f"{score[key]:.3f}" for key in shown.values()) + " |",
        "",
        "| state | n | recall |",
        "|---|---|---|",
        *(f"| {leaf} | {n_cells.get(leaf, 'not told')} | {value:.3f} |" for leaf, value in recall.items()),
        "",
        *([f"not scored (no held-out cell): {', '.join(unscored)}", ""] if unscored else []),
    ]
