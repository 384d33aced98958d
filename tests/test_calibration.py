"""Calibration: temperatures found again, and sets that hold the true leaf as often as they say, also under shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from carvae.model.calibration import (
    COMMON_SD,
    COVERAGES,
    PATIENT_CELLS,
    PATIENT_SD,
    SHORTAGE_SD,
    Bins,
    Calibration,
    Seen,
    Temperatures,
    _by_patient,
    set_scores,
    tempered,
)
from carvae.model.metrics import expected_calibration_error

N_LEAVES = 4
ONE_BIN = Bins(np.ones(1, np.float32), np.empty((1, 0), np.float32))
TWO_BINS = Bins(np.ones(1, np.float32), np.array([[100.0]], np.float32))
DEPTHS = np.array([50.0, 200.0])
"""A depth in each of two bins."""


def fit(log_p: np.ndarray, truth: np.ndarray, patient: np.ndarray | None = None, **where: Any) -> Calibration:
    """Fitted on cells of one patient, of one depth and with all genes, unless said otherwise."""
    counts, bins = where.get("counts", np.ones(truth.size)), where.get("bins", ONE_BIN)
    whose = np.full(truth.size, "P1", dtype=object) if patient is None else patient
    seen = Seen(log_p, truth, counts, np.ones(truth.size), whose, np.zeros(truth.size))
    return Calibration.fit(seen, bins, Temperatures.fit(seen))


def temperature(log_p: np.ndarray, truth: np.ndarray, counts: np.ndarray, patient: np.ndarray, at: float) -> float:
    """Temperature of a new patient's cells of depth ``at``."""
    rule = Temperatures.fit(Seen(log_p, truth, counts, np.ones(truth.size), patient, np.zeros(truth.size)))
    return float(rule.at(np.array([[np.log1p(at), 1.0]]))[0])


