"""Training and embedding speed on one GPU: carvae beside scvi-tools, cells resident on the device.

``bash scripts/bench_gpu.sh [FOLDER OF WHEELS]``, or in an environment that has carvae:
``python scripts/bench_gpu.py [--cells 1000000] [--device cuda]``

First the kernels are checked against float64, and the tests that need a GPU run. Then both train on the same simulated
counts (some thousand cells, repeated) with the same architecture, losses checked to be equal, through Lightning, as
their users do; for scvi-tools the faster of its dense and its sparse loader counts. Beside cells per second stand the
share of time in which the device is busy, the kernels of a step, and how much of a step the device must take at least:
bytes over its bandwidth and operations over its arithmetic, both measured here (`floor_seconds`). The table comes last,
then one line of JSON. ``--device cpu --cells 2000`` tries the script out where there is no GPU, and claims nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import lightning.pytorch as lightning
import numpy as np
import torch
from bench_data import cohort_of, simulated
from bench_train import SETTINGS, check_equal_losses, scvi_model
from gpu_device import Device, check_against_float64, floor_seconds, measure_device, run_gpu_tests, synchronise, timed
from torch import Tensor

from carvae.config import Config
from carvae.data import residence
from carvae.data.loader import CellData, Minibatch
from carvae.data.sparse import CompactCSR, CountsCSR
from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.network import Network
from carvae.model.objective import STEPS_PER_CALL, Objective

N_GENES = 4000
DISTINCT = 20_000
"""Cells that are simulated; the rest repeats them."""
BATCHES = (128, 1024, 4096)
RATIO_BARS = {128: 50.0, 1024: 50.0}
CELLS_PER_SECOND_BARS = {4096: 1e7}
EMBEDDING_BAR, EMBEDDED_AT_ONCE = 1e7, 32_768
BUSY_BAR = 0.9
WARM_UP, WATCHED = 4, 4
"""Calls of the training loop before the clock runs, and after it, under a profiler."""
SECONDS_IN_ALL = 420
"""No further measurement is begun after so long."""
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    batch_size: int
    precision: str
    carvae: float
    """Cells per second."""
    scvi: float
    busy: float | None
    kernels_per_step: float | None
    of_floor: float
    """Least time of a step over its time."""


@dataclass(slots=True)
class Resident:
    """Cells on the device, visited in random order without end; each chunk of minibatches is gathered at once."""

    counts: CompactCSR
    size_N: np.ndarray
    """Entries of each cell, on the host: the device is not asked."""
    sample_N1: Tensor
    order: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return 1_000_000  # chunks: longer than any measurement

    def __iter__(self) -> Iterator[list[Minibatch]]:
        rows_N = torch.from_numpy(self.order).to(self.counts.indptr_N.device)
        size = self.batch_size * STEPS_PER_CALL
        for first in itertools.cycle(range(0, self.order.size - size + 1, size)):
            yield self._chunk(rows_N[first : first + size], self.size_N[self.order[first : first + size]])

    def _chunk(self, rows_N: Tensor, size_N: np.ndarray) -> list[Minibatch]:
        chunk, sample_N1 = self.counts.rows(rows_N, int(size_N.sum())), self.sample_N1[rows_N]
        ends = np.concatenate([[0], size_N.cumsum()])
        nothing_N0 = torch.empty(self.batch_size, 0, device=rows_N.device)
        minibatches = []
        for a in range(0, rows_N.numel(), self.batch_size):
            b = a + self.batch_size
            entries = slice(int(ends[a]), int(ends[b]))
            counts = chunk.indptr_N[a : b + 1] - entries.start, chunk.gene_M[entries], chunk.count_M[entries]
            cells = CountsCSR(*counts, chunk.n_genes)
            minibatches.append(Minibatch(cells, sample_N1[a:b], None, nothing_N0.long(), nothing_N0, b - a))
        return minibatches

    def data(self) -> CellData:
        """The same as carvae's own class."""
        n, device = self.size_N.size, self.sample_N1.device
        nothing_N0 = torch.empty(n, 0, device=device)
        study_N = torch.zeros(n, dtype=torch.int64, device=device)
        counts = residence.Resident(self.counts, np.arange(n))
        return CellData(counts, self.sample_N1, None, study_N, nothing_N0.long(), nothing_N0)


class ResidentObjective(Objective):
    """Carvae's training on cells that are on the device."""

    source: Resident

    def train_dataloader(self) -> Any:
        """The resident cells, in place of a store's."""
        return self.source

    def val_dataloader(self) -> Any:
        """None are held out."""
        return []


