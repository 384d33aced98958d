"""Held-out ELBO per cell against training time on CARPALL: carvae beside scvi-tools' SCVI, by its defaults or tuned.

``python scripts/bench_elbo.py [--scvi defaults] [--scvi-epochs N] [section.key=value ...]``

One run, one thread, the same genes, cells, likelihood (NB), batch (= sample), latent size, width and depth for both.
Every tenth cell is held out at random within its sample, and not whole patients as everywhere else in carvae: a
decoder needs a trained row for each batch, so the likelihood of a new patient's counts depends on how a model guesses
the missing row, which is not the question here. Labels are not used. The 4,000 genes are chosen on the training cells.

Both models are judged by `negative_elbo` alone: same cells, same draws of z, scvi-tools' own NB log probability.
SCVI is trained by ``train()`` with its defaults (epochs by its heuristic, no early stopping), or with ``--scvi tuned``
at four times its rate, with a KL warm-up of 20 epochs, for 50; in both with ``train_size=1``: its own 10% of validation
cells would be cells that carvae has. Times are those of training alone, without imports,
reading of data and the evaluations on the way. ``section.key=value`` changes carvae's recipe; ``--scvi-epochs`` makes
a short trial, marked as such in the line of JSON that ends the output.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import anndata as ad
import lightning.pytorch as lightning
import numpy as np
import scipy.sparse as sp
import scvi
import torch
from bench_data import CARPALL, carpall, cohort_of, most_variable
from scvi.distributions import NegativeBinomial
from torch import Tensor

from carvae.config import Config, ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.network import Network
from carvae.train import fit

N_GENES = 4000
HELD_OUT_SHARE = 0.1
N_DRAWS = 10
"""Draws of z per cell in an evaluation."""
EVALUATED_EPOCHS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300, 350, 400)
"""Epochs of SCVI after which the held-out ELBO is measured, beside the last."""
ARCHITECTURE = (
    "model.n_latent=10",
    "model.n_hidden=128",
    "model.n_layers=1",
    "model.dropout_rate=0.1",
    "model.covariates=[sample]",
)
"""The defaults of scvi-tools' SCVI, for both."""
RECIPE = (
    "train.max_epochs=9",
    "train.lr=8e-3",
    "train.thinning=0",
    "train.gene_dropout=0",
    "train.validation_share=0",
    "train.wandb=disabled",
)
"""A short schedule, and no augmentation: that serves shallow queries and not the likelihood."""


@dataclass(frozen=True, slots=True)
class ScviRecipe:
    """How SCVI is trained."""

    epochs: int | None
    """None for its own heuristic."""
    plan: dict[str, float]
    bar: float
    """How many times less time carvae is to take."""


SCVI_RECIPES = {
    "defaults": ScviRecipe(None, {}, 100),
    "tuned": ScviRecipe(50, {"lr": 4e-3, "n_epochs_kl_warmup": 20}, 8),
}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cells on which both models are judged: dense counts, and each cell's row of the batch table."""

    counts_NG: Tensor
    batch_N: Tensor


