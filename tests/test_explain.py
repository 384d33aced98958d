"""Explanations: terms add up to the change of the log-odds, say what the weights say, and come out as tables."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from tiny import GENES, counts_of, tiny_bundle
from trained import PROGRAMMES, World, carvae

from carvae.config import label_file
from carvae.data.readers import open_source
from carvae.data.sparse import CountsCSR
from carvae.errors import ConfigError
from carvae.explain import MIN_CELLS, REST
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.model.attribution import Asked, Baseline, attribute, baseline, measured_share
from carvae.model.bundle import Bundle, load
from carvae.model.network import Network

TREE = LabelTree.flat(["a", "b", "a b"])  # names share words, and so parts
PANEL = counts_of(30)
LEAF_N = np.arange(30) % 3


def a_network(inverse_depth: float) -> Network:
    """Random weights; the gene view weighs n / (n + 1 / inverse_depth)."""
    network = tiny_bundle(TREE).network
    torch.manual_seed(2)
    for name, tensor in network.state_dict().items():
        if "parts" not in name:
            tensor.copy_(torch.randn(tensor.shape))
    network.head.get_buffer("inverse_depth").fill_(inverse_depth)
    network.head.get_buffer("depth_power").fill_(1)
    return network.eval()


def log_odds(network: Network, axis: str) -> np.ndarray[Any, Any]:
    """By the network's own forward pass, [N, S]: log probabilities less their mean over the states."""
    with torch.inference_mode():
        log_NS = network(CountsCSR.from_scipy(PANEL))[1][axis]
    return (log_NS - log_NS.mean(1, keepdim=True)).numpy()


@pytest.mark.parametrize("inverse_depth", [0.0, 0.05, 1e6], ids=["latent alone", "both", "genes alone"])
def test_terms_add_up_to_the_change_of_the_mixed_log_odds(inverse_depth: float) -> None:
    network, axis = a_network(inverse_depth), TREE.axes[0].name
    found = attribute(network, Asked(PANEL, axis, LEAF_N), baseline(PANEL, LEAF_N, 5))
    expected_N = log_odds(network, axis)[np.arange(30), LEAF_N]
    np.testing.assert_allclose(found.log_odds_N, expected_N, atol=1e-4)
    change_N = found.log_odds_N - found.baseline_N
    whole_N = (found.gene_NG + found.latent_NG).sum(1)
    np.testing.assert_allclose(whole_N, change_N, atol=0.02 * np.abs(change_N).max())
    assert np.abs(change_N).mean() > 0.1
    np.testing.assert_allclose(found.error(), whole_N - change_N, atol=1e-5)
    assert (np.abs(found.latent_NG).max() < 1e-4) == (inverse_depth > 1)
    assert (np.abs(found.gene_NG).max() == 0) == (inverse_depth == 0)


def test_terms_add_up_where_genes_were_not_measured() -> None:
    """What is expected of absent genes depends on the latent coordinates, and so on the genes that were measured."""
    network, axis = a_network(0.05), TREE.axes[0].name
    network.head.completion.get_buffer("share_G").fill_(1 / 12)
    present = np.arange(12) % 3 > 0
    panel = sp.csr_matrix(PANEL.multiply(present[None, :]))
    share = measured_share(network, present)
    assert share == pytest.approx(8 / 12)
    found = attribute(network, Asked(panel, axis, LEAF_N, present), baseline(panel, LEAF_N, 5, share))
    expected_NS = np.log(network.predict(panel, present_G=present).probability_NS[axis])
    expected_N = (expected_NS - expected_NS.mean(1, keepdims=True))[np.arange(30), LEAF_N]
    np.testing.assert_allclose(found.log_odds_N, expected_N, atol=1e-3)
    np.testing.assert_allclose(found.error(), 0, atol=0.02 * np.abs(found.log_odds_N - found.baseline_N).max())
    assert np.abs(found.gene_NG[:, ~present]).max() == np.abs(found.latent_NG[:, ~present]).max() == 0


def test_the_gene_view_is_exact() -> None:
    """Of the genes alone: a gene's term is the change of the log-odds when it alone changes."""
    network, axis = a_network(1e6), TREE.axes[0].name
    start = Baseline(np.zeros(12, np.float32), np.zeros(12, np.float32))
    found = attribute(network, Asked(PANEL, axis, LEAF_N), start)
    np.testing.assert_allclose(found.error(), 0, atol=1e-4)
    classifier = network.head.axes[0]
    weight_GS = classifier.get_buffer("gene_weight_GF") @ classifier.get_buffer("parts_SF").t()
    weight_GS = (weight_GS - weight_GS.mean(1, keepdim=True)).numpy()
    value_NG = np.log1p(PANEL.toarray() * (1e4 / np.asarray(PANEL.sum(1))))
    np.testing.assert_allclose(found.gene_NG, np.asarray(value_NG) * weight_GS.T[LEAF_N], rtol=1e-3, atol=1e-3)


