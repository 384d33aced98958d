"""GPU kernels (Triton): those of `kernels`, for tensors on a CUDA device. No figure of theirs has been measured yet.

Axes: N cells, G genes, M non-zero counts, P programs that run side by side.

`nb` and `zinb` read a row of logits once: softmax, likelihood and gradient are made in registers, and the gradient goes
where the logits were. What is done for every gene is in float32, what is done at counts alone in float64. The sums over
cells (gradients of dispersion and biases) are kept per program and added up in a fixed order, so that a run gives the
same weights each time; atomic additions would not.

The sparse first layer is a row of the minibatch laid out densely (`dense_rows`), and torch's matrix product: on a GPU
tensor cores are faster at that than adding weight rows up, by the model of `docs/speed.md`, and the gradient needs no
atomic additions. The alternative, if a panel is so wide that the dense tile costs more than the weight rows of its
non-zeros: one program per cell that adds up `weight_GH[gene] * value`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from carvae.data.sparse import CountsCSR

EPS = tl.constexpr(1e-8)
"""Added inside logarithms, as in scvi-tools."""
SHIFT = tl.constexpr(8)
"""Gamma functions are taken so far above their argument, where the asymptotic series is exact to 1e-13."""
HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))
LN2 = tl.constexpr(math.log(2))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
MANTISSA = tl.constexpr(23)
BIAS = tl.constexpr(127)
PROGRAMS_PER_PROCESSOR = 2
"""Rows that one multiprocessor works on at a time."""
GENES_PER_WARP = 512
LEAST_WARPS, MOST_WARPS = 4, 16
THREADS_PER_WARP = 32
PROGRAMS_INTERPRETED = 3
"""Where there is no GPU, and Triton's interpreter stands in for it."""


class Cells(NamedTuple):
    """Some cells' counts, compressed by row, and their expected sum over the genes."""

    indptr_N: Tensor
    gene_M: Tensor
    count_M: Tensor
    library_N: Tensor


class Sums(NamedTuple):
    """What a kernel writes beside the gradients of the logits; see `kernels.Sums`."""

    loss_N: Tensor
    dtheta_G: Tensor
    dbias_G: Tensor
    dzero_bias_G: Tensor


class _Scratch(NamedTuple):
    """Memory that a kernel needs besides."""

    r_M: Tensor
    """What counts add to the gradient of a gene's logit, unscaled, until it can be added."""
    dzero_M: Tensor
    """Likewise for the zero inflation."""
    dtheta_PG: Tensor
    dbias_PG: Tensor
    dzero_bias_PG: Tensor


@triton.jit
def _log1p(u):
    """log(1 + u) in float32 for u >= 0, relative error 2e-7 however small u is; see `kernels._log1p`."""
    k = ((u + 1.0).to(tl.int32, bitcast=True) - SQRT_HALF_BITS) >> MANTISSA
    scale = ((-k + BIAS) << MANTISSA).to(tl.float32, bitcast=True)
    f = u * scale + (scale - 1.0)
    s = f / (f + 2.0)
    z = s * s
    series = ((z * (2 / 9) + 2 / 7) * z + 2 / 5) * z + 2 / 3
    return k.to(tl.float32) * LN2 + (2.0 * s + s * z * series)


@triton.jit
def _gamma(z):
    """For lgamma(z) and digamma(z), z > 0, in float64: product, Stirling's series above it, and digamma itself.

    ``lgamma(z) = series - log(product)`` with ``product = z (z + 1) ... (z + SHIFT - 1)``; Abramowitz and Stegun 6.1.41
    and 6.3.18. Products are returned so that one logarithm serves several.
    """
    product, slope = z, z * 0.0 + 1.0
    for i in tl.static_range(1, SHIFT):
        slope = slope * (z + i) + product
        product = product * (z + i)
    w = z + SHIFT
    inverse, log = 1.0 / w, tl.log(w)
    i2 = inverse * inverse
    tail = inverse * (1 / 12 - i2 * (1 / 360 - i2 * (1 / 1260 - i2 * (1 / 1680 - i2 / 1188))))
    series = (w - 0.5) * log - w + HALF_LOG_2PI + tail
    dtail = i2 * (1 / 12 - i2 * (1 / 120 - i2 * (1 / 252 - i2 * (1 / 240 - i2 * (1 / 132 - i2 * (691 / 32760))))))
    return product, series, log - 0.5 * inverse - dtail - slope / product


