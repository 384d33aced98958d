"""Memory and time of embedding, and of training out of core, as the number of cells grows.

``python scripts/bench_scale.py [--sizes 100000 1000000] [--genes 2000] [--parts embed train] [--folder DIR]``

The cells are drawn with replacement from a pool of simulated ones and written by stream: as a query (.h5ad) to embed,
and as a store to train on. Each measurement is a fresh process with one thread of torch that first does the same with a
few cells, which loads libraries and compiled kernels, and then is timed: `carvae.predict.run` on the query;
`carvae.train.fit` for one pass over the store with ``train.data=stream``, which reads every cell twice (moments, then
minibatches of 1,024). Peak memory is the kernel's high-water mark of that process's resident memory, libraries and all.

Bars: under 2 GiB at the largest size, under 1.2 times the memory of the smallest, CPU time per cell within 15% (other
work on the machine does not touch it; wall time stands beside it). Files are removed at the end (about 3 GB at
1,000,000 cells of 2,000 genes). The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import sparse_dataset, write_elem

from carvae.config import Config
from carvae.data.genes import GeneTable
from carvae.data.store import CellStore, StoreHeader, StoreWriter

POOL = 16_384
BLOCK = 8192
WARM_UP = 4000
GIB = 1 << 30
BARS = {"peak_gib": 2.0, "memory_ratio": 1.2, "time_ratio": 1.15}
STUDIES = {"study": {"path": "cells.h5ad", "label": "label", "obs": {"sample": "sample", "patient": "patient"}}}


@dataclass(frozen=True, slots=True)
class Measured:
    """One process."""

    n_cells: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads."""
    peak_gib: float

    @property
    def us_per_cell(self) -> float:
        """Microseconds of CPU time."""
        return 1e6 * self.cpu / self.n_cells


def config_of(output: Path, study: Path, *overrides: str) -> Config:
    """Settings of all trainings here."""
    settings = ("train.max_epochs=1", "train.min_steps=0", "train.validation_share=0", "train.wandb=disabled")
    config = Config.parse_overrides([*settings, "train.batch_size=1024", "ingest.exclude_genes=[]", *overrides])
    studies = {"study": STUDIES["study"] | {"path": study}}
    ingest = config.ingest.model_dump() | {"studies": studies}
    return Config.parse(config.model_dump() | {"ingest": ingest, "output": output})


def pool_of(n_genes: int) -> sp.csr_matrix:
    """Cells of eight programmes over human genes, about 8% of their counts not zero."""
    rng = np.random.default_rng(0)
    programmes, base_G = rng.normal(size=(8, n_genes)) * 0.7, rng.normal(-1.3, 1.6, n_genes)
    blocks = []
    for _ in range(0, POOL, 2048):
        share = np.exp(base_G + rng.normal(size=(2048, 8)) @ programmes * 0.5)
        mean = share / share.sum(1, keepdims=True) * rng.lognormal(np.log(0.18 * n_genes), 0.4, 2048)[:, None]
        blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.int32)))
    return sp.vstack(blocks, format="csr")


