"""CPU kernels (numba): a row's softmax, NB or ZINB likelihood and gradients in one go, and the sparse first layer's.

Axes: N cells, G genes, H hidden, M non-zero counts (of a minibatch, or of one cell).

The maths is that of `likelihood`, whose plain torch functions are the readable form of the same sums. It is written so
that LLVM makes vector instructions of it: one loop over all genes, one over a cell's counts, gathered for it, and no
branch and no call in either. Both are in float32; the few counts above `SHORT` are in float64. Users need no compiler;
the first call on a machine takes some seconds, later ones read numba's cache.
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
Doubles = NDArray[np.float64]
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
SMALL = np.float32(EPS)
LN2, LOG2_E = np.float32(math.log(2)), np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2**23)
"""Added, it rounds a float32 to a whole number, which then stands in the last bits."""
SQRT_HALF_BITS = np.int32(0x3F3504F3)
MANTISSA, BIAS = np.int32(23), np.int32(127)
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
ASYMPTOTIC = 8.0
"""From here on the asymptotic series of lgamma and digamma are exact to 1e-13."""


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


class _Theta(NamedTuple):
    theta_G: Floats
    inverse_G: Floats
    """Of theta + eps."""
    lgamma_G: Doubles
    """Of theta; NaN where nobody has asked yet."""
    digamma_G: Doubles


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


@intrinsic
def _widen(typing: Any, x: Any) -> Any:
    """The float32 of a float32, or of the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return types.float32(x), generate


@intrinsic
def _narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float32 as the type of ``like``: itself, or the bits of the nearest bfloat16 (ties to even)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        last = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(last, word(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return like(types.float32, like), generate


@njit(forceinline=True)
def _ordered(bits: Any) -> Any:
    """Between the bits of a float32 and an int32 of the same order, both ways: integers have a vector maximum."""
    return np.int32(bits ^ (np.int32(bits >> np.int32(31)) & ALL_BUT_SIGN))


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0, relative error 1e-7; 0 below `SMALLEST`. A NaN stays one. Coefficients of Cephes ``expf``."""
    bounded = SMALLEST if x < SMALLEST else x
    rounded = bounded * LOG2_E + ROUND
    k = rounded - ROUND
    r = (bounded - k * LN2_HIGH) - k * LN2_LOW
    poly = np.float32(1.9875691500e-4)
    poly = poly * r + np.float32(1.3981999507e-3)
    poly = poly * r + np.float32(8.3334519073e-3)
    poly = poly * r + np.float32(4.1665795894e-2)
    poly = poly * r + np.float32(1.6666665459e-1)
    poly = poly * r + HALF
    value = (poly * r * r + r + ONE) * _float(np.int32((_bits(rounded) + BIAS) << MANTISSA))
    return np.float32(0) if x < SMALLEST else value


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _log_of(k: Any, f: Any) -> Any:
    """The logarithm of ``2^k (1 + f)`` for 1 + f between sqrt(1/2) and sqrt(2): ``log(1 + f) = 2 artanh(f / (f + 2))``."""
    s = f / (f + TWO)
    z = s * s
    series = np.float32(2 / 9)
    series = series * z + np.float32(2 / 7)
    series = series * z + np.float32(2 / 5)
    series = series * z + np.float32(2 / 3)
    return np.float32(k) * LN2 + (TWO * s + s * z * series)


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0, relative error 2e-7 however small u is, since f is taken from u itself."""
    k = np.int32(np.int32(_bits(u + ONE) - SQRT_HALF_BITS) >> MANTISSA)
    scale = _float(np.int32((BIAS - k) << MANTISSA))
    return _log_of(k, u * scale + (scale - ONE))


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _log(x: Any) -> Any:
    """log(x) for x > 0, to 2e-7 of the greater of it and 1."""
    k = np.int32(np.int32(_bits(x) - SQRT_HALF_BITS) >> MANTISSA)
    return _log_of(k, x * _float(np.int32((BIAS - k) << MANTISSA)) - ONE)


@njit(error_model="numpy")
def _gammas(x: float) -> Any:
    """lgamma and digamma for x > 0: recurrence to 8, then Abramowitz and Stegun 6.1.41 and 6.3.18."""
    product, below = 1.0, 0.0
    while x < ASYMPTOTIC:
        product *= x
        below += 1.0 / x
        x += 1.0
    log, i = math.log(x), 1.0 / x
    z = i * i
    stirling = i * (1 / 12 - z * (1 / 360 - z * (1 / 1260 - z * (1 / 1680 - z * (1 / 1188 - z * 691 / 360360)))))
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z * (1 / 132 - z * 691 / 32760)))))
    lgamma = (x - 0.5) * log - x + HALF_LOG_2_PI + stirling
    return lgamma - math.log(product), log - 0.5 * i - series - below


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
def _softmax(logits_G: Floats, bias_G: Floats, p_G: Floats) -> Any:
    """``p_G`` becomes the softmax but for a factor, which is returned."""
    greatest = _ordered(_bits(np.float32(-np.inf)))
    for g in range(p_G.size):
        p_G[g] = _widen(logits_G[g]) + bias_G[g]
        greatest = max(greatest, _ordered(_bits(p_G[g])))
    highest = _float(_ordered(greatest))
    for g in range(p_G.size):
        p_G[g] = _exp(p_G[g] - highest)
    return 1 / _sum(p_G)


