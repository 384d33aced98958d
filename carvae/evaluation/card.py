"""The model card of an evaluation, in the words of the bundle's; every number is the evaluation's own."""

from __future__ import annotations

from typing import Any

from carvae.evaluation.results import OWN
from carvae.model.card import INTENDED_USE, LICENCES, SAME_STUDIES

FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
}
KNOWN_BAD = 0.5
"""F1 below which a state is named among the failures."""
NAMES = {"patient": "each patient held out", "study": "each study held out", "reference": "trained on other studies"}
COVERAGE = 0.9
"""Coverage that the sets were asked for."""


def write_card(metrics: dict[str, Any], figures: dict[str, str]) -> str:
    """Return the card as Markdown.

    Parameters
    ----------
    metrics
        What stands in metrics.json.
    figures
        File -> what it shows.
    """
    lines = [
        "# carvae model card",
        "",
        f"Written by `carvae evaluate` of carvae {metrics['carvae_version']}, seeds "
        f"{', '.join(map(str, metrics['seeds']))}, data `{metrics['data_fingerprint'][:16]}`.",
        "It describes the recipe: models of it were trained without the cells that they are scored on.",
        settings_tried(metrics),
        "",
        "## Intended use",
        "",
        INTENDED_USE,
        "",
        *_data(metrics),
        "## Can the states be told from the batches?",
        "",
        metrics["identifiability"]["sentence"][0].upper() + metrics["identifiability"]["sentence"][1:] + ".",
        "",
    ]
    for design, found in metrics["designs"].items():
        lines += _novelty(found) if design == "state" else _labels(design, found)
    lines += ["## Limits", "", *[f"- {text}" for text in _failures(metrics)], ""]
    lines += _tripod(metrics)
    if figures:
        lines += ["## Figures", "", *[f"![{shows}]({file})" for file, shows in figures.items()], ""]
    return "\n".join(lines)


def settings_tried(metrics: dict[str, Any]) -> str:
    """How many settings the figures may have been chosen from."""
    n = metrics["settings_tried"]
    return f"Settings evaluated on these data so far, by the log beside the evaluation: {n}."


def _data(metrics: dict[str, Any]) -> list[str]:
    return [
        "## Data",
        "",
        "| study | cells | labelled | patients | licence |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {s['n_cells']:,} | {s['n_labelled']:,} | {s['n_patients']} | {s['licence']} |"
            for name, s in metrics["studies"].items()
        ),
        "",
        f"Labels ({metrics['axis']}): {', '.join(metrics['leaves'])}.",
        "",
    ]


