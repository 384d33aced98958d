"""Scores against naive loops and scikit-learn, over the whole set at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score

from carvae.model.metrics import N_BINS, expected_calibration_error, score_axis

LEAVES = ("naive", "memory", "effector", "exhausted")


def guesses(n: int, seed: int, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and true leaves, of very unequal classes."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, n, p=[0.85, 0.1, 0.04, 0.01])
    logits = rng.normal(size=(n, 4)) * sharpness
    logits[np.arange(n), truth] += 1
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), truth


def naive_ece(probability: np.ndarray, truth: np.ndarray) -> float:
    total = 0.0
    for k in range(N_BINS):
        inside = [
            (max(p), int(np.argmax(p) == t))
            for p, t in zip(probability, truth, strict=True)
            if k / N_BINS <= max(p) < (k + 1) / N_BINS or (k == N_BINS - 1 and max(p) == 1)
        ]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(truth) * abs(right - confidence)
    return total


@given(st.integers(1, 200), st.integers(0, 99), st.floats(0.1, 9))
def test_the_calibration_error_is_that_of_a_naive_loop(n: int, seed: int, sharpness: float) -> None:
    probability, truth = guesses(n, seed, sharpness)
    assert expected_calibration_error(probability, truth) == pytest.approx(naive_ece(probability, truth), abs=1e-9)


def test_the_calibration_error_is_over_the_whole_set_not_averaged_over_minibatches() -> None:
    """Peer fault: calibration averaged over minibatches, which calls a calibrated model uncalibrated."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    truth = (rng.random(20_000) > confidence).astype(int)  # right as often as it says
    probability = np.stack([confidence, 1 - confidence], 1)
    whole = expected_calibration_error(probability, truth)
    parts = [expected_calibration_error(probability[i : i + 128], truth[i : i + 128]) for i in range(0, 20_000, 128)]
    assert whole < 0.02
    assert np.mean(parts) > 5 * whole
    scores = score_axis(probability, truth, ("a", "b"))
    assert scores is not None
    assert scores.ece == whole


def test_a_sure_and_wrong_model_has_a_calibration_error_of_one() -> None:
    assert expected_calibration_error(np.array([[1.0, 0], [1, 0]]), np.array([1, 1])) == pytest.approx(1)
    assert expected_calibration_error(np.array([[1.0, 0], [0, 1]]), np.array([0, 1])) == 0


def test_macro_f1_is_the_mean_over_classes_and_not_micro_f1() -> None:
    """Peer fault: micro-F1 (which is accuracy) called F1. Always saying the commonest class must not look good."""
    truth = np.repeat([0, 1, 2, 3], [97, 1, 1, 1])
    constant = np.tile([0.7, 0.1, 0.1, 0.1], (100, 1))
    scores = score_axis(constant, truth, LEAVES)
    assert scores is not None
    assert scores.accuracy == 0.97
    assert scores.macro_f1 == pytest.approx(2 * 0.97 / 1.97 / 4)
    assert scores.balanced_accuracy == 0.25


@given(st.integers(1, 300), st.integers(0, 99))
def test_scores_are_those_of_scikit_learn(n: int, seed: int) -> None:
    probability, truth = guesses(n, seed)
    scores = score_axis(probability, truth, LEAVES)
    assert scores is not None
    predicted, present = probability.argmax(1), np.unique(truth)
    expected = f1_score(truth, predicted, average="macro", labels=present, zero_division=0)
    assert scores.macro_f1 == pytest.approx(expected)
    assert scores.accuracy == pytest.approx(np.mean(predicted == truth))
    assert scores.balanced_accuracy == pytest.approx(
        np.mean([(predicted == truth)[truth == k].mean() for k in present])
    )
    assert scores.recall == {LEAVES[k]: pytest.approx(np.mean(predicted[truth == k] == k)) for k in present}
    if 1 < len(np.union1d(truth, predicted)) == len(present):
        assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))


@given(st.integers(1, 100), st.integers(0, 99))
def test_the_confusion_matrix_counts_every_cell_by_true_row_and_predicted_column(n: int, seed: int) -> None:
    probability, truth = guesses(n, seed)
    scores = score_axis(probability, truth, LEAVES)
    assert scores is not None
    expected = np.zeros((4, 4), int)
    for p, t in zip(probability, truth, strict=True):
        expected[t, p.argmax()] += 1
    assert scores.confusion == expected.tolist()
    assert [row[0] for row in scores.confusion_rows()] == list(LEAVES)


def test_cells_without_a_single_true_leaf_are_not_scored() -> None:
    probability, truth = guesses(60, 0)
    hidden = truth.copy()
    hidden[::2] = -1
    assert score_axis(probability, hidden, LEAVES) == score_axis(probability[1::2], truth[1::2], LEAVES)
    assert score_axis(probability, np.full(60, -1), LEAVES) is None


def test_scores_are_json() -> None:
    scores = score_axis(*guesses(50, 0), LEAVES)
    assert scores is not None
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["n_cells"] == 50