@njit(fastmath=FAST, error_model="numpy")
def _nb_zeros(row: _Row, scale: Any, theta: _Theta, dtheta_G: Floats) -> None:
    """As if all counts were zero; ``scale`` makes ``mu`` of ``p_G``."""
    p_G, r_G, loss_G, theta_G, inverse_G = row.p_G, row.r_G, row.loss_G, theta.theta_G, theta.inverse_G
    for g in range(p_G.size):
        u = p_G[g] * scale * inverse_G[g]
        log1p, share = _log1p(u), u / (u + ONE)
        r_G[g] = -theta_G[g] * share
        loss_G[g] = theta_G[g] * log1p
        dtheta_G[g] += log1p - share


@njit(fastmath=FAST, error_model="numpy")
def _zinb_zeros(row: _Row, scale: Any, theta: _Theta, dtheta_G: Floats) -> None:
    """As `_nb_zeros`; ``dzero_G`` receives the gradient of the loss in the logits of the zero inflation."""
    p_G, r_G, loss_G, zero_G, dzero_G = row.p_G, row.r_G, row.loss_G, row.zero_G, row.dzero_G
    theta_G, inverse_G = theta.theta_G, theta.inverse_G
    for g in range(p_G.size):
        u = p_G[g] * scale * inverse_G[g]
        log1p, share = _log1p(u), u / (u + ONE)
        pi = zero_G[g]
        a = -theta_G[g] * log1p - pi
        exp_a, exp_pi = _exp(-abs(a)), _exp(-abs(pi))
        loss_G[g] = max(-pi, np.float32(0)) - max(a, np.float32(0)) + (_log1p(exp_pi) - _log1p(exp_a))
        sigmoid = (ONE if a > 0 else exp_a) / (ONE + exp_a)
        dzero_G[g] = sigmoid - (exp_pi if pi > 0 else ONE) / (ONE + exp_pi)
        r_G[g] = -theta_G[g] * share * sigmoid
        dtheta_G[g] += sigmoid * (log1p - share)


@njit(error_model="numpy")
def _collect(gene_M: Ints, count_M: Floats, row: _Row, scale: Any, theta: _Theta, entries: _Entries) -> int:
    """Put what the counts need side by side; returns how many are large."""
    n_large = 0
    for j in range(gene_M.size):
        g, x = np.uint32(gene_M[j]), count_M[j]
        entries.large_M[n_large] = j
        n_large += x > SHORT
        entries.count_M[j] = x if x <= SHORT else np.float32(0)
        entries.theta_M[j] = theta.theta_G[g]
        entries.mu_M[j] = row.p_G[g] * scale
        entries.zero_M[j] = row.zero_G[g]
    return n_large


