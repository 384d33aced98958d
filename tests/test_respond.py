"""``carvae respond``: what a bundle keeps of outcomes, and what is said of each patient of a query."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from trained import PROGRAMMES, World, carvae, settings, sha256, write_config

from carvae import report
from carvae.config import PredictConfig
from carvae.data.patients import Patients
from carvae.data.readers import open_source
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.model.bundle import Bundle, load
from carvae.model.responder import Recalibration, Responder
from carvae.model.response import Head, HeadSettings, fit_head
from carvae.page import outcomes
from carvae.page.annotated import read_annotated
from carvae.page.blocks import Grid, Text
from carvae.page.facts import Facts
from carvae.respond import FEW, FEW_CELLS
from carvae.response.cells import described_query, of_samples, with_outcomes
from carvae.response.learn import drawn_anew, learn
from carvae.section_patient import ClonesConfig
from carvae.section_respond import RespondConfig

QUICK = HeadSettings(n_members=2, n_cells=20, n_steps=15)
CONFIG = RespondConfig(columns={"outcome": "response"}, levels=(("NR",), ("CR",)))


@dataclass(frozen=True)
class Cohort:
    bundle: Bundle
    folder: Path
    patients: Patients
    query: ad.AnnData


@pytest.fixture(scope="module")
def cohort(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Twenty patients described by the trained model, whose states differ by outcome; a bundle that learned of them."""
    designs = tuple(replace(design, n_patients=20, days=(0,)) for design in STUDIES[2:3])
    simulated = SimulationSettings(studies=designs, n_cells=800, batch_effect=0.4)
    (query,) = simulate_studies(np.random.default_rng(1), PROGRAMMES, simulated)
    query.obs["product"] = "axi-cel"
    bundle = load(world.bundle, device="cpu")
    described = described_query(bundle, [open_source(query)], query.obs["library_id"].to_numpy(str), PredictConfig(), 0)
    named = query.obs.rename(columns={"library_id": "sample", "subject": "patient"})
    patients = with_outcomes(described, of_samples(named), CONFIG)
    bundle.responder = learn(patients, 0, lambda name: bundle.digest("product", name), QUICK)
    folder = bundle.save(tmp_path_factory.mktemp("respond") / "model")
    return Cohort(bundle, folder, patients, query)


def respond(query: ad.AnnData, model: Path, folder: Path) -> Any:
    query.write_h5ad(folder / "query.h5ad")
    return carvae("respond", folder / "query.h5ad", "--model", model, "--out", folder / "out.csv")


def test_every_patient_gets_a_probability_with_an_interval(cohort: Cohort, tmp_path: Path) -> None:
    answer = respond(cohort.query, cohort.folder, tmp_path)
    assert answer.code == 0, answer.err
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["patient"].tolist() == sorted(set(cohort.query.obs["subject"]))
    p = table["probability CR"]
    assert ((table["low"] < p) & (p < table["high"])).all()
    assert table["low"].min() > 0
    assert table["high"].max() < 1
    mine = dict(zip(cohort.patients.patient_R, cohort.bundle.responder.score(cohort.patients)[0], strict=True))  # type: ignore[union-attr]
    assert p.tolist() == pytest.approx([mine[name] for name in table["patient"]], abs=1e-4)
    few = table["cells"] < FEW_CELLS
    assert (table["note"] == FEW).eq(few).all()


def test_a_saved_bundle_predicts_as_the_one_in_memory_and_names_nobody(cohort: Cohort) -> None:
    opened = load(cohort.folder, device="cpu")
    assert opened.responder is not None
    assert cohort.bundle.responder is not None
    mine, theirs = (b.responder.score(cohort.patients) for b in (cohort.bundle, opened))  # type: ignore[union-attr]
    assert theirs[0] == pytest.approx(mine[0], abs=1e-5)
    assert theirs[1] == pytest.approx(mine[1], abs=1e-5)
    text = b"".join(path.read_bytes() for path in sorted(cohort.folder.iterdir()))
    for name in ("axi-cel", *cohort.patients.patient_R[:3], *cohort.patients.sample_R[:3]):
        assert str(name).encode() not in text


def with_head(cohort: Cohort) -> Bundle:
    """The same bundle, where the head predicts."""
    bundle = copy.copy(cohort.bundle)
    assert cohort.bundle.responder is not None
    heads = tuple(fit_head(cohort.patients, QUICK, seed) for seed in range(3))
    bundle.responder = replace(cohort.bundle.responder, method="head", predictor=heads[0], refits=heads[1:])
    return bundle


