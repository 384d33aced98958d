"""Training speed on a CPU: carvae beside scvi-tools, the same maths, cells, minibatch size and number of steps.

``python scripts/bench_train.py [--data simulated] [--rounds 3] [--threads 1]``

Both train as their users do, with Lightning, logging and data loading: `carvae.train.fit` and ``SCVI.train`` of a
scvi-tools model of the same architecture (LayerNorm, one hidden layer of 128, 10 latent dimensions, 4,000 genes). First
the loss of one minibatch is checked to be equal under equal weights and equal noise. Then the contenders take turns,
round after round, in one process; a ratio is of two neighbouring runs, and its spread is over the rounds. Ratios are of
CPU time, which other work on the machine does not touch; those of wall time stand beside them. The last line is one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scvi
import torch
from bench_data import CARPALL, carpall, cohort_of, most_variable, simulated

from carvae.config import Config
from carvae.data.loader import MinibatchLoader
from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.fused import has_bfloat16
from carvae.model.network import Network
from carvae.model.scvi_bridge import scvi_state
from carvae.train import fit

N_GENES = 4000
SETTINGS = (
    "model.n_latent=10",
    "model.n_hidden=128",
    "model.n_layers=1",
    "model.dropout_rate=0.1",
    "model.covariates=[sample]",
    "train.min_steps=0",
    "train.thinning=0",
    "train.gene_dropout=0",
    "train.validation_share=0",
    "train.wandb=disabled",
)
EPOCHS = {128: 4, 1024: 8}
BARS = {"nb 128": 4.5, "nb 1024": 6.0, "nb 128 bf16": 6.0, "nb 1024 bf16": 8.0, "zinb 128": 3.0}
"""Least ratio asked of each case."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    likelihood: str
    batch_size: int
    bf16: bool

    def __str__(self) -> str:
        return f"{self.likelihood} {self.batch_size}{' bf16' if self.bf16 else ''}"

    def config(self, threads: int) -> Config:
        """Carvae's settings."""
        overrides = [
            f"model.gene_likelihood={self.likelihood}",
            f"train.batch_size={self.batch_size}",
            f"train.max_epochs={EPOCHS[self.batch_size]}",
            f"train.precision={'bf16-mixed' if self.bf16 else '32-true'}",
            f"train.threads={threads}",
        ]
        return Config.parse_overrides([*SETTINGS, *overrides])


