"""CPU kernels (numba): a row's softmax, NB or ZINB likelihood and gradients in one go, and the sparse first layer's.

Axes: N cells, G genes, H hidden, M non-zero counts.

The maths is that of `likelihood`, whose plain torch functions are the readable form of the same sums. What is done
for every gene is in float32 and written so that LLVM makes vector instructions of it: `_exp` and `_log1p` have
no branch and no call. What is done at counts alone is in float64. Users need no compiler; the first call on a machine
takes some seconds, later ones read numba's cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.integer[Any]]

EPS = 1e-8
"""Added inside logarithms, as in scvi-tools."""
SHORT = 8
"""Up to this count, differences of gamma functions are products and sums of so many terms."""
FAST = {"contract", "nsz"}
"""No reordering of sums: code from numba's cache would then round otherwise than code just compiled, and a run that
goes on would not end with the weights of an uninterrupted one. Sums get their vectors from `LANES`."""
LANES = 64
"""Running sums side by side."""
SMALLEST = np.float32(-87.0)
ONE, HALF, TWO = np.float32(1), np.float32(0.5), np.float32(2)
LN2, LOG2_E = np.float32(math.log(2)), np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
SQRT_HALF_BITS = np.int32(0x3F3504F3)
MANTISSA, BIAS = np.int32(23), np.int32(127)
ASYMPTOTIC = 8.0
"""From here on the asymptotic series of digamma is exact to 1e-14."""
LARGEST_PRODUCT = 1e100
"""A running product beyond it, or below its inverse, is turned into a logarithm."""


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


class _Inflation(NamedTuple):
    zero_G: Floats
    dzero_G: Floats


@intrinsic
def _bits(typing: Any, x: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float(typing: Any, bits: Any) -> Any:
    """The float32 of the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(forceinline=True, error_model="numpy")  # without `FAST`: reordered, they would lose digits
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0, relative error 1e-7; 0 below `SMALLEST`. A NaN stays one. Coefficients of Cephes ``expf``."""
    bounded = SMALLEST if x < SMALLEST else x
    k = np.float32(math.floor(bounded * LOG2_E + HALF))
    r = (bounded - k * LN2_HIGH) - k * LN2_LOW
    poly = np.float32(1.9875691500e-4)
    poly = poly * r + np.float32(1.3981999507e-3)
    poly = poly * r + np.float32(8.3334519073e-3)
    poly = poly * r + np.float32(4.1665795894e-2)
    poly = poly * r + np.float32(1.6666665459e-1)
    poly = poly * r + HALF
    value = (poly * r * r + r + ONE) * _float(np.int32((np.int32(k) + BIAS) << MANTISSA))
    return np.float32(0) if x < SMALLEST else value


@njit(forceinline=True, error_model="numpy")  # without `FAST`: reordered, they would lose digits
def _log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0, relative error 2e-7 however small u is.

    With ``1 + u = 2^k m`` and m between sqrt(1/2) and sqrt(2), ``m - 1`` is taken from u itself, so nothing is lost
    where k = 0; then ``log m = 2 artanh((m - 1) / (m + 1))``.
    """
    k = np.int32(np.int32(_bits(u + ONE) - SQRT_HALF_BITS) >> MANTISSA)
    scale = _float(np.int32((BIAS - k) << MANTISSA))
    f = u * scale + (scale - ONE)
    s = f / (f + TWO)
    z = s * s
    series = np.float32(2 / 9)
    series = series * z + np.float32(2 / 7)
    series = series * z + np.float32(2 / 5)
    series = series * z + np.float32(2 / 3)
    return np.float32(k) * LN2 + (TWO * s + s * z * series)


@njit
def _digamma(x: float) -> float:
    """Derivative of lgamma for x > 0: recurrence to 8, then Abramowitz and Stegun 6.3.18."""
    below = 0.0
    while x < ASYMPTOTIC:
        below += 1.0 / x
        x += 1.0
    i = 1.0 / (x * x)
    series = i * (1 / 12 - i * (1 / 120 - i * (1 / 252 - i * (1 / 240 - i * (1 / 132 - i * 691 / 32760)))))
    return math.log(x) - 0.5 / x - series - below


@njit(fastmath=FAST, error_model="numpy")
def _sum(x_G: Floats) -> Any:
    lanes = np.zeros(LANES, np.float32)
    whole = x_G.size // LANES * LANES
    for start in range(0, whole, LANES):
        part = x_G[start : start + LANES]
        for k in range(LANES):
            lanes[k] += part[k]
    total = np.float64(0)
    for k in range(LANES):
        total += lanes[k]
    for g in range(whole, x_G.size):
        total += x_G[g]
    return total


@njit(fastmath=FAST, error_model="numpy")
def _greatest(x_G: Floats) -> Any:
    lanes = np.full(LANES, np.float32(-np.inf))
    whole = x_G.size // LANES * LANES
    for start in range(0, whole, LANES):
        part = x_G[start : start + LANES]
        for k in range(LANES):
            lanes[k] = part[k] if part[k] > lanes[k] else lanes[k]
    greatest = np.float32(-np.inf)
    for k in range(LANES):
        greatest = max(greatest, lanes[k])
    for g in range(whole, x_G.size):
        greatest = max(greatest, x_G[g])
    return greatest


