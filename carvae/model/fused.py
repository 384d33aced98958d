"""The two ends of the network that touch every gene, each as one differentiable operation with compiled kernels.

Axes: N cells, G genes, H hidden, M non-zero counts.

`decoder_loss` is product, softmax and likelihood at once: the kernel turns the logits into their gradient where they
lie, so that no second N x G tensor is made and backward is two matrix products. `sparse_product` is the encoder's first
layer. Tensors on a CPU go to numba (`kernels`), those on a GPU to Triton (`triton_kernels`). `available` says whether
the kernels can take a tensor; `likelihood` and `vae` hold the plain torch form of the same maths for the rest.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from carvae.data.sparse import CountsCSR

MOST_GENES_ON_GPU = 16_384
"""A GPU keeps a row in registers; wider rows would spill."""


def available(tensor: Tensor) -> bool:
    """Whether kernels can take tensors of this device and type, with as many rows as there are genes."""
    if tensor.dtype != torch.float32:
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and len(tensor) <= MOST_GENES_ON_GPU and _can_triton())


@cache
def _can_triton() -> bool:
    """Whether Triton is here with what it needs: on its first call it compiles a small C file."""
    return find_spec("triton") is not None and has_compiler()


def small_products(near: Tensor) -> AbstractContextManager[object]:
    """Without autocast on a CPU, where casting what a small product is made of takes longer than it saves."""
    asked = near.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if asked else nullcontext()


def has_compiler() -> bool:
    """Whether there is a C compiler, as Triton looks for one."""
    return any(map(shutil.which, filter(None, (os.environ.get("CC", ""), "gcc", "clang", "cc"))))


def has_bfloat16() -> bool:
    """Whether this processor has products of bfloat16; PyTorch's stand-in for them is slower than float32."""
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True, slots=True)
class Target:
    """What the decoder explains."""

    counts: CountsCSR
    library_N: Tensor
    unmeasured_NG: Tensor | None


