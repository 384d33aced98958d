"""The gene view of the state head: the optimum that scikit-learn finds, and its share in the answer."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression

from carvae.config import ModelConfig
from carvae.data.loader import CellData
from carvae.data.residence import Resident
from carvae.data.sparse import CompactCSR, CountsCSR
from carvae.model import gene_view
from carvae.model.completion import COUNTS_PER_CELL, fit_completion
from carvae.model.gene_view import fit_gene_view
from carvae.model.heads import EVEN_AT, StateHead

N, G, S = 150, 20, 3
CONFIG = ModelConfig(n_latent=2, n_hidden=4, gene_penalty=0.01)
ALLOWED = [torch.eye(S, dtype=torch.bool)]


def cells(seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts in which each of three states has genes of its own, and the states."""
    rng = np.random.default_rng(seed)
    state = rng.integers(0, S, N)
    mean = np.ones((N, G))
    for s in range(S):
        mean[state == s, 3 * s : 3 * s + 3] = 4.0
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32)), state


def data_of(counts: sp.csr_matrix, code: np.ndarray, weight: np.ndarray | None = None) -> CellData:
    weight = np.ones(len(code), np.float32) if weight is None else weight.astype(np.float32)
    return CellData(
        counts=Resident(CompactCSR.from_scipy(counts), np.arange(counts.shape[0])),
        covariate_NC=torch.zeros(len(code), 0, dtype=torch.int64),
        unmeasured_SG=None,
        study_N=torch.zeros(len(code), dtype=torch.int64),
        code_NA=torch.from_numpy(code.astype(np.int64))[:, None],
        weight_NA=torch.from_numpy(weight)[:, None],
    )


def a_head(seed: int = 0) -> StateHead:
    torch.manual_seed(seed)
    return StateHead({"state": torch.eye(S)}, G, CONFIG).eval()


def fitted(code: np.ndarray, counts: sp.csr_matrix, rows: np.ndarray | None = None) -> StateHead:
    head = a_head()
    rows = np.arange(N) if rows is None else rows
    fit_gene_view(head, data_of(counts, code), rows, ALLOWED, CONFIG, np.random.default_rng(0))
    return head


def gene_probability(head: StateHead, counts: sp.csr_matrix) -> np.ndarray:
    """Probabilities by the genes alone, with the head's formula written out in numpy."""
    dense = counts.toarray().astype(np.float64)
    value = np.log1p(dense / dense.sum(1, keepdims=True) * COUNTS_PER_CELL)
    axis = head.axes[0]
    logits = value @ axis.get_buffer("gene_weight_GF").numpy() + axis.get_buffer("gene_bias_F").numpy()
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponential / exponential.sum(1, keepdims=True))


def test_the_view_is_the_regression_that_scikit_learn_finds() -> None:
    counts, state = cells()
    dense = counts.toarray().astype(np.float64)
    value = np.log1p(dense / dense.sum(1, keepdims=True) * COUNTS_PER_CELL)
    scaled = value / np.sqrt(value.std(0))
    oracle = LogisticRegression(C=1 / (2 * CONFIG.gene_penalty * N), tol=1e-8, max_iter=2000).fit(scaled, state)
    found = gene_probability(fitted(state, counts), counts)
    np.testing.assert_allclose(found, oracle.predict_proba(scaled), atol=5e-3)


def test_genes_that_a_study_lacks_are_expected_and_not_zero() -> None:
    """By scikit-learn on the values with the expected ones written in; zeros would say that the state is another."""
    counts, state = cells()
    study, lacking = np.arange(N) % 2, np.arange(3, 6)  # what tells the second state from the others
    unmeasured = np.zeros((2, G), np.bool_)
    unmeasured[1, lacking] = True
    poorer = sp.csr_matrix(counts.multiply(~unmeasured[study]))
    data = replace(data_of(poorer, state), unmeasured_SG=torch.from_numpy(unmeasured), study_N=torch.from_numpy(study))
    head = a_head()
    fit_completion(head.completion, data, np.arange(N), np.random.default_rng(0))
    with mock.patch.object(gene_view, "MAX_ITERATIONS", 500):
        fit_gene_view(head, data, np.arange(N), ALLOWED, CONFIG, np.random.default_rng(0))
    share_N = np.where(study == 1, 1 - head.completion.get_buffer("share_G")[lacking].sum(), 1)
    dense = poorer.toarray().astype(np.float64)
    value = np.log1p(dense / dense.sum(1, keepdims=True) * COUNTS_PER_CELL * share_N[:, None])
    weights, bias = head.completion.carrier(torch.from_numpy(lacking))(torch.eye(G)[:, lacking])
    value[np.ix_(study == 1, lacking)] = (value @ weights.numpy() + bias.numpy())[study == 1]
    measured = ~unmeasured[study]
    mean = (value * measured).sum(0) / measured.sum(0)
    deviation = np.sqrt((value**2 * measured).sum(0) / measured.sum(0) - mean**2)
    usual = head.completion.deviation_G().numpy()[lacking]
    deviation[lacking] = np.maximum(deviation[lacking], usual)
    scale = np.sqrt(deviation)
    oracle = LogisticRegression(C=1 / (2 * CONFIG.gene_penalty * N), tol=1e-8, max_iter=2000).fit(value / scale, state)
    whole = np.log1p(counts.toarray() / counts.sum(1) * COUNTS_PER_CELL)
    found = gene_probability(head, counts)
    np.testing.assert_allclose(found, oracle.predict_proba(np.asarray(whole) / scale), atol=1e-2)
    with_zeros = gene_probability(fitted(state, poorer), counts)
    assert np.abs(with_zeros - found).max() > 0.1