@triton.jit
def _count_terms(x, theta, mu):
    """What a count adds to a zero's log NB, to ``mu d/d(mu)`` and to ``d/d(theta)`` of it, in float64."""
    product, series, digamma = _gamma(theta)
    product_x, series_x, digamma_x = _gamma(x + theta)
    product_1, series_1, _ = _gamma(x + 1.0)
    inverse = 1.0 / (mu + theta + EPS)
    gamma = series_x - series - series_1 + tl.log(product / product_x * product_1)
    loglik = gamma + x * tl.log((mu + EPS) * inverse)
    return loglik, x * (mu / (mu + EPS) - mu * inverse), digamma_x - digamma - x * inverse


@triton.jit
def _not_inflated(theta, u, pi):
    """What a count of ZINB adds to `_count_terms`, in its three terms, and to the gradient of the zero inflation.

    A zero's log likelihood is ``softplus(a) - softplus(-pi)``, ``a = -theta log1p(u) - pi``; a count has ``a`` for
    ``softplus(a)``. ``rest`` is ``1 - sigmoid(a)``.
    """
    log1p, share = tl.log(1.0 + u), u / (1.0 + u)
    a = -theta * log1p - pi
    exp_a = tl.exp(-tl.abs(a))
    rest = tl.where(a > 0, exp_a, 1.0) / (1.0 + exp_a)
    loglik = tl.minimum(a, 0.0) - tl.log(1.0 + exp_a)
    return loglik, -theta * share * rest, rest * (share - log1p), rest


@triton.jit
def _zeros(u, theta, pi, INFLATED: tl.constexpr):
    """As if all counts were zero, in float32: loss, ``mu d/d(mu)``, gradients of theta and of the zero inflation."""
    log1p, share = _log1p(u), u / (u + 1.0)
    if not INFLATED:
        return theta * log1p, -theta * share, log1p - share, pi
    a = -theta * log1p - pi
    exp_a, exp_pi = tl.exp(-tl.abs(a)), tl.exp(-tl.abs(pi))
    loss = tl.maximum(-pi, 0.0) - tl.maximum(a, 0.0) + (_log1p(exp_pi) - _log1p(exp_a))
    sigmoid = tl.where(a > 0, 1.0, exp_a) / (1.0 + exp_a)
    dzero = sigmoid - tl.where(pi > 0, exp_pi, 1.0) / (1.0 + exp_pi)
    return loss, -theta * share * sigmoid, sigmoid * (log1p - share), dzero


