"""From answers to figures: what of an evaluation goes into metrics.json and table.csv.

Axes: N cells, S leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from carvae.config import Config
from carvae.evaluation.answers import Answer, points_of
from carvae.evaluation.cells import Cells
from carvae.evaluation.confounding import Identifiability
from carvae.evaluation.folds import Fold
from carvae.evaluation.scores import Pooled, Tally, differences, ece, interval, macro_f1, method_figures, weights

Answers = dict[str, dict[int, list[Answer]]]
"""Method -> seed -> answers of all folds."""
OWN = "carvae"


def pooled(answers: Sequence[Answer], cells: Cells, scored: Sequence[str]) -> Pooled:
    """The cells of all folds whose leaf is among those that may be scored."""
    rows = np.concatenate([answer.rows_N for answer in answers])

    def together(name: str) -> NDArray[Any] | None:
        parts = [getattr(answer, name) for answer in answers]
        return None if any(part is None for part in parts) else np.concatenate(parts)

    probability_NS = np.concatenate([answer.probability_NS for answer in answers])
    every = Pooled(
        cells.truth_N[rows],
        probability_NS,
        cells.patient_N[rows],
        *(together(name) for name in ("raw_NS", "set_NS", "unknown_N")),
    )
    return every.take(may_score(cells, scored)[rows])


def may_score(cells: Cells, scored: Sequence[str]) -> NDArray[np.bool_]:
    """Cells whose leaf is known and among those."""
    codes = [cells.leaves.index(leaf) for leaf in scored]
    found: NDArray[np.bool_] = np.isin(cells.truth_N, codes)
    return found


def label_figures(answers: Answers, cells: Cells, allowed: Identifiability, config: Config) -> dict[str, Any]:
    """Figures of all methods in one design, and carvae's minus each other's."""
    by_method = {
        name: [pooled(folds, cells, allowed.scored) for folds in seeds.values()] for name, seeds in answers.items()
    }
    first = next(iter(by_method.values()))[0]
    n_patients = len(set(first.patient_N))
    weight_DP = weights(n_patients, np.random.default_rng((config.seed, 8)))
    methods = {}
    for name, by_seed in by_method.items():
        methods[name] = method_figures(by_seed, cells.leaves, weight_DP)
        methods[name]["per_study"] = _per_study(answers[name], cells, allowed.scored)
        methods[name]["sweeps"] = sweeps(answers[name], cells, allowed.scored, config)
        methods[name]["settings"] = [a.settings for folds in answers[name].values() for a in folds]
        methods[name]["seconds"] = [a.seconds for folds in answers[name].values() for a in folds]
    others = {name: found for name, found in by_method.items() if name != OWN}
    return {
        "n_cells": int(first.truth_N.size),
        "n_patients": n_patients,
        "methods": methods,
        "differences": differences(by_method[OWN], others, weight_DP) if OWN in by_method else {},
    }


def _per_study(seeds: dict[int, list[Answer]], cells: Cells, scored: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy, macro-F1 and calibration error in each study, the mean over seeds; that of the worst macro-F1 first."""
    study_N = cells.obs["study"].astype(str).to_numpy(dtype=object)
    found: dict[str, list[dict[str, float]]] = {}
    for answers in seeds.values():
        every = pooled(answers, cells, scored)
        rows = np.concatenate([answer.rows_N for answer in answers])
        study = study_N[rows[may_score(cells, scored)[rows]]]
        for name in np.unique(study):
            found.setdefault(str(name), []).append(short_figures(every.take(study == name)))
    means = {
        name: {key: float(np.mean([part[key] for part in parts])) for key in parts[0]} for name, parts in found.items()
    }
    return dict(sorted(means.items(), key=lambda study: study[1]["macro_f1"]))


def short_figures(part: Pooled) -> dict[str, float]:
    """Cells, accuracy, macro-F1 and calibration error."""
    tally, one = Tally.of(part, sorted(set(part.patient_N.astype(str)))), np.ones((1, len(set(part.patient_N))))
    return {
        "n_cells": float(part.truth_N.size),
        "accuracy": float(part.right_N.mean()),
        "macro_f1": float(macro_f1(tally, one)[0]),
        "ece": float(ece(tally, one)[0]),
    }