def test_the_latent_view_equals_integrated_gradients_over_all_genes() -> None:
    """Averaging the gradient behind the first layer is the same as in front of it."""
    from captum.attr import IntegratedGradients

    network, axis = a_network(0.0), TREE.axes[0].name
    start = baseline(PANEL, LEAF_N, 5)

    def forward(log1p_NG: torch.Tensor) -> torch.Tensor:
        encoder, classifier = network.vae.encoder, network.head.axes[0]
        first_NH = log1p_NG @ encoder.first.weight_GH + encoder.first.bias_H
        logits_NS: torch.Tensor = classifier(encoder.mean(encoder.later_layers(first_NH)))
        return logits_NS - logits_NS.mean(1, keepdim=True)

    log1p_NG = torch.from_numpy(np.log1p(PANEL.toarray())).float()
    from_NG = torch.from_numpy(start.log1p_G).expand_as(log1p_NG)
    expected = IntegratedGradients(forward).attribute(
        log1p_NG, from_NG, target=torch.from_numpy(LEAF_N), n_steps=128, method="gausslegendre"
    )
    found = attribute(network, Asked(PANEL, axis, LEAF_N), start)
    np.testing.assert_allclose(found.latent_NG, expected.detach().numpy(), atol=1e-4)


def test_the_baseline_is_the_mean_of_the_states() -> None:
    group_N = np.array([0] * 20 + [1] * 6 + [2] * 2 + [-1] * 2)
    found = baseline(PANEL, group_N, 5)
    dense = np.log1p(PANEL.toarray())
    np.testing.assert_allclose(found.log1p_G, (dense[:20].mean(0) + dense[20:26].mean(0)) / 2, rtol=1e-5)
    alone = baseline(PANEL, np.full(30, -1), 5)
    np.testing.assert_allclose(alone.log1p_G, dense.mean(0), rtol=1e-5)