class Judged(Protocol):
    """What `negative_elbo` asks of a model."""

    def encode(self, held: HeldOut) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x), [N, K]."""

    def decode(self, z_NK: Tensor, held: HeldOut) -> tuple[Tensor, Tensor]:
        """NB mean [N, G] and inverse dispersion [G] or [N, G]."""


@dataclass(frozen=True, slots=True)
class CarvaeModel:
    """Carvae's network."""

    network: Network

    def encode(self, held: HeldOut) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x), [N, K]."""
        counts = CountsCSR.from_scipy(sp.csr_matrix(held.counts_NG.numpy()))
        posterior = self.network.vae.encoder(counts)
        return posterior.mean_NK, posterior.variance_NK

    def decode(self, z_NK: Tensor, held: HeldOut) -> tuple[Tensor, Tensor]:
        """NB mean [N, G] and inverse dispersion [G]."""
        vae = self.network.vae
        logits_NG = vae.decoder.scale(vae.decoder.hidden(z_NK, held.batch_N[:, None]))
        return torch.softmax(logits_NG, 1) * held.counts_NG.sum(1, keepdim=True), vae.log_theta_G.exp()


@dataclass(frozen=True, slots=True)
class ScviModel:
    """scvi-tools' module."""

    module: Any

    def encode(self, held: HeldOut) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x), [N, K]."""
        posterior = self.module.inference(held.counts_NG, held.batch_N[:, None])["qz"]
        return posterior.loc, posterior.scale.square()

    def decode(self, z_NK: Tensor, held: HeldOut) -> tuple[Tensor, Tensor]:
        """NB mean [N, G] and inverse dispersion [G]."""
        library_N1 = held.counts_NG.sum(1, keepdim=True).log()
        counts = self.module.generative(z_NK, library_N1, held.batch_N[:, None])["px"]
        return counts.mu, counts.theta


@torch.inference_mode()
def negative_elbo(model: Judged, held: HeldOut, seed: int) -> float:
    """Return the mean over cells of -E_q[log p(x|z)] + KL(q(z|x) | N(0, 1)) in nats, by `N_DRAWS` draws of z."""
    mean_NK, variance_NK = model.encode(held)
    kl_N = 0.5 * (variance_NK + mean_NK.square() - 1 - variance_NK.log()).sum(1)
    generator = torch.Generator().manual_seed(seed)
    log_likelihood_N = torch.zeros_like(kl_N)
    for _ in range(N_DRAWS):
        noise_NK = torch.randn(mean_NK.shape, generator=generator)
        mu_NG, theta = model.decode(mean_NK + variance_NK.sqrt() * noise_NK, held)
        log_likelihood_N += NegativeBinomial(mu=mu_NG, theta=theta).log_prob(held.counts_NG).sum(1) / N_DRAWS
    return float((kl_N - log_likelihood_N).mean())


@dataclass(slots=True)
class Clock:
    """Wall and CPU seconds of what runs inside `running` and outside `paused`."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def running(self, sign: int = 1) -> Iterator[None]:
        """Add what the block takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += sign * (time.perf_counter() - wall)
        self.cpu_s += sign * (time.process_time() - cpu)

    def paused(self) -> Any:
        """Take off what the block takes."""
        return self.running(-1)


@dataclass(slots=True)
class Curve(lightning.Callback):
    """Held-out negative ELBO of a SCVI in training, with the clock stopped."""

    held: HeldOut
    clock: Clock
    seed: int
    points: dict[int, float] = field(default_factory=dict)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure after `EVALUATED_EPOCHS` and the last."""
        epoch = trainer.current_epoch + 1
        if epoch in EVALUATED_EPOCHS or epoch == trainer.max_epochs:
            with self.clock.paused():
                module = pl_module.module.eval()
                self.points[epoch] = negative_elbo(ScviModel(module), self.held, self.seed)
                module.train()
                print(f"scvi   epoch {epoch:4d}  held-out -ELBO {self.points[epoch]:.2f}", flush=True)

    def state_key(self) -> str:  # type: ignore[override]
        """Lightning's key of this callback."""
        return "curve"


@dataclass(frozen=True, slots=True)
class Task:
    """The data of the comparison, as both models take them."""

    cohort: Cohort
    train: ad.AnnData
    held: HeldOut


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model's result."""

    negative_elbo: float
    wall_s: float
    cpu_s: float
    epochs: int


def prepare(data: Path, config: Config, folder: Path) -> Task:
    """Split the cells, choose the genes on the training cells, and ingest those by carvae's own path."""
    adata = carpall(data)
    held_out_N = split_within_samples(adata.obs["sample"].to_numpy(str), np.random.default_rng(config.seed))
    train = most_variable(adata[~held_out_N].copy(), N_GENES)
    cohort = cohort_of(train, config, folder)
    genes, samples = list(cohort.store.header.genes), list(cohort.obs["sample"].astype("category").cat.categories)
    held = adata[held_out_N, genes]
    batch_N = torch.tensor([samples.index(s) for s in held.obs["sample"]])
    return Task(cohort, train[:, genes].copy(), HeldOut(torch.from_numpy(held.X.toarray()).float(), batch_N))


