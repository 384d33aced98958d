"""CPU kernels (numba): a row's softmax, NB or ZINB likelihood and gradients in one go.

Axes: N cells, G genes, H hidden, M non-zero counts (of a minibatch, or of one cell).

The maths is that of `likelihood`, whose plain torch functions are the readable form of the same sums. It is written so
that LLVM makes vector instructions of it: one loop over all genes, one over a cell's counts, gathered for it, and no
branch and no call in either. Both are in float32; the few counts above `SHORT` have a loop of their own in float64.
Users need no compiler; the first call on a machine takes some seconds, later ones read numba's cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carvae.model.large_counts import EPS, SHORT, Large, Theta, add_large, error_of_zeros
from carvae.model.vector import (
    FAST,
    ONE,
    bits,
    fast_exp,
    fast_log,
    fast_log1p,
    from_bits,
    narrow,
    ordered,
    widen,
)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]

PARTS = "dc180ee125a7"
"""Digest of `large_counts` and `vector`, compiled into what numba keeps of this file, which it makes anew when this
file's content changes, and not when theirs does. `tests/test_vector.py` tells the digest."""
LANES = 128
"""Running sums side by side; a power of two. With fewer each waits for the one before to be stored."""
FOLDED = 8
"""To which they are added up, half to half, before they are summed in float64."""
SMALL = np.float32(EPS)


class Cells(NamedTuple):
    """Some cells' counts, compressed by row, and their expected sum over the genes."""

    indptr_N: Ints
    gene_M: Ints
    count_M: Floats
    library_N: Floats


class Sums(NamedTuple):
    """What a kernel writes beside the gradients of the logits."""

    loss_N: Floats
    """Written."""
    dtheta_G: Floats
    """Added to: the gradient of the summed loss in theta."""
    dbias_G: Floats
    """Added to: the scaled gradient in the bias of the logits."""
    dzero_bias_G: Floats
    """Likewise for the zero inflation."""


class _Row(NamedTuple):
    """One cell's genes."""

    p_G: Floats
    """Share of each gene, not yet divided by the sum."""
    r_G: Floats
    """``mu d(log lik)/d(mu)``."""
    loss_G: Floats
    """Loss as if all counts were zero."""
    zero_G: Floats
    """Logits of the zero inflation."""
    dzero_G: Floats
    """Gradient of the loss in them."""
    slope_G: Floats
    """Gradient of the uninflated loss in theta."""
    exp_G: Floats


class _Entries(NamedTuple):
    """One cell's counts."""

    count_M: Floats
    """0 above `SHORT`."""
    theta_M: Floats
    mu_M: Floats
    loss_M: Floats
    """What the count adds to the loss of a zero; likewise the next two."""
    r_M: Floats
    dtheta_M: Floats
    zero_M: Floats
    dzero_M: Floats
    large_M: Ints
    """The entries above `SHORT`."""


@njit(fastmath=FAST, error_model="numpy")
def _sum(x_G: Floats) -> Any:
    lanes = np.zeros(LANES, np.float32)
    whole = x_G.size // LANES * LANES
    for start in range(0, whole, LANES):
        part = x_G[start : start + LANES]
        for k in range(LANES):
            lanes[k] += part[k]
    rest, n = x_G[whole:], LANES
    for k in range(rest.size):
        lanes[k] += rest[k]
    while n > FOLDED:
        n //= 2
        low, high = lanes[:n], lanes[n : 2 * n]
        for k in range(n):
            low[k] += high[k]
    total = np.float64(0)
    for k in range(FOLDED):
        total += lanes[k]
    return total


@njit(fastmath=FAST, error_model="numpy")
def _softmax(logits_G: Floats, bias_G: Floats, p_G: Floats) -> Any:
    """``p_G`` becomes the softmax but for a factor, which is returned."""
    greatest = ordered(bits(np.float32(-np.inf)))
    for g in range(p_G.size):
        p_G[g] = widen(logits_G[g]) + bias_G[g]
        greatest = max(greatest, ordered(bits(p_G[g])))
    highest = from_bits(ordered(greatest))
    for g in range(p_G.size):
        p_G[g] = fast_exp(p_G[g] - highest)
    return 1 / _sum(p_G)


