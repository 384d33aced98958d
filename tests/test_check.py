"""What would happen: told right, refused as the run would refuse it, and nothing done."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from trained import World, carvae, settings, sha256, write_config

from carvae.check import of_config, of_query
from carvae.config import Config
from carvae.forecast import FORWARD, MAX_CELLS, Pace, Work
from carvae.model.bundle import load
from carvae.model.cell_clones import Asked


def test_a_query_is_matched_with_the_model(world: World, tmp_path: Path) -> None:
    before = sha256(world.folder / world.query_path.name)
    checked = of_query(world.query_path, Config(), load(world.bundle), Asked())
    facts = checked.to_dict()
    result = tmp_path / "A.h5ad"
    assert carvae("annotate", world.query_path, "--model", world.bundle, "--out", result).code == 0
    annotated = ad.read_h5ad(result)
    receipt = json.loads(annotated.uns["carvae"]["genes"])
    assert facts["genes"] == receipt
    assert facts["cells"] == annotated.n_obs
    assert facts["bundle_id"] == annotated.uns["carvae"]["bundle_id"]
    assert facts["states"]["state"] == annotated.uns["carvae"]["states"]["state"].tolist()
    assert facts["unknown_of_tried"] == float(np.mean(annotated.obs["carvae_state"] == "unknown"))
    assert len(facts["patients"]) == world.query.obs["subject"].nunique()
    measured = {name.upper() for name in world.query.var_names}
    assert facts["markers_missing"]
    assert not set(facts["markers_missing"]) & measured
    assert facts["memory_bytes"] > 0
    assert facts["seconds"] >= 0
    text = checked.text()
    for words in ("counts", "in X", "patients", "genes found", "markers", "time", "memory", "device"):
        assert words in text
    assert sha256(world.folder / world.query_path.name) == before


def test_a_query_alone_is_described(world: World) -> None:
    answer = carvae("check", world.query_path)
    assert answer.code == 0, answer.err
    assert "human genes that are known" in answer.out
    assert "model" not in answer.out


@pytest.mark.parametrize("model", [True, False])
def test_what_would_be_refused_is_refused(world: World, tmp_path: Path, model: bool) -> None:
    broken = world.query.copy()
    broken.X = broken.X.astype(np.float32) * 0.37
    broken.write_h5ad(tmp_path / "q.h5ad")
    more = ("--model", world.bundle) if model else ()
    answer = carvae("check", tmp_path / "q.h5ad", *more)
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("carvae: ")
    assert "Traceback" not in answer.err


def test_counts_in_another_place_are_found_as_the_run_finds_them(world: World, tmp_path: Path) -> None:
    moved = world.query.copy()
    moved.layers["counts"] = moved.X.copy()
    moved.X = moved.X.astype(np.float32) * 0.37
    moved.write_h5ad(tmp_path / "q.h5ad")
    answer = carvae("check", tmp_path / "q.h5ad", "--model", world.bundle)
    assert answer.code == 0, answer.err
    assert "in layers/counts" in answer.out


def test_a_config_is_read_as_training_would(world: World, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m"))
    answer = carvae("check", path, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert [study["cells"] for study in facts["studies"]] == [160, 160, 160]
    assert [study["labelled"] for study in facts["studies"]] == [160, 160, 0]
    assert facts["studies"][1]["counts_in"] == ["layers/counts"]
    states = facts["labels"]["state"]
    assert 250 < sum(states["cells"].values()) + states["of_several_states"] <= 320  # some words say nothing of it
    assert states["of_several_states"] > 50
    assert facts["steps"] >= 150
    assert facts["networks"] == 1
    assert facts["seconds"] > facts["reading_seconds"]
    assert facts["step_seconds"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
    text = carvae("check", path, "train.calibration_folds=3").out
    assert "for 4 networks" in text
    assert re.search(r"time +at most about \d+ (s|minutes) \(\d+ s of it to read the studies\)", text)


def test_time_grows_with_the_work() -> None:
    pace = Pace(step=0.1, besides=1.0, n_labelled=100)
    one = Work(n_cells=1000, n_labelled=100, epochs=10, batches=8, networks=1)
    assert pace.of(one, 128) == pytest.approx(10 * 8 * 0.1 + 1.0)
    two = pace.of(replace(one, networks=2), 128)  # one is watched on patients that are held out
    assert two == pytest.approx(2 * 9.0 + FORWARD * 0.1 / 128 * 10 * 1000)
    assert pace.of(replace(one, networks=3), 128) > two + 9.0, "held-out cells are looked at again and again"
    assert pace.of(replace(one, n_labelled=10**9), 128) == pytest.approx(8.0 + MAX_CELLS / 100)


def test_time_that_cannot_be_foretold_is_no_refusal(world: World, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m"))
    answer = carvae("check", path, "train.devices=2")
    assert answer.code == 0
    assert "not foretold, since several processes would share the work" in answer.out
    answer = carvae("check", path, "train.lr=1e30")
    assert answer.code == 0
    assert "not foretold, since a try on 8 minibatches failed (the loss is not finite" in answer.out


def test_a_label_that_the_mapping_does_not_know_is_refused(world: World, tmp_path: Path) -> None:
    config = settings(world.folder, tmp_path / "m")
    config["ingest"]["studies"]["sim_lymphoma"]["mapping"] = "demo_leukaemia"
    trained = carvae("train", write_config(tmp_path / "c.yaml", config))
    checked = carvae("check", tmp_path / "c.yaml")
    assert checked.code == trained.code == 1
    assert checked.err.splitlines()[-1] in trained.err
    assert checked.out == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": {"covariates": ["assay"]}}, "model.covariates names 'assay'"),
        ({"train": {"accelerator": "cuda"}}, "train.accelerator is cuda"),
    ],
)
def test_settings_that_training_refuses_are_refused(
    world: World, tmp_path: Path, changed: dict[str, dict[str, object]], words: str
) -> None:
    import torch

    if "train" in changed and torch.cuda.is_available():
        pytest.skip("this machine has what the setting asks for")
    config = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m", **changed))
    answer = carvae("check", config)
    assert answer.code == 1
    assert words in answer.err


def test_a_config_needs_no_model_and_a_study(world: World, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", {"output": str(tmp_path / "m")})
    assert "--model is for a query" in carvae("check", path, "--model", world.bundle).err
    assert "ingest.studies is empty" in carvae("check", path).err


def test_weak_labels_are_told(world: World, tmp_path: Path) -> None:
    config = Config.parse(settings(world.folder, tmp_path / "m", labels={"weak": True}))
    assert "marked weak" in of_config(config).text()
