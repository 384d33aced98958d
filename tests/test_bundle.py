"""The bundle: what is loaded is what was saved, byte for byte, and nothing in it runs or names anybody."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GENES, config_of, counts_of, obs_of, tiny_bundle, write_store

from carvae.config import ModelConfig
from carvae.data.split import PatientSplit
from carvae.errors import BundleError, GeneError
from carvae.labels.tree import LabelTree
from carvae.model import bundle as module
from carvae.model.bundle import Bundle, leaf_parts, libraries, load
from carvae.model.bundle_files import FILES, NO_HASH, check_place
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.held_out import held_out_metrics
from carvae.model.network import Network
from carvae.model.responder import Linear, Recalibration, Responder

TWO_AXES = LabelTree.from_dict(
    {
        "name": "t",
        "axes": [
            {"name": "lineage", "nodes": [{"name": "CD4"}, {"name": "CD8"}]},
            {
                "name": "state",
                "nodes": [{"name": "memory", "nodes": [{"name": "TCM"}, {"name": "TEM"}]}, {"name": "CTL"}],
            },
        ],
    }
)
QUERY = ad.AnnData(
    counts_of(9, seed=5).astype(np.int32),
    obs=pd.DataFrame(index=[f"c{i}" for i in range(9)]),
    var=pd.DataFrame(index=list(GENES)),
)
TREES = {"two axes": TWO_AXES, "flat": LabelTree.flat(["x", "y"]), "none": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny_bundle(TWO_AXES).save(tmp_path / "model")


def soft_of(bundle: Bundle, query: ad.AnnData = QUERY, axis: str | None = None) -> pd.DataFrame:
    """The probability of every state."""
    soft = bundle.predict(query, axis, soft=True)
    assert isinstance(soft, pd.DataFrame)
    return soft


def rewrite(
    folder: Path, change: Callable[[dict[str, Any]], object], weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Change a bundle as one could who wants it to pass: every hash is made right again."""
    file = folder / "model.json"
    if weights is not None:
        save_file(weights, folder / FILES[0])
    spec = json.loads(file.read_text())
    spec["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    spec["sha256"] = NO_HASH
    change(spec)
    text = json.dumps(spec, indent=1)
    file.write_text(text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1))


@pytest.mark.parametrize("tree", TREES)
def test_a_loaded_model_says_what_the_saved_one_said(tmp_path: Path, tree: str) -> None:
    made = tiny_bundle(TREES[tree])
    found = load(made.save(tmp_path / "model"))
    assert (found.genes, found.tree, found.signatures, found.config) == (
        made.genes,
        made.tree,
        made.signatures,
        made.config,
    )
    assert (found.n_categories, found.gene_policy, found.provenance) == (
        made.n_categories,
        made.gene_policy,
        made.provenance,
    )
    assert (found.metrics, found.card, found.bundle_id) == (made.metrics, made.card, made.bundle_id)
    assert len(found.bundle_id) == 12
    for name, tensor in made.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor), name
    assert np.array_equal(found.get_latent_representation(QUERY), made.get_latent_representation(QUERY))
    for axis in made.axes:
        pd.testing.assert_frame_equal(soft_of(found, QUERY, axis), soft_of(made, QUERY, axis))
    assert not found.network.training
    assert all(p.requires_grad for p in found.network.parameters())


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = load(saved).save(tmp_path / "again")
    for name in ("model.json", *FILES):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_predictions_are_by_cell_and_named(saved: Path) -> None:
    found, before = load(saved), QUERY.copy()
    assert found.axes == ("state", "lineage")
    states, soft = found.predict(QUERY), soft_of(found)
    assert isinstance(states, pd.Series)
    assert list(soft.columns) == ["TCM", "TEM", "CTL"]
    assert soft.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-6)
    assert states.tolist() == [str(state) for state in soft.idxmax(axis=1)]
    assert set(found.predict(QUERY, "lineage")) <= {"CD4", "CD8"}
    shuffled = QUERY[::-1, ::-1].copy()
    pd.testing.assert_frame_equal(soft_of(found, shuffled)[::-1], soft, rtol=1e-5)
    assert (QUERY.X != before.X).nnz == 0
    assert not [*QUERY.obs, *QUERY.obsm, *QUERY.uns]


