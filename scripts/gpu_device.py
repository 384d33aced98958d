"""What `bench_gpu` asks of a device before it measures carvae: is it right, what can it do, what must a step take."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from carvae.data.sparse import CountsCSR
from carvae.model.fused import Target
from carvae.model.likelihood import reconstruction

TOLERANCE = 1e-5
"""Greatest relative error against float64."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the machine is and can do."""

    name: str
    bytes_per_second: float
    operations_per_second: dict[str, float]
    """Of matrix products, by precision."""


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, out of as many as fit."""
    work()
    synchronise(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        synchronise(device)
        calls += 1
    return (time.perf_counter() - start) / calls


def measure_device(device: torch.device) -> Device:
    """Bandwidth of a copy and arithmetic of matrix products of this very device."""
    big, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 22, 512)
    source = torch.empty(big, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source), device, 0.5)
    operations = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        operations[precision] = 2 * side**3 / timed(lambda a=a: a @ a, device, 0.5)  # type: ignore[misc]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, to try the script out"
    return Device(name, bandwidth, operations)


def floor_seconds(device: Device, batch_size: int, precision: str, n_genes: int, n_hidden: int) -> float:
    """Least time of a step: what touches every gene of every cell, and the optimiser on the two large layers.

    Cells x genes: the input laid out (written, read by two products); logits (written by a product, read twice and
    written by the kernels, read by the two products of backward). Five products in all.
    """
    per_cell_and_gene = 9 * (2 if precision == "bf16" else 4)
    adam = 7 * 4 * 2 * n_genes * n_hidden
    moved = batch_size * n_genes * per_cell_and_gene + adam
    operations = 5 * 2 * batch_size * n_genes * n_hidden
    return moved / device.bytes_per_second + operations / device.operations_per_second[precision]


def check_against_float64(device: torch.device) -> float:
    """Greatest relative error of losses and gradients of NB and ZINB; stops where it is above `TOLERANCE`.

    An empty cell, counts up to 65,535, dispersions from 1e-4 to 1e6, genes that are not measured. Errors are relative
    to the greatest value, or, for gradients that are differences of counts, to the greatest count.
    """
    rng, worst = np.random.default_rng(0), 0.0
    dense = np.where(rng.random((64, 1500)) < 0.1, np.round(65_535 ** rng.random((64, 1500))), 0).astype(np.float32)
    unmeasured = rng.random((64, 1500)) < 0.02
    dense[unmeasured] = dense[0] = 0
    dense[1, np.flatnonzero(~unmeasured[1])[0]] = 65_535
    counts = CountsCSR.from_scipy(sp.csr_matrix(dense))
    for inflated in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(32, 1500) for _ in range(1 + inflated))
        inputs = torch.randn(64, 32), (-4 + 10 * torch.rand(1500)) * np.log(10), layers
        gone_NG = torch.from_numpy(unmeasured)
        found = _results(inputs, counts, gone_NG, device, torch.float32)
        exact = _results(inputs, counts, gone_NG, torch.device("cpu"), torch.float64)
        for name, right in exact.items():
            scale = max(float(right.abs().max()), 0.0 if name == "loss" else 65_535 / 64)
            worst = max(worst, float((found[name] - right).abs().max()) / scale)
    if not worst < TOLERANCE:
        raise SystemExit(f"the kernels differ from float64 by {worst:.1e}, more than {TOLERANCE}")
    return worst


def _results(
    inputs: tuple[Tensor, Tensor, nn.ModuleList],
    counts: CountsCSR,
    unmeasured_NG: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    hidden_NH, log_theta_G = (tensor.to(device, dtype).clone().requires_grad_() for tensor in inputs[:2])
    scale, *zero = inputs[2].to(device, dtype)
    inputs[2].zero_grad()
    there = counts.to(device)
    there = CountsCSR(there.indptr_N, there.gene_M, there.count_M.to(dtype), there.n_genes)
    target = Target(there, there.library_N(), unmeasured_NG.to(device))
    mean, loss_N = reconstruction(hidden_NH, scale, zero[0] if zero else None, log_theta_G, target)
    mean.backward()
    results = {"loss": loss_N, "hidden": hidden_NH.grad, "bias": scale.bias.grad, "theta": log_theta_G.grad}
    return {name: value.detach().double().cpu() for name, value in results.items()}


def run_gpu_tests() -> tuple[bool, str]:
    """Run the tests that need a GPU: whether they passed, and pytest's last line (all it said, where they did not).

    A failure does not end the measurement: a GPU is lent for minutes. Warnings are no errors here.
    """
    tests = Path(__file__).resolve().parent.parent / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"]
    files = [str(tests / name) for name in ("test_triton_kernels.py", "test_cuda_graph.py")]
    try:
        done = subprocess.run(
            command + files, cwd=tests.parent, capture_output=True, text=True, check=False, timeout=150
        )
    except subprocess.TimeoutExpired:
        return False, "not done after 150 s"
    if done.returncode:
        return False, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    return True, done.stdout.strip().splitlines()[-1]
