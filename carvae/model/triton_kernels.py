"""GPU kernels (Triton): those of `kernels`, for tensors on a CUDA device. No figure of theirs has been measured yet.

Axes: N cells, G genes, M non-zero counts, P programs that run side by side.

`nb` and `zinb` are two kernels each: softmax and what counts add (float64, few registers left for the row), then
likelihood and gradient of every gene of a row in registers (float32), written where the logits were. The sums over
cells (gradients of dispersion and biases) are kept per program and added up in a fixed order, so that a run gives the
same weights each time; atomic additions would not.

The sparse first layer is a row of the minibatch laid out densely (`dense_rows`), and torch's matrix product: on a GPU
tensor cores are faster at that than adding weight rows up, by the model of ``docs/speed.md``, and the gradient needs no
atomic additions. The alternative, if a panel is so wide that the dense tile costs more than the weight rows of its
non-zeros: one program per cell that adds up ``weight_GH[gene] * value``.

Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported) runs all this on a CPU, for tests.
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
GENES_AT_COUNTS, GENES_AT_GENES = 512, 256
"""Genes per warp in the two kernels: as many as ptxas finds registers for without spilling (4,000 genes, sm_90)."""
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


class _Task(NamedTuple):
    """All that the kernels read and write. One struct of pointers, as Triton takes it."""

    logits: Any
    zero: Any
    """Logits of the zero inflation; without it the logits again, not touched."""
    bias_G: Any
    zero_bias_G: Any
    """What is still to be added to both."""
    cells: Cells
    theta_G: Any
    loss_N: Any
    scale: float
    r_M: Any
    """What counts add to the gradient of a gene's logit, unscaled, until it can be added."""
    dzero_M: Any
    """Likewise for the zero inflation."""
    greatest_N: Any
    total_N: Any
    """The softmax of a row is ``exp(logit - greatest) / total``."""
    loglik_N: Any
    sum_r_N: Any
    """What counts add to the log likelihood and to the sum of r, in float64."""
    dtheta_PG: Any
    dbias_PG: Any
    dzero_bias_PG: Any


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