def test_without_captum_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("captum"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs Captum; install it with: pip install 'carvae\[explain\]'"):
        attribute(a_network(0.1), Asked(PANEL, TREE.axes[0].name, LEAF_N), baseline(PANEL, LEAF_N, 5))


@pytest.fixture(scope="module")
def barcodes(world: World) -> list[str]:
    return [str(name) for name in open_source(world.query_path).cells.names()]


@pytest.fixture(scope="module")
def explained(world: World, barcodes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explained") / "o"
    asked = f"explain.barcodes=[{barcodes[3]}, {barcodes[77]}]"
    settings = (asked, "explain.label=true_state", "explain.n_genes=15", "predict.min_counts=5")
    answer = carvae("explain", world.query_path, "--model", world.bundle, "--out", out, *settings)
    assert answer.code == 0, answer.err
    return out


def test_planted_genes_speak_for_their_state(explained: Path) -> None:
    table = pd.read_csv(explained / "genes.csv")
    state = table[table["axis"] == "state"]
    planted = {name: set(genes) for name, genes in PROGRAMMES.items()}
    hits = {
        name: len(planted[name] & set(rows["gene"])) / len(rows)
        for name, rows in state.groupby("state")
        if name in planted and rows["n_cells"].iloc[0] >= 20
    }
    assert len(hits) >= 2
    assert np.mean([*hits.values()]) > 0.15, hits  # a program is one in a hundred of the model's genes
    np.testing.assert_allclose(table["attribution"], table["gene_view"] + table["latent_view"], atol=1e-9)
    assert (state.groupby("state")["attribution"].diff().dropna() <= 0).all()


def test_the_terms_of_a_cell_and_the_rest_are_its_log_odds(explained: Path, barcodes: list[str]) -> None:
    table = pd.read_csv(explained / "cells.csv")
    assert set(table["barcode"]) == {barcodes[3], barcodes[77]}
    for _, rows in table.groupby(["barcode", "axis"]):
        assert len(rows) == 16
        assert rows["gene"].iloc[-1] == REST
        change = rows["log_odds"].iloc[0] - rows["baseline_log_odds"].iloc[0]
        assert rows["attribution"].sum() == pytest.approx(change, abs=0.05)


def test_markers_are_means_over_the_cells_of_a_state(explained: Path, world: World) -> None:
    table = pd.read_csv(explained / "markers.csv")
    assert set(table["by"]) == {"predicted", "author"}
    source = open_source(world.query_path)
    counts = next(iter(source.chunks(10**6)))
    gene = next(name for name in table["gene"][table["mean"] > 0] if name in source.genes)
    column = source.genes.index(gene)
    total_N = np.asarray(counts.sum(1)).ravel()
    value_N = np.log1p(counts[:, column].toarray().ravel() * 1e4 / np.maximum(total_N, 1))
    for by in ("predicted", "author"):
        rows = table[(table["by"] == by) & (table["gene"] == gene)]
        assert rows["n_cells"].sum() == len(value_N)
        assert (rows["mean"] * rows["n_cells"]).sum() / len(value_N) == pytest.approx(value_N.mean())
        share = (rows["share_expressing"] * rows["n_cells"]).sum() / len(value_N)
        assert share == pytest.approx((value_N > 0).mean())
    assert matplotlib.image.imread(explained / "markers.png").std() > 0.01


def test_genes_that_are_not_there_are_named_and_not_shown_as_zero(explained: Path, world: World) -> None:
    missing = pd.read_csv(explained / "missing.csv")
    table = pd.read_csv(explained / "markers.csv")
    panel = load(world.bundle).genes
    assert set(missing[missing["what"] == "model"]["gene"]) <= set(panel)
    assert (missing["what"] == "model").sum() > 0  # the query lacks a tenth
    absent = set(missing[missing["what"] == "marker"]["gene"])
    assert absent
    assert set(table["gene"][table["mean"].isna()]) == absent


def test_where_genes_are_missing_no_gene_speaks_by_presence_for_every_state(world: World, tmp_path: Path) -> None:
    """Presence is to be there more than in the mean of the states, which not all of them can be."""
    poor = world.query[:, np.random.default_rng(0).random(world.query.n_vars) < 0.5]
    poor.write_h5ad(tmp_path / "poor.h5ad")
    settings = ("predict.min_counts=2", "predict.min_overlap=0.1", "explain.n_genes=10000")
    answer = carvae("explain", tmp_path / "poor.h5ad", "--model", world.bundle, "--out", tmp_path / "o", *settings)
    assert answer.code == 0, answer.err
    table = pd.read_csv(tmp_path / "o" / "genes.csv")
    table = table[(table["axis"] == "state") & (table["n_cells"] >= MIN_CELLS)]
    table = table[table.groupby("gene")["share_expressing"].transform("max") > 0]
    assert table["state"].nunique() > 2
    assert table.groupby("gene")["speaks_by"].agg(lambda by: "absence" in set(by)).all()


def test_cells_are_drawn_by_the_seed(world: World, tmp_path: Path) -> None:
    arguments = ("explain", world.query_path, "--model", world.bundle, "--out")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = ("explain.max_cells=60", "predict.min_counts=5", f"seed={seed}")
        assert carvae(*arguments, tmp_path / out, *settings).code == 0
    tables = [(tmp_path / out / "genes.csv").read_bytes() for out in "abc"]
    assert tables[0] == tables[1] != tables[2]
    assert not (tmp_path / "a" / "cells.csv").exists()
    assert pd.read_csv(tmp_path / "a" / "markers.csv").groupby("state")["n_cells"].first().sum() <= 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("explain.barcodes=[nobody]",), "explain.barcodes names 'nobody', and no cell of the query is called that"),
        (("explain.label=nothing",), "has no column 'nothing' for explain.label; it has"),
        (("explain.markers=nowhere",), "there is no packaged file 'labels/nowhere.yaml'"),
        (("predict.min_counts=100000",), "every cell of the query is unknown to the model"),
        (("map.held_out=0.5",), "this verb reads explain.* and predict.* and seed alone"),
    ],
    ids=["barcode", "label", "markers", "unknown", "other verb's"],
)
def test_refusals_leave_nothing(world: World, tmp_path: Path, settings: tuple[str, ...], words: str) -> None:
    answer = carvae("explain", world.query_path, "--model", world.bundle, "--out", tmp_path / "o", *settings)
    assert answer.code == 1
    assert words in answer.err
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_and_a_model_without_labels_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    answer = carvae("explain", world.query_path, "--model", world.bundle, "--out", tmp_path / "file")
    assert (answer.code, "is a file; explain writes its tables" in answer.err) == (1, True)
    made: Bundle = tiny_bundle(None, GENES)
    answer = carvae("explain", world.query_path, "--model", made.save(tmp_path / "m"), "--out", tmp_path / "o")
    assert (answer.code, "trained without labels, so there is nothing to explain" in answer.err) == (1, True)


def test_the_packaged_markers_hold_what_a_car_t_report_shows() -> None:
    markers = {gene for panel in Signatures.read(label_file("markers")).items for gene in panel.genes}
    wanted = "LAG3 PDCD1 HAVCR2 TOX TCF7 SELL CCR7 IL7R GZMB PRF1 MKI67 FOXP3".split()
    assert set(wanted) <= markers