def test_where_the_head_predicts_the_states_of_its_attention_are_written(cohort: Cohort, tmp_path: Path) -> None:
    model = with_head(cohort).save(tmp_path / "model")
    opened = load(model, device="cpu").responder
    assert opened is not None
    assert isinstance(opened.predictor, Head)
    answer = respond(cohort.query, model, tmp_path)
    assert answer.code == 0, answer.err
    states = pd.read_csv(tmp_path / "out.states.csv")
    shares = states.groupby("sample")[["share of cells", "share of attention"]].sum()
    assert shares.to_numpy() == pytest.approx(1, abs=1e-4)


def test_a_report_says_what_respond_says_and_for_research_only(cohort: Cohort, tmp_path: Path) -> None:
    asked = respond(cohort.query, cohort.folder, tmp_path)
    assert asked.code == 0, asked.err
    annotated = tmp_path / "A.h5ad"
    answer = carvae("annotate", tmp_path / "query.h5ad", "--model", cohort.folder, "--out", annotated)
    assert answer.code == 0, answer.err
    bundle = load(cohort.folder, device="cpu")
    said, refused = report._outcomes(read_annotated(annotated, ClonesConfig()), bundle, 0)
    assert said is not None
    assert refused == ""
    pd.testing.assert_frame_equal(said.fillna(""), pd.read_csv(tmp_path / "out.csv").fillna(""), check_dtype=False)
    section = outcomes.section(cast(Facts, SimpleNamespace(outcomes=said, bundle=bundle, no_outcomes="")))
    text, grid = section.blocks[0], section.blocks[1]
    assert isinstance(text, Text)
    assert text.text.startswith("For research only.")
    assert isinstance(grid, Grid)
    assert list(grid.frame.index) == said["patient"].tolist()
    assert grid.frame["probability CR"].iloc[0] == f"{said['probability CR'].iloc[0]:.3f}"


def test_a_model_that_learned_no_outcomes_says_so(world: World, tmp_path: Path) -> None:
    answer = respond(world.query, world.bundle, tmp_path)
    assert answer.code == 1
    assert "predicts no outcomes; train one with `respond.columns" in answer.err
    assert not (tmp_path / "out.csv").exists()


def test_contradictory_outcomes_are_one_sentence_and_nothing_is_written(cohort: Cohort, tmp_path: Path) -> None:
    query = cohort.query.copy()
    words = query.obs["response"].astype(str).to_numpy()
    words[0] = {"CR": "NR", "NR": "CR"}[words[0]]
    query.obs["response"] = words
    answer = respond(query, cohort.folder, tmp_path)
    assert answer.code == 1
    assert f"patient {query.obs['subject'].iloc[0]!r} has the outcomes 'CR' and 'NR'" in answer.err
    assert not (tmp_path / "out.csv").exists()


def test_a_sample_of_two_products_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    query = cohort.query.copy()
    query.obs["product"] = np.where(np.arange(query.n_obs) % 2, "axi-cel", "tisa-cel")
    answer = respond(query, cohort.folder, tmp_path)
    assert answer.code == 1
    assert "has cells of 2 products; name samples by product" in answer.err
    assert not (tmp_path / "out.csv").exists()