@njit(fastmath=FAST, error_model="numpy")
def _nb_zeros(row: _Row, scale: Any, theta: Theta, dtheta_G: Floats) -> None:
    """As if all counts were zero; ``scale`` makes ``mu`` of ``p_G``."""
    p_G, r_G, loss_G, theta_G, inverse_G = row.p_G, row.r_G, row.loss_G, theta.theta_G, theta.inverse_G
    for g in range(p_G.size):
        u = p_G[g] * scale * inverse_G[g]
        log1p, share = fast_log1p(u), u / (u + ONE)
        r_G[g] = -theta_G[g] * share
        loss_G[g] = theta_G[g] * log1p
        dtheta_G[g] += log1p - share


@njit(fastmath=FAST, error_model="numpy")
def _zinb_zeros(row: _Row, dtheta_G: Floats) -> None:
    """What `_nb_zeros` has written, inflated; ``dzero_G`` receives the gradient in the logits of the zero inflation.

    Loop by loop, each with one function that fits the registers.
    """
    r_G, loss_G, pi_G, dzero_G, slope_G, exp_G = row.r_G, row.loss_G, row.zero_G, row.dzero_G, row.slope_G, row.exp_G
    for g in range(pi_G.size):
        exp_G[g] = fast_exp(-abs(loss_G[g] + pi_G[g]))  # -loss - pi is the a of `likelihood.zinb_loss`
    for g in range(pi_G.size):
        inverse = ONE / (ONE + exp_G[g])
        dzero_G[g] = inverse * (ONE if loss_G[g] + pi_G[g] < 0 else exp_G[g])  # sigmoid(a)
    for g in range(pi_G.size):
        dtheta_G[g] += dzero_G[g] * slope_G[g]
        r_G[g] *= dzero_G[g]
    for g in range(pi_G.size):
        a = -loss_G[g] - pi_G[g]
        loss_G[g] = max(-pi_G[g], np.float32(0)) - max(a, np.float32(0)) - fast_log1p(exp_G[g])
    for g in range(pi_G.size):
        exp_G[g] = fast_exp(-abs(pi_G[g]))
    for g in range(pi_G.size):
        dzero_G[g] -= (exp_G[g] if pi_G[g] > 0 else ONE) / (ONE + exp_G[g])
        loss_G[g] += fast_log1p(exp_G[g])


@njit(error_model="numpy")
def _collect(gene_M: Ints, count_M: Floats, row: _Row, scale: Any, theta: Theta, entries: _Entries) -> int:
    """Put what the counts need side by side; returns how many are large."""
    n_large = 0
    for j in range(gene_M.size):
        g, x = np.uint32(gene_M[j]), count_M[j]
        entries.large_M[n_large] = j
        n_large += x > SHORT
        entries.count_M[j] = x if x <= SHORT else np.float32(0)
        entries.theta_M[j] = theta.theta_G[g]
        entries.mu_M[j] = row.p_G[g] * scale
    return n_large


