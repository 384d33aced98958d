"""Verdicts on samples: the worst training sample is still in range, a stranger is not, and the reason is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.model.novelty import Reference
from carvae.model.verdict import IN_RANGE, OUT_OF_RANGE, WITH_CARE, SampleFigures, SampleLimits, figures


def sample(unknown: float = 0.05, novelty: float = 0.5, distance: float = 2.0, depth: float = 512, n: int = 100):
    return SampleFigures(n, unknown, novelty, distance, -float(np.log2(depth)))


TRAINING = [sample(), sample(unknown=0.1), sample(distance=3.0), sample(novelty=0.6), sample(depth=256), sample()]


def test_training_samples_are_in_range_of_themselves() -> None:
    limits = SampleLimits.fit(TRAINING)
    assert limits is not None
    assert {limits.verdict(one, 1.0, 0.9, 0.5) for one in TRAINING} == {(IN_RANGE, "")}


@pytest.mark.parametrize(
    ("stranger", "overlap", "verdict", "said"),
    [
        (sample(unknown=0.97), 1.0, OUT_OF_RANGE, "97% of its cells are unknown"),
        (sample(unknown=0.13), 1.0, WITH_CARE, "13% of its cells are unknown"),
        (sample(distance=3.5), 1.0, WITH_CARE, "3.5 from the training samples"),
        (
            sample(depth=200),
            1.0,
            WITH_CARE,
            "counts over the panel (nine in ten of the labelled training samples, held out: at least 256)",
        ),
        (sample(depth=20), 1.0, OUT_OF_RANGE, "median depth 20"),
        (sample(), 0.8, WITH_CARE, "20% of the model's genes are missing"),
        (sample(), 0.4, OUT_OF_RANGE, "60% of the model's genes are missing"),
        (sample(n=5), 1.0, WITH_CARE, "only 5 cells"),
    ],
)
def test_a_stranger_is_told_with_its_reason(stranger: SampleFigures, overlap: float, verdict: str, said: str) -> None:
    limits = SampleLimits.fit(TRAINING)
    assert limits is not None
    found, reason = limits.verdict(stranger, overlap, 0.9, 0.5)
    assert found == verdict
    assert said in reason


def test_the_worst_reason_comes_first() -> None:
    limits = SampleLimits.fit(TRAINING)
    assert limits is not None
    _, reason = limits.verdict(sample(unknown=0.12, depth=10), 1.0, 0.9, 0.5)
    assert reason.startswith("median depth 10")
    assert "12%" in reason


def test_a_limit_is_told_with_the_samples_that_set_it() -> None:
    limits = SampleLimits.fit(TRAINING)
    assert limits is not None
    _, reason = limits.verdict(sample(unknown=0.12, depth=10), 1.0, 0.9, 0.5, len(TRAINING))
    first, second = reason.split("; ")
    assert first.endswith("(nine in ten of 6 labelled training samples, held out: at least 256)")
    assert second == "12% of its cells are unknown (at most 10%)"
    _, reason = limits.verdict(sample(unknown=0.12), 0.4, 0.9, 0.5, 1200)
    missing, last = reason.split("; ")
    assert missing.startswith("60% of the model's genes")
    assert "1,200 labelled training samples, held out: at most 10%" in last


def test_one_odd_training_sample_of_many_sets_no_limit() -> None:
    many = SampleLimits.fit([*TRAINING * 4, sample(unknown=1.0)])
    usual = SampleLimits.fit(TRAINING * 4)
    assert many is not None
    assert usual is not None
    assert many.care_F[0] == usual.care_F[0] == pytest.approx(0.1)


def test_small_samples_set_no_limits() -> None:
    assert SampleLimits.fit([sample(n=3)]) is None
    with_noise = SampleLimits.fit([*TRAINING, sample(unknown=1.0, n=3)])
    without = SampleLimits.fit(TRAINING)
    assert with_noise is not None
    assert without is not None
    np.testing.assert_array_equal(with_noise.care_F, without.care_F)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_unknown_cells_never_make_a_better_verdict(low: float, high: float) -> None:
    limits = SampleLimits.fit(TRAINING)
    assert limits is not None
    grades = [IN_RANGE, WITH_CARE, OUT_OF_RANGE]
    low, high = sorted((low, high))
    found = [grades.index(limits.verdict(sample(unknown=share), 1.0, 0.9, 0.5)[0]) for share in (low, high)]
    assert found[0] <= found[1]


def test_figures_are_what_they_say() -> None:
    eye = np.eye(2, dtype=np.float32)
    reference = Reference(
        mean_LH=eye, within_HH=eye, centre_H=eye[0], around_HH=eye, share_G=eye[0], identity_G=eye[0],
        sample_MK=np.array([[0, 0], [10, 0]], np.float32), scale_KK=np.diag([4.0, 1.0]).astype(np.float32),
    )  # fmt: skip
    latent = np.array([[7.0, 0.0], [9.0, 0.0]])
    found = figures(latent, np.array([0.2, 0.99]), np.array([100.0, 156.0]), reference, 0.05)
    assert (found.n_cells, found.fraction_unknown, found.mean_novelty) == (2, 0.5, pytest.approx(0.595))
    assert found.batch_distance == pytest.approx(4.0)  # two away along an axis with deviation one half
    assert found.shallowness == pytest.approx(-7.0)