def test_a_cell_does_not_depend_on_its_company(saved: Path) -> None:
    found = load(saved)
    whole = found.get_latent_representation(QUERY)
    alone = np.concatenate([found.get_latent_representation(QUERY[i : i + 1].copy()) for i in range(9)])
    assert whole == pytest.approx(alone, abs=1e-6)


def test_ensembl_ids_are_as_good_as_symbols() -> None:
    genes = ("CD3E", "CD8A", "LAG3", "TOX")
    bundle, counts = tiny_bundle(TWO_AXES, genes), counts_of(5, len(genes))
    ids = ["ENSG00000198851", "ENSG00000153563", "ENSG00000089692", "ENSG00000198846"]
    by_id = ad.AnnData(counts, var=pd.DataFrame({"gene_ids": ids}, index=["a", "b", "c", "d"]))
    by_symbol = ad.AnnData(counts, var=pd.DataFrame(index=list(genes)))
    assert np.array_equal(bundle.get_latent_representation(by_id), bundle.get_latent_representation(by_symbol))


def test_names_that_mapping_added_are_found_by_their_digest_alone(tmp_path: Path) -> None:
    made = tiny_bundle(TWO_AXES)
    assert made.digest("sample", "new A") == "e44e026c35d671a1fe9c13b677649d8a"  # as in bundles that were given away
    rows_AH = torch.arange(8.0).reshape(2, 4)
    made.network.vae.decoder.add_rows({"sample": rows_AH})
    made.mapped = {"sample": (made.digest("sample", "new A"), made.digest("sample", "7"))}
    found = load(made.save(tmp_path / "model"))
    assert (found.mapped, found.n_rows) == (made.mapped, {"sample": 5})
    assert torch.equal(found.network.vae.decoder.rows()["sample"][3:], rows_AH)
    rows = found.rows_of("sample", ["7", 7, "of training", "new A"])
    assert (rows.tolist(), rows.dtype) == ([4, 4, -1, 3], np.int64)
    assert tiny_bundle(None).rows_of("sample", ["7", "new A"]).tolist() == [-1, -1]
    with pytest.raises(BundleError, match="no covariate 'assay'; it has none"):
        tiny_bundle(None, n_categories={}).rows_of("assay", ["x"])


def test_what_predicts_outcomes_is_saved_with_the_rest(tmp_path: Path) -> None:
    made, part = tiny_bundle(TWO_AXES), np.array([1.0, 2.0])
    linear = Linear(("n_cells", "fraction TEM"), part, part, part, part[None], np.array([0.5]), "binary")
    about = ("pca", linear, (linear, linear), ("NR", "CR"), "binary", ("d1",), 20, 2)
    made.responder = Responder(*about, Recalibration(0.5, 0.1), {"pca": 0.6})
    found = load(made.save(tmp_path / "model")).responder
    assert found is not None
    assert found.describe() == made.responder.describe()
    assert {k: v.tolist() for k, v in found.tensors().items()} == {
        k: v.tolist() for k, v in made.responder.tensors().items()
    }
    assert len(found.refits) == 2


