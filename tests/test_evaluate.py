"""``carvae evaluate`` from a config to a folder of figures, on simulated studies."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import yaml
from trained import PROGRAMMES, World, carvae, settings, write_config

import carvae as package
from carvae.config import Config, EvaluateConfig
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.errors import EvaluateError
from carvae.evaluate import check_integration, checked_methods, installed
from carvae.evaluation import figures, runs
from carvae.evaluation.cells import WHOLE, Cells
from carvae.evaluation.folds import folds_of
from carvae.evaluation.own import carvae as own_method
from carvae.model.bundle import load

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["carvae", "majority", "knn"]
QUICK = {"min_steps": 40, "max_epochs": 1, "calibration_folds": 2, "refit": True}


def eval_settings(folder: Path, output: Path, **evaluate: Any) -> dict[str, Any]:
    """An evaluation of the study in which every cell is labelled, on two of its patients."""
    given = {
        "methods": METHODS,
        "hold_out": ["sim_lymphoma_P1", "sim_lymphoma_P2", "sim_lymphoma_P3"],
        "depths": [0.3],
        "umis": [500],
        "missing": [0.2, 0.7],
        "integration_cells": 0,
    }
    config = settings(folder, output, train=QUICK, evaluate=given | evaluate)
    config["ingest"]["studies"] = {"sim_lymphoma": config["ingest"]["studies"]["sim_lymphoma"]}
    return config


@pytest.fixture(scope="module")
def evaluated(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "out"
    answer = carvae("evaluate", write_config(output.with_name("eval.yaml"), eval_settings(world.folder, output)))
    assert answer.code == 0, answer.err
    return output


def test_the_folder_holds_figures_table_pictures_and_card(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    methods = metrics["designs"]["patient"]["methods"]
    assert list(methods) == METHODS
    assert metrics["identifiability"]["verdict"] == "identifiable"
    for name in METHODS:
        assert 0 <= methods[name]["macro_f1"]["low"] <= methods[name]["macro_f1"]["value"] <= 1
        assert {row["kind"] for row in methods[name]["sweeps"]} == {"depth", "umi", "missing"}
    assert {"ece_before", "set_coverage", "set_size", "unknown"} <= set(methods["carvae"])
    assert methods["carvae"]["accuracy"]["value"] > methods["majority"]["accuracy"]["value"]
    difference = metrics["designs"]["patient"]["differences"]["majority"]["accuracy"]["value"]
    expected = methods["carvae"]["accuracy"]["value"] - methods["majority"]["accuracy"]["value"]
    assert difference == pytest.approx(expected)
    table = pd.read_csv(evaluated / "table.csv")
    row = table[(table["method"] == "carvae") & (table["where"] == "all") & (table["figure"] == "macro_f1")]
    assert row["value"].item() == pytest.approx(methods["carvae"]["macro_f1"]["value"])
    drawn = sorted(path.name for path in evaluated.glob("*.png"))
    names = ("confusion", "methods", "reliability", "selective", "sweeps")
    assert drawn == [f"patient_{name}.png" for name in names]
    for name in drawn:
        head = (evaluated / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:24])) > 200
    assert set(drawn) <= set(figures.FILES)


def test_the_card_states_the_run_and_names_no_patient(evaluated: Path) -> None:
    card = (evaluated / "card.md").read_text()
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for heading in ("Intended use", "Data", "Limits", "TRIPOD+AI", "How sure it is", "Fewer counts, fewer genes"):
        assert f"## {heading}" in card
    assert f"{metrics['designs']['patient']['methods']['carvae']['macro_f1']['value']:.3f}" in card
    assert "not stated in evaluate.licences" in card
    assert "(refused by default)" in card
    assert not [patient for patient in metrics["designs"]["patient"]["folds"] if patient in card]


def test_a_second_run_asks_nothing_again(evaluated: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = {path: path.stat().st_mtime_ns for path in evaluated.with_name("out.work").rglob("*.npz")}
    assert len(before) == 3 * len(METHODS)
    first = json.loads((evaluated / "metrics.json").read_text())
    answer = carvae("evaluate", evaluated.with_name("eval.yaml"))
    assert answer.code == 0
    assert "3 of 3 folds are answered already" in caplog.text
    assert "carvae minus each other" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((evaluated / "metrics.json").read_text()) == first


def test_carvae_is_asked_as_its_own_verb_answers(world: World, tmp_path: Path) -> None:
    config = Config.parse(eval_settings(world.folder, tmp_path / "out", hold_out=["sim_lymphoma_P1"]))
    cells = Cells.read(config)
    plan = runs.Plan(config, cells, "x", folds_of("patient", cells, config.evaluate), ("carvae",))
    task = plan.task(plan.folds[0], 0)
    task.folder.mkdir(parents=True)
    said = own_method(task).says(task.fold.query, WHOLE)
    bundle = load(task.folder / "carvae")
    assert bundle.provenance.n_cells == task.fold.train.size
    study = world.studies["sim_lymphoma"]
    query = study[(study.obs["donor_id"] == "sim_lymphoma_P1").to_numpy()].copy()
    answer = package.annotate(query, bundle)
    names = [cells.leaves.index(name) for name in answer.uns["carvae"]["states"][cells.axis]]
    np.testing.assert_allclose(said.probability_NS[:, names], answer.obsm["carvae_probability"], atol=1e-5)
    np.testing.assert_allclose(said.novelty_N, answer.obs["carvae_novelty"], atol=1e-5)


def test_states_nested_in_batches_get_no_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = list(PROGRAMMES)[:3]
    nested = tuple(
        dataclasses.replace(STUDIES[0], name=f"lab_{i}", vocabulary={}, states=(state,))
        for i, state in enumerate(states)
    )
    simulation = SimulationSettings(studies=nested, n_cells=60)
    write_studies(simulate_studies(np.random.default_rng(0), PROGRAMMES, simulation), tmp_path)
    study = {"obs": dict(nested[0].columns), "label": "cell_type"}
    config = {
        "output": str(tmp_path / "out"),
        "ingest": {"studies": {s.name: study | {"path": str(tmp_path / f"{s.name}.h5ad")} for s in nested}},
        "evaluate": {"designs": ["patient", "study"], "integration_cells": 0},
    }
    answer = carvae("evaluate", write_config(tmp_path / "eval.yaml", config))
    assert answer.code == 0, answer.err
    assert "not identifiable: all states (nested in" in caplog.text
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["identifiability"]["verdict"] == "not identifiable"
    assert metrics["designs"] == {}
    assert len(pd.read_csv(tmp_path / "out" / "table.csv")) == 0
    assert "Not identifiable: all states" in (tmp_path / "out" / "card.md").read_text()
    assert not (tmp_path / "out.work").exists()


def test_each_state_held_out_is_scored_by_novelty(world: World, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = eval_settings(
        world.folder, output, designs=["state"], methods=["majority", "knn"], hold_out=["effector/cytotoxic"]
    )
    answer = carvae("evaluate", write_config(tmp_path / "eval.yaml", config))
    assert answer.code == 0, answer.err
    methods = json.loads((output / "metrics.json").read_text())["designs"]["state"]["methods"]
    assert methods["majority"]["mean_auroc"]["value"] == 0.5
    assert set(methods["knn"]["states"]) == {"effector/cytotoxic"}
    assert (output / "state_novelty.png").exists()
    assert "New states: each held out in turn" in (output / "card.md").read_text()


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ({"methods": ["carvae", "scanvy"]}, "'scanvy', which is no method; the nearest is 'scanvi'"),
        ({"methods": []}, "evaluate.methods is empty"),
        ({"designs": ["study"]}, "at least two studies"),
        ({"hold_out": ["sim_lymphoma_P11"]}, "the nearest is 'sim_lymphoma_P1'"),
        ({"designs": ["patients"]}, "evaluate.designs"),
        ({"depths": [1.5]}, "evaluate.depths"),
        ({"seeds": []}, "evaluate.seeds"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    world: World, tmp_path: Path, evaluate: dict[str, Any], says: str
) -> None:
    config = eval_settings(world.folder, tmp_path / "out", **evaluate)
    answer = carvae("evaluate", write_config(tmp_path / "eval.yaml", config))
    assert answer.code == 1
    assert says in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("found", "methods", "says"),
    [
        (None, ("carvae", "knn"), "scib-metrics is not installed"),
        (object(), ("carvae",), "components of `knn`"),
    ],
)
def test_what_scores_mixing_is_asked_for_first(found: Any, methods: tuple[str, ...], says: str) -> None:
    with mock.patch("importlib.util.find_spec", return_value=found):
        with pytest.raises(EvaluateError, match=says):
            check_integration(EvaluateConfig(), methods)
        check_integration(EvaluateConfig(integration_cells=0), methods)
        check_integration(EvaluateConfig(designs=("state",)), methods)


def test_studies_without_labels_have_nothing_to_score(world: World, tmp_path: Path) -> None:
    config = eval_settings(world.folder, tmp_path / "out")
    paediatric = settings(world.folder, tmp_path / "x")["ingest"]["studies"]["sim_paediatric"]
    config["ingest"]["studies"] = {"sim_paediatric": paediatric}
    answer = carvae("evaluate", write_config(tmp_path / "eval.yaml", config))
    assert answer.code == 1
    assert "no study has labels" in answer.err


def test_a_folder_of_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("years")
    answer = carvae("evaluate", write_config(tmp_path / "e.yaml", eval_settings(world.folder, tmp_path / "out")))
    assert answer.code == 1
    assert "'thesis.docx', which is no part of an evaluation" in answer.err


def test_a_method_that_is_not_installed_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed(("carvae", "celltypist")) == ("carvae",)
    assert "celltypist is not installed" in caplog.text
    with pytest.raises(EvaluateError, match="nearest is 'knn'"):
        checked_methods(["kn"])


def test_the_packaged_evaluation_is_of_the_packaged_recipe() -> None:
    recipe, evaluation = (
        yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("carpall.yaml", "eval_carpall.yaml")
    )
    for section in ("ingest", "model", "train"):
        assert recipe[section] == evaluation[section]
    assert evaluation["evaluate"]["designs"] == ["patient"]
