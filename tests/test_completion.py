"""Genes that a query lacks: what is expected of them is a conditional normal mean, and it keeps labels right."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from sklearn.decomposition import PCA
from trained import World

from carvae.config import ModelConfig, PredictConfig
from carvae.data.loader import CellData
from carvae.data.readers import open_source
from carvae.data.residence import Resident
from carvae.data.sparse import CompactCSR, CountsCSR
from carvae.model import completion as module
from carvae.model.bundle import load
from carvae.model.completion import COUNTS_PER_CELL, LEAST_NOISE, Completion, fit_completion, log_normalised
from carvae.model.heads import StateHead
from carvae.model.network import Network
from carvae.model.query import Samples, read

N, G, K = 300, 24, 3
CONFIG = ModelConfig(n_latent=K, n_hidden=8)


def cells(seed: int = 0) -> sp.csr_matrix:
    """Counts of genes that go up and down together, so that some tell of others."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(N, 2))
    mean = np.exp(place @ rng.normal(size=(2, G)) * 0.7 + 1)
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32))


def fitted(
    counts: sp.csr_matrix,
    study: np.ndarray | None = None,
    unmeasured: np.ndarray | None = None,
    label: np.ndarray | None = None,
) -> Completion:
    completion, n = Completion(G), counts.shape[0]
    data = CellData(
        counts=Resident(CompactCSR.from_scipy(counts), np.arange(n)),
        covariate_NC=torch.zeros(n, 0, dtype=torch.int64),
        unmeasured_SG=None if unmeasured is None else torch.from_numpy(unmeasured),
        study_N=torch.from_numpy(np.zeros(n, np.int64) if study is None else study),
        code_NA=torch.full((n, 1), -1) if label is None else torch.from_numpy(label)[:, None],
        weight_NA=torch.ones(n, 1),
    )
    fit_completion(completion, data, np.arange(n), np.random.default_rng(0))
    return completion


def values(counts: sp.csr_matrix) -> np.ndarray:
    dense = counts.toarray().astype(np.float64)
    return np.log1p(dense / np.maximum(dense.sum(1, keepdims=True), 1) * COUNTS_PER_CELL)


