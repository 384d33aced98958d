"""``carvae evaluate`` of the design ``response``: from tables to metrics.json, table.csv, card.md and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from carvae import __version__
from carvae.config import Config
from carvae.data.atomic import replacing_folder
from carvae.data.palette import EIGHT_COLOURS
from carvae.data.patients import Patients, read_patients
from carvae.data.spreadsheet import write_table
from carvae.errors import EvaluateError, LeakSuspected, nearest
from carvae.evaluation import ledger
from carvae.evaluation.card import settings_tried
from carvae.evaluation.response import ALPHA, CHANCE, INCONCLUSIVE, SCORE, Run, evaluate
from carvae.model.response import HeadSettings
from carvae.response.choice import CHOSEN
from carvae.response.guards import CEILING, MIN_SHUFFLES, shuffles_pass
from carvae.response.heads import heads
from carvae.response.methods import Method, baselines

log = logging.getLogger(__name__)

OWN_COLOUR, OTHER, GREY = EIGHT_COLOURS[5], EIGHT_COLOURS[0], "#777777"


def run(config: Config) -> Path:
    """Evaluate as ``config.respond`` says, write the output folder, and return its path.

    Raises
    ------
    CarvaeError
        The table cannot be used, allows no honest figure, or a leak is found or suspected; nothing is written then.
    """
    patients, settings = patients_of(config), HeadSettings(with_study=config.respond.with_study)
    methods = wanted([*baselines(patients), *heads(patients, settings)], config.respond.methods)
    log.info("%s", sentence_of(patients))
    if patients.set_aside:
        log.warning("set aside, as by their names known after the outcome only: %s", ", ".join(patients.set_aside))
    found = evaluate(Run(patients, methods, config.respond, config.seed))
    metrics: dict[str, Any] = {"carvae_version": __version__, "seed": config.seed, **found}
    metrics["settings"] = config.respond.model_dump(mode="json")
    chosen = {"respond": metrics["settings"], "seed": config.seed}
    tried = ledger.record(config.output, fingerprint(patients), "response", chosen, metrics["headline"]["auroc"])
    metrics["settings_tried"] = tried.settings
    check_leaks(metrics)
    with replacing_folder(config.output) as scratch:
        drawn = draw(metrics, scratch)
        (scratch / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False), encoding="utf-8")
        write_table(table_of(metrics), scratch / "table.csv")
        (scratch / "card.md").write_text(card_of(metrics, drawn), encoding="utf-8")
    log.info("%s", tried.sentence)
    log.info("%s\n%s", table_of(metrics).round(3).to_string(index=False, na_rep="-"), summary(metrics))
    log.info("wrote %s", config.output)
    return config.output


def patients_of(config: Config) -> Patients:
    """The patients of the table, or of the studies as a model describes them; raises CarvaeError."""
    if config.respond.table is not None and config.respond.model is not None:
        raise EvaluateError("respond.table and respond.model are both given; keep one")
    if config.respond.model is None:
        return read_patients(config.respond)
    if not config.ingest.studies:
        raise EvaluateError("respond.model describes the samples of ingest.studies, which names none")
    from carvae.response.cells import patients_of_studies

    return patients_of_studies(config)


def fingerprint(patients: Patients) -> str:
    """Of who was asked about what, whatever predicts it."""
    rows = zip(patients.sample_R, patients.patient_R, patients.outcome_R, strict=True)
    return ledger.digest(sorted([str(value) for value in row] for row in rows))


def wanted(methods: list[Method], names: tuple[str, ...]) -> tuple[Method, ...]:
    """The methods that are asked for, all where none is; raises EvaluateError for one that there is not."""
    known = {method.name: method for method in methods}
    for name in names:
        if name not in known:
            raise EvaluateError(
                f"respond.methods names {name!r}, which these data do not allow{nearest(name, known)} (there are "
                f"{', '.join(known)})"
            )
    return tuple(known[name] for name in names) if names else tuple(methods)


def sentence_of(patients: Patients) -> str:
    """What is evaluated, in one line."""
    n, known = len(set(patients.patient_R)), len(patients.names)
    rest = f" ({n - known} without an outcome, which are not scored)" if n > known else ""
    studies = len(set(patients.study_R))
    return (
        f"{patients.sample_R.size} samples of {n} patients{rest}, {studies} stud{'y' if studies == 1 else 'ies'}, "
        f"{len(patients.columns)} features"
    )


def check_leaks(metrics: dict[str, Any]) -> None:
    """Raise LeakSuspected where the headline is too good and the checks have not all passed."""
    headline = metrics["headline"]
    value = max(headline["auroc"]["value"], 1 - headline["auroc"]["value"])
    null = np.array(headline["null"])
    metrics["leak_checks"] = {
        "ceiling": CEILING,
        "shuffles": int(null.size),
        "mean_of_shuffles": float(null.mean()) if null.size else None,
        "shuffles_pass": shuffles_pass(null),
        "splits_pass": True,  # nosec B105 - no password
        "suspicions": len(metrics["suspicions"]),
    }
    for doubt in metrics["suspicions"]:
        log.warning("suspicious: %s %s", doubt["what"], doubt["why"])
    if value <= CEILING:
        return
    why = [f"{doubt['what']} {doubt['why']}" for doubt in metrics["suspicions"]]
    if null.size < MIN_SHUFFLES:
        why.append(f"{null.size} shuffles were made of the {MIN_SHUFFLES} that are needed (respond.permutations)")
    elif not shuffles_pass(null):
        why.append(f"with shuffled outcomes the same pipeline scores {null.mean():.2f}, not 0.5")
    if why:
        raise LeakSuspected(
            f"the AUROC of {value:.2f} is above {CEILING}, which products of so few patients do not honestly give, and "
            f"{'; '.join(why)}; leave such features out, or name what you have checked in respond.trusted; nothing was "
            "written"
        )


def table_of(metrics: dict[str, Any]) -> pd.DataFrame:
    """One row per design and method."""
    rows = []
    for design, found in metrics["designs"].items():
        for name, values in found["methods"].items():
            row = {"design": design, "method": name} | {k: values["auroc"][k] for k in ("value", "low", "high")}
            if "calibration" in values:
                row |= {"brier": values["calibration"]["brier"], "slope": values["calibration"]["slope"]}
            rows.append(row)
    return pd.DataFrame(rows).rename(columns={"value": figure_of(metrics).casefold()})


def summary(metrics: dict[str, Any]) -> str:
    """The verdict in words."""
    headline = metrics["headline"]
    auroc, p = headline["auroc"], headline["p"]
    what = {"score": f"{metrics['features'][0]!r} itself"}.get(headline["method"], "what inner folds chose")
    where = {"study": "studies held out", "patient": "patients held out", SCORE: "nothing fitted"}[headline["design"]]
    name = figure_of(metrics)
    spread = "" if auroc["low"] is None else f" [{auroc['low']:.3f}, {auroc['high']:.3f}]"
    lines = [
        f"{headline['verdict']}: {what}, within study, {where}: {name} {auroc['value']:.3f}{spread}, "
        f"{metrics['patients']} patients, "
        + ("no shuffles made" if p is None else f"permutation p = {p:.2g} ({headline['sides']}-sided)")
    ]
    if headline["verdict"] == INCONCLUSIVE and auroc["low"] is not None:
        lines.append(why_inconclusive(auroc, len(headline["null"])))
    if power := metrics["power"]:
        needed = ", ".join(f"{effect}: {n}" for effect, n in power["patients_needed"].items())
        least = power["smallest_detectable"]
        lines.append(
            f"with these patients the smallest AUROC that is seen four times in five is "
            f"{'none below 1' if least is None else f'{least:.2f}'} (patients needed for a true one of {needed})"
        )
    for row in metrics["confounding"]:
        if row["p"] < 1 / 20:
            lines.append(
                f"confounding: {row['what']} alone predicts the outcome ({name} {row['auroc']:.2f}, p = {row['p']:.2g})"
            )
    if metrics["studies_with_one_outcome"]:
        alone = ", ".join(metrics["studies_with_one_outcome"])
        lines.append(f"studies in which all patients have one outcome tell nothing within study: {alone}")
    return "\n".join(lines)


def figure_of(metrics: dict[str, Any]) -> str:
    """What the figure is called: of more than two levels and of times it is no AUROC."""
    return "AUROC" if metrics["kind"] == "binary" else "concordance"


def why_inconclusive(auroc: dict[str, float], shuffles: int) -> str:
    """What stands against saying that it predicts."""
    if auroc["low"] <= CHANCE <= auroc["high"]:
        return "the interval holds 0.5, so this is no evidence that it predicts"
    if auroc["high"] < CHANCE:
        return "it orders new patients the wrong way round, which is no evidence that it predicts"
    if 1 / (1 + shuffles) >= ALPHA:  # the least p that so many can give
        return f"{shuffles} shuffles can show nothing; {round(1 / ALPHA)} are the least (respond.permutations)"
    return "shuffled outcomes do as well too often for this to be evidence that it predicts"


def card_of(metrics: dict[str, Any], drawn: dict[str, str]) -> str:
    """The model card's page on outcomes."""
    lines = ["# Prediction of outcomes", "", summary(metrics).replace("\n", "  \n"), "", "For research only."]
    lines += [settings_tried(metrics), ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {word} | {n} patients |" for word, n in metrics["classes"].items()]
    lines += [f"| study {study} | {n} patients |" for study, n in metrics["studies"].items()]
    lines += [f"| without an outcome | {metrics['patients_without_outcome']} patients |", ""]
    for design, found in metrics["designs"].items():
        lines += [
            f"## {design}",
            "",
            f"| method | {figure_of(metrics)} within study | carvae minus it |",
            "|---|---|---|",
        ]
        for name, values in found["methods"].items():
            other = found["differences"].get(name)
            lines.append(f"| {name} | {_figure(values['auroc'])} | {_figure(other, '+') if other else ''} |")
        beaten = [n for n, d in found["differences"].items() if d["low"] is not None and d["low"] > 0]
        lines += ["", f"Beaten, with an interval of the difference above 0: {', '.join(beaten) or 'none'}.", ""]
    if metrics["confounding"]:
        lines += ["## What else predicts", "", f"| alone | {figure_of(metrics)} | p |", "|---|---|---|"]
        lines += [f"| {row['what']} | {row['auroc']:.2f} | {row['p']:.2g} |" for row in metrics["confounding"]]
    lines += ["", *(f"- suspicious: {d['what']} {d['why']}" for d in metrics["suspicions"]), ""]
    lines += [f"![{shows}]({file})" for file, shows in drawn.items()]
    return "\n".join(lines) + "\n"


def _figure(values: dict[str, float | None], sign: str = "") -> str:
    value, low, high = (values[key] for key in ("value", "low", "high"))
    spread = "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return "-" if value is None else f"{value:{sign}.3f}{spread}"


def draw(metrics: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the pictures; returns file -> what it shows."""
    drawn = {}
    for name, (plot, shows) in PLOTS.items():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        if plot(figure.subplots(), metrics):
            figure.savefig(folder / name, dpi=130)
            drawn[name] = shows
    return drawn


def _methods(axes: Axes, metrics: dict[str, Any]) -> bool:
    design = metrics["headline"]["design"]
    methods = metrics["designs"][design]["methods"]
    for row, (name, values) in enumerate(reversed(methods.items())):
        auroc, colour = values["auroc"], OWN_COLOUR if name in {CHOSEN, SCORE} else OTHER
        if auroc["value"] is not None:
            axes.plot(auroc["value"], row, "o", color=colour)
            if auroc["low"] is not None:
                axes.plot([auroc["low"], auroc["high"]], [row, row], color=colour)
    axes.set_yticks(range(len(methods)), [str(name) for name in reversed(methods)])
    axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xlabel=f"{figure_of(metrics)} within study (95% interval over patients), {design}")
    return True


def _null(axes: Axes, metrics: dict[str, Any]) -> bool:
    headline = metrics["headline"]
    if not headline["null"]:
        return False
    axes.hist(headline["null"], bins=np.linspace(0, 1, 41).tolist(), color=GREY)
    axes.axvline(headline["auroc"]["value"], color=OWN_COLOUR)
    axes.set(xlim=(0, 1), xlabel=f"{figure_of(metrics)} within study", ylabel="shuffles of the outcome")
    axes.set_title(f"found (line) and shuffled: p = {headline['p']:.2g}, {headline['sides']}-sided", fontsize=10)
    return True


def _calibration(axes: Axes, metrics: dict[str, Any]) -> bool:
    own = _own(metrics)
    if "calibration" not in own:
        return False
    bins = own["calibration"]["bins"]
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.plot([b["said"] for b in bins], [b["found"] for b in bins], "o-", color=OWN_COLOUR)
    axes.set(
        xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="probability said", ylabel=f"share that is {metrics['levels'][-1]}"
    )
    axes.set_title(f"fifths of {metrics['patients']} patients", fontsize=10)
    return True


def _decision(axes: Axes, metrics: dict[str, Any]) -> bool:
    own = _own(metrics)
    if "decision_curve" not in own:
        return False
    rows = own["decision_curve"]
    for key, colour, label in (("method", OWN_COLOUR, CHOSEN), ("all", OTHER, "act on all")):
        axes.plot([row["threshold"] for row in rows], [row[key] for row in rows], color=colour, label=label)
    axes.axhline(0, color=GREY, linewidth=1, label="act on none")
    axes.set(xlabel="probability from which one acts", ylabel="net benefit per patient")
    axes.set_ylim(-0.1, max(0.1, *(row["all"] for row in rows), *(row["method"] for row in rows)) * 1.1)
    axes.legend(frameon=False)
    return True


def _own(metrics: dict[str, Any]) -> dict[str, Any]:
    headline = metrics["headline"]
    own: dict[str, Any] = metrics["designs"][headline["design"]]["methods"][headline["method"]]
    return own


PLOTS: dict[str, tuple[Callable[[Axes, dict[str, Any]], bool], str]] = {
    "response_methods.png": (_methods, "every method in the same folds"),
    "response_null.png": (_null, "the figure beside those of shuffled outcomes"),
    "response_calibration.png": (_calibration, "what probabilities were worth"),
    "response_decision.png": (_decision, "net benefit of acting on the prediction"),
}
FILES = tuple(PLOTS)