@njit(fastmath=FAST, error_model="numpy")
def _nb_counts(entries: _Entries, m: int) -> None:
    """What counts to `SHORT` add, with ``total = mu + theta``: differences that would cancel are written out.

    ``log(mu / total) = -log1p(theta / mu)``; the loss has the product of ``(theta + i) / (i + 1)`` for i below x, in
    two halves lest it overflow; digamma's difference is the derivative of the logarithm of that product.
    """
    count_M, theta_M, mu_M = entries.count_M[:m], entries.theta_M[:m], entries.mu_M[:m]
    loss_M, r_M, dtheta_M = entries.loss_M[:m], entries.r_M[:m], entries.dtheta_M[:m]
    for j in range(m):
        x, theta, more = count_M[j], theta_M[j], mu_M[j] + SMALL
        share = x / (mu_M[j] + (theta + SMALL))
        low, dlow, high, dhigh = ONE, np.float32(0), ONE, np.float32(0)
        for i in range(SHORT // 2):
            factor, weight = theta + np.float32(i), np.float32(1 / (i + 1))
            below = x > np.float32(i)
            dlow = (dlow * factor + low) * weight if below else dlow
            low = low * factor * weight if below else low
            factor, weight = theta + np.float32(i + SHORT // 2), np.float32(1 / (i + 1 + SHORT // 2))
            below = x > np.float32(i + SHORT // 2)
            dhigh = (dhigh * factor + high) * weight if below else dhigh
            high = high * factor * weight if below else high
        loss_M[j] = x * fast_log1p(theta / more) - (fast_log(low) + fast_log(high))
        r_M[j] = share * theta * (mu_M[j] / more)
        dtheta_M[j] = share - (dlow / low + dhigh / high)


@njit(fastmath=FAST, error_model="numpy")
def _not_inflated(entries: _Entries, m: int) -> None:
    """Turn ``softplus(a)`` of `_zinb_zeros` into ``a``."""
    theta_M, mu_M, zero_M, dzero_M = entries.theta_M[:m], entries.mu_M[:m], entries.zero_M[:m], entries.dzero_M[:m]
    count_M, loss_M, r_M, dtheta_M = entries.count_M[:m], entries.loss_M[:m], entries.r_M[:m], entries.dtheta_M[:m]
    for j in range(m):
        u = mu_M[j] / (theta_M[j] + SMALL)
        log1p, share = fast_log1p(u), u / (u + ONE)
        a = -theta_M[j] * log1p - zero_M[j]
        exp_a = fast_exp(-abs(a))
        is_count = ONE if count_M[j] > 0 else np.float32(0)
        rest = is_count * (exp_a if a > 0 else ONE) / (ONE + exp_a)  # 1 - sigmoid(a)
        loss_M[j] += is_count * (fast_log1p(exp_a) - min(a, np.float32(0)))
        r_M[j] -= theta_M[j] * share * rest
        dtheta_M[j] += rest * (log1p - share)
        dzero_M[j] = rest


@njit(error_model="numpy")
def _add(gene_M: Ints, row: _Row, entries: _Entries, dtheta_G: Floats) -> None:
    for j in range(gene_M.size):
        g = np.uint32(gene_M[j])
        row.r_G[g] += entries.r_M[j]
        dtheta_G[g] += entries.dtheta_M[j]


@njit(error_model="numpy")
def _add_dzero(gene_M: Ints, row: _Row, entries: _Entries) -> None:
    for j in range(gene_M.size):
        row.dzero_G[np.uint32(gene_M[j])] += entries.dzero_M[j]


@njit(error_model="numpy")
def _not_inflated_large(g: int, mu: float, row: _Row, theta: Theta, dtheta_G: Floats) -> Any:
    """As `_not_inflated`, in float64; returns what is added to the loss and to r."""
    theta_g = np.float64(theta.theta_G[g])
    u = mu / (theta_g + EPS)
    log1p, share = math.log1p(u), u / (u + 1.0)
    a = -theta_g * log1p - np.float64(row.zero_G[g])
    exp_a = math.exp(-abs(a))
    rest = (exp_a if a > 0 else 1.0) / (1.0 + exp_a)
    r = -theta_g * share * rest
    row.r_G[g] += np.float32(r)
    row.dzero_G[g] += np.float32(rest)
    dtheta_G[g] += np.float32(rest * (log1p - share))
    return math.log1p(exp_a) - min(a, 0.0), r


@njit(fastmath=FAST, error_model="numpy")
def _to_logits(row: _Row, factor: Any, scale: Any, logits_G: Floats, dbias_G: Floats) -> None:
    """Write the gradient of the loss in the logits, ``p sum(r) - r``; ``factor`` is sum(r) times that of ``p_G``."""
    p_G, r_G = row.p_G, row.r_G
    for g in range(p_G.size):
        dlogit = (p_G[g] * factor - r_G[g]) * scale
        logits_G[g] = narrow(dlogit, logits_G[g])
        dbias_G[g] += dlogit


@njit(error_model="numpy")
def _workspace(n_genes: int, indptr_N: Ints, theta_G: Floats) -> Any:
    m = np.max(np.diff(indptr_N))
    row, e = np.zeros((7, n_genes), np.float32), np.zeros((8, m), np.float32)
    big, gammas = np.zeros((9, m)), np.full((2, n_genes), np.nan)
    return (
        _Row(row[0], row[1], row[2], row[3], row[4], row[5], row[6]),
        _Entries(e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], np.empty(m + 1, np.int64)),
        Large(big[0], big[1], big[2], big[3], big[4], big[5], big[6], big[7], big[8]),
        Theta(theta_G, ONE / (theta_G + SMALL), gammas[0], gammas[1]),
    )


@njit(nogil=True, error_model="numpy", cache=True)
def nb(logits_NG: Any, bias_G: Floats, cells: Cells, theta_G: Floats, scale: Any, sums: Sums) -> None:
    """-log NB of each cell; ``logits_NG`` becomes its gradient times ``scale``.

    The logits come without their bias, as float32 or as the bits of bfloat16, and stay in that type.
    """
    row, entries, large, theta = _workspace(logits_NG.shape[1], cells.indptr_N, theta_G)
    for n in range(logits_NG.shape[0]):
        start, end = cells.indptr_N[n], cells.indptr_N[n + 1]
        gene, count, m = cells.gene_M[start:end], cells.count_M[start:end], end - start
        factor = _softmax(logits_NG[n], bias_G, row.p_G)
        exact = factor * cells.library_N[n]
        _nb_zeros(row, np.float32(exact), theta, sums.dtheta_G)
        n_large = _collect(gene, count, row, np.float32(exact), theta, entries)
        _nb_counts(entries, m)
        loss, sum_r = _sum(row.loss_G) + _sum(entries.loss_M[:m]), _sum(row.r_G) + _sum(entries.r_M[:m])
        _add(gene, row, entries, sums.dtheta_G)
        gene_J = gene[entries.large_M[:n_large]]
        count_J = count[entries.large_M[:n_large]]
        added, r = add_large(gene_J, count_J, row.p_G, row.r_G, exact, theta, large, sums.dtheta_G)
        loss += added + error_of_zeros(gene_J, large, row.loss_G)
        sum_r += r
        sums.loss_N[n] = np.float32(loss)
        _to_logits(row, np.float32(sum_r * factor), scale, logits_NG[n], sums.dbias_G)


@njit(nogil=True, error_model="numpy", cache=True)
def zinb(logits_NG: Any, zero_NG: Any, biases: Any, cells: Cells, theta_G: Floats, scale: Any, sums: Sums) -> None:
    """-log ZINB of each cell; as `nb`, and ``zero_NG`` becomes the gradient in the zero inflation's logits."""
    row, entries, large, theta = _workspace(logits_NG.shape[1], cells.indptr_N, theta_G)
    bias_G, zero_bias_G = biases
    for n in range(logits_NG.shape[0]):
        start, end = cells.indptr_N[n], cells.indptr_N[n + 1]
        gene, count, m = cells.gene_M[start:end], cells.count_M[start:end], end - start
        factor = _softmax(logits_NG[n], bias_G, row.p_G)
        exact = factor * cells.library_N[n]
        for g in range(zero_bias_G.size):
            row.zero_G[g] = widen(zero_NG[n, g]) + zero_bias_G[g]
        row.slope_G[:] = 0
        _nb_zeros(row, np.float32(exact), theta, row.slope_G)
        _zinb_zeros(row, sums.dtheta_G)
        n_large = _collect(gene, count, row, np.float32(exact), theta, entries)
        _nb_counts(entries, m)
        for j in range(m):
            entries.zero_M[j] = row.zero_G[np.uint32(gene[j])]
        _not_inflated(entries, m)
        loss, sum_r = _sum(row.loss_G) + _sum(entries.loss_M[:m]), _sum(row.r_G) + _sum(entries.r_M[:m])
        _add(gene, row, entries, sums.dtheta_G)
        _add_dzero(gene, row, entries)
        gene_J = gene[entries.large_M[:n_large]]
        count_J = count[entries.large_M[:n_large]]
        added, r = add_large(gene_J, count_J, row.p_G, row.r_G, exact, theta, large, sums.dtheta_G)
        loss += added
        sum_r += r
        for j in range(n_large):
            added, r = _not_inflated_large(gene_J[j], large.mu_J[j], row, theta, sums.dtheta_G)
            loss += added
            sum_r += r
        sums.loss_N[n] = np.float32(loss)
        _to_logits(row, np.float32(sum_r * factor), scale, logits_NG[n], sums.dbias_G)
        for g in range(zero_bias_G.size):
            dzero = row.dzero_G[g] * scale
            zero_NG[n, g] = narrow(dzero, zero_NG[n, g])
            sums.dzero_bias_G[g] += dzero
