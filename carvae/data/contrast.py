"""Two groups of samples compared, with intervals over what the groups can speak for.

Axes: U units (patients or samples), F figures, S states.

One unit a side speaks for its cells alone: intervals are those of its figures, put together by the method of variance
estimates recovery, MOVER (Zou and Donner, Stat Med 27:1693, 2008). Several a side speak for patients: Student's
interval of paired differences, or Welch's. One against several is asked whether it may be one more of them: the
interval is that of prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Basis = Literal["cells", "units", "pairs", "one against several", "none"]

INTERVAL = 0.95
DRAWS = 2000
"""Random draws of the test of composition."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95% interval; NaN where there is none."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def within(self, least: float, most: float) -> Estimate:
        """The interval cut at the ends of what the figure can be."""
        return Estimate(self.value, *(float(np.clip(end, least, most)) for end in (self.low, self.high)))


@dataclass(frozen=True, slots=True)
class Contrast:
    """A figure of two groups, and their difference, B less A."""

    a: Estimate
    b: Estimate
    difference: Estimate
    p: float
    """Of no difference; NaN where intervals are over cells or there is none."""
    basis: Basis
    """What the interval of the difference is over."""


def over_cells(value_U: Floats, low_U: Floats, high_U: Floats, weight_U: Floats) -> Estimate:
    """A weighted sum of figures that are known with intervals (MOVER); weights may be negative."""
    found = float(value_U @ weight_U)
    to_low, to_high = value_U - low_U, high_U - value_U
    down = np.where(weight_U > 0, to_low, to_high) * weight_U
    up = np.where(weight_U > 0, to_high, to_low) * weight_U
    return Estimate(found, found - float(np.sqrt(down @ down)), found + float(np.sqrt(up @ up)))


def mean_of(value_U: Floats) -> Estimate:
    """Mean of some units with Student's interval; none where all are equal, which says nothing of the next one."""
    value_U = value_U[~np.isnan(value_U)]
    if not value_U.size:
        return Estimate(np.nan)
    mean = float(value_U.mean())
    if value_U.size == 1 or not np.ptp(value_U):
        return Estimate(mean)
    half = _quantile(value_U.size - 1) * float(value_U.std(ddof=1)) / np.sqrt(value_U.size)
    return Estimate(mean, mean - half, mean + half)


def paired(difference_U: Floats) -> tuple[Estimate, float]:
    """Mean of differences within units, and its p-value."""
    known = difference_U[~np.isnan(difference_U)]
    found = mean_of(known)
    return found, np.nan if np.isnan(found.low) else float(stats.ttest_1samp(known, 0.0).pvalue)


def welch(a_U: Floats, b_U: Floats) -> tuple[Estimate, float]:
    """Difference of the means of two groups of two or more units, and its p-value (Welch 1947)."""
    a_U, b_U = a_U[~np.isnan(a_U)], b_U[~np.isnan(b_U)]
    if min(a_U.size, b_U.size) < 2:  # noqa: PLR2004
        return Estimate(float(b_U.mean() - a_U.mean()) if min(a_U.size, b_U.size) else np.nan), np.nan
    found = float(b_U.mean() - a_U.mean())
    of_a, of_b = a_U.var(ddof=1) / a_U.size, b_U.var(ddof=1) / b_U.size
    if not (np.ptp(a_U) or np.ptp(b_U)):
        return Estimate(found), np.nan
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (a_U.size - 1) + of_b**2 / (b_U.size - 1))
    half = _quantile(freedom) * float(np.sqrt(of_a + of_b))
    p = 2 * float(stats.t.sf(abs(found) / np.sqrt(of_a + of_b), freedom))
    return Estimate(found, found - half, found + half), p


def one_more(one: float, others_U: Floats) -> tuple[Estimate, float]:
    """One unit less the mean of others; the interval holds zero where it may be one more of them."""
    others_U = others_U[~np.isnan(others_U)]
    if others_U.size < 2 or np.isnan(one):  # noqa: PLR2004
        return Estimate(one - float(others_U.mean()) if others_U.size else np.nan), np.nan
    found = one - float(others_U.mean())
    error = float(others_U.std(ddof=1)) * np.sqrt(1 + 1 / others_U.size)
    if not np.ptp(others_U):
        return Estimate(found), np.nan
    half = _quantile(others_U.size - 1) * error
    return Estimate(found, found - half, found + half), 2 * float(stats.t.sf(abs(found) / error, others_U.size - 1))


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + INTERVAL) / 2, freedom))


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two compositions are from each other: half the sum of absolute differences, 0 to 1."""

    found: float
    by_chance: float
    """Median of what it would be by chance."""
    p: float
    """Share of the draws by chance that are as far, or NaN where there are too few units to tell."""
    basis: Basis


def composition_distance(
    a_US: Floats, b_US: Floats, cells: tuple[float, float], basis: Basis, rng: np.random.Generator
) -> Distance:
    """Total variation distance of two mean compositions, beside what it is by chance.

    By chance means: cells drawn anew from both together (``cells``), units dealt anew to the sides (``units``), sides
    exchanged within units (``pairs``, rows being the same units), or each of the several taken for the one.

    Parameters
    ----------
    a_US, b_US
        Compositions of the units of each side.
    cells
        Cells of either side.
    """
    found = total_variation(a_US.mean(0), b_US.mean(0))
    draws = np.array(_draws(a_US, b_US, cells, basis, rng))
    if not draws.size:
        return Distance(found, np.nan, np.nan, basis)
    p = (1 + int((draws >= found - 1e-12).sum())) / (1 + draws.size)
    return Distance(found, float(np.median(draws)), float(p), basis)


def total_variation(a_S: Floats, b_S: Floats) -> float:
    """Half the sum of absolute differences."""
    return float(np.abs(a_S - b_S).sum() / 2)


def _draws(
    a_US: Floats, b_US: Floats, cells: tuple[float, float], basis: Basis, rng: np.random.Generator
) -> list[float]:
    if basis == "cells":
        n_a, n_b = (max(1, round(n)) for n in cells)
        pooled = (n_a * a_US.mean(0) + n_b * b_US.mean(0)) / (n_a + n_b)
        pooled = pooled / pooled.sum()
        drawn_a, drawn_b = (rng.multinomial(n, pooled, DRAWS) / n for n in (n_a, n_b))
        return list(np.abs(drawn_a - drawn_b).sum(1) / 2)
    if basis == "pairs":
        sign_DU = rng.choice([-1.0, 1.0], (DRAWS, len(a_US)))
        return list(np.abs(sign_DU @ (b_US - a_US) / len(a_US)).sum(1) / 2)
    if basis == "units":
        both, n = np.concatenate([a_US, b_US]), len(a_US)
        orders = (rng.permutation(len(both)) for _ in range(DRAWS))
        return [total_variation(both[order[:n]].mean(0), both[order[n:]].mean(0)) for order in orders]
    if basis == "one against several":
        several = a_US if len(a_US) > 1 else b_US
        rest = (np.delete(several, u, axis=0).mean(0) for u in range(len(several)))
        return [total_variation(several[u], mean) for u, mean in enumerate(rest)]
    return []