def cells(pool: sp.csr_matrix, n_cells: int) -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
    """Blocks of cells of 40 patients, with a label each."""
    rng = np.random.default_rng(1)
    for start in range(0, n_cells, BLOCK):
        rows = rng.integers(0, POOL, min(BLOCK, n_cells - start))
        patient = np.char.add("p", (np.arange(start, start + rows.size) * 40 // n_cells).astype(str))
        label = np.char.add("state", (rows % 5).astype(str))
        columns = {"study": "study", "source": "study", "sample": patient, "patient": patient, "label": label}
        yield pool[rows], pd.DataFrame(columns)


def write_store(path: Path, pool: sp.csr_matrix, genes: list[str], n_cells: int) -> None:
    """A store as ingest writes it."""
    header = StoreHeader("simulated", tuple(genes), ("study",), {})
    writer = StoreWriter(path, header, np.ones((1, len(genes)), np.bool_))
    for counts, obs in cells(pool, n_cells):
        writer.append(counts, obs)
    writer.close()


def write_query(path: Path, pool: sp.csr_matrix, genes: list[str], n_cells: int) -> None:
    """An .h5ad of the same cells."""
    table = []
    for counts, obs in cells(pool, n_cells):
        if not table:
            ad.AnnData(counts, obs.set_axis(obs.index.astype(str)), pd.DataFrame(index=genes)).write_h5ad(path)
        else:
            with h5py.File(path, "r+") as file:
                sparse_dataset(file["X"]).append(counts)
        table.append(obs)
    whole = pd.concat(table, ignore_index=True).astype("category")
    with h5py.File(path, "r+") as file:
        write_elem(file, "obs", whole.set_axis(pd.Index("cell" + whole.index.astype(str))))


def train(store: Path, folder: Path) -> None:
    """One pass over a store, out of core."""
    from carvae.data.split import PatientSplit
    from carvae.model.cohort import Cohort
    from carvae.train import fit

    config = config_of(folder / "model", folder / "none.h5ad", "train.data=stream")
    cohort = Cohort.assemble(CellStore(store), config)
    everyone = np.arange(len(cohort.obs), dtype=np.int64)
    fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, folder / f"fit-{store.stem}")


def embed(query: Path, folder: Path) -> None:
    """The whole of a query."""
    from carvae.config import PredictConfig
    from carvae.predict import run

    out = folder / "embedded.h5ad"
    run(query, folder / "model", out, PredictConfig(), label=False)
    out.unlink()


def measure(part: str, path: Path, small: Path, n_cells: int, folder: Path) -> None:
    """In a process of its own: warm up, work, and print what it took."""
    work = {"train": train, "embed": embed}[part]
    work(small, folder)
    wall, cpu = time.perf_counter(), time.process_time()
    work(path, folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # not getrusage: that begins at what the parent had when it started this process
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    print(json.dumps(asdict(Measured(n_cells, wall, cpu, peak / GIB))))


def measured(part: str, path: Path, small: Path, n_cells: int, folder: Path) -> Measured:
    """`measure` in a fresh process with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    arguments = [sys.executable, __file__, "--measure", part, str(path), str(small), str(n_cells), str(folder)]
    done = subprocess.run(arguments, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_part(part: str, sizes: list[int], pool: sp.csr_matrix, genes: list[str], folder: Path) -> dict[str, float]:
    """All sizes of one part, the smallest first; prints each."""
    write, suffix = (write_store, ".zarr") if part == "train" else (write_query, ".h5ad")
    small = folder / f"small{suffix}"
    write(small, pool, genes, WARM_UP)
    found = []
    for n_cells in sizes:
        path = folder / f"large{suffix}"
        write(path, pool, genes, n_cells)
        found.append(result := measured(part, path, small, n_cells, folder))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(
            f"{part:6} {n_cells:>9,} cells: peak {result.peak_gib:.2f} GiB, {result.us_per_cell:.1f} us of CPU"
            f" per cell, {result.wall:.1f} s",
            flush=True,
        )
    first, last = found[0], found[-1]
    row = {"peak_gib": last.peak_gib, "memory_ratio": last.peak_gib / first.peak_gib}
    row |= {"time_ratio": last.us_per_cell / first.us_per_cell, "us_per_cell": last.us_per_cell}
    for name, bar in BARS.items():
        print(f"{part:6} {name} {row[name]:.2f} (bar {bar})")
    return row


def small_model(pool: sp.csr_matrix, genes: list[str], folder: Path) -> None:
    """A bundle over all genes, trained for a few steps."""
    from carvae.train import run

    study = folder / "cells.h5ad"
    write_query(study, pool, genes, WARM_UP)
    run(config_of(folder / "model", study, f"ingest.n_top_genes={len(genes)}"))


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    if sys.argv[1:2] == ["--measure"]:
        part, path, small, n_cells, folder = sys.argv[2:]
        measure(part, Path(path), Path(small), int(n_cells), Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--parts", nargs="+", choices=["embed", "train"], default=["embed", "train"])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        genes = sorted(GeneTable.default().symbols)[: given.genes]
        pool = pool_of(given.genes)
        density = pool.nnz / POOL / given.genes
        print(f"{given.genes} genes, {density:.1%} of counts not zero, one thread", flush=True)
        if "embed" in given.parts:
            small_model(pool, genes, folder)
        results = {part: run_part(part, given.sizes, pool, genes, folder) for part in given.parts}
    finally:
        shutil.rmtree(folder)
    passed = all(row[name] < bar for row in results.values() for name, bar in BARS.items())
    rounded = {part: {name: round(value, 3) for name, value in row.items()} for part, row in results.items()}
    print(json.dumps({"sizes": given.sizes, "genes": given.genes, "parts": rounded, "passed": passed}))


if __name__ == "__main__":
    main()
