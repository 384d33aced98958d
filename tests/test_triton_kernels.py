"""The Triton kernels against float64: on a GPU where there is one, else by Triton's interpreter (``conftest.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.special
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fused import Ends, assert_close, cancelling, minibatch, results, zinb_too
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.model import fused

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("a driver, but no CUDA device that torch finds", allow_module_level=True)
from carvae.model import triton_kernels as kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def through_triton() -> AbstractContextManager[Any]:
    """Let CPU tensors go where CUDA tensors go, for the interpreter."""
    if not INTERPRETED:
        return nullcontext()

    def gradients(logits: list[Tensor], biases: list[Tensor], target: fused.Target, theta_G: Tensor) -> Any:
        return kernels.to_gradients(logits, biases, target.counts, target.library_N, theta_G)

    return mock.patch.object(fused, "_to_gradients", gradients)


def found(ends: Ends, counts: CountsCSR, *more: Tensor) -> dict[str, Tensor]:
    with through_triton():
        there = results(ends.to(DEVICE), counts.to(DEVICE), *(tensor.to(DEVICE) for tensor in more))
    return {name: value.cpu() for name, value in there.items()}


def exact(ends: Ends, counts: CountsCSR, *more: Tensor) -> dict[str, Tensor]:
    return results(ends.cpu().double(), counts, *more)


@zinb_too
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    largest=st.sampled_from([1, 9, 300, 65_535]),
    width=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    log10_theta=st.sampled_from([(-1.0, 2.0), (-4.0, 6.0), (-4.0, -3.0), (5.0, 6.0)]),
    seed=st.integers(0, 2**16),
)
@example(shape=(7, 140), density=1.0, largest=65_535, width=30.0, log10_theta=(-4.0, 6.0), seed=0)
@example(shape=(2, 40), density=0.3, largest=65_535, width=1.0, log10_theta=(5.0, 6.0), seed=0)
@example(shape=(1, 1), density=0.0, largest=1, width=0.0, log10_theta=(5.0, 6.0), seed=1)
@settings(max_examples=10)
def test_the_kernels_equal_float64(
    inflated: bool,
    shape: tuple[int, int],
    density: float,
    largest: int,
    width: float,
    log10_theta: tuple[float, float],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    counts = minibatch(*shape, density, largest, seed)
    ends = Ends(*shape, inflated, width, log10_theta)
    terms = cancelling(ends, shape, largest, width)
    assert_close(found(ends, counts), exact(ends, counts), terms, tolerance=1e-5)


@zinb_too
def test_more_counts_than_a_chunk_and_more_cells_than_programs(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(8, 300, 0.8, 40, 0), Ends(8, 300, inflated, 1.0, (-1.0, 2.0))
    chunk = kernels.launch_settings(300, kernels.GENES_AT_COUNTS)["CHUNK"]
    assert int(counts.indptr_N.diff().max()) > chunk
    assert_close(found(ends, counts), exact(ends, counts), {}, 1e-5)


@zinb_too
def test_unmeasured_genes_add_exactly_nothing(inflated: bool) -> None:
    torch.manual_seed(0)
    gone_G = torch.arange(40) >= 25
    dense = minibatch(4, 40, 0.3, 20, 0).to_scipy().toarray()
    dense[:, 25:] = 0
    counts, ends = CountsCSR.from_scipy(sp.csr_matrix(dense)), Ends(4, 40, inflated, 1.0, (-1.0, 2.0))
    there = found(ends, counts, gone_G.expand(4, 40))
    for name in ("scale.weight", "scale.bias", "log_theta_G"):
        assert (there[name][25:] == 0).all()
        assert (there[name][:25] != 0).any()
    assert_close(there, exact(ends, counts, gone_G.expand(4, 40)), {}, 1e-5)


@zinb_too
def test_what_stands_after_the_last_cell_is_not_read(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(4, 40, 0.3, 20, 0), Ends(4, 40, inflated, 1.0, (-1.0, 2.0))
    nothing = torch.full((70,), torch.nan)
    padded = CountsCSR(
        counts.indptr_N,
        torch.cat([counts.gene_M, torch.zeros(70, dtype=torch.int32)]),
        torch.cat([counts.count_M, nothing]),
        counts.n_genes,
    )
    without, there = found(ends, counts), found(ends, padded)
    assert all(torch.equal(there[name], value) for name, value in without.items())
    dense = [kernels.dense_rows(c.to(DEVICE), c.count_M.to(DEVICE), torch.float32) for c in (counts, padded)]
    assert torch.equal(*dense)


def test_a_count_thinned_to_zero_is_a_zero() -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(4, 40, 0.3, 3, 0), Ends(4, 40, True, 1.0, (-1.0, 2.0))
    stored = CountsCSR(counts.indptr_N, counts.gene_M, counts.count_M * (counts.count_M > 1), counts.n_genes)
    matrix = stored.to_scipy().copy()
    assert (matrix.data == 0).any()
    matrix.eliminate_zeros()
    assert_close(found(ends, stored), found(ends, CountsCSR.from_scipy(matrix)), {}, 1e-6)


@zinb_too
def test_logits_may_lack_their_bias_and_be_in_bfloat16(inflated: bool) -> None:
    torch.manual_seed(0)
    counts = minibatch(4, 40, 0.3, 20, 0).to(DEVICE)
    logits = [torch.randn(4, 40, device=DEVICE).bfloat16() for _ in range(1 + inflated)]
    biases, theta_G = [torch.randn(40, device=DEVICE) for _ in logits], torch.rand(40, device=DEVICE) + 0.1
    library_N = counts.library_N()
    whole = [x.float() + bias for x, bias in zip(logits, biases, strict=True)]
    nothing = [torch.zeros_like(bias) for bias in biases]
    loss_N, dtheta_G, dbiases = kernels.to_gradients(logits, biases, counts, library_N, theta_G)
    exact_N, exact_G, exact_biases = kernels.to_gradients(whole, nothing, counts, library_N, theta_G)
    torch.testing.assert_close(loss_N, exact_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dtheta_G, exact_G)
    for found_G, right_G, rounded, right in zip(dbiases, exact_biases, logits, whole, strict=True):
        torch.testing.assert_close(found_G, right_G, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rounded.float(), right, rtol=1e-2, atol=1e-2 * float(right.abs().max()))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_is_seen_in_the_loss() -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(4, 30, 0.3, 9, 0), Ends(4, 30, False, 1.0, (-1.0, 2.0))
    with torch.no_grad():
        ends.hidden_NH[2, 0] = torch.nan
        with through_triton():
            _, loss_N = ends.to(DEVICE)(counts.to(DEVICE))
    assert loss_N.isnan().tolist() == [False, False, True, False]


@given(seed=st.integers(0, 2**16), n=st.integers(1, 5), density=st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=10)
def test_the_sparse_product_and_its_gradient_are_those_of_the_dense(seed: int, n: int, density: float) -> None:
    counts = minibatch(n, 30, density, 300, seed)
    generator = torch.Generator().manual_seed(seed)
    weight_GH = torch.randn(30, 7, generator=generator)
    grad_NH = torch.randn(n, 7, generator=generator)
    there = counts.to(DEVICE)
    there_GH = weight_GH.to(DEVICE).requires_grad_()
    found_NH = fused._dense_product(there, there.count_M.log1p(), there_GH)
    found_NH.backward(grad_NH.to(DEVICE))  # type: ignore[no-untyped-call]
    dense_NG = torch.from_numpy(counts.to_scipy().toarray()).double().log1p()
    torch.testing.assert_close(found_NH.detach().cpu().double(), dense_NG @ weight_GH.double(), rtol=1e-5, atol=1e-4)
    assert there_GH.grad is not None
    torch.testing.assert_close(there_GH.grad.cpu().double(), dense_NG.t() @ grad_NH.double(), rtol=1e-5, atol=1e-4)


def test_a_row_wider_than_a_block_is_laid_out_densely() -> None:
    counts = minibatch(2, 2500, 0.5, 50, 0)
    dense_NG = kernels.dense_rows(counts.to(DEVICE), counts.count_M.to(DEVICE), torch.bfloat16)
    assert dense_NG.dtype == torch.bfloat16
    assert np.array_equal(dense_NG.float().cpu().numpy(), counts.to_scipy().toarray())


@triton.jit  # type: ignore[untyped-decorator]
def _gammas(z, product, series, digamma, n: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, n)
    of_product, of_series, of_digamma = kernels._gamma(tl.load(z + i))
    tl.store(product + i, of_product)
    tl.store(series + i, of_series)
    tl.store(digamma + i, of_digamma)


def test_the_gamma_functions_are_exact_in_float64() -> None:
    z = torch.logspace(-6, 7, 256, dtype=torch.float64, device=DEVICE)
    product, series, digamma = torch.empty(3, 256, dtype=torch.float64, device=DEVICE)
    _gammas[(1,)](z, product, series, digamma, n=256)
    lgamma = (series - product.log()).cpu().numpy()
    np.testing.assert_allclose(lgamma, scipy.special.gammaln(z.cpu().numpy()), rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(digamma.cpu().numpy(), scipy.special.digamma(z.cpu().numpy()), rtol=1e-12, atol=1e-12)


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    """Down to machine code of an A100 and an H100, with the compilers that Triton brings."""
    code = """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile
        from carvae.model import triton_kernels as kernels

        F, D = "*fp32", "*fp64"
        cells = kernels.Cells("*i64", "*i32", F, F)
        types = {
            "task": kernels._Task(F, F, F, F, cells, F, F, "fp32", F, F, F, F, D, D, F, F, F), "n_cells": "i32",
            "indptr_N": "*i64", "gene_M": "*i32", "value_M": F, "dense_NG": "*bf16", "n_genes": "i32",
        }
        known = {"INFLATED": True, "WIDTH": 1024, "CHUNK": 128}
        for kernel in (kernels._at_counts, kernels._at_genes, kernels._dense_rows):
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            constants = {name: value for name, value in known.items() if name in signature}
            for capability in (80, 90):
                source = ASTSource(kernel, signature=signature, constexprs=constants)
                options = {"num_warps": 4, "enable_fp_fusion": False}
                print(len(compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6
    assert all(int(size) > 1000 for size in done.stdout.split())


@pytest.mark.gpu
@zinb_too
def test_a_gpu_gives_the_same_bits_each_time(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(700, 900, 0.1, 40, 0), Ends(700, 900, inflated, 1.0, (-1.0, 2.0))
    first, second = found(ends, counts), found(ends, counts)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert_close(first, exact(ends, counts), {}, 1e-5)


@pytest.mark.gpu
@zinb_too
def test_under_autocast_products_alone_are_in_bfloat16(inflated: bool) -> None:
    torch.manual_seed(0)
    counts, ends = minibatch(50, 64, 0.2, 30, 0), Ends(50, 64, inflated, 1.0, (-1.0, 2.0))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = found(ends, counts)
    unrounded = found(ends, counts)
    assert not torch.equal(rounded["loss"], unrounded["loss"])
    assert_close(rounded, unrounded, {}, 0.03)