@triton.jit(do_not_specialize=["n_cells"])  # the last minibatch of an epoch is smaller
def _at_counts(task, n_cells, n_genes, INFLATED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Softmax of each row, and what its counts add; each program takes every P-th row and has its own sums."""
    cells, gene = task.cells, tl.arange(0, WIDTH)
    dtheta_G = task.dtheta_PG + tl.program_id(0).to(tl.int64) * n_genes
    for n in range(tl.program_id(0), n_cells, tl.num_programs(0)):
        row = tl.cast(n, tl.int64) * n_genes
        logit_G = tl.load(task.logits + row + gene, mask=gene < n_genes, other=float("-inf")).to(tl.float32)
        logit_G += tl.load(task.bias_G + gene, mask=gene < n_genes, other=0.0)
        greatest = tl.max(logit_G)
        total = tl.sum(tl.exp(logit_G - greatest))
        library, end = tl.load(cells.library_N + n), tl.load(cells.indptr_N + n + 1)
        loglik_sum, r_sum = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.float64)
        for start in range(tl.load(cells.indptr_N + n), end, CHUNK):
            entry = start + tl.arange(0, CHUNK)
            x = tl.load(cells.count_M + entry, mask=entry < end, other=0.0).to(tl.float64)
            g = tl.load(cells.gene_M + entry, mask=entry < end, other=0)
            theta32 = tl.load(task.theta_G + g)
            logit = tl.load(task.logits + row + g).to(tl.float32) + tl.load(task.bias_G + g)
            theta = theta32.to(tl.float64)
            mu = tl.exp(logit.to(tl.float64) - greatest) / total * library
            loglik, r, dtheta = _count_terms(x, theta, mu)
            if INFLATED:
                pi = (tl.load(task.zero + row + g).to(tl.float32) + tl.load(task.zero_bias_G + g)).to(tl.float64)
                more, more_r, more_dtheta, rest = _not_inflated(theta, mu / (theta + EPS), pi)
                loglik, r, dtheta = loglik + more, r + more_r, dtheta + more_dtheta
                tl.store(task.dzero_M + entry, tl.where(x > 0, rest, 0.0).to(tl.float32), mask=entry < end)
            else:  # a zero's term may be of the size of a great count and cancel: float64 in place of float32
                p = tl.exp(logit - greatest) * (1.0 / total)
                loss, _, _, _ = _zeros(p * library / (theta32 + EPS), theta32, logit, False)
                loglik -= theta * tl.log(1.0 + mu / (theta + EPS)) - loss.to(tl.float64)
            loglik_sum += tl.where(x > 0, loglik, 0.0)
            r = tl.where(x > 0, r, 0.0)
            r_sum += r
            tl.store(task.r_M + entry, r.to(tl.float32), mask=entry < end)
            _add(dtheta_G + g, -dtheta.to(tl.float32), x > 0)
        tl.store(task.greatest_N + n, greatest)
        tl.store(task.total_N + n, total)
        tl.store(task.loglik_N + n, tl.sum(loglik_sum))
        tl.store(task.sum_r_N + n, tl.sum(r_sum))
        tl.debug_barrier()  # the next row's genes are other threads' in the sums


@triton.jit(do_not_specialize=["n_cells"])
def _at_genes(task, n_cells, n_genes, INFLATED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Loss of each row, and its gradient in place of its logits."""
    gene = tl.arange(0, WIDTH)
    mask = gene < n_genes
    part = tl.program_id(0).to(tl.int64) * n_genes
    theta = tl.load(task.theta_G + gene, mask=mask, other=1.0)
    dtheta_sum, dbias, dzero_bias = tl.zeros_like(theta), tl.zeros_like(theta), tl.zeros_like(theta)
    for n in range(tl.program_id(0), n_cells, tl.num_programs(0)):
        row = tl.cast(n, tl.int64) * n_genes
        logit = tl.load(task.logits + row + gene, mask=mask, other=float("-inf")).to(tl.float32)
        logit, pi = logit + tl.load(task.bias_G + gene, mask=mask, other=0.0), logit
        if INFLATED:
            pi = tl.load(task.zero + row + gene, mask=mask, other=0.0).to(tl.float32)
            pi += tl.load(task.zero_bias_G + gene, mask=mask, other=0.0)
        p = tl.exp(logit - tl.load(task.greatest_N + n)) * (1.0 / tl.load(task.total_N + n))
        u = p * tl.load(task.cells.library_N + n) / (theta + EPS)
        loss, r, dtheta, dzero = _zeros(u, theta, pi, INFLATED)
        tl.store(task.loss_N + n, (tl.sum(loss.to(tl.float64)) - tl.load(task.loglik_N + n)).to(tl.float32))
        sum_r = (tl.sum(r).to(tl.float64) + tl.load(task.sum_r_N + n)).to(tl.float32)
        dlogit = (p * sum_r - r) * task.scale
        dtheta_sum += dtheta
        dbias += dlogit
        tl.store(task.logits + row + gene, dlogit, mask=mask)
        if INFLATED:
            dzero_bias += dzero * task.scale
            tl.store(task.zero + row + gene, dzero * task.scale, mask=mask)
        tl.debug_barrier()  # counts are added to what other threads have written
        _add_counts(task, n, row, part, INFLATED, CHUNK)
        tl.debug_barrier()
    _add(task.dtheta_PG + part + gene, dtheta_sum, mask)
    _add(task.dbias_PG + part + gene, dbias, mask)
    if INFLATED:
        _add(task.dzero_bias_PG + part + gene, dzero_bias, mask)


@triton.jit
def _add_counts(task, n, row, part, INFLATED: tl.constexpr, CHUNK: tl.constexpr):
    """Add the gradients that `_at_counts` laid aside to those of zeros, and to the sums over cells."""
    end = tl.load(task.cells.indptr_N + n + 1)
    for start in range(tl.load(task.cells.indptr_N + n), end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        mask = entry < end
        g = tl.load(task.cells.gene_M + entry, mask=mask, other=0)
        dlogit = tl.load(task.r_M + entry, mask=mask, other=0.0) * -task.scale
        _add(task.logits + row + g, dlogit, mask)
        _add(task.dbias_PG + part + g, dlogit, mask)
        if INFLATED:
            dzero = tl.load(task.dzero_M + entry, mask=mask, other=0.0) * task.scale
            _add(task.zero + row + g, dzero, mask)
            _add(task.dzero_bias_PG + part + g, dzero, mask)


@triton.jit
def _add(at, value, mask):
    """Add in memory; not atomic, and no place may be named twice."""
    tl.store(at, tl.load(at, mask=mask, other=0.0).to(tl.float32) + value, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["indptr_N", "gene_M", "value_M"])  # parts of larger tensors
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


def nb(logits_NG: Tensor, bias_G: Tensor, cells: Cells, theta_G: Tensor, scale: float, sums: Sums) -> None:
    """-log NB of each cell; ``logits_NG``, which lack their bias, become its gradient times ``scale``.

    Logits may be in bfloat16; they are read, and their gradient is written, in that type, and all else is not.
    """
    _launch([logits_NG], [bias_G], cells, theta_G, scale, sums)


def zinb(
    logits_NG: Tensor,
    zero_NG: Tensor,
    biases: tuple[Tensor, Tensor],
    cells: Cells,
    theta_G: Tensor,
    scale: float,
    sums: Sums,
) -> None:
    """-log ZINB of each cell; as `nb`, and ``zero_NG`` becomes the gradient in the zero inflation's logits."""
    _launch([logits_NG, zero_NG], [*biases], cells, theta_G, scale, sums)


def _launch(
    logits: list[Tensor], biases: list[Tensor], cells: Cells, theta_G: Tensor, scale: float, sums: Sums
) -> None:
    (n_cells, n_genes), n = logits[0].shape, len(logits)
    n_programs = min(n_cells, _programs(theta_G.device))
    parts = theta_G.new_zeros(1 + n, n_programs, n_genes)
    at_counts = [torch.empty_like(cells.count_M) for _ in logits]
    softmax, exact = theta_G.new_empty(2, n_cells), theta_G.new_empty(2, n_cells, dtype=torch.float64)
    memory = at_counts[0], at_counts[-1], *softmax, *exact, parts[0], parts[1], parts[-1]
    task = _Task(logits[0], logits[-1], biases[0], biases[-1], cells, theta_G, sums.loss_N, scale, *memory)
    for kernel, genes_per_warp in ((_at_counts, GENES_AT_COUNTS), (_at_genes, GENES_AT_GENES)):
        settings = launch_settings(n_genes, genes_per_warp)
        kernel[(n_programs,)](task, n_cells, n_genes, INFLATED=n > 1, **settings)
    torch._foreach_add_(list(sums[1 : 2 + n]), list(parts.sum(1)))


def launch_settings(n_genes: int, genes_per_warp: int) -> dict[str, Any]:
    """Sizes of blocks for a row of so many genes at once.

    No fused multiply-add: a term of a zero that is taken twice (`_at_counts`) must come out the same.
    """
    width = triton.next_power_of_2(n_genes)
    warps = min(max(width // genes_per_warp, LEAST_WARPS), MOST_WARPS)
    return {"WIDTH": width, "CHUNK": warps * THREADS_PER_WARP, "num_warps": warps, "enable_fp_fusion": False}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def to_gradients(
    logits: list[Tensor], biases: list[Tensor], counts: CountsCSR, library_N: Tensor, theta_G: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Turn the logits (of expression, and of zero inflation for ZINB) into gradients of the mean loss.

    Returns
    -------
    Loss of each cell, gradient of the summed loss in theta, and gradients of the mean loss in the biases of the logits.
    """
    loss_N, sums = torch.empty_like(library_N), theta_G.new_zeros(3, len(theta_G))
    cells = Cells(counts.indptr_N, counts.gene_M, counts.count_M, library_N)
    scale, all_sums = 1 / len(loss_N), Sums(loss_N, *sums)
    if len(logits) == 1:
        nb(logits[0], biases[0], cells, theta_G, scale, all_sums)
    else:
        zinb(logits[0], logits[1], (biases[0], biases[1]), cells, theta_G, scale, all_sums)
    return loss_N, sums[0], list(sums[1 : 1 + len(logits)])


def dense_rows(counts: CountsCSR, value_M: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, G] of values in place of the counts, zero elsewhere; each gene may stand once in a cell."""
    dense_NG = torch.empty(counts.n_cells, counts.n_genes, dtype=dtype, device=value_M.device)
    arrays = counts.indptr_N, counts.gene_M, value_M, dense_NG
    _dense_rows[(counts.n_cells,)](*arrays, counts.n_genes, WIDTH=1024, num_warps=4)
    return dense_NG