def test_what_is_no_number_in_json_is_never_written(tmp_path: Path) -> None:
    made = tiny_bundle(None)
    made.metrics = {"accuracy": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        made.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_versions_of_the_libraries_are_those_that_are_installed() -> None:
    assert libraries() == {name: version(name) for name in ("torch", "scvi-tools", "anndata", "lightning", "numpy")}


def test_a_part_that_one_leaf_alone_has_weighs_what_sharing_leaves_it() -> None:
    tree = LabelTree.flat([f"{lineage} {state}" for lineage in ("CD4", "CD8") for state in ("CTL", "TEM")])
    (parts_SF,) = leaf_parts(tree, ModelConfig(label_sharing=0.75)).values()
    assert torch.equal(parts_SF[:, -4:], 0.25 * torch.eye(4))
    assert set(parts_SF[:, :-4].unique().tolist()) == {0.0, 1.0}
    assert leaf_parts(None, ModelConfig()) == {}


def test_a_model_without_labels_or_axis_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="trained without labels"):
        tiny_bundle(None).predict(QUERY)
    with pytest.raises(Exception, match=r"no axis 'stat'.*'state'"):
        tiny_bundle(TWO_AXES).predict(QUERY, "stat")
    with pytest.raises(GeneError, match=r"only 25\.0% of the model's 12 genes"):
        tiny_bundle(TWO_AXES).predict(QUERY[:, :3].copy())


# damage