@njit(fastmath=FAST, error_model="numpy")
def _nb_counts(entries: _Entries, m: int) -> None:
    """What counts to `SHORT` add, with ``total = mu + theta``: differences that would cancel are written out.

    ``log(mu / total) = -log1p(theta / mu)``; the loss has the product of ``(theta + i) / (i + 1)`` for i below x, in two
    halves lest it overflow; digamma's difference is the derivative of the logarithm of that product.
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
        loss_M[j] = x * _log1p(theta / more) - (_log(low) + _log(high))
        r_M[j] = share * theta * (mu_M[j] / more)
        dtheta_M[j] = share - (dlow / low + dhigh / high)


@njit(fastmath=FAST, error_model="numpy")
def _not_inflated(entries: _Entries, m: int) -> None:
    """Turn ``softplus(a)`` of `_zinb_zeros` into ``a``."""
    theta_M, mu_M, zero_M, dzero_M = entries.theta_M[:m], entries.mu_M[:m], entries.zero_M[:m], entries.dzero_M[:m]
    count_M, loss_M, r_M, dtheta_M = entries.count_M[:m], entries.loss_M[:m], entries.r_M[:m], entries.dtheta_M[:m]
    for j in range(m):
        u = mu_M[j] / (theta_M[j] + SMALL)
        log1p, share = _log1p(u), u / (u + ONE)
        a = -theta_M[j] * log1p - zero_M[j]
        exp_a = _exp(-abs(a))
        is_count = ONE if count_M[j] > 0 else np.float32(0)
        rest = is_count * (exp_a if a > 0 else ONE) / (ONE + exp_a)  # 1 - sigmoid(a)
        loss_M[j] += is_count * (_log1p(exp_a) - min(a, np.float32(0)))
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
def _gammas_of(g: int, theta: _Theta) -> Any:
    if theta.lgamma_G[g] != theta.lgamma_G[g]:
        theta.lgamma_G[g], theta.digamma_G[g] = _gammas(np.float64(theta.theta_G[g]))
    return theta.lgamma_G[g], theta.digamma_G[g]


@njit(error_model="numpy")
def _nb_large(g: int, x: float, mu: float, row: _Row, theta: _Theta, dtheta_G: Floats) -> Any:
    """As `_nb_counts`, in float64; returns what is added to the loss and to r."""
    theta_g, more = np.float64(theta.theta_G[g]), mu + EPS
    total = mu + (theta_g + EPS)
    lgamma, digamma = _gammas_of(g, theta)
    lgamma_x, digamma_x = _gammas(x + theta_g)
    r = x * theta_g * mu / (total * more)
    row.r_G[g] += np.float32(r)
    dtheta_G[g] += np.float32(x / total - (digamma_x - digamma))
    return x * math.log1p(theta_g / more) - (lgamma_x - lgamma - _gammas(x + 1.0)[0]), r


@njit(error_model="numpy")
def _as_zero(g: int, mu: float, row: _Row, theta: _Theta) -> float:
    """The error of ``loss_G``, which may be of the size of the count, and cancels against `_nb_large`."""
    theta_g = np.float64(theta.theta_G[g])
    return theta_g * math.log1p(mu / (theta_g + EPS)) - np.float64(row.loss_G[g])


@njit(error_model="numpy")
def _not_inflated_large(g: int, mu: float, row: _Row, theta: _Theta, dtheta_G: Floats) -> Any:
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
    """r to the gradient of the loss in the logits, ``p sum(r) - r``; ``factor`` is sum(r) times that of ``p_G``."""
    p_G, r_G = row.p_G, row.r_G
    for g in range(p_G.size):
        dlogit = (p_G[g] * factor - r_G[g]) * scale
        logits_G[g] = _narrow(dlogit, logits_G[g])
        dbias_G[g] += dlogit


@njit(error_model="numpy")
def _workspace(n_genes: int, indptr_N: Ints, theta_G: Floats) -> Any:
    m = np.max(np.diff(indptr_N))
    row, entries = np.zeros((5, n_genes), np.float32), np.zeros((8, m), np.float32)
    gammas = np.full((2, n_genes), np.nan)
    inverse_G = ONE / (theta_G + SMALL)
    return (
        _Row(row[0], row[1], row[2], row[3], row[4]),
        _Entries(
            entries[0],
            entries[1],
            entries[2],
            entries[3],
            entries[4],
            entries[5],
            entries[6],
            entries[7],
            np.empty(m + 1, np.int64),
        ),
        _Theta(theta_G, inverse_G, gammas[0], gammas[1]),
    )


@njit(nogil=True, error_model="numpy", cache=True)
def nb(logits_NG: Any, bias_G: Floats, cells: Cells, theta_G: Floats, scale: Any, sums: Sums) -> None:
    """-log NB of each cell; ``logits_NG`` becomes its gradient times ``scale``.

    The logits come without their bias, as float32 or as the bits of bfloat16, and stay in that type.
    """
    row, entries, theta = _workspace(logits_NG.shape[1], cells.indptr_N, theta_G)
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
        for j in entries.large_M[:n_large]:
            g, mu = gene[j], exact * row.p_G[gene[j]]
            added, r = _nb_large(g, np.float64(count[j]), mu, row, theta, sums.dtheta_G)
            loss += added + _as_zero(g, mu, row, theta)
            sum_r += r
        sums.loss_N[n] = np.float32(loss)
        _to_logits(row, np.float32(sum_r * factor), scale, logits_NG[n], sums.dbias_G)


@njit(nogil=True, error_model="numpy", cache=True)
def zinb(
    logits_NG: Any, zero_NG: Any, biases: Any, cells: Cells, theta_G: Floats, scale: Any, sums: Sums
) -> None:
    """-log ZINB of each cell; as `nb`, and ``zero_NG`` becomes the gradient in the zero inflation's logits."""
    row, entries, theta = _workspace(logits_NG.shape[1], cells.indptr_N, theta_G)
    bias_G, zero_bias_G = biases
    for n in range(logits_NG.shape[0]):
        start, end = cells.indptr_N[n], cells.indptr_N[n + 1]
        gene, count, m = cells.gene_M[start:end], cells.count_M[start:end], end - start
        factor = _softmax(logits_NG[n], bias_G, row.p_G)
        exact = factor * cells.library_N[n]
        for g in range(zero_bias_G.size):
            row.zero_G[g] = _widen(zero_NG[n, g]) + zero_bias_G[g]
        _zinb_zeros(row, np.float32(exact), theta, sums.dtheta_G)
        n_large = _collect(gene, count, row, np.float32(exact), theta, entries)
        _nb_counts(entries, m)
        _not_inflated(entries, m)
        loss, sum_r = _sum(row.loss_G) + _sum(entries.loss_M[:m]), _sum(row.r_G) + _sum(entries.r_M[:m])
        _add(gene, row, entries, sums.dtheta_G)
        _add_dzero(gene, row, entries)
        for j in entries.large_M[:n_large]:
            g, mu = gene[j], exact * row.p_G[gene[j]]
            added, r = _nb_large(g, np.float64(count[j]), mu, row, theta, sums.dtheta_G)
            more, more_r = _not_inflated_large(g, mu, row, theta, sums.dtheta_G)
            loss += added + more
            sum_r += r + more_r
        sums.loss_N[n] = np.float32(loss)
        _to_logits(row, np.float32(sum_r * factor), scale, logits_NG[n], sums.dbias_G)
        for g in range(zero_bias_G.size):
            dzero = row.dzero_G[g] * scale
            zero_NG[n, g] = _narrow(dzero, zero_NG[n, g])
            sums.dzero_bias_G[g] += dzero


