"""Mapping: rows for new batches are learned, kept only where they help, and change nothing of the reference."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GENES, counts_of, tiny_bundle
from trained import World, carvae, sha256

from carvae.config import MapConfig
from carvae.data.sparse import CountsCSR
from carvae.errors import BundleError, ConfigError, CountsError
from carvae.labels.tree import LabelTree
from carvae.map import map_query
from carvae.model.bundle import Bundle, load
from carvae.model.mapping import PRIOR_VARIANCE, Cells, RowFit, prior_variance

COVARIATES = {"sample": 3, "study": 2, "assay": 1}
TREE = LabelTree.flat(["x", "y"])
NAMES = ("Jane-Roe-1971", "MRN0042")


def a_model(n_covariates: int = 2) -> Bundle:
    """A model whose every weight is random, and which is sure of z."""
    made = tiny_bundle(TREE, n_categories=dict(list(COVARIATES.items())[:n_covariates]))
    torch.manual_seed(1)
    for name, tensor in made.network.state_dict().items():
        if "parts" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.5)
    made.network.vae.decoder.scale.weight.data.mul_(3)
    log_variance = made.network.vae.encoder.log_variance
    log_variance.weight.data.zero_()
    log_variance.bias.data.fill_(-9.0)
    return made


def drawn(model: Bundle, n_cells: int, shift: float, seed: int = 0) -> ad.AnnData:
    """Cells of two samples whose counts are drawn from the decoder at their own embedding, off its mean rows by shift.

    Embedding and counts depend on each other, so that counts are drawn a few times in turn.
    """
    rng, decoder = np.random.default_rng(seed), model.network.vae.decoder
    code_N = np.arange(n_cells) % 2
    off_BH = torch.from_numpy(rng.normal(size=(2, decoder.first.out_features)) * shift).float()
    counts = counts_of(n_cells, seed=seed)
    for _ in range(5):
        with torch.no_grad():
            z_NK = model.network.vae.encoder(CountsCSR.from_scipy(counts)).mean_NK
            mean_H = torch.stack([decoder.mean_row(name) for name in decoder.rows()]).sum(0)
            hidden_NH = decoder.first(z_NK) + mean_H + off_BH[code_N]
            hidden_NH = torch.nn.functional.layer_norm(hidden_NH, hidden_NH.shape[1:]).relu()
            p_NG = decoder.scale(hidden_NH).softmax(1).numpy().astype(np.float64)
            theta_G = model.network.vae.log_theta_G.exp().numpy()
        counts = type(counts)(rng.poisson(60 * p_NG * rng.gamma(theta_G, 1 / theta_G, p_NG.shape)))
    obs = pd.DataFrame(
        {"sample": np.array(NAMES)[code_N], "study": "SecretTrial", "assay": "5p"},
        index=[f"c{i}" for i in range(n_cells)],
    )
    return ad.AnnData(counts.astype(np.int32), obs=obs, var=pd.DataFrame(index=list(GENES)))


@pytest.mark.parametrize("n_covariates", [1, 2, 3])
def test_the_reference_is_bit_identical(n_covariates: int, tmp_path: Path) -> None:
    """Every weight, every embedding and label, and what is decoded in old, and in unknown, batches."""
    model = a_model(n_covariates)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    query, reference = drawn(model, 200, 3.0), drawn(model, 50, 0.0, seed=5)
    mapped = map_query(query, model)
    assert mapped.helped
    found = load(mapped.bundle.save(tmp_path / "m"))
    assert found.n_rows == dict(list({"sample": 5, "study": 3, "assay": 2}.items())[:n_covariates])
    assert found.n_categories == model.n_categories
    for name, tensor in before.items():
        assert torch.equal(model.network.state_dict()[name], tensor), name
        assert torch.equal(found.network.state_dict()[name][: len(tensor)] if tensor.dim() else tensor, tensor), name
    for cells in (reference, query):
        assert np.array_equal(found.get_latent_representation(cells), model.get_latent_representation(cells))
        pd.testing.assert_frame_equal(found.predict(cells, soft=True), model.predict(cells, soft=True))
    z_NK = torch.from_numpy(model.get_latent_representation(reference))
    for code in itertools.product(*(range(-1, n) for n in model.n_categories.values())):
        covariate_NC = torch.tensor(code).expand(len(z_NK), -1)
        hidden = [bundle.network.vae.decoder.hidden(z_NK, covariate_NC) for bundle in (model, found)]
        assert torch.equal(*hidden), code


def test_rows_are_the_best_there_are() -> None:
    """No other row nearby has a smaller penalised loss, but for a nat in 400 cells."""
    model = a_model(1)
    query = drawn(model, 400, 3.0)
    cells = Cells(query.X.tocsr(), np.zeros(len(GENES), bool), 3 + np.arange(400)[:, None] % 2)
    fit = RowFit(model.network, {"sample": 2})
    rows = fit.fit(cells, seed=0)["sample"]
    mean_H, variance = model.network.vae.decoder.mean_row("sample").detach(), prior_variance(model.network)["sample"]

    def loss(rows_AH: torch.Tensor) -> float:
        penalty = float((rows_AH - mean_H).square().sum()) / (2 * variance)
        return float(fit.nll(cells, {"sample": rows_AH}, 0).sum()) + penalty

    best, rng = loss(rows), torch.Generator().manual_seed(0)
    for _ in range(20):
        assert loss(rows + 0.3 * torch.nn.functional.normalize(torch.randn(rows.shape, generator=rng))) > best - 1
    assert best < loss(mean_H.expand(2, -1)) - 100


def test_the_gain_is_that_of_held_out_cells_and_told_per_sample() -> None:
    model = a_model()
    mapped = map_query(drawn(model, 300, 3.0), model, MapConfig(held_out=0.25))
    table = mapped.samples.set_index("sample")
    assert list(table.index) == sorted(NAMES)
    assert table["n_held_out"].tolist() == [37, 37]
    assert np.allclose(table["gain"], table["nll"] - table["nll_mapped"])
    record = mapped.bundle.metrics["mapped"][-1]
    assert record["gain"] == pytest.approx((table["gain"] * table["n_held_out"]).sum() / 74)
    assert record["gain"] > 2 * record["standard_error"] > 0
    assert table[["row_sample", "row_study"]].to_numpy().tolist() == [["3", "2"], ["4", "2"]]
    assert "kept" in mapped.bundle.card


def test_rows_that_do_not_help_are_not_kept(tmp_path: Path) -> None:
    model = a_model()
    model.network.vae.decoder.scale.weight.data.zero_()  # whatever is in the rows, all cells are expected alike
    mapped = map_query(drawn(model, 200, 3.0), model)
    assert not mapped.helped
    assert mapped.bundle.n_rows == model.n_categories
    assert set(mapped.samples["row_sample"]) == {"-1"}
    assert "not kept" in mapped.bundle.card
    kept = load(mapped.bundle.save(tmp_path / "m")).network.state_dict()
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(kept[name], tensor), name


def test_a_second_query_adds_its_rows_below_those_of_the_first(tmp_path: Path) -> None:
    model = a_model()
    first = map_query(drawn(model, 200, 3.0), model).bundle
    query = drawn(model, 200, 3.0, seed=9)
    query.obs["sample"] = np.where(query.obs["sample"] == NAMES[0], NAMES[0], "new")
    second = map_query(query, load(first.save(tmp_path / "m")))
    assert second.bundle.n_rows == {"sample": 6, "study": 3}
    assert second.bundle.rows_of("sample", ["new", *NAMES, "other"]).tolist() == [5, 3, 4, -1]
    for name, rows in first.network.vae.decoder.rows().items():
        assert torch.equal(second.bundle.network.vae.decoder.rows()[name][: len(rows)], rows)
    with pytest.raises(BundleError, match=r"every batch of the query \(sample, study\) was mapped before"):
        map_query(query, second.bundle)


def test_no_name_is_in_the_bundle_and_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = a_model()
    for out in ("a", "b"):
        map_query(drawn(model, 200, 3.0), model, seed=4).bundle.save(tmp_path / out)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    everything = b"".join(file.read_bytes() for file in (tmp_path / "a").iterdir())
    for name in (*NAMES, "SecretTrial"):
        assert name.encode() not in everything
    other = a_model()
    other.provenance = type(other.provenance)("0.1", 0, "e" * 64, 30, 3, 1, False, {})
    assert other.digest("sample", "p") != model.digest("sample", "p") != model.digest("study", "p")


def test_a_batch_that_the_query_does_not_name_stays_at_the_mean() -> None:
    model = a_model(3)
    query = drawn(model, 200, 3.0)
    del query.obs["assay"]
    assert map_query(query, model).bundle.n_rows == {"sample": 5, "study": 3, "assay": 1}
    query.obs["kit"] = query.obs.pop("sample").to_numpy()
    query.obs["study"] = query.obs["study"].where(np.arange(200) < 100)
    found = map_query(query, model, MapConfig(obs={"assay": "kit"}, constants={"sample": "one"}))
    assert found.bundle.n_rows == {"sample": 4, "study": 3, "assay": 3}
    assert found.samples["row_study"].tolist() == ["-1 2"]


def test_an_expectation_in_scvi_tools_takes_the_rows_and_the_mean_stays(tmp_path: Path) -> None:
    """Cells of mapped batches have their rows' expression there, and cells of unknown batches what they had before."""
    from carvae.model.scvi_bridge import to_scvi

    model = a_model()
    query = drawn(model, 120, 3.0)
    mapped = map_query(query, model).bundle
    query.obs["code"] = mapped.rows_of("sample", query.obs["sample"])
    query.obs["study_code"] = mapped.rows_of("study", query.obs["study"])
    query = query[: len(query) // 2].copy()
    columns = {"sample": "code", "study": "study_code"}
    known, unknown, before = to_scvi(mapped, query, columns), to_scvi(mapped, query), to_scvi(model, query)
    with torch.inference_mode():
        z_NK = torch.from_numpy(model.get_latent_representation(query))
        for scvi_model, names in ((known, columns), (unknown, None), (before, None)):
            tensors = next(iter(scvi_model._make_data_loader(scvi_model.adata, batch_size=len(query))))
            inferred = scvi_model.module.inference(**scvi_model.module._get_inference_input(tensors))
            inferred["z"] = inferred["qz"].loc
            generated = scvi_model.module.generative(**scvi_model.module._get_generative_input(tensors, inferred))
            codes = np.full((len(query), 2), -1) if names is None else query.obs[list(names.values())].to_numpy()
            decoder = (mapped if names else model).network.vae.decoder
            expected = decoder.scale(decoder.hidden(z_NK, torch.from_numpy(codes.astype(np.int64)))).softmax(1)
            torch.testing.assert_close(generated["px"].scale, expected, rtol=1e-3, atol=1e-5)


def rewritten(folder: Path, weights: dict[str, torch.Tensor], change: Callable[[dict[str, Any]], object]) -> Path:
    """A bundle changed by one who made its hashes right again."""
    save_file(weights, folder / "weights.safetensors")
    spec = json.loads((folder / "model.json").read_text())
    change(spec)
    spec["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in spec["files"]}
    spec["sha256"] = "0" * 64
    text = json.dumps(spec, indent=1)
    own = hashlib.sha256(text.encode()).hexdigest()
    (folder / "model.json").write_text(text.replace("0" * 64, own, 1))
    return folder


def test_a_bundle_of_the_layout_before_mapping_is_mapped(tmp_path: Path) -> None:
    model = a_model()
    folder = model.save(tmp_path / "m")
    old = rewritten(folder, load_file(folder / "weights.safetensors"), lambda s: (s.pop("mapped"), s.update(format=2)))
    assert load(old).n_rows == model.n_categories
    assert map_query(drawn(model, 100, 3.0), old).bundle.n_rows == {"sample": 5, "study": 3}


@pytest.mark.parametrize("what", ["no decoder", "no such covariate", "other number", "no list"])
def test_rows_that_do_not_fit_the_description_are_refused(tmp_path: Path, what: str) -> None:
    model = a_model()
    folder = map_query(drawn(model, 100, 3.0), model).bundle.save(tmp_path / "m")
    weights = load_file(folder / "weights.safetensors")
    if what == "no decoder":
        weights = {name: tensor for name, tensor in weights.items() if "decoder" not in name}
    change: dict[str, Callable[[dict[str, Any]], object]] = {
        "no decoder": lambda spec: None,
        "no such covariate": lambda spec: spec["mapped"].update(tissue=["0" * 32]),
        "other number": lambda spec: spec["mapped"]["sample"].append("0" * 32),
        "no list": lambda spec: spec.update(mapped=7),
    }
    rewritten(folder, weights, change[what])
    answer = carvae("map", "nowhere.h5ad", "--model", folder, "--out", tmp_path / "o")
    assert answer.code == 1
    assert "does not describe a model of this carvae" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_table_of_one_row_has_the_variance_of_the_others() -> None:
    model = a_model(3)
    variance = prior_variance(model.network)
    rows = {name: table.detach() for name, table in model.network.vae.decoder.rows().items()}
    assert variance["sample"] == pytest.approx(float(rows["sample"].var(0).mean()))
    assert variance["assay"] == pytest.approx((variance["sample"] + variance["study"]) / 2)
    assert prior_variance(tiny_bundle(None, n_categories={"study": 1}).network) == {"study": PRIOR_VARIANCE}


def test_genes_that_were_not_measured_say_nothing() -> None:
    """What the decoder expects of an absent gene must not be weighed against its zeros."""
    model = a_model(1)
    query = drawn(model, 60, 3.0)
    panel = query.X.multiply(np.arange(len(GENES)) != 4).tocsr()
    panel.eliminate_zeros()
    losses = []
    for absent in (True, False):
        cells = Cells(panel, np.arange(len(GENES)) == (4 if absent else -1), np.full((60, 1), -1))
        for more in (0.0, 3.0):
            changed = a_model(1)
            changed.network.vae.decoder.scale.bias.data[4] += more
            losses.append(RowFit(changed.network, {}).nll(cells, {}, 0))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (losses[3] > losses[2]).mean() > 0.9  # where it was measured, its zeros count against it
    assert np.median(losses[3] - losses[2]) > 1


@pytest.mark.parametrize(
    ("change", "config", "kind", "words"),
    [
        ({}, {"obs": {"tissue": "sample"}}, ConfigError, "'tissue', which the model does not correct for"),
        ({"obs": ["sample", "study"]}, {}, ConfigError, "the query names no sample, study; name columns with map.obs"),
        ({"cells": 20}, {}, CountsError, "20 cells, too few to hold 10 out"),
    ],
    ids=["no covariate", "no names", "few cells"],
)
def test_what_cannot_be_mapped_is_said(
    change: dict[str, object], config: dict[str, object], kind: type[Exception], words: str
) -> None:
    model = a_model()
    query = drawn(model, 100, 3.0)[: change.get("cells", 100)].copy()
    query.obs = query.obs.drop(columns=change.get("obs", []))
    if "obs" in change:  # without a name of the sample all cells are of "AnnData"
        query.obs["sample"] = None
    with pytest.raises(kind, match=words):
        map_query(query, model, MapConfig(**config))


def test_a_model_without_covariates_has_no_rows_to_add() -> None:
    with pytest.raises(BundleError, match="corrects for no covariate, so there are no rows to add"):
        map_query(drawn(a_model(), 100, 1.0), tiny_bundle(TREE, n_categories={}))
    with pytest.raises(BundleError, match="no covariate 'assay'; it has sample, study"):
        a_model().rows_of("assay", ["x"])


def test_the_verb_writes_a_model_that_says_the_same(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sha256(world.bundle)
    answer = carvae("map", world.query_path, "--model", world.bundle, "--out", tmp_path / "m")
    assert answer.code == 0, answer.err
    assert "embedding, labels, novelty and verdicts do not depend on the rows" in caplog.text
    assert sha256(world.bundle) == before
    table = pd.read_csv(tmp_path / "m.samples.csv")
    assert set(table["sample"]) == set(world.query.obs["sample"] if "sample" in world.query.obs else table["sample"])
    said = []
    for model, name in ((world.bundle, "a"), (tmp_path / "m", "b")):
        assert carvae("annotate", world.query_path, "--model", model, "--out", tmp_path / f"{name}.csv").code == 0
        said.append((tmp_path / f"{name}.csv").read_bytes())
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("out", "settings", "words"),
    [
        ("model", (), "is the model itself"),
        ("new", ("plan.draws=2",), "this verb reads map.* and predict.* and seed alone"),
        ("new", ("map.obs={tissue: sample}",), "which the model does not correct for"),
        ("full", (), "is no part of a bundle"),
    ],
)
def test_refusals_leave_nothing(world: World, tmp_path: Path, out: str, settings: tuple[str, ...], words: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sha256(world.bundle)
    target = world.bundle if out == "model" else tmp_path / out
    answer = carvae("map", world.query_path, "--model", world.bundle, "--out", target, *settings)
    assert answer.code == 1
    assert words in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert sha256(world.bundle) == before
