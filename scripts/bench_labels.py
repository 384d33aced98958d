"""Label a held-out CAR-T patient from the five others, for all six: carvae beside the usual baselines.

``python scripts/bench_labels.py --data PATH --config configs/carpall.yaml --methods logreg knn carvae --out DIR``

Every (method, patient) is kept in ``DIR/<method>/<patient>.csv``; a second call computes only what is absent, so
delete a method's folder to measure it anew. Cells without an author label are used unsupervised where a method
can, and never scored. The last line printed is one line of JSON with all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import baselines
import numpy as np
import pandas as pd
from baselines import MISSING, Fold, Method, Prediction
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

METHODS: dict[str, Method] = {
    "logreg": baselines.gene_logistic,
    "logreg_balanced": partial(baselines.gene_logistic, class_weight="balanced"),
    "logreg_allhvg": partial(baselines.gene_logistic, genes_from_all=True),
    "logreg_balanced_allhvg": partial(baselines.gene_logistic, class_weight="balanced", genes_from_all=True),
    "knn": baselines.pca_knn,
    "scvi_logreg": baselines.scvi_logistic,
    "scanvi": baselines.scanvi,
}
SEEDED_BOOTSTRAPS = 200


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for."""

    data: Path
    config: Path
    methods: tuple[str, ...]
    out: Path


def folds(data: Path, out: Path) -> Iterator[tuple[Fold, pd.Series]]:
    """Each patient held out once, with the author labels of its cells kept apart from the fold."""
    adata = ad.read_h5ad(data)
    adata.obs = adata.obs.assign(label=adata.obs["cell_type"].astype(str))[["label", "patient", "sample"]].astype(str)
    patients = adata.obs["patient"].to_numpy()
    for patient in np.unique(patients):
        query = adata[patients == patient].copy()
        truth = query.obs["label"].copy()
        query.obs["label"] = MISSING
        train = adata[patients != patient].copy()
        yield Fold(str(patient), train, query, out / "models" / str(patient)), truth


def carvae_command() -> list[str]:
    """The console script beside this Python or on the path; else the same entry point from the checkout."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which("carvae", path=search)
    return [command] if command else [sys.executable, "-m", "carvae.cli"]


def carvae(fold: Fold, config: Path) -> Prediction:
    """Carvae through its command line, as a user would run it."""
    command = carvae_command()
    bundle = fold.cache / "carvae"
    exclude = f"ingest.exclude_patients=[{fold.patient}]"
    subprocess.run([*command, "train", str(config), f"output={bundle}", exclude], check=True)
    with tempfile.TemporaryDirectory() as folder:
        held_out, answer = Path(folder) / "heldout.h5ad", Path(folder) / "annotated.h5ad"
        fold.query.write_h5ad(held_out)
        subprocess.run([*command, "annotate", str(held_out), "--model", str(bundle), "--out", str(answer)], check=True)
        obs = ad.read_h5ad(answer, backed="r").obs
    return Prediction(np.asarray(obs.loc[fold.query.obs_names, "carvae_state_best"].astype(str), dtype=str))


def predict(name: str, fold: Fold, truth: pd.Series, settings: Settings) -> pd.DataFrame:
    """One fold of one method, from its file when that is there: barcode, patient, truth, prediction."""
    path = settings.out / name / f"{fold.patient}.csv"
    if path.exists():
        table = pd.read_csv(path, dtype=str)
        if list(table["barcode"]) != list(truth.index):
            raise SystemExit(f"{path} was made from other cells than {settings.data}; delete it and run again")
        return table
    start = time.perf_counter()
    result = carvae(fold, settings.config) if name == "carvae" else METHODS[name](fold)
    table = pd.DataFrame(
        {"barcode": truth.index, "patient": fold.patient, "truth": truth.to_numpy(), "prediction": result.labels_N}
    )
    record = {**result.settings, "seconds": round(time.perf_counter() - start, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record))
    unfinished = path.with_suffix(".partial")
    table.to_csv(unfinished, index=False)
    unfinished.replace(path)
    print(f"{name} {fold.patient}: {record}", file=sys.stderr, flush=True)
    return table


def macro_f1(table: pd.DataFrame, names: list[str]) -> float:
    """Mean F1 over the named classes, a class never predicted counting 0."""
    scores = f1_score(table["truth"], table["prediction"], labels=names, average="macro", zero_division=0)
    return float(scores)


def standard_error(table: pd.DataFrame, names: list[str]) -> float:
    """Deviation of macro-F1 when the cells of each patient are drawn anew."""
    groups = [group for _, group in table.groupby("patient")]
    draws = [
        macro_f1(pd.concat([group.sample(frac=1, replace=True, random_state=seed) for group in groups]), names)
        for seed in range(SEEDED_BOOTSTRAPS)
    ]
    return float(np.std(draws))


def figures(table: pd.DataFrame) -> dict[str, Any]:
    """The pooled figures of one method over its labelled cells."""
    names = sorted(table["truth"].unique())
    by_class = f1_score(table["truth"], table["prediction"], labels=names, average=None, zero_division=0)
    by_patient = {
        str(patient): round(float(accuracy_score(group["truth"], group["prediction"])), 4)
        for patient, group in table.groupby("patient")
    }
    return {
        "accuracy": round(float(accuracy_score(table["truth"], table["prediction"])), 4),
        "macro_f1": round(macro_f1(table, names), 4),
        "macro_f1_se": round(standard_error(table, names), 4),
        "n_cells": len(table),
        "f1": {name: round(float(value), 3) for name, value in zip(names, by_class, strict=True)},
        "patient_accuracy": by_patient,
    }


def describe(results: dict[str, dict[str, Any]], tables: dict[str, pd.DataFrame]) -> str:
    """Figures of all methods side by side, then the confusion matrix of the most accurate."""
    parts = [
        pd.DataFrame({name: {key: result[key] for key in ("accuracy", "macro_f1", "macro_f1_se")}})
        for name, result in results.items()
    ]
    rows = [pd.concat(parts, axis=1)]
    rows += [
        pd.DataFrame({name: result[key] for name, result in results.items()}) for key in ("f1", "patient_accuracy")
    ]
    best = max(results, key=lambda name: float(results[name]["accuracy"]))
    names = list(results[best]["f1"])
    matrix = confusion_matrix(tables[best]["truth"], tables[best]["prediction"], labels=names)
    confusion = pd.DataFrame(matrix, index=names, columns=names)
    blocks = [frame.to_string() for frame in rows]
    return "\n\n".join([*blocks, f"confusion of {best} (rows: author label)", confusion.to_string()])


def run(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every method in every fold, then the pooled tables and figures."""
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in settings.methods}
    for fold, truth in folds(settings.data, settings.out):
        for name in settings.methods:
            parts[name].append(predict(name, fold, truth, settings))
    tables = {}
    for name, tables_of_folds in parts.items():
        pooled = pd.concat(tables_of_folds, ignore_index=True)
        tables[name] = pooled[pooled["truth"] != MISSING]
        tables[name].to_csv(settings.out / f"oof_{name}.csv", index=False)
    results = {name: figures(table) for name, table in tables.items()}
    print(describe(results, tables))
    return results


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/carpall.yaml"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "carvae"], default=[*METHODS, "carvae"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_labels"))
    given = parser.parse_args()
    results = run(Settings(given.data, given.config, tuple(given.methods), given.out))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