def _labels(design: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Labels, {NAMES[design]}",
        "",
        f"{found['n_cells']:,} cells of {found['n_patients']} patients; in brackets 95% intervals when patients are "
        "drawn anew.",
        "",
        "| method | " + " | ".join(FIGURES.values()) + " | accuracy of the surest 80% |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    for name, values in found["methods"].items():
        shown = [_value(values[key]) for key in FIGURES]
        lines.append(f"| {name} | {' | '.join(shown)} | {values['selective_accuracy']['0.8']:.3f} |")
    lines.append("")
    if OWN in found["methods"]:
        lines += _own(found["methods"][OWN], found)
    return lines


def _own(own: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if found["differences"]:
        lines += ["carvae minus each other:", "", "| method | accuracy | macro-F1 |", "|---|---|---|"]
        lines += [
            f"| {name} | {_value(d['accuracy'], '+')} | {_value(d['macro_f1'], '+')} |"
            for name, d in found["differences"].items()
        ]
        lines.append("")
    lines += ["| state | cells | F1 | recall |", "|---|---|---|---|"]
    lines += [
        f"| {leaf} | {v['n_cells']:,} | {v['f1']:.3f} | {v['recall']:.3f} |" for leaf, v in own["per_class"].items()
    ]
    for group, title in (("per_study", "study"), ("per_patient", "patient")):
        lines += ["", f"| {title} | cells | accuracy | macro-F1 | calibration error |", "|---|---|---|---|---|"]
        for i, (name, v) in enumerate(own[group].items()):
            shown = name if group == "per_study" else f"{i + 1}"  # a card is shared: it names no patient
            lines.append(
                f"| {shown} | {v['n_cells']:,.0f} | {v['accuracy']:.3f} | {v['macro_f1']:.3f} | {v['ece']:.3f} |"
            )
    return [*lines, "", *_sure(own), *_poorer(own)]


def _sure(own: dict[str, Any]) -> list[str]:
    """What was measured of calibration, sets and unknown cells."""
    if "ece_before" not in own:
        return []
    parts = [
        f"Calibration error {own['ece_before']['value']:.3f} before and {own['ece']['value']:.3f} after calibration."
    ]
    if "set_coverage" in own:
        parts.append(
            f"Sets for {COVERAGE:.0%} hold the author's state of {own['set_coverage']['value']:.1%} of the cells "
            f"({own['set_size']['value']:.2f} states each)."
        )
    if "unknown" in own:
        parts.append(f"{own['unknown']['value']:.1%} of the cells of known states are called unknown.")
    return ["### How sure it is", "", " ".join(parts), ""]


def _poorer(own: dict[str, Any]) -> list[str]:
    if not own["sweeps"]:
        return []
    return [
        "### Fewer counts, fewer genes",
        "",
        "| taken away | macro-F1 | of that of whole cells (sd over draws) | calibration error |",
        "|---|---|---|---|",
        *(
            f"| {_point(row)} | {row['macro_f1']:.3f} | {row['kept']:.0%} ({row['kept_sd']:.0%}) | {row['ece']:.3f} |"
            for row in own["sweeps"]
        ),
        "",
    ]


def _point(row: dict[str, Any]) -> str:
    words = {"depth": "{:.0%} of the reads kept", "umi": "{:,.0f} UMIs per cell", "missing": "{:.0%} of the genes gone"}
    refused = " (refused by default)" if row["refused_by_default"] else ""
    return words[row["kind"]].format(row["value"]) + refused


def _novelty(found: dict[str, Any]) -> list[str]:
    lines = ["## New states: each held out in turn", "", "| method | mean AUROC (over states) |", "|---|---|"]
    lines += [f"| {name} | {_value(values['mean_auroc'])} |" for name, values in found["methods"].items()]
    if OWN in found["methods"]:
        lines += ["", "| state held out | cells | AUROC | called unknown | other cells called unknown |"]
        lines.append("|---|---|---|---|---|")
        for state, v in found["methods"][OWN]["states"].items():
            rest = [f"{v[key]:.1%}" if key in v else "-" for key in ("new_unknown", "known_unknown")]
            lines.append(f"| {state} | {v['n_cells']:,} | {v['auroc']:.3f} | {' | '.join(rest)} |")
    return [*lines, ""]


def _failures(metrics: dict[str, Any]) -> list[str]:
    same = [SAME_STUDIES] * bool({"patient", "state"} & set(metrics["designs"]))  # in the others whole studies are new
    found = [*same, f"{LICENCES} see the table of the data."]
    if refused := metrics["identifiability"]["not_identifiable"]:
        found.append(f"No figure is given for {', '.join(refused)}: they cannot be told from batches here.")
    for design, values in metrics["designs"].items():
        if lacking := values.get("untaught"):
            told = ", ".join(f"{state} ({n:,} cells)" for state, n in lacking.items())
            found.append(
                f"With {NAMES[design]}, these were asked where no training cell has them, and count as wrong: {told}."
            )
        if OWN in values["methods"]:
            own = values["methods"][OWN]
            found += _blind(own) if design == "state" else _weak(NAMES[design], own, values["differences"])
    return found


def _blind(own: dict[str, Any]) -> list[str]:
    blind = [f"{state} ({v['auroc']:.2f})" for state, v in own["states"].items() if v["auroc"] < KNOWN_BAD]
    return [f"Cells of these states, when new, look less strange than known ones: {', '.join(blind)}."] * bool(blind)


def _weak(design: str, own: dict[str, Any], differences: dict[str, Any]) -> list[str]:
    found = []
    if bad := [
        f"{s} ({v['f1']:.2f}, {v['n_cells']:,} cells)" for s, v in own["per_class"].items() if v["f1"] < KNOWN_BAD
    ]:
        found.append(f"With {design}, F1 is below {KNOWN_BAD} for {', '.join(bad)}.")
    for name, difference in differences.items():
        better = [FIGURES[key] for key in ("accuracy", "macro_f1") if difference[key]["value"] < 0]
        found += [f"With {design}, {name} has a better {figure}." for figure in better]
    if "ece_before" in own and own["ece"]["value"] > own["ece_before"]["value"]:
        found.append(
            f"With {design}, calibration made the calibration error greater "
            f"({own['ece_before']['value']:.3f} to {own['ece']['value']:.3f})."
        )
    if "set_coverage" in own and own["set_coverage"]["value"] < COVERAGE:
        found.append(f"Sets for {COVERAGE:.0%} cover {own['set_coverage']['value']:.1%}: fewer than stated.")
    return found


def _tripod(metrics: dict[str, Any]) -> list[str]:
    """The items of TRIPOD+AI (Collins et al. 2024, doi:10.1136/bmj-2023-078378) that a labelling of cells has."""
    settings, studies = metrics["settings"], metrics["studies"]
    patients = sum(s["n_patients"] for s in studies.values())
    designs = ", ".join(metrics["designs"]) or "none: not identifiable"
    chosen = settings["evaluate"]["hold_out"]
    own = [design["methods"].get(OWN, {}) for design in metrics["designs"].values()]
    learned = any("set_coverage" in figures for figures in own)  # not where too few patients had labels
    calibrated = "calibrated afterwards on held-out patients" if learned else "uncalibrated"
    rows = {
        "3 background and use": "see Intended use; health inequalities between groups of patients were not examined",
        "5 data sources": f"{', '.join(studies)}; see Data",
        "6 participants": f"{patients} patients, as their studies enrolled them; "
        + (f"scored are those that evaluate.hold_out chose ({len(chosen)})" if chosen else "all were scored"),
        "7 preparation": "raw counts, genes by HGNC symbol, all choices made on training cells; see settings",
        "8 outcome": f"the author's label ({metrics['axis']}), given from the same expression: no independent truth",
        "9 predictors": "counts of genes alone; response, patient and clone never enter",
        "10 sample size": f"what is public: {sum(s['n_labelled'] for s in studies.values()):,} labelled cells; "
        "intervals are over patients",
        "11 missing data": "missing genes are masked, unlabelled cells train the space and are not scored",
        "12 analysis": f"designs: {designs}; methods: {', '.join(metrics['methods'])}; no patient on both sides",
        "12e performance": f"macro-F1, accuracy, calibration error, {'sets, ' * learned}selective accuracy",
        "13 class imbalance": f"loss weighs classes by count^-{settings['train']['class_balance']:g}; {calibrated}",
        "14 fairness": "scores by study and by patient; ancestry, sex and age were not available",
        "15 output": f"probability per state, {'a set of states, ' * learned}or unknown",
        "18 open science": "metrics.json and table.csv hold every figure and setting; licences stand in Data",
        "23 performance": "see the tables of figures above",
        "26 limitations": "see Limits",
        "27 use": "raw counts and most of the genes are needed; no further skill than that of the analysis of cells",
    }
    return [
        "## TRIPOD+AI items that apply",
        "",
        "| item | answer |",
        "|---|---|",
        *(f"| {item} | {answer} |" for item, answer in rows.items()),
        "",
    ]


def _value(figure: dict[str, Any], sign: str = "") -> str:
    spread = "" if figure["low"] is None else f" [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"
    return f"{figure['value']:{sign}.3f}{spread}"
