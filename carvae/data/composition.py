"""How far a composition or a mean over some cells may be from that of the specimen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INTERVAL = 0.95


def fraction_interval(
    count: NDArray[np.floating], total: NDArray[np.floating] | NDArray[np.integer], n_states: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the central 95% interval of a state's fraction, NaN where there are no cells.

    The counts of a sample are multinomial and its composition has a Dirichlet prior of one cell in all, spread evenly
    (Perks, J Inst Actuar 73:285, 1947); the fraction of one state is then a beta variable. It says how far the cells
    drawn may be from the specimen, not whether their labels are right.

    Parameters
    ----------
    count, total
        Cells of the state, and of all states.
    """
    from scipy.stats import beta

    a, b = count + 1.0 / n_states, total - count + 1.0 - 1.0 / n_states
    tail = (1.0 - INTERVAL) / 2
    share = count / np.maximum(total, 1)  # at none and at all of the cells the central interval would leave it out
    low, high = np.minimum(beta.ppf(tail, a, b), share), np.maximum(beta.ppf(1.0 - tail, a, b), share)
    return np.where(total > 0, low, np.nan), np.where(total > 0, high, np.nan)


def mean_interval(
    total: NDArray[np.floating], square: NDArray[np.floating], n: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of Student's 95% interval of a mean of values between 0 and 1, NaN where there are fewer than two cells.

    Parameters
    ----------
    total, square, n
        Sum of the values, sum of their squares, and how many there are.
    """
    from scipy.stats import t

    some = np.maximum(n, 2)
    mean = total / some
    variance = np.maximum(square - total * mean, 0.0) / (some - 1)
    half = t.ppf((1.0 + INTERVAL) / 2, some - 1) * np.sqrt(variance / some)
    known = n >= 2  # noqa: PLR2004
    low, high = np.clip(mean - half, 0.0, 1.0), np.clip(mean + half, 0.0, 1.0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)