@njit(error_model="numpy")
def _by_gene(indptr_N: Ints, gene_M: Ints, value_M: Floats, n_genes: int) -> Any:
    """The transposed matrix: where each gene's entries begin, their cells and values."""
    indptr_G = np.zeros(n_genes + 1, np.int64)
    for g in gene_M:
        indptr_G[g + 1] += 1
    indptr_G = np.cumsum(indptr_G)
    place_G, cell_M, sorted_M = indptr_G.copy(), np.empty(gene_M.size, np.int64), np.empty_like(value_M)
    for n in range(indptr_N.size - 1):
        for j in range(indptr_N[n], indptr_N[n + 1]):
            place = place_G[gene_M[j]]
            cell_M[place], sorted_M[place] = n, value_M[j]
            place_G[gene_M[j]] = place + 1
    return indptr_G, cell_M, sorted_M


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def transposed_product(indptr_N: Ints, gene_M: Ints, value_M: Floats, grad_NH: Floats, dweight_GH: Floats) -> None:
    """Write to each gene's row the gradients of the cells that have it, times their values: sparse^T x dense."""
    indptr_G, cell_M, value_M = _by_gene(indptr_N, gene_M, value_M, dweight_GH.shape[0])
    for g in range(dweight_GH.shape[0]):
        row_H = dweight_GH[g]
        row_H[:] = 0
        for j in range(indptr_G[g], indptr_G[g + 1]):
            grad_H, value = grad_NH[cell_M[j]], value_M[j]
            for h in range(row_H.size):
                row_H[h] += value * grad_H[h]