@pytest.mark.parametrize("n_shown", [0, 3])
def test_genes_of_which_labels_say_nothing_or_little_do_not_rule(n_shown: int) -> None:
    """A large labelled study lacks genes which unlabelled cells have; of the labelled ones ``n_shown`` show them."""
    counts, state = cells()
    lacking = np.arange(3, 6)
    study = np.repeat([0, 1, 2], [90, 10, N - 100])
    unmeasured = np.zeros((3, G), np.bool_)
    unmeasured[0, lacking] = True
    poorer = sp.csr_matrix(counts.multiply(~unmeasured[study])).toarray()
    poorer[np.ix_(np.arange(90 + n_shown, 100), lacking)] = 0
    code = np.where(study == 2, -1, state)
    data = replace(
        data_of(sp.csr_matrix(poorer), code),
        unmeasured_SG=torch.from_numpy(unmeasured),
        study_N=torch.from_numpy(study),
    )
    head = a_head()
    fit_completion(head.completion, data, np.arange(N), np.random.default_rng(0))
    fit_gene_view(head, data, np.arange(N), ALLOWED, CONFIG, np.random.default_rng(0))
    weight = head.axes[0].get_buffer("gene_weight_GF").abs().max(1).values.numpy()
    assert weight[lacking].any() == (n_shown > 0)
    assert weight[lacking].max() <= np.delete(weight, lacking).max()
    right = gene_probability(head, counts[study == 2]).argmax(1) == state[study == 2]
    zeros = gene_probability(fitted(code, sp.csr_matrix(poorer)), counts[study == 2]).argmax(1) == state[study == 2]
    assert right.mean() >= zeros.mean()


def test_until_it_is_fitted_the_latent_space_answers_alone() -> None:
    counts, _ = cells()
    head, z_NK = a_head(), torch.randn(N, 2)
    answer = head(z_NK, CountsCSR.from_scipy(counts))["state"]
    torch.testing.assert_close(answer, head.latent_view(z_NK)["state"])


def test_the_answer_is_the_mean_of_both_views_with_the_genes_weighing_by_depth() -> None:
    counts, state = cells()
    head, z_NK = fitted(state, counts), torch.randn(N, 2)
    depth = np.asarray(counts.sum(1)).ravel()
    relative = depth / (EVEN_AT * np.sort(depth)[(N - 1) // 2])  # torch's median is the lower one
    weight = (relative**2 / (relative**2 + 1))[:, None]
    latent = head.latent_view(z_NK)["state"].exp().detach().numpy()
    mixed = latent ** (1 - weight) * gene_probability(head, counts) ** weight
    expected = mixed / mixed.sum(1, keepdims=True)
    found = head(z_NK, CountsCSR.from_scipy(counts))["state"].exp().detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def test_cells_out_of_the_training_rows_and_cells_without_a_label_teach_nothing() -> None:
    """Peer fault: accuracy on training cells. What is held out leaves no trace, nor do unlabelled cells."""
    counts, state = cells()
    rows = np.arange(100)
    other = state.copy()
    other[100:] = (state[100:] + 1) % S
    unlabelled = other.copy()
    unlabelled[100:] = -1
    weights = [
        fitted(code, counts, chosen).axes[0].get_buffer("gene_weight_GF")
        for code, chosen in ((state, rows), (other, rows), (unlabelled, np.arange(N)))
    ]
    assert weights[0].abs().max() > 0
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_without_labels_nothing_is_fitted() -> None:
    counts, _ = cells()
    head = fitted(np.full(N, -1), counts)
    assert head.get_buffer("inverse_depth") == 0
    assert head.axes[0].get_buffer("gene_weight_GF").abs().max() == 0


def test_a_coarse_label_teaches_the_sum_of_its_leaves() -> None:
    counts, state = cells()
    head, coarse = a_head(), np.minimum(state, 1)  # the second set allows two leaves
    allowed = [torch.tensor([[True, False, False], [False, True, True]])]
    fit_gene_view(head, data_of(counts, coarse), np.arange(N), allowed, CONFIG, np.random.default_rng(0))
    probability = gene_probability(head, counts)
    assert ((probability[:, 0] > 0.5) == (state == 0)).mean() > 0.9
    np.testing.assert_allclose(probability[:, 1], probability[:, 2], rtol=1e-4)  # nothing tells them apart


@pytest.mark.parametrize("seed", [1, 2])
def test_of_very_many_cells_a_draw_is_used_that_the_seed_decides(seed: int) -> None:
    counts, state = cells()
    weights = []
    with mock.patch.object(gene_view, "MAX_CELLS", 60):
        for draw in (seed, seed, seed + 10):
            head = a_head()
            fit_gene_view(head, data_of(counts, state), np.arange(N), ALLOWED, CONFIG, np.random.default_rng(draw))
            weights.append(head.axes[0].get_buffer("gene_weight_GF").clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
