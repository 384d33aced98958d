"""Embedding speed on a CPU: from memory beside scvi-tools with the same weights, from disk beside reading the file.

``python scripts/bench_embed.py [--data simulated] [--rounds 5] [--copies 10]``

From memory: latent means of the same cells over the same 4,000 genes, by carvae's network and by
``SCVI.get_latent_representation`` at each of several batch sizes, under equal weights; the coordinates are checked to
be equal first. ``Bundle.get_latent_representation``, which also checks every count and finds the genes, stands beside.
From disk: ``carvae embed`` of an .h5ad and of a zarr store (the cells over all their genes, ``--copies`` times over, so
that what is done once per run does not weigh), beside the time that h5py or zarr takes to read the same counts in
blocks. Contenders take turns in one process; a ratio is of two neighbouring runs. From memory it is of CPU time, which
other work on the machine touches only through the caches that they share; from disk of wall time, since reading,
embedding and writing overlap, with that of CPU time beside it. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import torch
import zarr
from bench_data import CARPALL, carpall, most_variable, simulated
from bench_train import Case, scvi_model, timed

from carvae import __version__
from carvae.config import Config, PredictConfig
from carvae.labels.signatures import Signatures
from carvae.model.bundle import Bundle, Provenance
from carvae.model.network import Network
from carvae.model.scvi_bridge import scvi_state
from carvae.predict import run

N_GENES = 4000
BATCH_SIZES = (128, 512, 1024, 2048, 4096)
MEMORY_BAR, DISK_BAR = 9.0, 1.5
BLOCK = 4_000_000
"""Counts read at a time."""


def ratios(
    rounds: int, ours: Callable[[], object], theirs: Callable[[], object], clock: str = "cpu"
) -> dict[str, float]:
    """Seconds of two contenders that take turns, and their ratio, theirs / ours, with its spread.

    By ``clock``, cpu or wall; ``other_clock`` is the ratio by the other one.
    """
    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds + 1)][1:]  # the first round warms up
    by_clock = {name: np.array([[getattr(took, name) for took in pair] for pair in pairs]) for name in ("cpu", "wall")}
    ratio = {name: seconds[:, 1] / seconds[:, 0] for name, seconds in by_clock.items()}
    mine, other = np.median(by_clock.pop(clock), axis=0)
    spread = {"ratio": np.median(ratio[clock]), "least": ratio[clock].min(), "greatest": ratio[clock].max()}
    aside = {"other_clock": np.median(ratio[next(iter(by_clock))])}
    return {
        key: round(float(value), 4) for key, value in {**spread, "ours_s": mine, "theirs_s": other, **aside}.items()
    }


def from_memory(bundle: Bundle, adata: ad.AnnData, config: Config, rounds: int) -> dict[str, Any]:
    """Carvae beside scvi-tools at every batch size."""
    network = bundle.network
    model = scvi_model(adata, config)
    model.module.load_state_dict(scvi_state(network.vae), strict=False)
    model.is_trained = True
    model.module.eval()  # as after training
    counts = adata.X.tocsr()
    difference = np.abs(network.predict(counts, label=False).latent_NK - model.get_latent_representation()).max()
    if not difference < 1e-4:
        raise SystemExit(f"the latent coordinates differ by up to {difference}")
    print(f"latent coordinates equal to {difference:.1e}", flush=True)
    results: dict[str, Any] = {}
    for size in BATCH_SIZES:
        row = ratios(
            rounds,
            lambda: network.predict(counts, label=False),
            lambda: model.get_latent_representation(batch_size=size),  # noqa: B023
        )
        results[f"scvi {size}"] = row
        say(f"from memory, scvi-tools at batch size {size}", row, adata.n_obs)
    best = min(BATCH_SIZES, key=lambda size: results[f"scvi {size}"]["theirs_s"])
    row = ratios(
        rounds,
        lambda: bundle.get_latent_representation(adata),
        lambda: model.get_latent_representation(batch_size=best),
    )
    results["whole call"] = row
    say(f"from memory, every count and gene name checked too, scvi-tools at batch size {best}", row, adata.n_obs)
    row = ratios(
        rounds, lambda: network.predict(counts, "bf16", label=False), lambda: network.predict(counts, label=False)
    )
    moved = np.abs(
        network.predict(counts, "bf16", label=False).latent_NK - network.predict(counts, label=False).latent_NK
    ).max()
    results["bf16"] = row | {"greatest_difference": round(float(moved), 4)}
    say(f"from memory, bf16 (moves by up to {moved:.3f}) against fp32", row, adata.n_obs)
    return results


def from_disk(bundle: Path, adata: ad.AnnData, folder: Path, rounds: int) -> dict[str, Any]:
    """Carvae embed beside reading, of both formats."""
    results: dict[str, Any] = {}
    adata.write_h5ad(folder / "q.h5ad", compression="gzip")
    adata.write_zarr(folder / "q.zarr")
    for ending, read in ((".h5ad", read_h5ad), (".zarr", read_zarr)):
        query, out = folder / f"q{ending}", folder / f"o{ending}"
        row = ratios(
            rounds,
            lambda: read(query),  # noqa: B023
            lambda: run(query, bundle, out, PredictConfig(), label=False),  # noqa: B023
            "wall",
        )
        results[ending] = row
        say(f"from disk, {ending}, against reading it, by wall time", row, adata.n_obs)
    return results


def read_h5ad(path: Path) -> None:
    """Read the counts of an .h5ad, some at a time."""
    with h5py.File(path) as file:
        read_blocks(file["X/data"], file["X/indices"])


def read_zarr(path: Path) -> None:
    """Read the counts of a zarr store, some at a time."""
    root = zarr.open_group(path, mode="r")
    read_blocks(root["X/data"], root["X/indices"])


def read_blocks(*arrays: Any) -> None:
    """Every value of some arrays."""
    for array in arrays:
        for start in range(0, array.shape[0], BLOCK):
            array[start : start + BLOCK]


def say(what: str, row: dict[str, float], n_cells: int) -> None:
    """Print one line of the table."""
    each = ", ".join(f"{1e6 * row[key] / n_cells:.2f}" for key in ("ours_s", "theirs_s"))
    spread = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f}; other clock {row['other_clock']:.2f})"
    print(f"{what}: {spread}; {each} us per cell", flush=True)


def bundle_of(network: Network, genes: list[str], config: Config) -> Bundle:
    """A bundle without labels."""
    provenance = Provenance(__version__, 0, "0" * 64, 1, 1, 1, False, {})
    signature = {"name": "none", "genes": [genes[0]], "sources": [{"citation": "none"}]}
    signatures = Signatures.from_dict({"signatures": [signature]})
    return Bundle(network, tuple(genes), None, signatures, config.model, {"sample": 1}, (), provenance)


def copies_of(adata: ad.AnnData, n: int) -> ad.AnnData:
    """The cells some times over, the barcodes and one count of each told apart."""
    parts = []
    for i in range(n):
        part = adata.copy()
        part.obs_names = [f"{cell}-{i}" for cell in part.obs_names]
        parts.append(part)
    return ad.concat(parts, merge="same")


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CARPALL, help="CARPALL's file, or the word simulated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=10, help="how often the file on disk holds the cells")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    is_simulated = str(given.data) == "simulated"
    whole = simulated(20_000, N_GENES) if is_simulated else carpall(given.data)
    panel = whole if is_simulated else most_variable(whole.copy(), N_GENES)
    if "sample" not in panel.obs:
        raise SystemExit("the cells name no sample")
    config = Case("nb", 128, bf16=False).config(1)
    torch.manual_seed(0)
    network = Network(panel.n_vars, {"sample": panel.obs["sample"].nunique()}, {}, config.model).eval()
    print(f"{panel.n_obs} cells, {panel.n_vars} genes, {panel.X.nnz / panel.n_obs:.0f} counts of them per cell")
    panel.X = panel.X.astype(np.float32)
    memory = from_memory(bundle_of(network, list(panel.var_names), config), panel, config, given.rounds)
    folder = Path(tempfile.mkdtemp())
    try:
        small = Network(panel.n_vars, {"sample": 1}, {}, config.model).eval()
        bundle = bundle_of(small, list(panel.var_names), config).save(folder / "bundle")
        whole = copies_of(whole, 1 if is_simulated else given.copies)
        disk = from_disk(bundle, whole, folder, given.rounds)
    finally:
        shutil.rmtree(folder)
    best = min((row for name, row in memory.items() if name.startswith("scvi")), key=lambda row: row["theirs_s"])
    passed = best["ratio"] >= MEMORY_BAR and all(row["ratio"] <= DISK_BAR for row in disk.values())
    figures = {"data": str(given.data), "memory": memory, "disk": disk, "memory_ratio_at_best": best["ratio"]}
    print(json.dumps(figures | {"memory_bar": MEMORY_BAR, "disk_bar": DISK_BAR, "passed": passed}))


if __name__ == "__main__":
    main()