def split_within_samples(sample_N: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return True for the cells held out: `HELD_OUT_SHARE` of each sample, rounded."""
    held_out_N = np.zeros(sample_N.size, np.bool_)
    for name in np.unique(sample_N):
        cells = np.flatnonzero(sample_N == name)
        held_out_N[rng.choice(cells, round(HELD_OUT_SHARE * cells.size), replace=False)] = True
    return held_out_N


def run_carvae(task: Task, config: Config, folder: Path) -> Outcome:
    """Train carvae by `carvae.train.fit` on all training cells."""
    everyone = np.arange(len(task.cohort.obs), dtype=np.int64)
    clock = Clock()
    with clock.running():
        result = fit(task.cohort, PatientSplit(everyone, everyone[:0], ()), config, folder)
    value = negative_elbo(CarvaeModel(result.network), task.held, config.seed)
    print(f"carvae epoch {result.n_epochs:4d}  held-out -ELBO {value:.2f}  {clock.cpu_s:.1f} CPU s", flush=True)
    return Outcome(value, clock.wall_s, clock.cpu_s, result.n_epochs)


def run_scvi(task: Task, config: ModelConfig, seed: int, recipe: ScviRecipe) -> tuple[Outcome, dict[int, float]]:
    """Train SCVI; returns its last point and its curve."""
    scvi.settings.seed = seed
    samples = list(task.cohort.obs["sample"].astype("category").cat.categories)
    task.train.obs["sample"] = task.train.obs["sample"].astype(str).astype("category").cat.set_categories(samples)
    scvi.model.SCVI.setup_anndata(task.train, batch_key="sample")
    model = scvi.model.SCVI(
        task.train,
        n_latent=config.n_latent,
        n_hidden=config.n_hidden,
        n_layers=config.n_layers,
        dropout_rate=config.dropout_rate,
        gene_likelihood="nb",
    )
    clock = Clock()
    curve = Curve(task.held, clock, seed)
    with clock.running():
        model.train(
            max_epochs=recipe.epochs,
            plan_kwargs=recipe.plan,
            train_size=1.0,
            accelerator="cpu",
            callbacks=[curve],
            enable_progress_bar=False,
        )
    epochs = max(curve.points)
    return Outcome(curve.points[epochs], clock.wall_s, clock.cpu_s, epochs), curve.points


def report(carvae: Outcome, scvi_last: Outcome, curve: dict[int, float], name: str, trial: bool) -> dict[str, Any]:
    """Print both side by side; returns the figures."""
    best = min(curve, key=lambda epoch: curve[epoch])
    wall, cpu = scvi_last.wall_s / carvae.wall_s, scvi_last.cpu_s / carvae.cpu_s
    print(f"\n{'':22}{'-ELBO':>9}{'epochs':>8}{'wall s':>9}{'CPU s':>9}")
    rows = {"carvae": carvae, f"scvi-tools {name}": scvi_last}
    for label, row in rows.items():
        print(f"{label:22}{row.negative_elbo:9.2f}{row.epochs:8d}{row.wall_s:9.1f}{row.cpu_s:9.1f}")
    print(f"{'  its best point':22}{curve[best]:9.2f}{best:8d}\nwall time {wall:.1f} times less, CPU time {cpu:.1f}")
    return {
        "carvae_elbo": round(carvae.negative_elbo, 3),
        "scvi_elbo": round(scvi_last.negative_elbo, 3),
        "scvi_best_elbo": round(curve[best], 3),
        "scvi_best_epoch": best,
        "carvae_wall_s": round(carvae.wall_s, 2),
        "scvi_wall_s": round(scvi_last.wall_s, 2),
        "wall_ratio": round(wall, 2),
        "cpu_ratio": round(cpu, 2),
        "carvae_epochs": carvae.epochs,
        "scvi_epochs": scvi_last.epochs,
        "scvi_curve": {str(epoch): round(value, 2) for epoch, value in curve.items()},
        "scvi_recipe": name,
        "trial": trial,
        "passed": not trial
        and wall >= SCVI_RECIPES[name].bar
        and carvae.negative_elbo <= min(scvi_last.negative_elbo, curve[best]),
    }


def main() -> None:
    """Parse the command line, run both, and end with one line of JSON: negative ELBO in nats per held-out cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CARPALL)
    parser.add_argument("--scvi", choices=SCVI_RECIPES, default="defaults", help="how SCVI is trained")
    parser.add_argument("--scvi-epochs", type=int, help="a short trial, in place of the recipe's epochs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of carvae's recipe")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = Config.parse_overrides([*ARCHITECTURE, *RECIPE, *given.overrides])
    with tempfile.TemporaryDirectory() as temporary:
        task = prepare(given.data, config, Path(temporary))
        torch.set_num_threads(1)  # here, since the choice of genes (numba) gives torch all threads again
        print(f"{task.train.n_obs} training cells, {len(task.held.batch_N)} held out, {task.train.n_vars} genes")
        carvae = run_carvae(task, config, Path(temporary) / "fit")
        recipe = SCVI_RECIPES[given.scvi]
        recipe = replace(recipe, epochs=given.scvi_epochs or recipe.epochs)
        scvi_last, curve = run_scvi(task, config.model, config.seed, recipe)
    print(json.dumps(report(carvae, scvi_last, curve, given.scvi, given.scvi_epochs is not None)))


if __name__ == "__main__":
    main()