@njit(fastmath=FAST, error_model="numpy")
def _softmax(logits_G: Floats, p_G: Floats) -> None:
    greatest = _greatest(logits_G)
    for g in range(logits_G.size):
        p_G[g] = _exp(logits_G[g] - greatest)
    scale = np.float32(1 / _sum(p_G))
    for g in range(logits_G.size):
        p_G[g] *= scale


@njit(fastmath=FAST, error_model="numpy")
def _nb_zeros(r_G: Floats, p_G: Floats, loss_G: Floats, library: Any, theta_G: Floats, dtheta_G: Floats) -> None:
    """As if all counts were zero: ``loss_G`` receives the loss, ``r_G`` each gene's ``mu d(log lik)/d(mu)``."""
    for g in range(p_G.size):
        u = p_G[g] * library / (theta_G[g] + np.float32(EPS))
        log1p, share = _log1p(u), u / (u + ONE)
        r_G[g] = -theta_G[g] * share
        loss_G[g] = theta_G[g] * log1p
        dtheta_G[g] += log1p - share


@njit(fastmath=FAST, error_model="numpy")
def _zinb_zeros(
    r_G: Floats, p_G: Floats, loss_G: Floats, inflation: _Inflation, library: Any, theta_G: Floats, dtheta_G: Floats
) -> None:
    """As `_nb_zeros`; ``dzero_G`` receives the gradient of the loss in the logits of the zero inflation."""
    for g in range(p_G.size):
        u = p_G[g] * library / (theta_G[g] + np.float32(EPS))
        log1p, share = _log1p(u), u / (u + ONE)
        pi = inflation.zero_G[g]
        a = -theta_G[g] * log1p - pi
        exp_a, exp_pi = _exp(-abs(a)), _exp(-abs(pi))
        loss_G[g] = max(-pi, np.float32(0)) - max(a, np.float32(0)) + (_log1p(exp_pi) - _log1p(exp_a))
        sigmoid = (ONE if a > 0 else exp_a) / (ONE + exp_a)
        inflation.dzero_G[g] = sigmoid - (exp_pi if pi > 0 else ONE) / (ONE + exp_pi)
        r_G[g] = -theta_G[g] * share * sigmoid
        dtheta_G[g] += sigmoid * (log1p - share)


@njit(error_model="numpy")
def _at_counts(
    gene_M: Ints, count_M: Floats, r_G: Floats, p_G: Floats, library: float, theta_G: Floats, dtheta_G: Floats
) -> Any:
    """What counts add to the log likelihood of zeros and to the sum of r. Few logarithms: of running products."""
    loglik, product, sum_r = 0.0, 1.0, 0.0
    for j in range(gene_M.size):
        g, x = gene_M[j], np.float64(count_M[j])
        theta, mu = np.float64(theta_G[g]), np.float64(p_G[g]) * library
        inverse = 1.0 / (mu + (theta + EPS))
        ratio = (mu + EPS) * inverse
        digamma = 0.0
        if x <= SHORT:
            for i in range(int(x)):
                product *= (theta + i) * ratio / (i + 1.0)
                digamma += 1.0 / (theta + i)
            if product < 1.0 / LARGEST_PRODUCT or product > LARGEST_PRODUCT:
                loglik += math.log(product)
                product = 1.0
        else:
            loglik += math.lgamma(x + theta) - math.lgamma(theta) - math.lgamma(x + 1.0) + x * math.log(ratio)
            digamma = _digamma(x + theta) - _digamma(theta)
        r = x * (mu / (mu + EPS) - mu * inverse)
        r_G[g] += np.float32(r)
        sum_r += r
        dtheta_G[g] -= np.float32(digamma - x * inverse)
    return loglik + math.log(product), sum_r


@njit(error_model="numpy")
def _exact_terms(gene_M: Ints, count_M: Floats, loss_G: Floats, p_G: Floats, library: float, theta_G: Floats) -> float:
    """What is to be added to the sum of ``loss_G`` so that its terms at large counts are as exact as float64.

    Such a term may be of the size of the count, and cancels against those of `_at_counts`.
    """
    added = 0.0
    for j in range(gene_M.size):
        if count_M[j] > SHORT:
            g = gene_M[j]
            theta = np.float64(theta_G[g])
            added += theta * math.log1p(np.float64(p_G[g]) * library / (theta + EPS)) - np.float64(loss_G[g])
    return added


