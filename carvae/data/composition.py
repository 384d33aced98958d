"""How far a composition counted in some cells may be from that of the specimen."""

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
