"""A cell's counts above `SHORT`, where the CPU kernels of the likelihood (`kernels`) need float64.

One loop over them, side by side, with Stirling's series, of which LLVM makes vector instructions. Axes: G genes,
J large counts of one cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carvae.model.vector import FAST, asymptotic_gammas, double_log, double_log1p, gammas

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]

EPS = 1e-8
"""Added inside logarithms, as in scvi-tools."""
SHORT = 8
"""Greatest count that is not large. Up to it, differences of gamma functions are products and sums of so many terms."""


class Theta(NamedTuple):
    """Inverse dispersion of the genes, and what is computed of it."""

    theta_G: Floats
    inverse_G: Floats
    """Of theta + eps."""
    lgamma_G: Doubles
    """Of theta; NaN where nobody has asked yet."""
    digamma_G: Doubles


class Large(NamedTuple):
    """One cell's counts above `SHORT`."""

    count_J: Doubles
    theta_J: Doubles
    mu_J: Doubles
    lgamma_J: Doubles
    """Of theta."""
    digamma_J: Doubles
    loss_J: Doubles
    """What the count adds to the loss of a zero; likewise the next two."""
    r_J: Doubles
    dtheta_J: Doubles
    zero_J: Doubles
    """Loss as if the count were zero."""


@njit(error_model="numpy")
def _collect(gene_J: Ints, count_J: Floats, p_G: Floats, scale: float, theta: Theta, large: Large) -> None:
    """Put what large counts need side by side; ``scale`` makes ``mu`` of ``p_G``."""
    for j in range(gene_J.size):
        g = np.uint32(gene_J[j])
        large.count_J[j], large.theta_J[j] = np.float64(count_J[j]), np.float64(theta.theta_G[g])
        large.mu_J[j] = scale * p_G[g]
        if np.isnan(theta.lgamma_G[g]):
            theta.lgamma_G[g], theta.digamma_G[g] = gammas(large.theta_J[j])
        large.lgamma_J[j], large.digamma_J[j] = theta.lgamma_G[g], theta.digamma_G[g]


@njit(fastmath=FAST, error_model="numpy")
def _nb(large: Large, n: int) -> None:
    """What large counts add to loss, r and the gradient in theta of `kernels.nb`, and the loss as if they were zero."""
    count_J, theta_J, mu_J = large.count_J[:n], large.theta_J[:n], large.mu_J[:n]
    lgamma_J, digamma_J, zero_J = large.lgamma_J[:n], large.digamma_J[:n], large.zero_J[:n]
    loss_J, r_J, dtheta_J = large.loss_J[:n], large.r_J[:n], large.dtheta_J[:n]
    for j in range(n):
        x, theta, mu = count_J[j], theta_J[j], mu_J[j]
        more, both, next_x = mu + EPS, x + theta, x + 1.0
        total = mu + (theta + EPS)
        lgamma, digamma = asymptotic_gammas(both, double_log(both))
        factorial, _ = asymptotic_gammas(next_x, double_log(next_x))
        loss_J[j] = x * double_log1p(theta / more) - (lgamma - lgamma_J[j] - factorial)
        r_J[j] = x * theta * mu / (total * more)
        dtheta_J[j] = x / total - (digamma - digamma_J[j])
        zero_J[j] = theta * double_log1p(mu / (theta + EPS))


@njit(error_model="numpy")
def add_large(
    gene_J: Ints,
    count_J: Floats,
    p_G: Floats,
    r_G: Floats,
    scale: float,
    theta: Theta,
    large: Large,
    dtheta_G: Floats,
) -> Any:
    """Add large counts to r and to the gradient in theta; returns what they add to the loss and to the sum of r.

    ``scale`` makes ``mu`` of ``p_G``.
    """
    _collect(gene_J, count_J, p_G, scale, theta, large)
    _nb(large, gene_J.size)
    loss, sum_r = 0.0, 0.0
    for j in range(gene_J.size):
        g = gene_J[j]
        r_G[g] += np.float32(large.r_J[j])
        dtheta_G[g] += np.float32(large.dtheta_J[j])
        loss += large.loss_J[j]
        sum_r += large.r_J[j]
    return loss, sum_r


@njit(error_model="numpy")
def error_of_zeros(gene_J: Ints, large: Large, loss_G: Floats) -> float:
    """The error of ``loss_G``, which may be of the size of a large count, and cancels against `add_large`."""
    error = 0.0
    for j in range(gene_J.size):
        error += large.zero_J[j] - np.float64(loss_G[gene_J[j]])
    return error
