"""``carvae evaluate``: hold out patients, studies or states, compare with the usual methods, and write it all down.

What comes out: metrics.json, table.csv, figures as PNG and card.md in the output folder; the answers of every fold in
``<output>.work``, from which a run that was killed goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carvae import __version__
from carvae.config import Config, EvaluateConfig
from carvae.data.atomic import alone, replacing_folder
from carvae.data.spreadsheet import write_table
from carvae.errors import ConfigError, EvaluateError, nearest
from carvae.evaluation import figures, ledger, response_report, runs
from carvae.evaluation.baselines import NO_CELLTYPIST
from carvae.evaluation.card import write_card
from carvae.evaluation.cells import Cells
from carvae.evaluation.confounding import Identifiability, identifiability
from carvae.evaluation.folds import Fold, folds_of, untaught
from carvae.evaluation.integration import table_of as integration_table
from carvae.evaluation.results import OWN, label_figures, novelty_figures, table_of

log = logging.getLogger(__name__)

FILES = ("metrics.json", "table.csv", "card.md")
RESPONSE = "response"
"""The design that predicts outcomes of patients."""
SHOWN = ("accuracy", "macro_f1", "balanced_accuracy", "ece_before", "ece", "set_coverage", "set_size", "unknown")


def run(config: Config) -> Path:
    """Evaluate as ``config.evaluate`` says, write the output folder, and return its path.

    Raises
    ------
    CarvaeError
        The studies cannot be read, or do not allow what is asked for; the output folder is untouched then.
    """
    check_place(config.output)
    ledger.check(config.output)
    if RESPONSE in config.evaluate.designs:
        if len(config.evaluate.designs) > 1:
            raise EvaluateError("the design 'response' is evaluated alone; give it a config and an output of its own")
        with alone(config.output):
            return response_report.run(config)
    methods = installed(checked_methods(config.evaluate.methods))
    check_integration(config.evaluate, methods)
    with alone(config.output):
        return _run(config, methods)


def _run(config: Config, methods: tuple[str, ...]) -> Path:
    cells = Cells.read(config)
    allowed = identifiability(cells, config.model.covariates)
    (log.warning if allowed.refused else log.info)("%s", allowed.sentence)
    folds = {
        design: [fold for fold in folds_of(design, cells, config.evaluate) if fold.state not in allowed.refused]
        for design in config.evaluate.designs
    }
    metrics = _head(config, cells, allowed, methods)
    if allowed.scored:
        fingerprint = cells.fingerprint
        for design, found in folds.items():
            log.info("design %s: %d folds", design, len(found))
            if not found:  # all its states are refused, which the sentence above says
                continue
            plan = runs.Plan(config, cells, fingerprint, found, methods)
            runs.run(plan)
            metrics["designs"][design] = _figures(design, found, plan, allowed)
    tried = ledger.record(config.output, *_entry(metrics))
    metrics["settings_tried"] = tried.settings
    write(metrics, config)
    log.info("%s", summary(metrics))
    log.info("%s", tried.sentence)
    log.info("wrote %s", config.output)
    return config.output


def checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods, each known; raises EvaluateError with the nearest name for one that is not."""
    for name in methods:
        if name not in runs.ALL:
            raise EvaluateError(
                f"evaluate.methods names {name!r}, which is no method{nearest(name, runs.ALL)} "
                f"(there are {', '.join(runs.ALL)})"
            )
    if not methods:
        raise EvaluateError(f"evaluate.methods is empty; name some of {', '.join(runs.ALL)}")
    return tuple(dict.fromkeys(methods))


