"""Exponential, logarithms and gamma functions of the CPU kernels, against long double and scipy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy.special import gammaln, psi

from carvae.model import kernels, large_counts, vector
from carvae.model.vector import (
    asymptotic_gammas,
    double_log,
    double_log1p,
    fast_exp,
    fast_log,
    fast_log1p,
    gammas,
)

SMALL_TO_LARGE = np.concatenate(
    [10.0 ** np.random.default_rng(0).uniform(-12, 14, 2000), [0.5**0.5, 1.0, 2.0**0.5, 2.0]]
)


def test_what_numba_keeps_is_of_the_files_as_they_are() -> None:
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in (large_counts, vector))
    assert hashlib.sha256(text).hexdigest()[:12] == kernels.PARTS, "write this digest into kernels.PARTS"


def test_float64_logarithms() -> None:
    """To a few units in the last place of the result, or of 1 where the logarithm itself is near 0."""
    exact = np.log(SMALL_TO_LARGE.astype(np.longdouble))
    found = np.array([double_log(x) for x in SMALL_TO_LARGE])
    assert np.all(np.abs(found - exact) <= 1e-15 * np.maximum(np.abs(exact), 1))
    exact = np.log1p(SMALL_TO_LARGE.astype(np.longdouble))
    found = np.array([double_log1p(x) for x in SMALL_TO_LARGE])
    np.testing.assert_allclose(found, exact.astype(np.float64), rtol=1e-15)
    assert double_log1p(0.0) == 0


def test_float32_functions() -> None:
    x = SMALL_TO_LARGE.astype(np.float32)
    wide = x.astype(np.float64)
    found = np.array([fast_log(v) for v in x])
    assert np.all(np.abs(found - np.log(wide)) <= 3e-7 * np.maximum(np.abs(np.log(wide)), 1))
    np.testing.assert_allclose(np.array([fast_log1p(v) for v in x]), np.log1p(wide), rtol=3e-7)
    below = -x[x < 80]
    found = np.array([fast_exp(v) for v in below])
    np.testing.assert_allclose(found, np.exp(below.astype(np.float64)), rtol=2e-7)
    assert fast_exp(np.float32(-1e4)) == 0


@pytest.mark.parametrize("greatest", [8.0, 1e7])
def test_gamma_functions(greatest: float) -> None:
    """`gammas` for any x, its asymptotic part from 8 on; scipy has the same to 1e-13 or better."""
    x = greatest ** np.random.default_rng(1).uniform(-4, 1, 500)
    found = np.array([gammas(v) for v in x])
    np.testing.assert_allclose(found[:, 0], gammaln(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[:, 1], psi(x), rtol=1e-12, atol=1e-12)
    large = x[x >= 8]
    found = np.array([asymptotic_gammas(v, np.log(v)) for v in large]).reshape(-1, 2)
    np.testing.assert_allclose(found[:, 0], gammaln(large), rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], psi(large), rtol=1e-12)
