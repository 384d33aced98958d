"""Arithmetic of the CPU kernels: exponential and logarithms without branch or call, bits of floats, gamma functions.

So written that LLVM makes vector instructions of a loop around them, in float32, and in float64 where a name says
``double``. `kernels` is what numba keeps in its cache, by that file's content alone: hence `kernels.PARTS`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FAST = {"contract", "nsz"}
"""No reordering of sums: code from numba's cache would then round otherwise than code just compiled, and a run that
goes on would not end with the weights of an uninterrupted one. Sums get their vectors from `kernels.LANES`."""
SMALLEST = np.float32(-87.0)
ONE, HALF, TWO = np.float32(1), np.float32(0.5), np.float32(2)
LN2, LOG2_E = np.float32(math.log(2)), np.float32(1 / math.log(2))
DOUBLE_LN2 = math.log(2)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2**23)
"""Added, it rounds a float32 to a whole number, which then stands in the last bits."""
SQRT_HALF_BITS = np.int32(0x3F3504F3)
MANTISSA, BIAS = np.int32(23), np.int32(127)
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
DOUBLE_MANTISSA, DOUBLE_BIAS = np.uint64(52), np.uint64(1023)
SQRT_HALF_TO_ONE = np.uint64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
"""Added to the bits of a float64, it lets the exponent change at sqrt(1/2) in place of 1."""
TWO_52 = 2.0**52
TWO_52_BITS = np.uint64(0x4330000000000000)
"""Of 2^52, whose last bits hold a whole number: AVX2 turns no 64-bit integer into a float64."""
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
ASYMPTOTIC = 8.0
"""From here on the asymptotic series of lgamma and digamma are exact to 1e-13."""


@intrinsic
def bits(typing: Any, x: Any) -> Any:
    """The bits of a float32 as an int32, of a float64 as a uint64."""
    integer, word = (types.uint64, ir.IntType(64)) if x == types.float64 else (types.int32, ir.IntType(32))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], word)

    return integer(types.float64 if x == types.float64 else types.float32), generate


@intrinsic
def from_bits(typing: Any, x: Any) -> Any:
    """The float32 of the bits of an int32, the float64 of those of a uint64."""
    number, kind = (types.float64, ir.DoubleType()) if x == types.uint64 else (types.float32, ir.FloatType())

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], kind)

    return number(types.uint64 if x == types.uint64 else types.int32), generate


@intrinsic
def widen(typing: Any, x: Any) -> Any:
    """The float32 of a float32, or of the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return types.float32(x), generate


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
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
def ordered(x: Any) -> Any:
    """Between the bits of a float32 and an int32 of the same order, both ways: integers have a vector maximum."""
    return np.int32(x ^ (np.int32(x >> np.int32(31)) & ALL_BUT_SIGN))


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def fast_exp(x: Any) -> Any:
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
    value = (poly * r * r + r + ONE) * from_bits(np.int32((bits(rounded) + BIAS) << MANTISSA))
    return np.float32(0) if x < SMALLEST else value


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _log_of(k: Any, f: Any) -> Any:
    """``log(2^k (1 + f))``, 1 + f between sqrt(1/2) and sqrt(2); ``log(1 + f) = 2 artanh(f / (f + 2))``."""
    s = f / (f + TWO)
    z = s * s
    series = np.float32(2 / 9)
    series = series * z + np.float32(2 / 7)
    series = series * z + np.float32(2 / 5)
    series = series * z + np.float32(2 / 3)
    return np.float32(k) * LN2 + (TWO * s + s * z * series)


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def fast_log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0, relative error 2e-7 however small u is, since f is taken from u itself."""
    k = np.int32(np.int32(bits(u + ONE) - SQRT_HALF_BITS) >> MANTISSA)
    scale = from_bits(np.int32((BIAS - k) << MANTISSA))
    return _log_of(k, u * scale + (scale - ONE))


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def fast_log(x: Any) -> Any:
    """log(x) for x > 0, to 2e-7 of the greater of it and 1."""
    k = np.int32(np.int32(bits(x) - SQRT_HALF_BITS) >> MANTISSA)
    return _log_of(k, x * from_bits(np.int32((BIAS - k) << MANTISSA)) - ONE)


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def _double_log_of(exponent: Any, f: Any) -> Any:
    """As `_log_of`, with the exponent's bits as they stand in a float64."""
    s = f / (f + 2.0)
    z = s * s
    series = 2 / 23
    series = series * z + 2 / 21
    series = series * z + 2 / 19
    series = series * z + 2 / 17
    series = series * z + 2 / 15
    series = series * z + 2 / 13
    series = series * z + 2 / 11
    series = series * z + 2 / 9
    series = series * z + 2 / 7
    series = series * z + 2 / 5
    series = series * z + 2 / 3
    k = from_bits(exponent | TWO_52_BITS) - (TWO_52 + 1023.0)
    return k * DOUBLE_LN2 + (2.0 * s + s * z * series)


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def double_log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0 in float64, relative error 1e-15."""
    exponent = (bits(u + 1.0) + SQRT_HALF_TO_ONE) >> DOUBLE_MANTISSA
    scale = from_bits((DOUBLE_BIAS + DOUBLE_BIAS - exponent) << DOUBLE_MANTISSA)
    return _double_log_of(exponent, u * scale + (scale - 1.0))


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def double_log(x: Any) -> Any:
    """log(x) for x > 0 in float64, to 1e-15 of the greater of it and 1."""
    exponent = (bits(x) + SQRT_HALF_TO_ONE) >> DOUBLE_MANTISSA
    return _double_log_of(exponent, x * from_bits((DOUBLE_BIAS + DOUBLE_BIAS - exponent) << DOUBLE_MANTISSA) - 1.0)


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def asymptotic_gammas(x: Any, log: Any) -> Any:
    """Logarithm of gamma, and digamma, for x from `ASYMPTOTIC`, given log(x): Abramowitz and Stegun 6.1.41, 6.3.18."""
    i = 1.0 / x
    z = i * i
    stirling = i * (1 / 12 - z * (1 / 360 - z * (1 / 1260 - z * (1 / 1680 - z * (1 / 1188 - z * (691 / 360360))))))
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z * (1 / 132 - z * (691 / 32760))))))
    return (x - 0.5) * log - x + HALF_LOG_2_PI + stirling, log - 0.5 * i - series


@njit(error_model="numpy")
def gammas(x: float) -> Any:
    """Logarithm of gamma, and digamma, for x > 0, by recurrence to `ASYMPTOTIC`."""
    product, below = 1.0, 0.0
    while x < ASYMPTOTIC:
        product *= x
        below += 1.0 / x
        x += 1.0
    lgamma, digamma = asymptotic_gammas(x, math.log(x))
    return lgamma - math.log(product), digamma - below