def installed(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods that can run here; what cannot is said and left out."""
    if "celltypist" in methods and importlib.util.find_spec("celltypist") is None:
        log.warning("%s; the others run", NO_CELLTYPIST)
        methods = tuple(name for name in methods if name != "celltypist")
    return methods


def check_integration(config: EvaluateConfig, methods: tuple[str, ...]) -> None:
    """Raise EvaluateError, before anything is trained, where the mixing of batches could not be scored."""
    if not config.integration_cells or not set(config.designs) - {"state"}:
        return
    if importlib.util.find_spec("scib_metrics") is None:
        raise EvaluateError(
            "scib-metrics is not installed; `pip install scib-metrics` (extra `bench`) or set "
            "evaluate.integration_cells=0"
        )
    if "knn" not in methods:
        raise EvaluateError(
            "the mixing of batches is scored against the principal components of `knn`, which is not in "
            "evaluate.methods; add it, or set evaluate.integration_cells=0"
        )


def check_place(output: Path) -> None:
    """Raise ConfigError where the output folder holds anything but an older evaluation."""
    if not output.exists():
        return
    own = {*FILES, *figures.FILES, *response_report.FILES}
    foreign = sorted({p.name for p in output.iterdir()} - own) if output.is_dir() else [output.name]
    if foreign:
        raise ConfigError(
            f"{output} holds {foreign[0]!r}, which is no part of an evaluation; choose another output, or move that "
            "away; nothing there was touched"
        )


def _head(config: Config, cells: Cells, allowed: Identifiability, methods: tuple[str, ...]) -> dict[str, Any]:
    known = cells.truth_N >= 0
    studies = {}
    for name, part in cells.obs.groupby(cells.obs["study"].astype(str)):
        studies[str(name)] = {
            "n_cells": len(part),
            "n_labelled": int(known[part.index].sum()),
            "n_patients": int(part["patient"].nunique()),
            "licence": config.evaluate.licences.get(str(name), "not stated in evaluate.licences"),
        }
    return {
        "carvae_version": __version__,
        "data_fingerprint": cells.fingerprint,
        "studies": studies,
        "axis": cells.axis,
        "leaves": list(cells.leaves),
        "methods": list(methods),
        "seeds": list(config.evaluate.seeds),
        "settings": config.model_dump(mode="json", include={"model", "train", "evaluate", "labels"}),
        "identifiability": allowed.to_dict(),
        "designs": {},
    }


def _entry(metrics: dict[str, Any]) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """For the log: data, designs, settings and the figures of carvae in each design."""
    headline = {}
    for design, found in metrics["designs"].items():
        own = found["methods"].get(OWN, {})
        headline[design] = {key: own[key]["value"] for key in ("accuracy", "macro_f1", "mean_auroc") if key in own}
    settings = {key: metrics[key] for key in ("settings", "methods", "seeds")}
    return metrics["data_fingerprint"], " ".join(metrics["designs"]), settings, headline


def _figures(design: str, folds: Sequence[Fold], plan: runs.Plan, allowed: Identifiability) -> dict[str, Any]:
    """Everything that is known of one design."""
    answers, cells, config = runs.collect(plan), plan.cells, plan.config
    names = {"folds": [fold.name for fold in folds]}
    if design == "state":
        return names | novelty_figures(answers, cells, folds, config.seed)
    found = names | label_figures(answers, cells, allowed, config) | {"untaught": untaught(cells, folds)}
    if found["untaught"]:
        log.warning(
            "design %s: no training cell has the state of some asked cells, which count as wrong: %s",
            design,
            ", ".join(f"{state} ({n:,})" for state, n in found["untaught"].items()),
        )
    if n := config.evaluate.integration_cells:
        first = {name: next(iter(seeds.values())) for name, seeds in answers.items()}
        batch = "study" if cells.obs["study"].nunique() > 1 else "patient"
        log.info("scoring integration of batches by %s", batch)
        found["integration"] = integration_table(first, cells, batch, n)
    return found


def write(metrics: dict[str, Any], config: Config) -> None:
    """Write the output folder; it is replaced as a whole or not at all."""
    with replacing_folder(config.output) as scratch:
        drawn = figures.draw(metrics, scratch)
        (scratch / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        write_table(table_of(metrics), scratch / "table.csv")
        (scratch / "card.md").write_text(write_card(metrics, drawn), encoding="utf-8")


def summary(metrics: dict[str, Any]) -> str:
    """The figures of all methods side by side, for the screen."""
    import pandas as pd

    blocks = []
    for design, found in metrics["designs"].items():
        rows = {}
        for name, values in found["methods"].items():
            if design == "state":
                rows[name] = {"mean AUROC": values["mean_auroc"]["value"]} | {
                    state: figures["auroc"] for state, figures in values["states"].items()
                }
                continue
            rows[name] = {key: values[key]["value"] for key in SHOWN if key in values}
            rows[name] |= {"accuracy at 80%": values["selective_accuracy"]["0.8"], "seconds": sum(values["seconds"])}
        table = pd.DataFrame(rows).T if design != "state" else pd.DataFrame(rows)
        blocks.append(f"design {design}\n{table.round(3).to_string(na_rep='-')}")
        if OWN in found["methods"] and found.get("differences"):
            blocks.append(_difference_lines(found["differences"]))
    return "\n\n".join(blocks) or "no figures: " + metrics["identifiability"]["sentence"]


def _difference_lines(differences: dict[str, Any]) -> str:
    lines = [f"{OWN} minus each other, with 95% intervals over patients"]
    for name, values in differences.items():
        parts = []
        for key in ("accuracy", "macro_f1"):
            found = values[key]
            spread = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
            parts.append(f"{key} {found['value']:+.3f}{spread}")
        lines.append(f"  {name}: {', '.join(parts)}")
    return "\n".join(lines)
