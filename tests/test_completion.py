"""Genes that a query lacks: what is expected of them is scikit-learn's ridge regression, and it keeps labels right."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from sklearn.linear_model import Ridge
from trained import World

from carvae.config import ModelConfig, PredictConfig
from carvae.data.loader import CellData
from carvae.data.readers import open_source
from carvae.data.residence import Resident
from carvae.data.sparse import CompactCSR, CountsCSR
from carvae.model.bundle import load
from carvae.model.completion import COUNTS_PER_CELL, RIDGE, Completion, fit_completion, log_normalised
from carvae.model.heads import StateHead
from carvae.model.network import Network
from carvae.model.query import Samples, read
from carvae.model.vae import Encoder

N, G, K = 300, 24, 3
CONFIG = ModelConfig(n_latent=K, n_hidden=8)


def cells(seed: int = 0) -> sp.csr_matrix:
    """Counts of genes that go up and down together, so that some tell of others."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(N, 2))
    mean = np.exp(place @ rng.normal(size=(2, G)) * 0.7 + 1)
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32))


def an_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(G, CONFIG).eval()


def fitted(counts: sp.csr_matrix, study: np.ndarray | None = None, unmeasured: np.ndarray | None = None) -> Completion:
    completion, n = Completion(G, K), counts.shape[0]
    data = CellData(
        counts=Resident(CompactCSR.from_scipy(counts), np.arange(n)),
        covariate_NC=torch.zeros(n, 0, dtype=torch.int64),
        unmeasured_SG=None if unmeasured is None else torch.from_numpy(unmeasured),
        study_N=torch.from_numpy(np.zeros(n, np.int64) if study is None else study),
        code_NA=torch.full((n, 1), -1),
        weight_NA=torch.ones(n, 1),
    )
    fit_completion(completion, an_encoder(), data, np.arange(n), np.random.default_rng(0))
    return completion


def values(counts: sp.csr_matrix) -> np.ndarray:
    dense = counts.toarray().astype(np.float64)
    return np.log1p(dense / np.maximum(dense.sum(1, keepdims=True), 1) * COUNTS_PER_CELL)


def latent(counts: sp.csr_matrix) -> np.ndarray:
    with torch.no_grad():
        return an_encoder()(CountsCSR.from_scipy(counts)).mean_NK.double().numpy()


def test_expected_values_are_the_ridge_regression_of_scikit_learn() -> None:
    counts = cells()
    completion, z_NK = fitted(counts), latent(counts)
    oracle = Ridge(alpha=RIDGE * N).fit(z_NK, values(counts)).predict(z_NK)
    identity = torch.eye(G)
    found = completion.logits(torch.from_numpy(z_NK).float(), torch.arange(G), identity)
    np.testing.assert_allclose(found.numpy(), oracle, rtol=1e-3, atol=1e-3)
    share = np.mean(counts.toarray() / np.maximum(counts.sum(1), 1), axis=0)
    np.testing.assert_allclose(completion.get_buffer("share_G").numpy(), np.asarray(share).ravel(), rtol=1e-4)


def test_a_gene_is_learned_from_the_studies_that_measured_it() -> None:
    """Of two studies with the same cells the second lacks genes: shares and expected values are those of the first."""
    counts = cells()
    unmeasured = np.zeros((2, G), np.bool_)
    unmeasured[1, :6] = True
    poorer = sp.csr_matrix(counts.multiply(~unmeasured[1][None, :]))
    both = sp.csr_matrix(sp.vstack([counts, poorer]))
    whole, found = fitted(counts), fitted(both, np.repeat([0, 1], N), unmeasured)
    np.testing.assert_allclose(found.get_buffer("share_G").numpy(), whole.get_buffer("share_G").numpy(), rtol=0.1)
    z = torch.from_numpy(latent(counts)).float()
    lacking = torch.arange(6)
    expected = whole.logits(z, lacking, torch.eye(G))
    torch.testing.assert_close(found.logits(z, lacking, torch.eye(G)), expected, rtol=1e-3, atol=1e-3)
    naive = fitted(both).logits(z, lacking, torch.eye(G))
    assert (naive - expected)[:, :6].abs().mean() > 1


