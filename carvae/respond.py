"""``carvae respond``: the outcome of each patient of a query, as a model that was trained with outcomes predicts it.

Axes: N cells, R samples, P patients, B draws of the training patients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from carvae.config import PredictConfig
from carvae.data.atomic import refuse_model, replacing_file
from carvae.data.patients import Floats, Patients
from carvae.data.readers import CountsSource, open_samples
from carvae.data.schema import inspect_obs, named_column, query_samples
from carvae.data.sheet import told_of_cells
from carvae.data.spreadsheet import write_table
from carvae.errors import BundleError, ConfigError, RespondError, SchemaError
from carvae.model.bundle import Bundle
from carvae.model.machine import load_on
from carvae.model.responder import Responder
from carvae.model.response import Head
from carvae.response.cells import Described, Model, described_query
from carvae.response.learn import sentence

log = logging.getLogger(__name__)

FEW_CELLS = 50
"""Cells of a patient below which care is due."""
FEW = f"fewer than {FEW_CELLS} cells"


def run(query: Path, model: Path, out: Path, predict: PredictConfig, seed: int = 0) -> Path:
    """Predict the outcome of every patient of a query, write ``out`` (a CSV), and return its path.

    Where the head predicts, ``<out>.states.csv`` says beside it which states its attention lies on.

    Raises
    ------
    CarvaeError
        The model predicts no outcomes, or the query cannot be used; nothing is written then.
    """
    bundle = load_on(model, predict)
    refuse(bundle, out)
    sources = open_samples(query, counts=predict.counts)
    obs = cells_of(sources, predict)
    described = described_query(bundle, sources, obs["sample"].to_numpy(str), predict, seed)
    table, states = predicted(bundle, described, obs)
    with replacing_file(out) as scratch:
        write_table(table, scratch)
    wrote = [out]
    if states is not None:
        wrote.append(out.with_name(f"{out.name.removesuffix('.gz').removesuffix('.csv')}.states.csv"))
        with replacing_file(wrote[1]) as scratch:
            write_table(states, scratch)
    log.info("wrote %s", " and ".join(map(str, wrote)))
    return out


def refuse(bundle: Bundle, out: Path) -> None:
    """Raise what `run` would raise before it looks at the query."""
    if not out.name.endswith((".csv", ".csv.gz")):
        raise ConfigError(f"--out {str(out)!r} is no table; end it in .csv or .csv.gz")
    refuse_model(out)
    if bundle.responder is None and not bundle.decodes:
        raise BundleError(
            "this model was given away by `carvae export --share`, which leaves out what predicts outcomes, since that "
            "was learned of single patients; ask whoever trained it for the whole model"
        )
    if bundle.responder is None or bundle.tree is None:
        raise BundleError(
            "this model predicts no outcomes; train one with `respond.columns: {outcome: response}` in the config of "
            "`carvae train`"
        )


def predicted(bundle: Bundle, described: Described, obs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """One row per patient, and the states that attention lies on where the head predicts."""
    responder = bundle.responder
    assert responder is not None
    assert bundle.tree is not None
    log.info("%s", sentence(responder.method, dict(responder.inner)))
    asked = asked_of(described, obs)
    score_R, refit_BR = responder.score(asked)
    rows = []
    for name in sorted(set(asked.patient_R)):
        own = np.flatnonzero(asked.patient_R == name)
        cells = int(asked.beside["n_cells"][own].sum())
        row = {"patient": name, "samples": own.size, "cells": cells, "method": responder.method}
        answer = _answer(responder, score_R[own], refit_BR[:, own])
        rows.append(row | answer | {"note": _note(bundle, asked, own, cells)})
    table = pd.DataFrame(rows)
    if len(table) == 1:
        log.info("one patient: whether a prediction is right cannot be told from one; see the scores of the model card")
    for note in sorted(set(table["note"]) - {""}):
        log.warning("%s: %s", ", ".join(table["patient"][table["note"] == note]), note)
    model = Model(bundle.network, bundle.genes, bundle.tree, bundle.signatures)
    return table, _states(responder.predictor, asked, model) if isinstance(responder.predictor, Head) else None


def cells_of(sources: Sequence[CountsSource], predict: PredictConfig) -> pd.DataFrame:
    """Sample, patient and product of each cell, and what ``predict.sheet`` says of it.

    Raises
    ------
    SchemaError
        A patient has several outcomes, a sample is of several patients or products, or the sheet cannot be used.
    """
    parts, unnamed = [], []
    for source in sources:
        sample_N, _ = query_samples(source.obs, source.name, predict.sample)
        _refuse_contradiction(source.obs, source.name)
        found = inspect_obs(source.obs, source.name, {}, {}, require=()).obs
        part = pd.DataFrame({"sample": sample_N.astype(str)})
        for name in ("patient", "product"):
            known = name in found
            part[name] = found[name].astype(object).to_numpy() if known else (sample_N if name == "patient" else np.nan)
        unnamed += [] if "patient" in found else [source.name]
        parts.append(part)
    obs = pd.concat(parts, ignore_index=True)
    told = told_of_cells(predict.sheet, obs["sample"])
    obs = obs.assign(**{str(column): told[column].astype(object) for column in told})
    if "patient" in told:
        obs["patient"] = obs["patient"].fillna(obs["sample"])
    elif unnamed:
        log.info("%s names no patient: every sample is taken for one (predict.sheet says who it is)", unnamed[0])
    for name in ("patient", "product"):
        several = obs.groupby("sample")[name].nunique()
        if (several > 1).any():
            which, n = several.idxmax(), several.max()
            raise SchemaError(f"sample {which!r} has cells of {n} {name}s; name samples by {name}")
    return obs


def _refuse_contradiction(obs: pd.DataFrame, name: str) -> None:
    patient, response = (named_column(list(map(str, obs.columns)), what) for what in ("patient", "response"))
    if len(patient) != 1 or len(response) != 1:
        return
    said = obs[[patient[0], response[0]]].astype("string").dropna().groupby(patient[0])[response[0]].unique()
    for person, words in said.items():
        if len(words) > 1:
            raise SchemaError(
                f"{name}: patient {person!r} has the outcomes {' and '.join(map(repr, sorted(words)))} in "
                f"obs[{response[0]!r}]; an outcome belongs to a patient, so keep one"
            )


def asked_of(described: Described, obs: pd.DataFrame) -> Patients:
    """The samples that have cells, as the prediction reads them; raises RespondError where none has."""
    kept = np.flatnonzero(described.table["n_cells"].to_numpy() > 0)
    if not kept.size:
        raise RespondError("no cell of the query has enough counts over the model's genes, so nothing can be predicted")
    table = described.table.iloc[kept]
    features = table.drop(columns=["sample", "n_cells", "median_counts"])
    of = obs.groupby("sample")[["patient", "product"]].first().loc[table["sample"]]
    return Patients(
        sample_R=table["sample"].to_numpy(object),
        patient_R=of["patient"].fillna("unknown patient").astype(str).to_numpy(object),
        study_R=np.full(len(table), "query", dtype=object),
        outcome_R=np.full(len(table), np.nan),
        columns=tuple(map(str, features)),
        x_RF=features.to_numpy(float),
        beside={"n_cells": table["n_cells"].to_numpy(float), "product": of["product"].fillna("").to_numpy(str)},
        bags={space: tuple(bags[r] for r in kept) for space, bags in described.bags.items()},
    )


def _answer(responder: Responder, score: Floats, refit_B: Floats) -> dict[str, float]:
    """Mean over the patient's samples with the 95% interval that the refits give, on the scale of the logit."""
    value, drawn = float(score.mean()), refit_B.mean(1)
    top = max(1, len(responder.levels) - 1)
    what = f"probability {responder.levels[-1]}" if responder.kind == "binary" else "prediction"
    if responder.kind == "time":
        half = float(norm.ppf(0.975) * drawn.std(ddof=1))
        return {what: value, "low": value - half, "high": value + half}
    edge = 1e-4
    share, draws = (np.clip(v / top, edge, 1 - edge) for v in (np.array(value), drawn))
    centre, half = np.log(share / (1 - share)), norm.ppf(0.975) * np.log(draws / (1 - draws)).std(ddof=1)
    low, high = (top / (1 + np.exp(-(centre + sign * half))) for sign in (-1, 1))
    return {what: value, "low": float(low), "high": float(high)}