class Clock(lightning.Callback):
    """Times the calls of a training loop after ``warm_up`` of them, and watches a few for what the device does."""

    def __init__(self, device: torch.device, warm_up: int, seconds: float, watched: int = 0) -> None:
        self.device, self.warm_up, self.seconds, self.watched = device, warm_up, seconds, watched
        self.started = self.took = 0.0
        self.calls = self.timed_calls = 0
        self.profiler: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if self.calls == self.warm_up:
            synchronise(self.device)
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it when the time is up; then watch some more calls."""
        self.calls += 1
        if self.took:
            self.watched -= 1
        elif self.started and time.perf_counter() - self.started > self.seconds:
            synchronise(self.device)
            self.took, self.timed_calls = time.perf_counter() - self.started, self.calls - self.warm_up
            if self.watched:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
        trainer.should_stop = self.took > 0 and self.watched == 0
        if trainer.should_stop and self.profiler is not None:
            synchronise(self.device)
            self.profiler.stop()

    def per_second(self, cells_per_call: int) -> float:
        """Cells per second."""
        return self.timed_calls * cells_per_call / self.took


def busy_share(profiler: Any) -> tuple[float, int]:
    """Share of the time from the first kernel to the last in which one ran, and their number."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    busy = end = 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0]), len(spans)


def train_carvae(cohort: Cohort, source: Resident, config: Config, seconds: float) -> Clock:
    """Train on resident cells for so long."""
    device = source.sample_N1.device
    torch.manual_seed(0)
    network = Network(source.counts.n_genes, cohort.n_categories, {}, config.model)
    everyone = np.arange(source.size_N.size, dtype=np.int64)
    objective = ResidentObjective(network, source.data(), cohort, PatientSplit(everyone, everyone[:0], ()), config)
    objective.source, objective.n_steps = source, 1_000_000
    on_gpu = device.type == "cuda"
    clock = Clock(device, warm_up=WARM_UP if on_gpu else 0, seconds=seconds, watched=WATCHED if on_gpu else 0)
    trainer(config.train.precision, on_gpu, clock).fit(objective)
    return clock


def trainer(precision: str, on_gpu: bool, clock: Clock) -> lightning.Trainer:
    """Lightning without what writes files."""
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=-1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def train_scvi(adata: ad.AnnData, config: Config, on_gpu: bool, seconds: float) -> float:
    """Cells per second of scvi-tools, with the faster of its loaders."""
    speeds = []
    for sparse in (False, True):
        clock = Clock(torch.device("cuda" if on_gpu else "cpu"), warm_up=20 if on_gpu else 0, seconds=seconds)
        scvi_model(adata, config).train(
            max_epochs=1000,
            batch_size=config.train.batch_size,
            train_size=1.0,
            accelerator="gpu" if on_gpu else "cpu",
            callbacks=[clock],
            load_sparse_tensor=sparse,
            enable_progress_bar=False,
            logger=False,
        )
        speeds.append(clock.per_second(config.train.batch_size))
    return max(speeds)


def embed(network: Network, source: Resident, precision: str, seconds: float) -> float:
    """Cells per second of the latent means, from counts on the device to a table there."""
    device, counts = source.sample_N1.device, source.counts
    network = network.to(device).eval()
    ends = np.concatenate([[0], source.size_N.cumsum()])
    n_cells = source.size_N.size
    latent_NK = torch.empty(n_cells, network.vae.encoder.mean.out_features, device=device)

    def everything() -> None:
        for a in range(0, n_cells, EMBEDDED_AT_ONCE):
            b = min(a + EMBEDDED_AT_ONCE, n_cells)
            cells = counts.rows(torch.arange(a, b, device=device), int(ends[b] - ends[a]))
            latent_NK[a:b] = network.vae.encoder(cells).mean_NK

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return n_cells / timed(everything, device, seconds)