def decoder_loss(
    hidden_NH: Tensor, scale: nn.Linear, zero: nn.Linear | None, log_theta_G: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood under NB, or ZINB where there is a layer of zero inflation, in nats.

    Products are in the type of autocast where that is on; softmax, likelihood and its sums in float32.

    Parameters
    ----------
    hidden_NH
        Last hidden layer of the decoder.
    scale, zero
        The layers that make logits of expression and of zero inflation.
    log_theta_G
        Log inverse dispersion.
    target
        Counts, their expected sum over the genes, and the genes that are not measured.

    Returns
    -------
    The mean over cells, differentiable once in all parameters and ``hidden_NH``; and the value of each cell [N], which
    is for reading and carries no gradient.
    """
    layers = (scale.weight, scale.bias) + ((None, None) if zero is None else (zero.weight, zero.bias))
    mean, loss_N = _DecoderLoss.apply(hidden_NH, *layers, log_theta_G, (target, _product_type(hidden_NH)))  # type: ignore[no-untyped-call]
    return mean, loss_N


def sparse_product(counts: CountsCSR, value_M: Tensor, weight_GH: Tensor) -> Tensor:
    """Sparse [N, G] x dense [G, H], with values in place of the counts; differentiable in ``weight_GH``."""
    if not available(weight_GH):
        return sum_of_rows(counts, value_M, weight_GH)
    if weight_GH.is_cuda:
        return _dense_product(counts, value_M, weight_GH)
    product_NH: Tensor = _SparseProduct.apply(counts, value_M, weight_GH)  # type: ignore[no-untyped-call]
    return product_NH


def sum_of_rows(counts: CountsCSR, value_M: Tensor, weight_GH: Tensor) -> Tensor:
    """Sparse [N, G] x dense [G, H], by torch's own operation."""
    first_N = counts.indptr_N[:-1].to(counts.gene_M.dtype)
    return functional.embedding_bag(counts.gene_M, weight_GH, first_N, mode="sum", per_sample_weights=value_M)


def _dense_product(counts: CountsCSR, value_M: Tensor, weight_GH: Tensor) -> Tensor:
    """As `sparse_product`, through a dense [N, G], in the type of autocast where that is on."""
    from carvae.model.triton_kernels import dense_rows

    return (dense_rows(counts, value_M, _product_type(weight_GH)) @ weight_GH).float()


def _product_type(tensor: Tensor) -> torch.dtype:
    """The type that inputs of matrix products have on the tensor's device."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: CountsCSR, value_M: Tensor, weight_GH: Tensor) -> Tensor:
        from carvae.model.gather import COLUMNS, weighted_rows

        ctx.counts, ctx.value_M = counts, value_M
        if weight_GH.shape[1] % COLUMNS or torch.get_num_threads() > 1:
            return sum_of_rows(counts, value_M, weight_GH)
        return weighted_rows(counts, value_M, weight_GH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        from carvae.model.gather import weight_gradient  # numba is slow to import, and not needed to read a bundle

        return None, None, weight_gradient(ctx.counts, ctx.value_M, grad_NH)


class _DecoderLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_GH: Tensor,
        bias_G: Tensor,
        zero_weight_GH: Tensor | None,
        zero_bias_G: Tensor | None,
        log_theta_G: Tensor,
        task: tuple[Target, torch.dtype],
    ) -> tuple[Tensor, Tensor]:
        target, dtype = task
        with torch.autocast(hidden_NH.device.type, enabled=False):
            hidden_NH = hidden_NH.to(dtype)
            weights = [w.to(dtype) for w in (weight_GH, zero_weight_GH) if w is not None]
            biases = [b for b in (bias_G, zero_bias_G) if b is not None]
            logits = [hidden_NH @ w.t() for w in weights]
            if target.unmeasured_NG is not None:
                logits[0].masked_fill_(target.unmeasured_NG, -torch.inf)
            theta_G = log_theta_G.exp()
            loss_N, dtheta_G, dbiases = _to_gradients(logits, biases, target, theta_G)
            ctx.save_for_backward(hidden_NH, dtheta_G.mul_(theta_G / len(loss_N)), *weights, *logits, *dbiases)
            ctx.mark_non_differentiable(loss_N)
        return loss_N.mean(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, dlog_theta_G, *rest = ctx.saved_tensors
        n = len(rest) // 3
        weights, dlogits, dbiases = rest[:n], rest[n : 2 * n], rest[2 * n :]
        scaled_NH = hidden_NH * grad.to(hidden_NH.dtype)
        dhidden_NH = sum((d @ w).float() for d, w in zip(dlogits, weights, strict=True)) * grad
        grads: list[Tensor | None] = []
        for d, dbias_G in zip(dlogits, dbiases, strict=True):
            grads += [(d.t() @ scaled_NH).float(), dbias_G * grad]
        return dhidden_NH, *grads, *[None] * (4 - len(grads)), dlog_theta_G * grad, None


def _to_gradients(
    logits: list[Tensor], biases: list[Tensor], target: Target, theta_G: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Turn the logits into gradients of the mean loss; returns loss, gradient of theta (of the sum) and of biases."""
    if theta_G.is_cuda:
        from carvae.model.triton_kernels import to_gradients

        return to_gradients(logits, biases, target.counts, target.library_N, theta_G)
    from carvae.model.kernels import Cells, Sums, nb, zinb

    n, counts = len(target.library_N), target.counts
    loss_N = torch.empty(n)
    n_parts = max(1, min(torch.get_num_threads(), n))

    def some_cells(first: int, last: int) -> Tensor:
        sums = torch.zeros(3, len(theta_G))
        indptr_N = counts.indptr_N[first : last + 1]
        cells = Cells(*_arrays(indptr_N, counts.gene_M, counts.count_M, target.library_N[first:last]))
        rows, theta = _arrays(*(tensor[first:last] for tensor in logits)), theta_G.numpy()
        kernel: Any = nb if len(logits) == 1 else zinb
        bias = _arrays(*biases)[0] if len(logits) == 1 else tuple(_arrays(*biases))
        kernel(*rows, bias, cells, theta, np.float32(1 / n), Sums(*_arrays(loss_N[first:last], *sums)))
        return sums

    if n_parts == 1:
        sums = some_cells(0, n)
    else:
        bounds = np.linspace(0, n, n_parts + 1).astype(int)
        with ThreadPoolExecutor(n_parts) as pool:
            sums = torch.stack(list(pool.map(some_cells, bounds[:-1], bounds[1:]))).sum(0)
    return loss_N, sums[0], list(sums[1 : 1 + len(logits)])


def _arrays(*tensors: Tensor) -> list[Any]:
    """The tensors' own memory, for numba; bfloat16 as its bits."""
    return [(t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).detach().numpy() for t in tensors]