def sweeps(seeds: dict[int, list[Answer]], cells: Cells, scored: Sequence[str], config: Config) -> list[dict[str, Any]]:
    """A row per depth or share of missing genes: mean figures, the share of the whole cells' macro-F1 that is kept.

    ``kept_sd`` is its standard deviation over the draws of what is taken away (and seeds).
    """
    if any(answer.sweep_PLS is None for answers in seeds.values() for answer in answers):
        return []
    points, found = points_of(config.evaluate), []
    for answers in seeds.values():
        rows = np.concatenate([a.rows_N[cells.truth_N[a.rows_N] >= 0] for a in answers])
        kept = may_score(cells, scored)[rows]
        sweep_PLS = np.concatenate([a.sweep_PLS for a in answers if a.sweep_PLS is not None], axis=1)
        whole = short_figures(pooled(answers, cells, scored))["macro_f1"]
        for point, probability_LS in zip(points, sweep_PLS, strict=True):
            part = Pooled(cells.truth_N[rows], probability_LS, cells.patient_N[rows]).take(kept)
            figures = short_figures(part)
            found.append({"kind": point.kind, "value": point.value} | figures | {"kept": figures["macro_f1"] / whole})
    if not found:
        return []
    by_point = pd.DataFrame(found).groupby(["kind", "value"], sort=False)
    table = by_point.mean().assign(kept_sd=by_point["kept"].std()).reset_index()
    table["refused_by_default"] = (table["kind"] == "missing") & (1 - table["value"] < config.predict.min_overlap)
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def novelty_figures(answers: Answers, cells: Cells, folds: Sequence[Fold], seed: int) -> dict[str, Any]:
    """How far each method's novelty tells the cells of the held-out state from the other held-out cells.

    A state's AUROC is the mean over groups of patients and seeds, weighed by its cells; intervals are over states.
    """
    rng = np.random.default_rng((seed, 8))
    found: dict[str, Any] = {}
    for name, seeds in answers.items():
        rows = []
        for by_fold in seeds.values():
            for fold, answer in zip(folds, by_fold, strict=True):
                new = cells.truth_N[answer.rows_N] == cells.leaves.index(str(fold.state))
                row = {"state": fold.state, "n": int(new.sum()), "auroc": roc_auc_score(new, answer.novelty_N)}
                if answer.unknown_N is not None:
                    row |= {"new_unknown": answer.unknown_N[new].mean(), "known_unknown": answer.unknown_N[~new].mean()}
                rows.append(row)
        table = pd.DataFrame(rows)
        values = [c for c in table if c not in {"state", "n"}]
        states = {
            str(state): {str(c): float(np.average(part[c], weights=part["n"])) for c in values}
            | {"n_cells": int(part["n"].sum() / len(seeds))}
            for state, part in table.groupby("state")
        }
        auroc_S = np.array([figures["auroc"] for figures in states.values()])
        draws = rng.integers(auroc_S.size, size=(2000, auroc_S.size))
        mean_D = np.append(auroc_S.mean(), auroc_S[draws].mean(1))
        found[name] = {"mean_auroc": interval(mean_D, auroc_S.size), "states": states}
    return {"methods": found}


def table_of(metrics: dict[str, Any]) -> pd.DataFrame:
    """One row per design, method and figure."""
    rows: list[dict[str, Any]] = []
    for design, found in metrics["designs"].items():
        for method, figures in found.get("methods", {}).items():
            for name, value in figures.items():
                if isinstance(value, dict) and {"value", "low", "high"} <= set(value):
                    rows.append(_entry(design, method, "all", name, value))
            for group in ("per_class", "per_patient", "per_study", "states"):
                for entry, values in figures.get(group, {}).items():
                    rows += [_entry(design, method, f"{group}: {entry}", k, {"value": v}) for k, v in values.items()]
            for row in figures.get("sweeps", []):
                where = f"{row['kind']} {row['value']:g}"
                rows += [
                    _entry(design, method, where, k, {"value": row[k]}) for k in ("accuracy", "macro_f1", "ece", "kept")
                ]
        for method, values in found.get("differences", {}).items():
            rows += [_entry(design, f"{OWN} - {method}", "all", k, v) for k, v in values.items()]
        for row in found.get("integration", []):
            rows += [_entry(design, row["method"], "integration", k, {"value": row[k]}) for k in row if k != "method"]
    columns = ["design", "method", "where", "figure", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _entry(design: str, method: str, where: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
    keep = {key: value.get(key) for key in ("value", "low", "high")}
    return {"design": design, "method": method, "where": where, "figure": name} | keep