def test_values_of_measured_genes_are_those_of_the_whole_cell() -> None:
    """Without the share, half of the genes would look twice as high."""
    counts = cells()
    completion, present = fitted(counts), np.arange(G) % 2 == 0
    absent = completion.absent(present)
    assert absent is not None
    part = CountsCSR.from_scipy(sp.csr_matrix(counts[:, :].multiply(present[None, :])))
    found = log_normalised(part, completion.measured_share(absent))
    exact = values(counts)[:, present]
    exact = exact[exact > 0]
    assert abs(float(found[found > 0].mean()) - exact.mean()) < 0.05
    assert float(log_normalised(part)[part.count_M > 0].mean()) - exact.mean() > 0.5


def test_what_stands_for_absent_genes_is_nearer_to_the_whole_answer_than_zeros() -> None:
    counts = cells()
    torch.manual_seed(1)
    head = StateHead({"state": torch.eye(4)}, G, CONFIG).eval()
    head.get_buffer("inverse_depth").fill_(1e6)
    head.axes[0].get_buffer("gene_weight_GF").copy_(torch.randn(G, 4) * 0.2)
    z, whole = torch.from_numpy(latent(counts)).float(), CountsCSR.from_scipy(counts)
    present = np.arange(G) >= 8
    part = CountsCSR.from_scipy(sp.csr_matrix(counts.multiply(present[None, :])))
    answer = head(z, whole)["state"].exp()
    assert head.completion.absent(present) is None  # nothing is expected yet
    head.completion.load_state_dict(fitted(counts).state_dict())
    assert head.completion.absent(np.ones(G, np.bool_)) is None
    absent = head.completion.absent(present)
    completed, zeros = head(z, part, absent)["state"].exp(), head(z, part)["state"].exp()
    assert (completed - answer).abs().mean() < 0.5 * (zeros - answer).abs().mean()


@pytest.mark.parametrize("measured", [1.0, 0.5])
def test_the_latent_space_weighs_less_where_genes_are_absent(measured: float) -> None:
    counts = cells()
    head = StateHead({"state": torch.eye(4)}, G, CONFIG).eval()
    head.get_buffer("inverse_depth").fill_(1e-3)
    head.completion.get_buffer("share_G").fill_(1 / G)
    present = np.arange(G) < measured * G
    part = CountsCSR.from_scipy(sp.csr_matrix(counts.multiply(present[None, :])))
    found = head.gene_weight(part, head.completion.absent(present))[:, 0]
    relative = part.library_N() / measured * 1e-3
    torch.testing.assert_close(found, 1 - measured**2 / (relative**2 + 1))
    head.get_buffer("inverse_depth").zero_()
    assert not head.gene_weight(part, head.completion.absent(present)).any(), "a view that is not fitted"


def test_files_that_measured_different_genes_are_read_by_the_genes_of_all(world: World) -> None:
    """Else a gene's counts in one file would come on top of what is expected of it since the other file lacks it."""
    bundle, whole = load(world.bundle, device="cpu"), world.query[:40].copy()
    query: AnnData = whole[:, ::2].copy()
    sources, config = [open_source(whole), open_source(query)], PredictConfig(min_overlap=0.1, min_counts=5)
    samples = Samples.of(sources, None)
    together = read(sources, bundle, config, samples, np.ones(80, np.bool_))
    own = Samples.of(sources[1:], None)
    alone = read(sources[1:], bundle, config, own, np.ones(40, np.bool_))
    np.testing.assert_array_equal(together.present_G, alone.present_G)
    assert not together.panel[:, ~together.present_G].sum()
    np.testing.assert_array_equal(together.panel[:40].toarray(), alone.panel.toarray())


def test_each_study_is_asked_about_with_the_genes_that_it_measured() -> None:
    torch.manual_seed(2)
    network = Network(G, {}, {"state": torch.eye(4)}, CONFIG).eval()
    network.head.completion.load_state_dict(fitted(cells()).state_dict())
    network.head.get_buffer("inverse_depth").fill_(0.01)
    network.head.axes[0].get_buffer("gene_weight_GF").normal_()
    study, measured = np.arange(N) % 3, np.arange(G)[None, :] % np.array([[99], [2], [3]]) != 1
    counts = sp.csr_matrix(cells().multiply(measured[study]))
    found = network.predict_studies(counts, measured, study)
    for s in range(3):
        expected = network.predict(counts[study == s], present_G=measured[s])
        np.testing.assert_allclose(found.latent_NK[study == s], expected.latent_NK, rtol=1e-5, atol=1e-6)
        got = found.probability_NS["state"][study == s]
        np.testing.assert_allclose(got, expected.probability_NS["state"], rtol=1e-4, atol=1e-6)
    zeros = network.predict(counts).probability_NS["state"]
    assert np.abs(found.probability_NS["state"] - zeros).max() > 0.05