@triton.jit
def _at_counts(n, row, part, softmax, cells, logits, theta_G, scratch, INFLATED: tl.constexpr, CHUNK: tl.constexpr):
    """Log likelihood and sum of r that the counts of cell ``n`` add; their gradients go to ``scratch``."""
    greatest, total = softmax
    library = tl.load(cells.library_N + n)
    end = tl.load(cells.indptr_N + n + 1)
    loglik_sum, r_sum = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.float64)
    for start in range(tl.load(cells.indptr_N + n), end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        inside = entry < end
        g = tl.load(cells.gene_M + entry, mask=inside, other=0)
        x = tl.load(cells.count_M + entry, mask=inside, other=0.0).to(tl.float64)
        live = inside & (x > 0)
        theta32, logit = tl.load(theta_G + g), tl.load(logits[0] + row + g)
        theta = theta32.to(tl.float64)
        mu = tl.exp(logit.to(tl.float64) - greatest) / total * library
        u = mu / (theta + EPS)
        loglik, r, dtheta = _count_terms(x, theta, mu)
        if INFLATED:
            pi = tl.load(logits[1] + row + g).to(tl.float64)
            more, more_r, more_dtheta, rest = _not_inflated(theta, u, pi)
            loglik, r, dtheta = loglik + more, r + more_r, dtheta + more_dtheta
            tl.store(scratch.dzero_M + entry, tl.where(live, rest, 0.0).to(tl.float32), mask=inside)
        else:  # the term of a zero may be of the size of a great count and cancel: float64 for the float32 that stands
            p = tl.exp(logit - greatest) * (1.0 / total)
            loss, _, _, _ = _zeros(p * library / (theta32 + EPS), theta32, logit, False)
            loglik -= theta * tl.log(1.0 + u) - loss.to(tl.float64)
        loglik_sum += tl.where(live, loglik, 0.0)
        r_sum += tl.where(live, r, 0.0)
        tl.store(scratch.r_M + entry, tl.where(live, r, 0.0).to(tl.float32), mask=inside)
        at = scratch.dtheta_PG + part + g
        tl.store(at, tl.load(at, mask=live) - dtheta.to(tl.float32), mask=live)
    return tl.sum(loglik_sum), tl.sum(r_sum)


@triton.jit
def _add_counts(n, row, part, scale, cells, logits, scratch, INFLATED: tl.constexpr, CHUNK: tl.constexpr):
    """Add the gradients that `_at_counts` left in ``scratch`` to those of zeros."""
    end = tl.load(cells.indptr_N + n + 1)
    for start in range(tl.load(cells.indptr_N + n), end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        inside = entry < end
        live = inside & (tl.load(cells.count_M + entry, mask=inside, other=0.0) > 0)
        g = tl.load(cells.gene_M + entry, mask=inside, other=0)
        dlogit = tl.load(scratch.r_M + entry, mask=live, other=0.0) * -scale
        at, sum_at = logits[0] + row + g, scratch.dbias_PG + part + g
        tl.store(at, tl.load(at, mask=live) + dlogit, mask=live)
        tl.store(sum_at, tl.load(sum_at, mask=live) + dlogit, mask=live)
        if INFLATED:
            dzero = tl.load(scratch.dzero_M + entry, mask=live, other=0.0) * scale
            at, sum_at = logits[1] + row + g, scratch.dzero_bias_PG + part + g
            tl.store(at, tl.load(at, mask=live) + dzero, mask=live)
            tl.store(sum_at, tl.load(sum_at, mask=live) + dzero, mask=live)


@triton.jit
def _add_row(sum_G, row_G, mask):
    tl.store(sum_G, tl.load(sum_G, mask=mask, other=0.0) + row_G, mask=mask)


@triton.jit
def _rows(
    logits,
    cells,
    theta_G,
    scale,
    loss_N,
    scratch,
    shape,
    INFLATED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each program takes every P-th row. Barriers part what one thread writes from what another reads."""
    program, n_cells, n_genes = tl.program_id(0), shape[0], shape[1]
    part = program.to(tl.int64) * n_genes
    gene = tl.arange(0, WIDTH)
    mask = gene < n_genes
    theta = tl.load(theta_G + gene, mask=mask, other=1.0)
    dtheta_sum, dbias, dzero_bias = tl.zeros_like(theta), tl.zeros_like(theta), tl.zeros_like(theta)
    for n in range(program, n_cells, tl.num_programs(0)):
        row = tl.cast(n, tl.int64) * n_genes
        logit = tl.load(logits[0] + row + gene, mask=mask, other=float("-inf"))
        pi = tl.load(logits[1] + row + gene, mask=mask, other=0.0) if INFLATED else tl.zeros_like(theta)
        greatest = tl.max(logit)
        p = tl.exp(logit - greatest)
        total = tl.sum(p)
        p *= 1.0 / total
        u = p * tl.load(cells.library_N + n) / (theta + EPS)
        loss, r, dtheta, dzero = _zeros(u, theta, pi, INFLATED)
        softmax = (greatest, total)
        loglik, more_r = _at_counts(n, row, part, softmax, cells, logits, theta_G, scratch, INFLATED, CHUNK)
        tl.store(loss_N + n, (tl.sum(loss.to(tl.float64)) - loglik).to(tl.float32))
        dtheta_sum += dtheta
        dlogit = (p * (tl.sum(r).to(tl.float64) + more_r).to(tl.float32) - r) * scale
        dbias += tl.where(mask, dlogit, 0.0)
        tl.debug_barrier()
        tl.store(logits[0] + row + gene, dlogit, mask=mask)
        if INFLATED:
            dzero_bias += dzero * scale
            tl.store(logits[1] + row + gene, dzero * scale, mask=mask)
        tl.debug_barrier()
        _add_counts(n, row, part, scale, cells, logits, scratch, INFLATED, CHUNK)
        tl.debug_barrier()
    _add_row(scratch.dtheta_PG + part + gene, dtheta_sum, mask)
    _add_row(scratch.dbias_PG + part + gene, dbias, mask)
    if INFLATED:
        _add_row(scratch.dzero_bias_PG + part + gene, dzero_bias, mask)


@triton.jit
def _dense_rows(indptr_N, gene_M, value_M, dense_NG, n_genes, WIDTH: tl.constexpr):
    n, lane = tl.program_id(0), tl.arange(0, WIDTH)
    row_G = dense_NG + n.to(tl.int64) * n_genes
    zeros = tl.zeros([WIDTH], dense_NG.dtype.element_ty)
    for start in range(0, n_genes, WIDTH):
        tl.store(row_G + start + lane, zeros, mask=start + lane < n_genes)
    tl.debug_barrier()
    end = tl.load(indptr_N + n + 1)
    for start in range(tl.load(indptr_N + n), end, WIDTH):
        inside = start + lane < end
        value = tl.load(value_M + start + lane, mask=inside).to(zeros.dtype)
        tl.store(row_G + tl.load(gene_M + start + lane, mask=inside, other=0), value, mask=inside)


def nb(logits_NG: Tensor, cells: Cells, theta_G: Tensor, scale: float, sums: Sums) -> None:
    """-log NB of each cell; ``logits_NG`` becomes its gradient times ``scale``."""
    _launch((logits_NG, logits_NG), cells, theta_G, scale, sums, inflated=False)


def zinb(logits_NG: Tensor, zero_NG: Tensor, cells: Cells, theta_G: Tensor, scale: float, sums: Sums) -> None:
    """-log ZINB of each cell; as `nb`, and ``zero_NG`` becomes the gradient in the zero inflation's logits."""
    _launch((logits_NG, zero_NG), cells, theta_G, scale, sums, inflated=True)


def _launch(
    logits: tuple[Tensor, Tensor], cells: Cells, theta_G: Tensor, scale: float, sums: Sums, *, inflated: bool
) -> None:
    shape = logits[0].shape
    n_programs = min(shape[0], _programs(theta_G.device))
    r_M, parts = torch.empty_like(cells.count_M), theta_G.new_zeros(2 + inflated, n_programs, shape[1])
    dzero_M = torch.empty_like(r_M) if inflated else r_M
    scratch = _Scratch(r_M, dzero_M, parts[0], parts[1], parts[-1])
    settings = launch_settings(shape[1])
    _rows[(n_programs,)](
        logits, cells, theta_G, scale, sums.loss_N, scratch, tuple(shape), INFLATED=inflated, **settings
    )
    for total_G, part_PG in zip(sums[1:], parts, strict=False):
        total_G += part_PG.sum(0)


def launch_settings(n_genes: int) -> dict[str, Any]:
    """Sizes of blocks for rows of so many genes: a row at once, 16 genes per thread where that can be.

    No fused multiply-add: a term taken twice (`_at_counts`) must come out the same.
    """
    width = triton.next_power_of_2(n_genes)
    warps = min(max(width // GENES_PER_WARP, LEAST_WARPS), MOST_WARPS)
    return {"WIDTH": width, "CHUNK": warps * THREADS_PER_WARP, "num_warps": warps, "enable_fp_fusion": False}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def dense_rows(counts: CountsCSR, value_M: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, G] of values in place of the counts, zero elsewhere; each gene may stand once in a cell."""
    dense_NG = torch.empty(counts.n_cells, counts.n_genes, dtype=dtype, device=value_M.device)
    arrays = counts.indptr_N, counts.gene_M, value_M, dense_NG
    _dense_rows[(counts.n_cells,)](*arrays, counts.n_genes, WIDTH=1024, num_warps=4)
    return dense_NG
