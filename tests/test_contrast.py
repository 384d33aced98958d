"""Intervals of differences against published and independent answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from carvae.data.contrast import composition_distance, mean_of, one_more, over_cells, paired, total_variation, welch


def wilson(count: int, n: int) -> tuple[float, float, float]:
    ends = stats.binomtest(count, n).proportion_ci(method="wilson")
    return count / n, ends.low, ends.high


def test_two_proportions_give_newcombes_interval() -> None:
    # Newcombe, Stat Med 17:873, 1998, table II, example (a), method 10: 56/70 less 48/80
    value, low, high = np.transpose([wilson(56, 70), wilson(48, 80)])
    found = over_cells(value, low, high, np.array([1.0, -1.0]))
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)


def test_one_figure_keeps_its_own_interval() -> None:
    found = over_cells(np.array([0.3]), np.array([0.1]), np.array([0.6]), np.array([1.0]))
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.1, 0.6))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_several_units_are_as_scipy_has_them(a: list[float], b: list[float]) -> None:
    first, second = np.array(a), np.array(b)
    if np.ptp(first) < 1e-3 or np.ptp(second) < 1e-3:
        return
    expected = stats.ttest_ind(second, first, equal_var=False)
    found, p = welch(first, second)
    assert p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6, abs=1e-9)
    swapped, _ = welch(second, first)
    assert (-swapped.high, -swapped.low) == pytest.approx((found.low, found.high), abs=1e-12)
    n = min(first.size, second.size)
    difference = second[:n] - first[:n]
    if np.ptp(difference) > 1e-3:
        related = stats.ttest_rel(second[:n], first[:n])
        found, p = paired(difference)
        assert p == pytest.approx(related.pvalue, rel=1e-6, abs=1e-12)
        assert (found.low, found.high) == pytest.approx(tuple(related.confidence_interval(0.95)), rel=1e-6, abs=1e-9)


def test_one_more_of_the_same_kind_is_inside_in_nineteen_of_twenty() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found, p = one_more(float(rng.normal()), rng.normal(size=4))
        inside += found.low <= 0 <= found.high
        assert (p > 0.05) == (found.low <= 0 <= found.high)
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_equal_units_say_nothing_of_the_next() -> None:
    same = np.full(3, 0.2)
    for found in (mean_of(same), welch(same, same)[0], paired(same - same)[0], one_more(0.2, same)[0]):
        assert np.isnan(found.low)
        assert not np.isnan(found.value)


def test_missing_units_are_left_out() -> None:
    known, holes = np.array([0.1, 0.2, 0.4]), np.array([0.1, np.nan, 0.2, 0.4])
    assert mean_of(holes) == mean_of(known)
    assert welch(holes, known + 0.1) == welch(known, known + 0.1)
    nothing, p = welch(np.array([np.nan]), known)
    assert np.isnan(nothing.value)
    assert np.isnan(p)


@pytest.mark.parametrize("basis", ["cells", "units", "pairs"])
def test_the_test_of_composition_keeps_its_level_and_finds_a_difference(basis: str) -> None:
    rng = np.random.default_rng(1)
    units, n = (1, 300) if basis == "cells" else (8, 300)
    centre = np.array([0.5, 0.3, 0.2])

    def drawn(shift: float) -> np.ndarray:
        share = centre + np.array([shift, -shift, 0.0])
        spread = [share] * units if basis == "cells" else [rng.dirichlet(80 * share) for _ in range(units)]
        return np.array([rng.multinomial(n, s) / n for s in spread])

    same = [
        composition_distance(drawn(0), drawn(0), (n, n), basis, np.random.default_rng(i)).p  # type: ignore[arg-type]
        for i in range(100)
    ]
    assert np.mean(np.array(same) <= 0.05) <= 0.12
    found = composition_distance(drawn(0), drawn(0.15), (n, n), basis, rng)  # type: ignore[arg-type]
    assert found.p < 0.05
    assert found.by_chance < found.found


def test_one_against_several_cannot_be_surer_than_their_number() -> None:
    several = np.array([[0.5, 0.5], [0.52, 0.48], [0.49, 0.51], [0.51, 0.49]])
    found = composition_distance(
        several, np.array([[0.1, 0.9]]), (1.0, 1.0), "one against several", np.random.default_rng(0)
    )
    assert found.p == pytest.approx(1 / 5)
    assert found.found == pytest.approx(total_variation(several.mean(0), np.array([0.1, 0.9])))