def _note(bundle: Bundle, asked: Patients, own: NDArray[np.intp], cells: int) -> str:
    """What speaks for care."""
    assert bundle.responder is not None
    notes, known = [], bundle.responder.products
    for product in sorted(set(asked.beside["product"][own])) if known else []:
        if not product:
            notes.append("the product is not named, so that it may be one that was not learned from")
        elif bundle.digest("product", product) not in known:
            notes.append(f"product {str(product)!r} was not learned from: how good predictions are for it is not known")
    if cells < FEW_CELLS:
        notes.append(FEW)
    return "; ".join(notes)


def _states(head: Head, asked: Patients, model: Model) -> pd.DataFrame:
    """Share of cells and of attention of every state of the main axis, by sample."""
    axis = model.tree.axes[0]
    start = sum(len(a.leaves) for a in model.tree.axes)
    rows = []
    for sample, patient, bag in zip(asked.sample_R, asked.patient_R, asked.bags[head.space], strict=True):
        first = bag.shape[1] - start
        state_N = bag[:, first : first + len(axis.leaves)].argmax(1)
        weight_N = head.attention(bag)
        for s, leaf in enumerate(axis.leaves):
            of = state_N == s
            share = {"share of cells": float(of.mean()), "share of attention": float(weight_N[of].sum())}
            rows.append({"patient": patient, "sample": sample, "state": leaf} | share)
    return pd.DataFrame(rows)