CASES = tuple(Case(*key) for key in (("nb", 128, False), ("nb", 1024, False), ("nb", 128, True), ("nb", 1024, True)))
CASES += (Case("zinb", 128, False),)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one run."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Took:
    """Seconds that ``work`` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def scvi_model(adata: ad.AnnData, config: Config) -> Any:
    """An untrained SCVI of the same architecture."""
    scvi.model.SCVI.setup_anndata(adata, batch_key="sample")
    model = config.model
    return scvi.model.SCVI(
        adata,
        n_latent=model.n_latent,
        n_hidden=model.n_hidden,
        n_layers=model.n_layers,
        dropout_rate=model.dropout_rate,
        gene_likelihood=model.gene_likelihood,
        use_layer_norm="both",
        use_batch_norm="none",
    )


@torch.no_grad()
def check_equal_losses(cohort: Cohort, adata: ad.AnnData, config: Config) -> float:
    """Relative difference of the two losses on 128 cells; stops where it is more than 1e-5."""
    torch.manual_seed(0)
    network = Network(adata.n_vars, cohort.n_categories, {}, config.model).eval()
    module = scvi_model(adata, config).module.eval()
    module.load_state_dict(scvi_state(network.vae), strict=False)
    rows = np.arange(128)
    batch = next(iter(MinibatchLoader(cohort.data(rows, config), rows, rows.size)))
    posterior = network.vae.encoder(batch.counts)
    noise_NK = torch.randn_like(posterior.mean_NK)
    z_NK = posterior.mean_NK + posterior.variance_NK.sqrt() * noise_NK
    ours = float(network.vae.elbo(batch.counts, posterior, z_NK, batch.covariate_NC).loss())
    x_NG = torch.from_numpy(batch.counts.to_scipy().toarray())
    inferred = module.inference(x_NG, batch.covariate_NC)
    inferred["z"] = inferred["qz"].loc + inferred["qz"].scale * noise_NK
    generated = module.generative(inferred["z"], inferred["library"], batch.covariate_NC)
    theirs = float(module.loss({"X": x_NG}, inferred, generated).loss)
    difference = abs(ours - theirs) / abs(theirs)
    if not difference < 1e-5:
        raise SystemExit(f"the losses differ: carvae {ours}, scvi-tools {theirs}")
    return difference


def measure(case: Case, cohort: Cohort, adata: ad.AnnData, rounds: int, threads: int) -> dict[str, float]:
    """Interleaved runs of one case; ratios scvi-tools / carvae."""
    config = case.config(threads)
    everyone = np.arange(adata.n_obs, dtype=np.int64)
    split, epochs = PatientSplit(everyone, everyone[:0], ()), config.train.max_epochs
    steps = epochs * -(-adata.n_obs // case.batch_size)
    pairs = []
    for i in range(rounds + 1):  # the first round warms up
        with tempfile.TemporaryDirectory() as folder:
            ours = timed(lambda: fit(cohort, split, config, Path(folder)))
        model = scvi_model(adata, config)
        arguments = {"train_size": 1.0, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
        theirs = timed(lambda: model.train(max_epochs=epochs, batch_size=case.batch_size, **arguments))  # noqa: B023
        if i:
            pairs.append((ours, theirs))
    cpu = np.array([theirs.cpu / ours.cpu for ours, theirs in pairs])
    wall = np.array([theirs.wall / ours.wall for ours, theirs in pairs])
    return {
        "ratio": float(np.median(cpu)),
        "least": float(cpu.min()),
        "greatest": float(cpu.max()),
        "wall_ratio": float(np.median(wall)),
        "carvae_ms_per_step": 1e3 * float(np.median([ours.cpu for ours, _ in pairs])) / steps,
        "scvi_ms_per_step": 1e3 * float(np.median([theirs.cpu for _, theirs in pairs])) / steps,
        "bar": BARS[str(case)],
    }


def main() -> None:
    """Parse the command line, run, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CARPALL, help="CARPALL's file, or the word simulated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=[str(case) for case in CASES])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    is_simulated = str(given.data) == "simulated"
    adata = simulated(20_000, N_GENES) if is_simulated else most_variable(carpall(given.data), N_GENES)
    folder = Path(tempfile.mkdtemp())
    try:
        config = CASES[0].config(given.threads)
        cohort = cohort_of(adata, config, folder)
        adata = adata[:, list(cohort.store.header.genes)].copy()
        torch.set_num_threads(given.threads)  # here, since the choice of genes (numba) gives torch all threads again
        density = adata.X.nnz / adata.n_obs / adata.n_vars
        print(f"{adata.n_obs} cells, {adata.n_vars} genes, {density:.1%} not zero, {given.threads} thread(s)")
        for likelihood in ("nb", "zinb"):
            difference = check_equal_losses(cohort, adata, Case(likelihood, 128, bf16=False).config(given.threads))
            print(f"{likelihood}: losses equal to {difference:.1e}", flush=True)
        if not has_bfloat16():
            print("this processor has no bfloat16 products: carvae's are in float32 in every case")
        results = {}
        for case in [case for case in CASES if not given.cases or str(case) in given.cases]:
            results[str(case)] = row = measure(case, cohort, adata, given.rounds, given.threads)
            print(
                f"{case!s:14} {row['ratio']:5.2f}x ({row['least']:.2f} to {row['greatest']:.2f}; wall"
                f" {row['wall_ratio']:.2f}x; bar {row['bar']}x)  carvae {row['carvae_ms_per_step']:.2f} ms,"
                f" scvi-tools {row['scvi_ms_per_step']:.2f} ms of CPU per step",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    passed = all(row["ratio"] >= row["bar"] for row in results.values())
    facts = {"data": str(given.data), "threads": given.threads, "bfloat16": has_bfloat16()}
    print(json.dumps(facts | {"cases": rounded, "passed": passed}))


if __name__ == "__main__":
    main()
