"""Indices of diversity against scikit-bio and scirpy, and what rarefaction owes to its user."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.data import diversity as own
from carvae.data.diversity import INDICES, SIZE_BINS, clonal_figures, rarefied

SIZES = st.lists(st.integers(0, 200), min_size=1, max_size=60).map(np.array).filter(lambda c: c.sum() > 0)


def skbio_index(name: str, **given_: object) -> Callable[[np.ndarray], float]:
    alpha = pytest.importorskip("skbio.diversity.alpha", reason="needs scikit-bio (pip install 'carvae[test]')")

    def index(count: np.ndarray) -> float:
        try:
            return float(getattr(alpha, name)(count[count > 0], **given_))
        except ValueError:  # ACE of single cells alone
            return np.nan

    return index


@pytest.mark.parametrize(
    ("index", "name", "given_"),
    [
        (own.shannon, "shannon", {"base": np.e}),
        (own.inverse_simpson, "inv_simpson", {}),
        (own.gini_simpson, "simpson", {}),
        (own.gini, "gini_index", {"method": "trapezoids"}),
        (own.chao1, "chao1", {}),
        (own.ace, "ace", {}),
        (own.richness, "sobs", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_indices_are_those_of_scikit_bio(
    index: Callable[[np.ndarray], np.ndarray], name: str, given_: dict[str, object]
) -> None:
    oracle, rng = skbio_index(name, **given_), np.random.default_rng(0)
    samples = [rng.negative_binomial(0.4, rng.choice([0.02, 0.2, 0.7]), rng.integers(1, 200)) for _ in range(150)]
    samples += [np.array(c) for c in ([1], [7], [11], [1, 1, 1], [1, 12], [5, 5], [2, 0, 2], [10, 10, 10], [3, 40])]
    for count in samples:
        if count.sum():
            assert float(index(count)) == pytest.approx(oracle(count), rel=1e-6, abs=1e-9, nan_ok=True), count


def test_evenness_and_expansion_are_those_of_scirpy() -> None:
    scirpy = pytest.importorskip("scirpy", reason="needs scirpy (pip install 'carvae[tcr]')")
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"sample": rng.choice(list("abc"), 900), "clone_id": rng.zipf(1.6, 900).astype(str)})
    obs.loc[obs["sample"] == "c", "clone_id"] = "one"
    obs.loc[::17, "clone_id"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anndata as ad
        import awkward

        airr = awkward.Array([[]] * len(obs))
        adata = ad.AnnData(obs=obs.set_axis([f"c{i}" for i in obs.index]), obsm={"airr": airr})
        expected = scirpy.tl.alpha_diversity(adata, "sample", inplace=False)[0]
    code = pd.Categorical(obs["sample"]).codes
    found = clonal_figures(pd.factorize(obs["clone_id"])[0], code, 3, None, 20, 20, rng)
    np.testing.assert_allclose(found["clone_evenness"], expected[["a", "b", "c"]], atol=1e-6)
    np.testing.assert_allclose(found["clone_expansion"], 1 - expected[["a", "b", "c"]], atol=1e-6)


@given(SIZES, st.randoms(use_true_random=False))
def test_the_order_of_clones_and_absent_clones_do_not_matter(count: np.ndarray, random: object) -> None:
    shuffled = np.append(np.random.default_rng(int(count.sum())).permutation(count), [0, 0])
    for name, index in INDICES.items():
        np.testing.assert_allclose(index(count), index(shuffled), rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(index(np.stack([shuffled, shuffled]))[1], index(count), rtol=1e-9, err_msg=name)


@given(SIZES)
def test_indices_stay_within_their_bounds(count: np.ndarray) -> None:
    n = float(own.richness(count))
    assert sum(float(INDICES[name](count)) for name in SIZE_BINS) == pytest.approx(1.0)
    assert 1.0 - 1e-9 <= own.inverse_simpson(count) <= n + 1e-9
    assert -1e-9 <= own.shannon(count) <= np.log(n) + 1e-9
    for name in ("gini", "gini_simpson", "evenness", "expansion"):
        assert -1e-9 <= INDICES[name](count) <= 1 + 1e-9, name
    assert own.chao1(count) >= n
    assert np.isnan(own.ace(count)) or own.ace(count) >= n - 1e-9


def test_rarefied_richness_is_what_the_hypergeometric_says() -> None:
    count, depth = np.array([60, 30, 5, 2, 1, 1, 1]), 25
    total = count.sum()
    missed = [np.prod([(total - c - i) / (total - i) for i in range(depth)]) for c in count]
    found = rarefied(count, depth, 4000, np.random.default_rng(0))
    assert found["n"].mean == pytest.approx(len(count) - sum(missed), abs=0.05)
    assert found["n"].low < found["n"].mean < found["n"].high


def test_at_full_depth_nothing_is_left_to_chance_and_beyond_it_nothing_is_said() -> None:
    count = np.array([9, 4, 1, 1, 0])
    full = rarefied(count, 15, 20, np.random.default_rng(0))
    for name, index in INDICES.items():
        for value in (full[name].mean, full[name].low, full[name].high):
            assert value == pytest.approx(float(index(count)), nan_ok=True), name
    assert all(np.isnan(found.mean) for found in rarefied(count, 16, 20, np.random.default_rng(0)).values())


def test_depth_makes_samples_comparable_where_plain_figures_are_not() -> None:
    """Two samples of one pool of clones, one ten times as deep: richness differs, at equal depth it does not."""
    rng = np.random.default_rng(3)
    pool = rng.dirichlet(np.full(400, 0.3))
    clone = np.append(rng.choice(400, 2000, p=pool), rng.choice(400, 200, p=pool))
    group = np.repeat([0, 1], [2000, 200])
    found = clonal_figures(clone, group, 2, None, 50, 100, rng)
    assert list(found["clone_depth"]) == [200, 200]
    assert found["clone_n"][0] > 1.5 * found["clone_n"][1]
    assert found["clone_n_at_depth_low"][0] <= found["clone_n"][1] <= found["clone_n_at_depth_high"][0]


def test_cells_without_a_clone_and_small_samples() -> None:
    clone, group = np.array([-1, -1, 0, 0, 1, -1]), np.array([0, 1, 1, 1, 1, 2])
    found = clonal_figures(clone, group, 4, None, 4, 20, np.random.default_rng(0))
    assert list(found["clone_cells"]) == [0, 3, 0, 0]
    assert np.isnan(found["clone_n"][0])
    assert found["clone_n"][1] == 2
    assert found["clone_depth"].isna().all()
    assert "clone_n_at_depth" not in found
    again = [clonal_figures(clone, group, 4, 2, 2, 20, np.random.default_rng(7)) for _ in range(2)]
    pd.testing.assert_frame_equal(*again)
    assert 1 <= again[0]["clone_n_at_depth"][1] <= 2