def refused(folder: Path) -> None:
    with pytest.raises(BundleError):
        load(folder)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Peers load 55 of 60 changed models without a word. Here every byte of every file is changed, each in its turn."""
    saved = tiny_bundle(TREES["flat"], GENES[:3], {}).save(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name in ("model.json", *FILES):
        file = saved / name
        good = file.read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 8) if place % 3 else int(rng.integers(1, 256))
            file.write_bytes(bad)
            try:
                load(saved)
            except BundleError:
                continue
            pytest.fail(f"{name}: byte {place} changed from {good[place]} to {bad[place]} unnoticed")
        file.write_bytes(good)
    load(saved)


def test_every_truncation_and_addition_is_noticed(saved: Path) -> None:
    for name in ("model.json", *FILES):
        file = saved / name
        good = file.read_bytes()
        for bad in (*(good[:n] for n in range(0, len(good), max(1, len(good) // 40))), good[:-1], good + b"\n"):
            file.write_bytes(bad)
            refused(saved)
        file.unlink()
        with pytest.raises(BundleError, match=f"no {name}" if name == "model.json" else f"'{name}' is missing"):
            load(saved)
        file.write_bytes(good)
    load(saved)


def test_a_changed_byte_is_told_with_the_file_and_the_remedy(saved: Path) -> None:
    card = saved / "card.md"
    card.write_bytes(card.read_bytes().replace(b"c", b"k", 1))
    with pytest.raises(
        BundleError, match=r"model: 'card.md' was changed after the model was saved; copy .* or retrain"
    ):
        load(saved)


def test_what_is_no_bundle_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no model bundle .*output folder of `carvae train`"):
        load(tmp_path / "nowhere")
    (tmp_path / "model.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BundleError, match="is no model description"):
        load(tmp_path)
    (tmp_path / "model.json").write_text("[" * 100_000)
    refused(tmp_path)


def test_a_newer_layout_is_refused_by_name(saved: Path) -> None:
    """Even where a later carvae hashes otherwise: the number is read first."""
    rewrite(saved, lambda spec: spec.update(format=99))
    with pytest.raises(BundleError, match="has layout 99, newer than 7; upgrade carvae"):
        load(saved)
    file = saved / "model.json"
    file.write_text(file.read_text().replace('"format": 99', '"format": 98'))
    with pytest.raises(BundleError, match="has layout 98, newer than 7; upgrade carvae"):
        load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    for name in load_file(saved / FILES[0]):
        weights = load_file(saved / FILES[0])
        weights[name].view(-1)[-1] = value
        rewrite(saved, lambda _: None, weights)
        with pytest.raises(BundleError, match=f"weights '{name}' are not finite"):
            load(saved)
        rewrite(saved, lambda _: None, tiny_bundle(TWO_AXES).network.state_dict())


CRAFTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda spec: spec.update(files={}),
    "no card": lambda spec: spec["files"].pop("card.md"),
    "another file": lambda spec: spec["files"].update({"../../etc/passwd": "0"}),
    "files are a list": lambda spec: spec.update(files=[]),
    "no genes": lambda spec: spec.pop("genes"),
    "one gene less": lambda spec: spec["genes"].pop(),
    "genes are a number": lambda spec: spec.update(genes=3),
    "tree is text": lambda spec: spec.update(tree="tree"),
    "tree is empty": lambda spec: spec.update(tree={}),
    "tree gone": lambda spec: spec.update(tree=None),
    "a leaf more": lambda spec: spec["tree"]["axes"][0]["nodes"].append({"name": "new"}),
    "signatures are text": lambda spec: spec.update(signatures="x"),
    "architecture unknown": lambda spec: spec["architecture"].update(n_heads=3),
    "a wide network": lambda spec: spec["architecture"].update(n_hidden=10**9, n_latent=10**9),
    "a deep network": lambda spec: spec["architecture"].update(n_layers=10**9),
    "many batches": lambda spec: spec["covariates"].update(sample=10**12),
    "batches are text": lambda spec: spec["covariates"].update(sample="many"),
    "provenance": lambda spec: spec["provenance"].update(__class__="os.system"),
    "format is text": lambda spec: spec.update(format="1"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_description_that_does_not_fit_is_refused_though_its_hashes_are_right(saved: Path, name: str) -> None:
    """No memory is taken for what a description claims before the weights have it."""
    rewrite(saved, CRAFTED[name])
    refused(saved)


def test_weights_of_another_kind_are_refused(saved: Path) -> None:
    good = load_file(saved / FILES[0])
    name = next(iter(good))
    for bad in (
        {k: v for k, v in good.items() if k != name},
        good | {"extra": torch.zeros(1)},
        good | {name: good[name][:1].clone()},
        {k: v.half() for k, v in good.items()},
    ):
        rewrite(saved, lambda _: None, bad)
        refused(saved)


def test_loading_runs_nothing_and_opens_nothing_else(saved: Path, tmp_path: Path) -> None:
    """Peer fault: pickled models. An audit hook sees every file that is opened and every process that is started."""
    load(saved)  # whatever is imported on first use
    seen: list[tuple[str, str]] = []
    listening = True

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event in {
            "open",
            "exec",
            "compile",
            "os.system",
            "subprocess.Popen",
            "socket.connect",
            "pickle.find_class",
        }:
            seen.append((event, str(arguments[0]) if arguments else ""))

    sys.addaudithook(listen)
    load(saved)
    listening = False
    assert {Path(what).parent for event, what in seen if event == "open"} == {saved}
    assert not [entry for entry in seen if entry[0] != "open"]
    assert {p.suffix for p in saved.iterdir()} == {".json", ".md", ".safetensors"}


# saving


def test_a_folder_that_is_no_bundle_is_refused_and_untouched(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "thesis.docx").write_text("years of work")
    (results / "model.json").write_text("somebody else's")
    (tmp_path / "file").write_text("a file")
    said = {results: "'thesis.docx', which is no part of a bundle; choose", tmp_path / "file": "is a file, and a model"}
    for place, words in said.items():
        with pytest.raises(BundleError, match=words):
            tiny_bundle(None).save(place)
    assert (results / "thesis.docx").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "results"]


def test_what_a_user_put_beside_the_model_is_not_taken_away(saved: Path) -> None:
    check_place(saved)
    (saved / "A.h5ad").write_text("annotated")
    with pytest.raises(BundleError, match=r"'A.h5ad', which is no part of a bundle"):
        tiny_bundle(None).save(saved)
    assert (saved / "A.h5ad").read_text() == "annotated"
    assert load(saved).tree == TWO_AXES


def test_an_empty_folder_and_an_older_bundle_are_replaced(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "empty").mkdir()
    load(tiny_bundle(None).save(tmp_path / "empty"))
    assert load(tiny_bundle(None).save(saved)).tree is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model"]


def test_a_failed_save_leaves_the_old_bundle(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Bundle, "_describe", fails)
    with pytest.raises(OSError, match="disk full"):
        tiny_bundle(None).save(saved)
    monkeypatch.undo()
    assert load(saved).tree == TWO_AXES
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# privacy


PATIENTS = {"Jane-Roe-1971": 14, "MRN0042": 12, "j.doe@clinic.org": 10}


def test_no_patient_sample_study_or_path_is_in_the_bundle(tmp_path: Path) -> None:
    """Of a bundle made from a whole cohort with scores, card and covariates: the bytes of all its files."""
    obs = obs_of(PATIENTS, "SecretTrial")
    obs["sample"] = ["biopsy_" + p for p in obs["patient"]]
    obs["label"] = (["TCM", "CTL"] * 18)[: len(obs)]
    config = config_of("SecretTrial")
    store = write_store(tmp_path / "PrivateFolder" / "s", counts_of(len(obs)), obs)
    cohort = Cohort.assemble(store, config)
    rows = np.arange(len(obs))
    held = (obs["patient"] == "MRN0042").to_numpy()
    split = PatientSplit(rows[~held], rows[held], ("MRN0042",))
    network = Network(len(GENES), cohort.n_categories, leaf_parts(cohort.tree, config.model), config.model).eval()
    made = tiny_bundle(None)
    made.network, made.tree, made.config, made.n_categories = network, cohort.tree, config.model, cohort.n_categories
    made.metrics = held_out_metrics(network, cohort, split, 0) | {"epochs": 1}
    made.card = write_card(made)
    folder = made.save(tmp_path / "out" / "model")
    everything = b"".join(file.read_bytes() for file in folder.iterdir())
    for name in (*PATIENTS, *obs["sample"], "SecretTrial", "PrivateFolder", str(tmp_path), "nowhere.h5ad"):
        assert name.encode() not in everything, name
    assert b"1 patient(s) that this training did not see" in everything
    assert load(folder).n_categories == {"study": 1, "sample": 3}


def test_the_card_tells_the_runs_own_numbers() -> None:
    made = tiny_bundle(TWO_AXES)
    assert "None: no labelled patient was held out" in write_card(made)
    assert "30 cells of 3 patients in 1 study; 12 genes" in write_card(made)
    score = {
        "n_cells": 7,
        "accuracy": 0.5,
        "macro_f1": 0.25,
        "balanced_accuracy": 0.75,
        "ece": 0.125,
        "recall": {"CTL": 0.9, "TCM": 0.6},
        "confusion": [[4, 0, 0], [1, 2, 0], [0, 0, 0]],
        "leaves": ["CTL", "TCM", "TEX"],
    }
    made.metrics = {
        "held_out": {"state": score},
        "held_out_patients": 2,
        "macro_f1_by_missing_genes": {"0": 0.25, "0.5": 0.2},
        "refit": True,
    }
    card = write_card(made)
    assert "| 0.500 | 0.250 | 0.750 | 0.125 |" in card
    assert "| CTL | 4 | 0.900 |" in card
    assert "| TCM | 3 | 0.600 |" in card
    assert "not scored (no held-out cell): TEX" in card
    assert "chose the epoch: the scores are slightly optimistic" in card
    assert "trained again on all patients" in card
    assert "Weak labels" not in card
    score["recall"] = {"CTL": 0.9}
    card = write_card(made)
    assert "not scored (no held-out cell): TCM, TEX" in card
    assert "| accuracy | calibration error |" in card
    for word in ("macro-f1", "balanced accuracy", "0.250", "0.750"):
        assert word not in card.lower()


@pytest.mark.gpu
def test_a_bundle_says_the_same_on_the_gpu(saved: Path) -> None:
    on_gpu, on_cpu = load(saved, "cuda"), load(saved, "cpu")
    assert on_gpu.get_latent_representation(QUERY) == pytest.approx(on_cpu.get_latent_representation(QUERY), abs=1e-4)
    assert module.load(saved).network.vae.log_theta_G.device.type == "cuda"
