"""A model as a repository's folder, and back: the same model, with its card, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import tiny_bundle
from trained import World, carvae, sha256

from carvae.errors import BundleError
from carvae.labels.tree import LabelTree
from carvae.model.bundle import load
from carvae.model.hub import from_folder, readme, to_folder


def test_there_and_back_is_the_same_model(world: World, tmp_path: Path) -> None:
    export = ("hub", "export", world.bundle, "--out", tmp_path / "repo", "--licence")
    answer = carvae(*export, "cc-by-4.0", "--name", "T cells")
    assert (answer.code, answer.out) == (0, f"{tmp_path / 'repo'}\n")
    answer = carvae("hub", "import", tmp_path / "repo", "--out", tmp_path / "model")
    assert answer.code == 0, answer.err
    assert sha256(tmp_path / "model") == sha256(world.bundle)
    assert load(tmp_path / "repo").bundle_id == load(world.bundle).bundle_id  # the folder itself is a model
    text = (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc-by-4.0"
    assert fields["library_name"] == "carvae"
    held_out = load(world.bundle).metrics["held_out"]
    scores = {result["task"]["name"]: result["metrics"][1]["value"] for result in fields["model-index"][0]["results"]}
    assert scores == {f"cell labelling, {axis}": round(score["macro_f1"], 4) for axis, score in held_out.items()}
    assert (world.bundle / "card.md").read_text(encoding="utf-8") in body
    assert carvae(*export, "mit").code == 0
    text = (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "mit"


def test_the_hub_reads_the_fields() -> None:
    hub = pytest.importorskip("huggingface_hub")
    bundle = tiny_bundle(LabelTree.flat(["x", "y"]))
    bundle.metrics = {"held_out": {"state": {"accuracy": 0.5, "macro_f1": 0.25, "n_cells": 8}}}
    for licence in ("cc-by-4.0", "other"):
        card = hub.ModelCard(readme(bundle, licence, "a: 'name'"))
        assert card.data.license == licence
        assert card.data.model_name == "a: 'name'"
        assert sorted(result.metric_value for result in card.data.eval_results) == [0.25, 0.5]
        assert card.text.rstrip().endswith("# card")


@pytest.mark.parametrize(("said", "nearest"), [("cc-by-4", "cc-by-4.0"), ("GPL-3.0-only", "gpl-3.0"), ("MITT", "mit")])
def test_a_licence_that_the_hub_does_not_know_is_refused_with_the_nearest(
    tmp_path: Path, said: str, nearest: str
) -> None:
    model = tiny_bundle(None).save(tmp_path / "model")
    answer = carvae("hub", "export", model, "--out", tmp_path / "repo", "--licence", said)
    assert answer.code == 1
    assert f"{said.lower()!r} is none that Hugging Face knows; the nearest is {nearest!r}" in answer.err
    assert not (tmp_path / "repo").exists()
    repo = to_folder(model, tmp_path / "repo", "CC-BY-4.0", "m")  # as SPDX writes it
    assert "license: cc-by-4.0\n" in (repo / "README.md").read_text(encoding="utf-8")


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    model = tiny_bundle(None).save(tmp_path / "model")
    repo = to_folder(model, tmp_path / "repo", "mit", "m")
    (repo / "weights.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BundleError, match="git lfs pull"):
        from_folder(repo, tmp_path / "back")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(BundleError, match="no part of a bundle"):
        to_folder(model, tmp_path / "full", "mit", "m")
    with pytest.raises(BundleError):
        from_folder(model, tmp_path / "full")
    answer = carvae("hub", "export", model, "--out", model, "--licence", "mit")
    assert answer.code == 1
    assert "is the model itself" in answer.err
    assert carvae("hub", "export", tmp_path / "gone", "--out", tmp_path / "x", "--licence", "mit").code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model", "repo"]
