"""Novelty: each view sees its kind of stranger, the scale is uniform on cells like the held-out ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from tiny import counts_of, tiny_bundle

from carvae.labels.tree import LabelTree
from carvae.model.novelty import LEVELS, VIEWS, Observed, Reference, Scale, observe, refer, views

EVERY = np.ones(12, np.bool_)


def observed_of(hidden: np.ndarray, energy: float = 0.0, misfit: float = 1.0) -> Observed:
    n = len(hidden)
    return Observed(
        latent_NK=hidden[:, :2].astype(np.float32),
        hidden_NH=hidden.astype(np.float32),
        log_probability={},
        energy_N=np.full(n, energy, np.float32),
        misfit_N=np.full(n, misfit, np.float32),
    )


def reference(n: int = 4000, seed: int = 0) -> Reference:
    """Two states at -3 and 3 of the first hidden coordinate, with deviations 1 and 2 in the two coordinates."""
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 2, n)
    hidden = rng.normal(0, [1.0, 2.0], (n, 2)) + np.stack([np.where(code, 3.0, -3.0), np.zeros(n)], 1)
    identity = np.zeros(12, np.bool_)
    identity[:2] = True
    return refer(observed_of(hidden), code, rng.integers(0, 3, n), np.full(12, 1 / 12), identity)


def test_the_reference_finds_means_and_covariances_again() -> None:
    found = reference()
    np.testing.assert_allclose(found.mean_LH, [[-3, 0], [3, 0]], atol=0.15)
    np.testing.assert_allclose(np.linalg.inv(found.within_HH), np.diag([1, 4]), atol=0.25)
    np.testing.assert_allclose(np.linalg.inv(found.around_HH), np.diag([10, 4]), atol=0.6)
    assert found.sample_MK.shape == (3, 2)


def test_unlabelled_cells_move_no_class() -> None:
    rng = np.random.default_rng(1)
    hidden = rng.normal(0, 1, (200, 2))
    hidden[100:] += 50
    code = np.repeat([0, -1], 100)
    found = refer(observed_of(hidden), code, code, np.full(12, 1 / 12), EVERY)
    np.testing.assert_allclose(found.mean_LH, [hidden[:100].mean(0)], rtol=1e-5)
    np.testing.assert_allclose(found.centre_H, hidden.mean(0), rtol=1e-5)


def test_distance_is_to_the_nearest_state_less_that_to_all_cells() -> None:
    found = reference()
    at = np.array([[3.0, 0.0], [0.0, 0.0], [-3.0, 0.0]])  # a state, between both, a state
    distance = views(observed_of(at), found, counts_of(3), EVERY)[:, VIEWS.index("distance")]
    oracle = [0 - 0.9, 9 - 0.0, 0 - 0.9]
    np.testing.assert_allclose(distance, oracle, atol=0.6)


def test_identity_counts_what_is_missing_of_what_is_measured() -> None:
    found = reference()
    cells = sp.csr_matrix(np.array([[2, 2] + [2] * 10, [0, 0] + [2] * 10, [0, 0] + [2] * 10]))
    identity = VIEWS.index("identity")
    of = observed_of(np.zeros((3, 2)))
    seen = views(of, found, cells, EVERY)[:, identity]
    bare = (20 / 6) / np.sqrt(20 / 6 + 1)
    np.testing.assert_allclose(seen, [0, bare, bare], rtol=1e-5, atol=1e-6)
    unmeasured = EVERY.copy()
    unmeasured[:2] = False
    np.testing.assert_allclose(views(of, found, cells, unmeasured)[1:, identity], 0)


def test_novelty_is_uniform_on_cells_like_the_held_out_ones_and_high_on_strangers_of_any_view() -> None:
    rng = np.random.default_rng(2)
    bin_n = rng.integers(0, 2, 8000)
    held_out = rng.gamma(2.0, 1.0 + bin_n[:, None] * 5, (8000, len(VIEWS)))  # bins differ in scale
    scale = Scale.fit(held_out[:4000], bin_n[:4000], 2)
    novelty = scale.novelty(held_out[4000:], bin_n[4000:])
    for b in (0, 1):
        for share in (0.5, 0.9, 0.95, 0.99):
            assert (novelty[bin_n[4000:] == b] <= share).mean() == pytest.approx(share, abs=0.05)
    for view in range(len(VIEWS)):
        stranger = np.full((1, len(VIEWS)), 1.0)
        stranger[0, view] = 100.0
        assert scale.novelty(stranger, np.zeros(1, np.int64))[0] > 0.99
    assert scale.novelty(np.full((1, len(VIEWS)), 1.0), np.zeros(1, np.int64))[0] < 0.9


@pytest.mark.parametrize("n", [15, 60, 300])
def test_few_held_out_cells_hide_no_stranger_and_raise_few_false_alarms(n: int) -> None:
    """Each view has a strangest held-out cell; with few cells these are more than the share called unknown."""
    rng = np.random.default_rng(4)
    stranger = np.full((1, len(VIEWS)), 2.0)
    stranger[0, 2] = 1000.0
    alarms = []
    for _ in range(200):
        scale = Scale.fit(rng.gamma(2.0, size=(n, len(VIEWS))), np.zeros(n, np.int64), 1)
        assert scale.novelty(stranger, np.zeros(1, np.int64))[0] == 1
        alarms.append(np.mean(scale.novelty(rng.gamma(2.0, size=(50, len(VIEWS))), np.zeros(50, np.int64)) > 0.95))
    assert np.mean(alarms) < 0.05 + 1.5 / n


def test_levels_are_quantiles_in_order() -> None:
    assert LEVELS[[0, -1]].tolist() == [0, 1]
    assert (np.diff(LEVELS) > 0).all()
    assert np.diff(LEVELS[LEVELS > 0.89]).max() < 0.03  # where the threshold lies


def test_a_view_in_which_all_cells_are_alike_makes_nobody_strange() -> None:
    rng = np.random.default_rng(3)
    held_out = np.zeros((500, len(VIEWS)))
    held_out[:, 0] = rng.normal(size=500)
    novelty = Scale.fit(held_out, np.zeros(500, np.int64), 1).novelty(held_out, np.zeros(500, np.int64))
    assert (novelty > 0.9).mean() == pytest.approx(0.1, abs=0.02)
    shallow = np.zeros((4, len(VIEWS)))
    assert (
        Scale.fit(np.zeros((50, len(VIEWS))), np.zeros(50, np.int64), 1).novelty(shallow, np.zeros(4, np.int64)).max()
        == 0
    )


def test_observation_agrees_with_prediction_and_with_a_plain_misfit() -> None:
    bundle = tiny_bundle(LabelTree.flat(["x", "y"]))
    counts = counts_of(9, seed=5)
    present = EVERY.copy()
    present[[3, 7]] = False
    counts = counts.multiply(present[None, :]).tocsr()
    found = observe(bundle.network, counts, present)
    said = bundle.network.predict(counts)
    np.testing.assert_allclose(found.latent_NK, said.latent_NK, rtol=1e-5, atol=1e-6)
    axis = next(iter(said.probability_NS))
    np.testing.assert_allclose(np.exp(found.log_probability[axis]), said.probability_NS[axis], rtol=1e-5)
    decoder, dense = bundle.network.vae.decoder, counts.toarray().astype(float)
    with torch.no_grad():
        unknown = torch.full((9, 1), -1)
        raw = decoder.scale(decoder.hidden(torch.from_numpy(said.latent_NK), unknown)).double().exp().numpy() * present
        theta = bundle.network.vae.log_theta_G.exp().double().numpy()
    mean = raw / raw.sum(1, keepdims=True) * dense.sum(1, keepdims=True)
    oracle = ((dense - mean) ** 2 / (mean + mean**2 / theta + 0.01))[:, present].mean(1)
    np.testing.assert_allclose(found.misfit_N, oracle, rtol=1e-4)
