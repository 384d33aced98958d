"""The order of cells: what is along a curve comes in its order, and the distance is scanpy's where that is right."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr

from carvae.model import pseudotime as module
from carvae.model.pseudotime import pseudotime, root_cells


def curve(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = rng.random(n)
    z = np.stack([np.cos(3 * t), np.sin(3 * t), 2 * t], axis=1) @ rng.normal(size=(3, 16))
    return t, (z + rng.normal(0, 0.1, z.shape)).astype(np.float32)


@pytest.mark.parametrize("n", [300, 2000])
def test_cells_along_a_curve_come_in_its_order(n: int) -> None:
    t, z = curve(n)
    place = pseudotime(z, np.flatnonzero(t < 0.02), np.random.default_rng(0))
    assert spearmanr(place, t).statistic > 0.98  # sc.tl.dpt has 0.04 of the 2,000
    assert place.min() == 0
    assert place.max() == 1


def test_the_distance_is_scanpys_where_no_component_is_slow() -> None:
    import scanpy as sc

    z = np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)
    z[:200] += 2
    place = pseudotime(z, np.array([3]), np.random.default_rng(0))
    graph = module._graph(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.tl.diffmap(graph, n_comps=module.COMPONENTS + 1, random_state=0)
        graph.uns["iroot"] = 3
        sc.tl.dpt(graph, n_dcs=module.COMPONENTS + 1)
    assert graph.uns["diffmap_evals"][1] < 0.9994
    np.testing.assert_allclose(place, graph.obs["dpt_pseudotime"], atol=1e-4)


def test_cells_that_no_path_joins_to_the_root_have_no_place() -> None:
    t, z = curve(300)
    apart = np.concatenate([z, z[:100] + 100])
    place = pseudotime(apart, np.flatnonzero(t < 0.05), np.random.default_rng(0))
    assert np.isnan(place[300:]).all()
    assert spearmanr(place[:300], t).statistic > 0.98
    assert np.isnan(pseudotime(z[:20], np.array([0]), np.random.default_rng(0))).all()
    assert np.isnan(pseudotime(z, np.zeros(0, np.intp), np.random.default_rng(0))).all()


def test_of_many_cells_some_are_drawn_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    t, z = curve(900)
    monkeypatch.setattr(module, "MAX_CELLS", 400)
    place = pseudotime(z, np.flatnonzero(t < 0.02), np.random.default_rng(0))
    assert np.isfinite(place).all()
    assert spearmanr(place, t).statistic > 0.97


def test_the_memory_like_end_is_the_states_of_the_highest_scores() -> None:
    """Few naive cells of two lineages, with many effector memory cells of which some score as high."""
    rng = np.random.default_rng(0)
    state = np.repeat(["CD4 naive", "CD8 naive", "effector memory", "rare"], [20, 30, 900, 5])
    mean = {"CD4 naive": 0.45, "CD8 naive": 0.43, "effector memory": 0.2, "rare": 0.9}
    score = np.array([mean[s] for s in state]) + rng.normal(0, 0.15, state.size)
    score[3] = np.nan
    assert sorted(root_cells(score, state)) == [i for i in range(50) if i != 3]


def test_without_a_state_of_some_cells_the_highest_scores_begin() -> None:
    score, state = np.append(np.arange(30.0), np.nan), np.arange(31)
    assert sorted(root_cells(score, state)) == list(range(20, 30))
    assert not len(root_cells(np.full(5, np.nan), np.arange(5)))