def world(n: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """True log probabilities of cells, and leaves drawn from them; classes are unbalanced."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(0, 2, (n, N_LEAVES)) - np.arange(N_LEAVES) * 0.7
    log_p = log_softmax(logits, axis=1)
    truth = (rng.random((n, 1)) > np.exp(log_p).cumsum(1)).sum(1).clip(max=N_LEAVES - 1)
    return log_p, truth


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_again(true: float) -> None:
    """A little nearer 1, where it is expected beforehand."""
    log_p, truth = world(20_000, 0)
    distorted = log_softmax(log_p * true, axis=1)
    one = np.full(truth.size, "P1", dtype=object)
    assert temperature(distorted, truth, np.ones(truth.size), one, 1.0) == pytest.approx(true, rel=0.08)


def test_a_new_patients_temperature_is_the_mean_of_the_patients_and_follows_depth_within_them() -> None:
    # the deeper a cell, the more is said of it: T = own * counts ** 0.5 / 10; the large patient is the deepest by far
    own, cells, depth = np.array([0.5, 1.0, 2.0, 4.0]), [4000, 4000, 4000, 30_000], [30.0, 40.0, 50.0, 900.0]
    rng = np.random.default_rng(0)
    counts = np.concatenate([d * rng.uniform(0.1, 1, n) for d, n in zip(depth, cells, strict=True)])
    whose = np.repeat(np.array(["A", "B", "C", "D"], dtype=object), cells)
    log_p, truth = world(counts.size, 5)
    said = log_softmax(log_p * (np.repeat(own, cells) * np.sqrt(counts) / 10)[:, None], axis=1)
    for at in (10.0, 100.0):
        found = temperature(said, truth, counts, whose, at)
        assert found == pytest.approx(np.sqrt(2) * np.sqrt(at) / 10, rel=0.15)  # sqrt(2): geometric mean of `own`
    pooled = temperature(said, truth, counts, np.full(counts.size, "P", dtype=object), 10.0)
    assert pooled < 0.85 * np.sqrt(2) * np.sqrt(10) / 10  # who pools the cells takes the large patient for an effect


def test_networks_that_had_fewer_cells_do_not_make_the_final_one_less_sure() -> None:
    # T = 1.1 * shortage ** 1.5 of each patient's network; the final one has none
    shortage, n = np.array([1.05, 1.2, 1.4, 2.0, 3.0]), 4000
    log_p, truth = world(shortage.size * n, 8)
    true_n = np.repeat(1.1 * shortage**1.5, n)
    said = log_softmax(log_p * true_n[:, None], axis=1)
    whose = np.repeat(np.array(list("ABCDE"), dtype=object), n)
    one = np.ones(truth.size)
    seen = Seen(said, truth, one, one, whose, np.log(np.repeat(shortage, n)))
    rule = Temperatures.fit(seen)
    assert rule.of_shortage == pytest.approx(1.5, rel=0.1)
    assert rule.at(seen.condition_NX())[0] == pytest.approx(1.1, rel=0.05)
    np.testing.assert_allclose(rule.at(seen.condition_NX(), seen.shortage_N), true_n, rtol=0.1)
    without = Temperatures.fit(Seen(said, truth, one, one, whose, np.zeros(truth.size)))
    assert without.at(seen.condition_NX())[0] > 1.8
    # and sets of the final network are no wider than theirs would be with true probabilities
    sizes = []
    for rule_used in (rule, without):
        calibration = Calibration.fit(seen, ONE_BIN, rule_used)
        bin_n = np.zeros(truth.size, np.int64)
        final = log_softmax(log_p * 1.1, axis=1)
        sizes.append(calibration.sets(calibration.probability(final, bin_n), bin_n, 0.9).sum(1).mean())
    assert sizes[0] < sizes[1]


def test_confidence_is_how_often_the_likeliest_leaf_is_right_though_the_others_are_wrongly_weighed() -> None:
    # the second leaf is the true one wherever the first is not, which no temperature can say: by the likelihood of the
    # true leaf one that silences the others would be best, under which the first leaf has 0.71 and is right in 0.6
    n, right = 10_000, 0.6
    log_p = np.tile(log_softmax(np.array([[2.0, 1.5, 0.0, 0.0]]), axis=1), (n, 1))
    truth = (np.random.default_rng(0).random(n) > right).astype(int)
    said = fit(log_p, truth).probability(log_p, np.zeros(n, np.int64))
    assert said[:, 0].mean() == pytest.approx((truth == 0).mean(), abs=0.01)


def test_what_patients_have_in_common_is_the_regression_with_weak_priors() -> None:
    # the same by least squares: a row for each patient, as sure as its cells are many, and a row for each prior
    shortage, cells = np.array([0.0, 0.3, 0.9]), np.array([300, 2000, 700])
    log_p, truth = world(int(cells.sum()), 9)
    whose = np.repeat(np.array(list("ABC"), dtype=object), cells)
    said = log_softmax(log_p * np.repeat([0.8, 1.5, 3.0], cells)[:, None], axis=1)
    one = np.ones(truth.size)
    rule = Temperatures.fit(Seen(said, truth, one, one, whose, np.repeat(shortage, cells)))
    own, *_ = _by_patient(Seen(said, truth, one, one, whose, np.repeat(shortage, cells)))
    sure = np.sqrt(cells / (cells + PATIENT_CELLS)) / PATIENT_SD
    rows = np.vstack(
        [sure[:, None] * np.column_stack([np.ones(3), shortage]), np.diag([1 / COMMON_SD, 1 / SHORTAGE_SD])]
    )
    expected, *_ = np.linalg.lstsq(rows, np.append(sure * own, [0.0, 0.0]), rcond=None)
    np.testing.assert_allclose((rule.common, rule.of_shortage), expected, rtol=1e-6)


def test_too_few_cells_for_any_pool_share_one_threshold() -> None:
    log_p, truth = world(12, 10)
    fitted = fit(log_p, truth)
    assert np.ptp(fitted.threshold_BSC, axis=(0, 1)).max() == 0
    assert (np.diff(fitted.threshold_BSC, axis=2) >= 0).all()
    probability, bin_n = fitted.probability(log_p, np.zeros(12, np.int64)), np.zeros(12, np.int64)
    assert fitted.sets(probability, bin_n, 0.99).all()  # of twelve cells none tells what one in a hundred does


def test_calibration_repairs_an_overconfident_model_and_keeps_its_choices() -> None:
    log_p, truth = world(12_000, 1)
    loud = log_softmax(log_p * 3, axis=1)
    half, bin_n = 6000, np.zeros(6000, np.int64)
    fitted = fit(loud[:half], truth[:half])
    quiet = fitted.probability(loud[half:], bin_n)
    assert expected_calibration_error(np.exp(loud[half:]), truth[half:]) > 0.1
    assert expected_calibration_error(quiet, truth[half:]) < 0.03
    np.testing.assert_array_equal(quiet.argmax(1), loud[half:].argmax(1))


@pytest.mark.parametrize("coverage", [0.5, 0.77, 0.9, 0.95])
def test_sets_cover_each_leaf_as_often_as_stated(coverage: float) -> None:
    log_p, truth = world(40_000, 2)
    half, bin_n = 20_000, np.zeros(20_000, np.int64)
    fitted = fit(log_p[:half], truth[:half])
    held = fitted.sets(fitted.probability(log_p[half:], bin_n), bin_n, coverage)
    covered = held[np.arange(half), truth[half:]]
    for leaf in range(N_LEAVES):
        found = covered[truth[half:] == leaf].mean()
        assert found > coverage - 0.025
        best = (log_p[half:].argmax(1) == truth[half:])[truth[half:] == leaf].mean()
        assert found < max(coverage, best) + 0.025  # the likeliest leaf is always in the set


def test_coverage_holds_in_each_bin_where_a_single_threshold_fails() -> None:
    deep, shallow = world(20_000, 3, sharpness=2.0), world(20_000, 4, sharpness=0.3)
    order = np.random.default_rng(0).permutation(40_000)
    log_p = np.concatenate([log_softmax(deep[0] * 1.5, 1), log_softmax(shallow[0] * 4, 1)])[order]
    truth = np.concatenate([deep[1], shallow[1]])[order]
    bin_n = np.repeat([0, 1], 20_000)[order]
    one, test = slice(0, 20_000), slice(20_000, None)

    def gap(bins: Bins) -> float:
        counts = DEPTHS[bin_n]
        at = bins.of(counts[test], 1.0)
        fitted = fit(log_p[one], truth[one], bins=bins, counts=counts[one])
        held = fitted.sets(fitted.probability(log_p[test], at), at, 0.9)
        covered = held[np.arange(20_000), truth[test]]
        return max(abs(covered[bin_n[test] == b].mean() - 0.9) for b in (0, 1))

    assert gap(TWO_BINS) < 0.025
    assert gap(ONE_BIN) > 0.035


@given(st.integers(0, 10_000), st.floats(0.3, 3.0))
def test_sets_are_nested_never_empty_and_hold_the_best(seed: int, temperature: float) -> None:
    log_p, truth = world(60, seed)
    bin_n = np.arange(60) % 2
    fitted = fit(log_softmax(log_p * temperature, axis=1), truth, bins=TWO_BINS, counts=DEPTHS[bin_n])
    p = fitted.probability(log_p, bin_n)
    smaller = fitted.sets(p, bin_n, 0.6)
    assert smaller[np.arange(60), p.argmax(1)].all()
    assert (smaller <= fitted.sets(p, bin_n, 0.93)).all()
    assert (np.diff(fitted.threshold_BSC, axis=2) >= 0).all()
    assert fitted.threshold_BSC.shape == (2, N_LEAVES, len(COVERAGES))


def test_set_scores_are_the_mass_before_a_leaf_and_half_its_own() -> None:
    np.testing.assert_allclose(set_scores(np.array([[0.2, 0.5, 0.3]])), [[0.9, 0.25, 0.65]])


def test_tempering_divides_log_probabilities() -> None:
    p = tempered(np.log(np.array([[0.8, 0.2]])), np.array([2.0]))
    np.testing.assert_allclose(p, [[2 / 3, 1 / 3]], rtol=1e-6)  # sqrt(0.8) : sqrt(0.2) = 2 : 1


def test_bins_are_equally_filled_and_the_nearest_overlap_counts() -> None:
    counts = np.tile(np.arange(1000.0), 2)
    bins = Bins.fit(counts, np.repeat([1.0, 0.5], 1000))
    of = bins.of(counts[:1000], 1.0)
    assert np.bincount(of, minlength=bins.n).tolist() == [0] * 5 + [200] * 5
    assert bins.of(np.array([0.0, 1e9]), 0.6).tolist() == [0, 4]
    assert bins.of(np.array([0.0, 1e9]), 0.9).tolist() == [5, 9]


def patients(n_patients: int, n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells whose patient shifts what a model says of them, each patient in its own direction."""
    log_p, truth = world(n_patients * n_cells, seed)
    shift = np.random.default_rng((seed, 1)).normal(0, 1.2, (n_patients, N_LEAVES))
    said = log_softmax(log_p + np.repeat(shift, n_cells, axis=0), axis=1)
    return said, truth, np.repeat([f"P{i}" for i in range(n_patients)], n_cells).astype(object)


def test_new_patients_are_covered_where_a_fit_on_pooled_cells_covers_too_few() -> None:
    new, truth_of_new, _ = patients(150, 100, 99)
    bin_n = np.zeros(truth_of_new.size, np.int64)
    covered: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(6):
        said, truth, whose = patients(6, 500, seed)
        for by_patient, who in ((True, whose), (False, None)):
            fitted = fit(said, truth, who)
            held = fitted.sets(fitted.probability(new, bin_n), bin_n, 0.9)
            covered[by_patient].append(float(held[np.arange(truth_of_new.size), truth_of_new].mean()))
    assert np.mean(covered[True]) > np.mean(covered[False]) + 0.005
    assert 0.88 < np.mean(covered[True]) < 0.93