def sheet_of(query: ad.AnnData, path: Path) -> pd.DataFrame:
    """A table of samples, written as a spreadsheet does: two samples a patient, of whom the query says nothing."""
    names = sorted(query.obs["library_id"].astype(str).unique())
    sheet = pd.DataFrame({"sample": names, "patient": [f"{n // 2:03d}" for n in range(len(names))]})
    sheet = sheet.assign(product="axi-cel", timepoint=["product", "D28"] * (len(names) // 2))
    sheet.to_csv(path, index=False, sep=";", encoding="utf-8-sig")
    return sheet


def test_the_table_of_samples_says_who_the_patients_are(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = cohort.query.copy()
    query.obs = query.obs.drop(columns=["subject", "product", "response"])
    query.write_h5ad(tmp_path / "query.h5ad")
    sheet = sheet_of(query, tmp_path / "samples.csv")
    arguments = ("respond", tmp_path / "query.h5ad", "--model", cohort.folder, "--out", tmp_path / "out.csv")
    setting = f"predict.sheet={tmp_path / 'samples.csv'}"
    assert carvae(*arguments, setting).code == 0
    found = pd.read_csv(tmp_path / "out.csv", dtype={"patient": str}).fillna("")
    assert found["patient"].tolist() == sorted(set(sheet["patient"]))
    assert (found["samples"] == 2).all()
    assert not found["note"].str.contains("product").any()
    assert "names no patient" not in caplog.text
    sheet.assign(response=["CR", "NR"] * (len(sheet) // 2)).to_csv(tmp_path / "samples.csv", index=False)
    answer = carvae(*arguments, setting)
    assert answer.code == 1
    assert "samples.csv cannot be used: column 'response'" in answer.err
    assert "'000': 'CR', 'NR'" in answer.err


def test_one_patient_of_an_unseen_product_is_answered_with_care(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = cohort.query[cohort.query.obs["subject"] == cohort.query.obs["subject"].iloc[0]].copy()
    query.obs["product"] = "tisa-cel"
    with caplog.at_level("INFO", "carvae"):
        answer = respond(query, cohort.folder, tmp_path)
    assert answer.code == 0, answer.err
    assert "one patient: whether a prediction is right cannot be told from one" in caplog.text
    (note,) = pd.read_csv(tmp_path / "out.csv")["note"]
    assert "product 'tisa-cel' was not learned from" in note


@pytest.mark.parametrize(
    ("column", "value", "note"),
    [("product", None, "the product is not named"), ("product", "axi-cel", "")],
)
def test_a_product_that_is_known_needs_no_note(
    cohort: Cohort, tmp_path: Path, column: str, value: str | None, note: str
) -> None:
    query = cohort.query.copy()
    if value is None:
        del query.obs[column]
    assert respond(query, cohort.folder, tmp_path).code == 0
    said = pd.read_csv(tmp_path / "out.csv")["note"]
    assert said.str.contains("product").all() == bool(note)


def test_out_must_be_a_table(cohort: Cohort, tmp_path: Path) -> None:
    answer = carvae("respond", tmp_path, "--model", cohort.folder, "--out", tmp_path / "x.h5ad")
    assert answer.code == 1
    assert "end it in .csv" in answer.err


def test_draws_keep_study_and_outcome_and_count_a_patient_drawn_twice_as_two(cohort: Cohort) -> None:
    drawn = drawn_anew(cohort.patients, np.random.default_rng(0))
    assert sorted(drawn.outcome_R) == sorted(cohort.patients.outcome_R)
    assert len(set(drawn.patient_R)) == 20
    assert len(set(drawn.sample_R)) < 20


def test_recalibration_keeps_the_order() -> None:
    p = np.linspace(0.01, 0.99, 30)
    again = Recalibration(0.3, -1.0)(p)
    assert (np.diff(again) > 0).all()
    assert Recalibration()(p) == pytest.approx(p)


def test_training_learns_outcomes_or_refuses_before_it_trains(tmp_path: Path) -> None:
    designs = tuple(replace(design, n_patients=16, days=(0,)) for design in STUDIES[:1])
    simulated = SimulationSettings(studies=designs, n_cells=320)
    studies = simulate_studies(np.random.default_rng(0), PROGRAMMES, simulated)
    write_studies(studies, tmp_path)
    config = settings(
        tmp_path,
        tmp_path / "model",
        respond={"columns": {"outcome": "response"}, "levels": [["NR"], ["CR"]]},
        train={"min_steps": 10, "max_epochs": 1},
    )
    config["ingest"]["studies"] = {"sim_lymphoma": config["ingest"]["studies"]["sim_lymphoma"]}
    assert carvae("train", write_config(tmp_path / "good.yaml", config)).code == 0
    responder = load(tmp_path / "model").responder
    assert isinstance(responder, Responder)
    assert responder.n_patients == 16
    assert responder.levels == ("NR", "CR")
    assert "head" in responder.inner
    before = sha256(tmp_path / "model")
    config["respond"]["missing"] = ["NR"]
    config["respond"]["levels"] = [["SD"], ["CR"]]
    answer = carvae("train", write_config(tmp_path / "bad.yaml", config))
    assert answer.code == 1
    assert "too few patients: 0 SD, 8 CR" in answer.err
    assert sha256(tmp_path / "model") == before