def expected(completion: Completion, value_NG: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """What stands for the absent genes: the sum over carried weights that each pick one of them."""
    weight_GF = torch.eye(G)[:, absent]
    carried_GF, bias_F = completion.carrier(torch.from_numpy(absent))(weight_GF)
    assert not carried_GF[absent].any()
    return np.asarray(value_NG @ carried_GF.numpy() + bias_F.numpy())


@pytest.mark.parametrize("n_factors", [3, G])
def test_expected_values_are_the_conditional_mean_of_a_normal(n_factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By scikit-learn's components and the textbook's formula, with all pairs of genes written out."""
    monkeypatch.setattr(module, "N_FACTORS", n_factors)
    counts, absent, present = cells(), np.arange(0, G, 3), np.flatnonzero(np.arange(G) % 3)
    value_NG = values(counts)
    pca = PCA(n_factors).fit(value_NG)
    variance_R = pca.explained_variance_ * (N - 1) / N
    loading_GR = pca.components_.T * np.sqrt(variance_R)
    noise_G = np.maximum(value_NG.var(0) - (loading_GR**2).sum(1), LEAST_NOISE)
    covariance_GG = loading_GR @ loading_GR.T + np.diag(noise_G)
    slope = np.linalg.solve(covariance_GG[np.ix_(present, present)], covariance_GG[np.ix_(present, absent)])
    oracle = value_NG.mean(0)[absent] + (value_NG - value_NG.mean(0))[:, present] @ slope
    completion = fitted(counts)
    np.testing.assert_allclose(expected(completion, value_NG, absent), oracle, rtol=1e-3, atol=2e-3)
    share = np.mean(counts.toarray() / np.maximum(counts.sum(1), 1), axis=0)
    np.testing.assert_allclose(completion.get_buffer("share_G").numpy(), np.asarray(share).ravel(), rtol=1e-4)


def test_a_rare_label_has_a_say() -> None:
    """Ten cells of three hundred with an axis of their own: by cells alone, what they show would be noise."""
    rng, label = np.random.default_rng(1), np.repeat([0, 1], [N - 10, 10])
    place = np.where(label == 1, rng.normal(size=N) * 2, 0)
    mean = np.where(np.arange(G) < 12, np.exp(place)[:, None] * 5, 20)
    counts = sp.csr_matrix(rng.poisson(mean).astype(np.float32))
    absent, rare, value_NG = np.arange(6), label == 1, values(counts)
    errors = [
        np.abs(expected(fitted(counts, label=own), value_NG, absent) - value_NG[:, absent])[rare].mean()
        for own in (label, None)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_gene_is_learned_from_the_studies_that_measured_it() -> None:
    """Of two studies with the same cells the second lacks genes: shares and expected values are those of the first."""
    counts = cells()
    unmeasured = np.zeros((2, G), np.bool_)
    unmeasured[1, :6] = True
    poorer = sp.csr_matrix(counts.multiply(~unmeasured[1][None, :]))
    both = sp.csr_matrix(sp.vstack([counts, poorer]))
    whole, found = fitted(counts), fitted(both, np.repeat([0, 1], N), unmeasured)
    np.testing.assert_allclose(found.get_buffer("share_G").numpy(), whole.get_buffer("share_G").numpy(), rtol=0.1)
    value_NG, lacking = values(counts), np.arange(6)
    oracle = expected(whole, value_NG, lacking)
    assert np.abs(expected(found, value_NG, lacking) - oracle).mean() < 0.1  # shares are known less exactly
    assert np.abs(expected(fitted(both), value_NG, lacking) - oracle).mean() > 1


def test_genes_that_no_study_measured_together_are_expected_at_their_mean() -> None:
    """The pair's covariance is not known, and the matrix with it no covariance; nothing may blow up."""
    counts = cells()
    unmeasured = np.array([np.arange(G) < 6, np.arange(G) >= 18])
    own = [sp.csr_matrix(counts.multiply(~row[None, :])) for row in unmeasured]
    completion = fitted(sp.csr_matrix(sp.vstack(own)), np.repeat([0, 1], N), unmeasured)
    value_NG = values(counts)
    found = expected(completion, value_NG, np.arange(6))
    assert np.isfinite(found).all()
    assert np.abs(found - value_NG[:, :6]).mean() < 1.5 * np.abs(value_NG[:, :6].mean(0) - value_NG[:, :6]).mean()


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
    z, whole = torch.zeros(N, K), CountsCSR.from_scipy(counts)
    present = np.arange(G) >= 8
    part = CountsCSR.from_scipy(sp.csr_matrix(counts.multiply(present[None, :])))
    answer = head(z, whole)["state"].exp()
    assert head.completion.absent(present) is None  # nothing is expected yet
    head.completion.load_state_dict(fitted(counts).state_dict())
    assert head.completion.absent(np.ones(G, np.bool_)) is None
    completed, zeros = head(z, part, head.views(present))["state"].exp(), head(z, part)["state"].exp()
    assert (completed - answer).abs().mean() < 0.5 * (zeros - answer).abs().mean()


@pytest.mark.parametrize("measured", [1.0, 0.5])
def test_the_latent_space_weighs_less_where_genes_are_absent(measured: float) -> None:
    counts = cells()
    head = StateHead({"state": torch.eye(4)}, G, CONFIG).eval()
    head.get_buffer("inverse_depth").fill_(1e-3)
    head.completion.get_buffer("share_G").fill_(1 / G)
    present = np.arange(G) < measured * G
    part = CountsCSR.from_scipy(sp.csr_matrix(counts.multiply(present[None, :])))
    found = head.gene_weight(part, head.views(present))[:, 0]
    relative = part.library_N() / measured * 1e-3
    torch.testing.assert_close(found, 1 - measured**2 / (relative**2 + 1))
    head.get_buffer("inverse_depth").zero_()
    assert not head.gene_weight(part, head.views(present)).any(), "a view that is not fitted"


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