@njit(error_model="numpy")
def _not_inflated(
    gene_M: Ints,
    count_M: Floats,
    r_G: Floats,
    p_G: Floats,
    inflation: _Inflation,
    library: Any,
    theta_G: Floats,
    dtheta_G: Floats,
) -> Any:
    """Turn ``softplus(a)`` of `_zinb_zeros` into ``a`` where there is a count; returns log likelihood and r added."""
    loglik, product, sum_r = 0.0, 1.0, 0.0
    for j in range(gene_M.size):
        if count_M[j] == 0:
            continue
        g = gene_M[j]
        theta = np.float64(theta_G[g])
        u = np.float64(p_G[g]) * library / (theta + EPS)
        log1p = math.log1p(u) if count_M[j] > SHORT else np.float64(_log1p(np.float32(u)))  # see `_exact_terms`
        share = u / (u + 1.0)
        a = -theta * log1p - np.float64(inflation.zero_G[g])
        exp_a = np.float64(_exp(np.float32(-abs(a))))
        loglik += min(a, 0.0)
        product *= 1.0 + exp_a
        if product > LARGEST_PRODUCT:
            loglik -= math.log(product)
            product = 1.0
        rest = (exp_a if a > 0 else 1.0) / (1.0 + exp_a)  # 1 - sigmoid(a)
        r = -theta * share * rest
        r_G[g] += np.float32(r)
        sum_r += r
        inflation.dzero_G[g] += np.float32(rest)
        dtheta_G[g] += np.float32(rest * (log1p - share))
    return loglik - math.log(product), sum_r


@njit(fastmath=FAST, error_model="numpy")
def _to_logits(r_G: Floats, p_G: Floats, sum_r: Any, scale: Any, dbias_G: Floats) -> None:
    """In place: r to the gradient of the loss in the logits, ``p sum(r) - r``."""
    for g in range(p_G.size):
        r_G[g] = (p_G[g] * sum_r - r_G[g]) * scale
        dbias_G[g] += r_G[g]


@njit(nogil=True, error_model="numpy", cache=True)
def nb(logits_NG: Floats, cells: Cells, theta_G: Floats, scale: Any, sums: Sums) -> None:
    """-log NB of each cell; ``logits_NG`` becomes its gradient times ``scale``."""
    p_G, loss_G = np.empty(logits_NG.shape[1], np.float32), np.empty(logits_NG.shape[1], np.float32)
    for n in range(logits_NG.shape[0]):
        row_G, library = logits_NG[n], cells.library_N[n]
        start, end = cells.indptr_N[n], cells.indptr_N[n + 1]
        gene, count = cells.gene_M[start:end], cells.count_M[start:end]
        _softmax(row_G, p_G)
        _nb_zeros(row_G, p_G, loss_G, library, theta_G, sums.dtheta_G)
        loss, sum_r = _sum(loss_G), _sum(row_G)
        added = _exact_terms(gene, count, loss_G, p_G, np.float64(library), theta_G)
        loglik, more_r = _at_counts(gene, count, row_G, p_G, np.float64(library), theta_G, sums.dtheta_G)
        sums.loss_N[n] = np.float32(loss + added - loglik)
        _to_logits(row_G, p_G, np.float32(sum_r + more_r), scale, sums.dbias_G)


@njit(nogil=True, error_model="numpy", cache=True)
def zinb(logits_NG: Floats, zero_NG: Floats, cells: Cells, theta_G: Floats, scale: Any, sums: Sums) -> None:
    """-log ZINB of each cell; as `nb`, and ``zero_NG`` becomes the gradient in the zero inflation's logits."""
    p_G, loss_G = np.empty(logits_NG.shape[1], np.float32), np.empty(logits_NG.shape[1], np.float32)
    zero_G = np.empty_like(p_G)
    for n in range(logits_NG.shape[0]):
        row_G, dzero_G, library = logits_NG[n], zero_NG[n], cells.library_N[n]
        start, end = cells.indptr_N[n], cells.indptr_N[n + 1]
        gene, count = cells.gene_M[start:end], cells.count_M[start:end]
        zero_G[:] = dzero_G
        _softmax(row_G, p_G)
        inflation = _Inflation(zero_G, dzero_G)
        _zinb_zeros(row_G, p_G, loss_G, inflation, library, theta_G, sums.dtheta_G)
        loss, sum_r = _sum(loss_G), _sum(row_G)
        loglik, more_r = _not_inflated(gene, count, row_G, p_G, inflation, np.float64(library), theta_G, sums.dtheta_G)
        at_counts, r_at_counts = _at_counts(gene, count, row_G, p_G, np.float64(library), theta_G, sums.dtheta_G)
        sums.loss_N[n] = np.float32(loss - loglik - at_counts)
        _to_logits(row_G, p_G, np.float32(sum_r + more_r + r_at_counts), scale, sums.dbias_G)
        for g in range(zero_G.size):
            dzero_G[g] *= scale
            sums.dzero_bias_G[g] += dzero_G[g]


@njit(nogil=True, fastmath=FAST, cache=True)
def scatter_rows(indptr_N: Ints, gene_M: Ints, value_M: Floats, grad_NH: Floats, dweight_GH: Floats) -> None:
    """Add to each gene's row the gradients of the cells that have it, times their values: sparse^T x dense."""
    for n in range(grad_NH.shape[0]):
        for j in range(indptr_N[n], indptr_N[n + 1]):
            g, value = gene_M[j], value_M[j]
            for h in range(grad_NH.shape[1]):
                dweight_GH[g, h] += value * grad_NH[n, h]