def some_cells(n_cells: int) -> ad.AnnData:
    """Simulated cells over genes that are not rare: ingest would drop those."""
    adata = simulated(n_cells, N_GENES * 5 // 4)
    often = np.argsort(-adata.X.getnnz(axis=0))[:N_GENES]
    return adata[:, np.sort(often)].copy()


def repeated(adata: ad.AnnData, n_cells: int) -> ad.AnnData:
    """The cells again and again, ``n_cells`` in all."""
    rows = np.resize(np.arange(adata.n_obs), n_cells)
    obs = adata.obs.iloc[rows].reset_index(drop=True).set_axis([f"c{i}" for i in range(n_cells)])
    return ad.AnnData(adata.X[rows], obs, adata.var)


def resident(adata: ad.AnnData, device: torch.device) -> Resident:
    """The cells on the device."""
    code_N = adata.obs["sample"].cat.codes.to_numpy(np.int64)
    size_N = np.diff(adata.X.indptr).astype(np.int64)
    sample_N1 = torch.from_numpy(code_N)[:, None].to(device)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    return Resident(CompactCSR.from_scipy(adata.X).to(device), size_N, sample_N1, order, BATCHES[0])


def settings(batch_size: int, precision: str) -> Config:
    """Carvae's settings of one row."""
    more = [f"train.batch_size={batch_size}", f"train.precision={PRECISIONS[precision]}"]
    return Config.parse_overrides([*SETTINGS, *more])


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows share."""

    device: Device
    cohort: Cohort
    source: Resident
    adata: ad.AnnData
    seconds: float
    stop_at: float

    def rows(self) -> Iterator[Row]:
        """The table, a row at a time, until the time is up."""
        on_gpu = self.source.sample_N1.is_cuda
        for batch_size in BATCHES:
            if batch_size * STEPS_PER_CALL > self.adata.n_obs or time.monotonic() > self.stop_at:
                continue
            config = settings(batch_size, "fp32")
            scvi = train_scvi(self.adata, config, on_gpu, self.seconds)
            for precision in PRECISIONS:
                self.source.batch_size = batch_size
                clock = train_carvae(self.cohort, self.source, settings(batch_size, precision), self.seconds)
                speed = clock.per_second(batch_size * STEPS_PER_CALL)
                least = floor_seconds(
                    self.device, batch_size, precision, self.source.counts.n_genes, config.model.n_hidden
                )
                busy, kernels = busy_share(clock.profiler) if clock.profiler else (None, None)
                per_step = None if kernels is None else kernels / WATCHED / STEPS_PER_CALL
                yield Row(batch_size, precision, speed, scvi, busy, per_step, least * speed / batch_size)


def table(rows: list[Row], embedded: dict[str, float]) -> list[str]:
    """The results to be read."""
    titles = "batch", "", "carvae", "scvi-tools", "ratio", "busy", "kernels", "floor"
    lines = ["{:>6} {:5} {:>12} {:>11} {:>7} {:>5} {:>8} {:>6}".format(*titles)]
    for row in rows:
        busy = "" if row.busy is None else f"{row.busy:.0%}"
        kernels = "" if row.kernels_per_step is None else f"{row.kernels_per_step:.0f}"
        ratio, speed = RATIO_BARS.get(row.batch_size), CELLS_PER_SECOND_BARS.get(row.batch_size)
        bar = f"bar {ratio:.0f}x" if ratio else f"bar {speed:,.0f}/s"
        lines.append(
            f"{row.batch_size:6} {row.precision:5} {row.carvae:12,.0f} {row.scvi:11,.0f} {row.carvae / row.scvi:6.1f}x "
            f"{busy:>5} {kernels:>8} {row.of_floor:6.0%}  {bar}"
        )
    lines += [f" embed {name:5} {speed:12,.0f}  bar {EMBEDDING_BAR:,.0f}/s" for name, speed in embedded.items()]
    return lines


def passed(rows: list[Row], embedded: dict[str, float]) -> bool:
    """Whether every bar is met, each by one of the precisions."""
    if {row.batch_size for row in rows} != set(BATCHES):
        return False
    best = {size: max((r for r in rows if r.batch_size == size), key=lambda r: r.carvae) for size in BATCHES}
    return (
        all(best[size].carvae >= bar * best[size].scvi for size, bar in RATIO_BARS.items())
        and all(best[size].carvae >= bar for size, bar in CELLS_PER_SECOND_BARS.items())
        and all(row.busy is not None and row.busy >= BUSY_BAR for row in best.values())
        and max(embedded.values()) >= EMBEDDING_BAR
    )


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --device cpu --cells 4096 --seconds 1 tries the script out")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"carvae beside scvi-tools on {device}: checking", flush=True)
    print(f"largest error against float64: {check_against_float64(device):.1e}", flush=True)
    tests_passed, said = run_gpu_tests()
    print(f"tests on a GPU: {said}", flush=True)
    measured = measure_device(device)
    print(f"{measured}\nafter {time.monotonic() - began:.0f} s: simulating", flush=True)
    distinct = some_cells(min(given.cells, DISTINCT))
    with tempfile.TemporaryDirectory() as folder:
        config = settings(BATCHES[0], "fp32")
        cohort = cohort_of(distinct[:2000].copy(), config, Path(folder))
        kept = distinct[:, list(cohort.store.header.genes)].copy()
        print(f"losses equal to {check_equal_losses(cohort, kept[:2000].copy(), config):.1e}", flush=True)
        adata = repeated(kept, given.cells)
        source = resident(adata, device)
        print(f"after {time.monotonic() - began:.0f} s: {adata.n_obs:,} cells resident", flush=True)
        bench = Bench(measured, cohort, source, adata, given.seconds, began + SECONDS_IN_ALL)
        rows: list[Row] = []
        for row in bench.rows():
            print(f"after {time.monotonic() - began:.0f} s: {row}", flush=True)
            rows.append(row)
        network = Network(source.counts.n_genes, cohort.n_categories, {}, config.model)
        embedded = {name: embed(network, source, name, given.seconds / 2) for name in PRECISIONS}
    what = "measured on" if device.type == "cuda" else "NOT a measurement, on"
    print(f"{what} {measured.name}, {adata.n_obs:,} cells x {adata.n_vars:,} genes, cells per second")
    print("\n".join(table(rows, embedded)))
    figures: dict[str, Any] = {"device": asdict(measured), "rows": [asdict(row) for row in rows], "embedding": embedded}
    figures["tests_passed"] = tests_passed
    verdict = tests_passed and passed(rows, embedded) if device.type == "cuda" else None
    print(json.dumps(figures | {"cells": adata.n_obs, "seconds": time.monotonic() - began, "passed": verdict}))


if __name__ == "__main__":
    main()
