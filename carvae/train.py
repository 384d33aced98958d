"""Semi-supervised training: ELBO on all cells, label loss on the labelled, early stopping on held-out patients.

What is random is a function of the seed and a counter (order of cells: seed and epoch; noise: seed and step), so a run
that was killed and started again ends with the weights of an uninterrupted one.

Axes: N cells, A label axes, S leaves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import Tensor

from carvae import __version__
from carvae.config import Config, label_file
from carvae.data.loader import CellData, Chunks, Minibatch, MinibatchLoader, Thinning, seed_step
from carvae.data.split import PatientSplit, split_patients
from carvae.data.store import CellStore
from carvae.errors import TrainError
from carvae.ingest import run as ingest
from carvae.ingest import work_folder
from carvae.labels.signatures import Signatures
from carvae.model.bundle import Bundle, Provenance, check_place, leaf_parts
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.heads import label_loss
from carvae.model.held_out import held_out_metrics
from carvae.model.metrics import AxisScores, score_axis
from carvae.model.network import Network
from carvae.model.run_log import rows_before, wandb_mode

log = logging.getLogger(__name__)

STEPS_PER_CALL = 16
"""Optimiser steps in one call of Lightning, whose own work between calls costs up to a quarter of a step."""
LR_WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of one stage of training."""

    network: Network
    n_epochs: int
    """Epochs behind the weights: the best by held-out loss, or all where nothing was held out."""


def run(config: Config) -> Path:
    """Train on the studies of ``config`` and write a bundle to ``config.output``; returns its path.

    Raises
    ------
    CarvaeError
        The studies, labels or settings do not fit; the previous bundle, if any, is then untouched.
    """
    check_place(config.output)  # now, not after hours of training
    work = work_folder(config.output)
    if config.train.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainError("train.accelerator is cuda, but torch finds no CUDA device here; set train.accelerator=auto")
    store = CellStore(ingest(config))
    if config.train.threads:  # after ingest: the choice of genes (numba) sets torch's threads too
        torch.set_num_threads(config.train.threads)
    cohort = Cohort.assemble(store, config)
    rng = np.random.default_rng((config.seed, 2))
    split = split_patients(cohort.obs["patient"], cohort.authored_N, config.train.validation_share, rng)
    log.info("%s", cohort.sentence(split))
    result = fit(cohort, split, config, work / "fit")
    metrics = held_out_metrics(result.network, cohort, split, config.seed) | {"epochs": result.n_epochs}
    for axis, score in metrics.get("held_out", {}).items():
        macro_f1 = f", macro-F1 {score['macro_f1']:.3f}" if len(score["recall"]) > 1 else ""
        log.info("held-out patients, %s: accuracy %.3f%s", axis, score["accuracy"], macro_f1)
    if config.train.refit and split.validation.size:
        everyone = np.arange(len(cohort.obs), dtype=np.int64)
        metrics["refit"] = True
        log.info("training again on all patients")
        result = fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, work / "refit")
        metrics["epochs"] = result.n_epochs
    path = _bundle(result.network, cohort, config, metrics).save(config.output)
    for stage in ("fit", "refit"):
        shutil.rmtree(work / stage / "checkpoints", ignore_errors=True)
    log.info("model written to %s", path)
    return path


def fit(cohort: Cohort, split: PatientSplit, config: Config, folder: Path) -> Fit:
    """Train one network, continuing from ``folder``'s checkpoint where one of the same run is there.

    Raises
    ------
    TrainError
        The loss is not finite.
    """
    data = cohort.data(split.train, config)
    steps_per_epoch = math.ceil(split.train.size / config.train.batch_size)
    epochs = max(config.train.max_epochs, math.ceil(config.train.min_steps / steps_per_epoch))
    torch.manual_seed(config.seed)
    network = Network(data.counts.n_genes, cohort.n_categories, leaf_parts(cohort.tree, config.model), config.model)
    network.vae.start_from_moments(*data.counts.rows(torch.from_numpy(split.train)).moments())
    module = Objective(network, data, cohort, split, config)
    module.n_steps = epochs * steps_per_epoch
    checkpoints = _checkpoint_folder(folder, cohort, split, config)
    keep, *others = _callbacks(checkpoints, held_out=bool(split.validation.size), patience=config.train.patience)
    last = checkpoints / "last.ckpt"
    with _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(config.train.accelerator, config.train.accelerator),
            devices=1,
            precision=config.train.precision,
            max_epochs=epochs,
            logger=_loggers(folder, config, last),
            callbacks=[keep, *others],
            log_every_n_steps=50,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty() and log.isEnabledFor(logging.INFO),
            default_root_dir=folder,
        )
        if last.exists():
            log.info("continuing from %s", last)
        trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    n_trained = trainer.current_epoch
    if split.validation.size and isinstance(keep, ModelCheckpoint):
        best = torch.load(keep.best_model_path, weights_only=True)
        module.load_state_dict(best["state_dict"])
        n_trained = int(best["epoch"]) + 1
    _finish(trainer.loggers, module.scores)
    return Fit(network.cpu().eval(), n_trained)


class Objective(lightning.LightningModule):
    """The network with its loss, data and optimiser.

    Parameters
    ----------
    network
        What is trained.
    data
        All cells.
    cohort
        Their label tree, and which leaves each label allows.
    split
        Cells to train on and cells to watch.
    config
        All settings.
    """

    n_steps: int = 1
    """Optimiser steps of the whole schedule: warm-ups and learning rate are fractions of it."""

    def __init__(self, network: Network, data: CellData, cohort: Cohort, split: PatientSplit, config: Config) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.data, self.split, self.config = data, split, config
        self.leaves = {} if cohort.tree is None else {axis.name: axis.leaves for axis in cohort.tree.axes}
        self.truth = {axis: cohort.true_leaf(axis)[split.validation] for axis in self.leaves}
        for a, allowed_LS in enumerate(cohort.allowed().values()):
            self.register_buffer(f"allowed_{a}", allowed_LS, persistent=False)
        train = config.train
        self.thin = Thinning(train.thinning, train.min_depth, train.gene_dropout, train.max_gene_dropout)
        self.scores: dict[str, AxisScores] = {}
        self._sums: dict[str, Tensor] = {}
        self._val_loss: float | None = None
        self._train_sums: dict[str, Tensor] = {}
        self._held_out: list[dict[str, Tensor]] = []

    def train_dataloader(self) -> Chunks:
        """Training cells, in the order of this epoch."""
        rows, size = self.split.train, self.config.train.batch_size
        return Chunks(MinibatchLoader(self.data, rows, size, self.config.seed, self.current_epoch), STEPS_PER_CALL)

    def val_dataloader(self) -> MinibatchLoader | list[Any]:
        """Cells of held-out patients, in order."""
        rows = self.split.validation
        return MinibatchLoader(self.data, rows, max(1024, self.config.train.batch_size)) if rows.size else []

    def training_step(self, batches: list[Minibatch], batch_idx: int) -> None:
        """Some optimiser steps; what the encoder sees is thinned, what the decoder explains is not."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        for batch in batches:
            seed_step(self.config.seed, self.global_step, self.device)
            kl_weight = self.config.train.kl_weight_at((self.global_step + 1) / self.n_steps)  # full even for one step
            loss, parts = self._loss(batch, self.thin, kl_weight)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()
            self._accumulate(parts | {"train_loss": loss}, batch)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means; stop where training has diverged."""
        means = self._means()
        self._refuse_divergence(means["train_loss"])
        self.log_dict(means)
        if not sys.stderr.isatty():  # on a terminal there is the progress bar
            said = [f"train loss {means['train_loss']:.2f}"]
            said += [] if self._val_loss is None else [f"held-out loss {self._val_loss:.2f}"]
            said += [f"{axis} macro-F1 {s.macro_f1:.3f}" for axis, s in self.scores.items() if len(s.recall) > 1]
            log.info("epoch %d: %s", self.current_epoch + 1, ", ".join(said))

    def on_validation_epoch_start(self) -> None:
        """Put the training sums aside: validation has its own."""
        self._train_sums, self._sums = self._sums, {}
        self._held_out = []

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:
        """Loss of held-out cells with z at its mean, and their predictions."""
        loss, parts = self._loss(batch, None, self.config.train.kl_weight)
        self._accumulate(parts | {"val_loss": loss}, batch)
        _, log_probability = self.network(batch.counts)
        self._held_out.append({axis: p.exp().cpu() for axis, p in log_probability.items()})

    def on_validation_epoch_end(self) -> None:
        """Log held-out losses and label scores over the whole held-out set."""
        means = self._means()
        self._refuse_divergence(means["val_loss"])  # comes before the training epoch's own end
        self._val_loss = means["val_loss"]
        self.log_dict({name if name == "val_loss" else f"val_{name}": value for name, value in means.items()})
        for axis, leaves in self.leaves.items():
            probability = torch.cat([p[axis] for p in self._held_out]).float().numpy()
            scores = score_axis(probability, self.truth[axis], leaves)
            if scores is not None:
                self.scores[axis] = scores
                self.log_dict({f"val_{axis}_macro_f1": scores.macro_f1, f"val_{axis}_ece": scores.ece})
                self.log_dict({f"val_{axis}_recall/{leaf}": recall for leaf, recall in scores.recall.items()})
        self._sums = self._train_sums

    def configure_optimizers(self) -> Any:
        """Adam with a cosine schedule; eps at 1e-8, since gradients of rare genes are smaller than scvi's 0.01."""
        train = self.config.train
        optimizer = torch.optim.Adam(
            self.network.parameters(), lr=train.lr, eps=1e-8, weight_decay=train.weight_decay, fused=True
        )

        def factor(step: int) -> float:
            done = min(step / self.n_steps, 1.0)
            return min(1.0, done / LR_WARMUP + 0.02) * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: Minibatch, thin: Thinning | None, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.network.vae.encoder(batch.counts if thin is None else thin(batch.counts))
        z_NK = posterior.mean_NK if thin is None else posterior.sample()
        elbo = self.network.vae.elbo(batch.counts, posterior, z_NK, batch.covariate_NC, batch.unmeasured_NG)
        loss = elbo.loss(kl_weight)
        parts = {"reconstruction": elbo.reconstruction, "kl": elbo.kl_N.mean()}
        for a, (axis, log_probability_NS) in enumerate(self.network.head(posterior.mean_NK).items()):
            labels = batch.code_NA[:, a], self.get_buffer(f"allowed_{a}"), batch.weight_NA[:, a]
            parts[f"label_{axis}"] = label_loss(log_probability_NS, *labels)
            loss = loss + self.config.train.label_weight * parts[f"label_{axis}"]
        return loss, parts

    def _accumulate(self, parts: dict[str, Tensor], batch: Minibatch) -> None:
        """Sum over cells on the device; nothing is read back before the epoch ends."""
        n = batch.counts.n_cells
        for name, value in (parts | {"n": torch.ones_like(next(iter(parts.values())))}).items():
            self._sums[name] = self._sums.get(name, 0.0) + n * value.detach()

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is not finite in epoch {self.current_epoch}; lower train.lr (now {self.config.train.lr:g})"
            )

    def _means(self) -> dict[str, float]:
        n = self._sums.pop("n")
        means = {name: float(value / n) for name, value in self._sums.items()}
        self._sums = {}
        return means


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and advertisements off the screen; its errors still come."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


def _checkpoint_folder(folder: Path, cohort: Cohort, split: PatientSplit, config: Config) -> Path:
    """Folder of this very run's checkpoints; those of another run are gone, its W&B folder stays."""
    settings = config.model_dump(mode="json", include={"model", "train", "labels", "seed", "ingest"})
    run_id = hashlib.sha256(
        json.dumps([__version__, torch.__version__, cohort.store.content, settings]).encode() + split.train.tobytes()
    ).hexdigest()[:16]
    checkpoints = folder / "checkpoints" / run_id
    for other in checkpoints.parent.glob("*"):
        if other != checkpoints:
            shutil.rmtree(other, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    return checkpoints


class _EarlyStopping(EarlyStopping):
    """Early stopping that a run which had stopped remembers when it is started again."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = self.wait_count >= self.patience


def _callbacks(checkpoints: Path, *, held_out: bool, patience: int) -> list[Callback]:
    """The keeper of checkpoints, and early stopping where something is held out."""
    keep = ModelCheckpoint(
        dirpath=checkpoints,
        filename="best",
        monitor="val_loss" if held_out else None,
        save_top_k=1,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    return [keep, _EarlyStopping("val_loss", patience=patience, check_on_train_epoch_end=True)] if held_out else [keep]


def _loggers(folder: Path, config: Config, checkpoint: Path) -> list[Logger]:
    """A CSV log always; W&B with the settings, but without study paths, patient names or what the machine is called.

    Lightning's CSV log begins anew; here it keeps what was logged before ``checkpoint``, where that is there.
    """
    rows = rows_before(checkpoint, folder / "log" / "metrics.csv")
    shutil.rmtree(folder / "log", ignore_errors=True)
    table = CSVLogger(folder, name="", version="log")
    table.experiment.metrics.extend(rows)
    table.save()
    loggers: list[Logger] = [table]
    mode = wandb_mode(config.train.wandb, os.environ.get("WANDB_MODE", ""))
    if mode != "disabled":
        import wandb

        run = wandb.init(
            project="carvae",
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=config.model_dump(mode="json", include={"seed", "labels", "model", "train"}),
            settings=wandb.Settings(
                x_disable_meta=True, disable_git=True, disable_code=True, console="off", silent=True
            ),
        )
        loggers.append(WandbLogger(experiment=run))
    return loggers


def _finish(loggers: Sequence[Logger], scores: dict[str, AxisScores]) -> None:
    """Log the confusion matrices of the last held-out pass, and close."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for axis, score in scores.items():
                logger.log_table(f"confusion_{axis}", columns=["true", *score.leaves], data=score.confusion_rows())
            logger.experiment.finish()


def _bundle(network: Network, cohort: Cohort, config: Config, metrics: dict[str, Any]) -> Bundle:
    provenance = Provenance(
        carvae_version=__version__,
        seed=config.seed,
        data_fingerprint=cohort.store.content,
        n_cells=len(cohort.obs),
        n_patients=int(cohort.obs["patient"].nunique()),
        n_studies=int(cohort.obs["study"].nunique()),
        weak_labels=cohort.weak,
        libraries={name: version(name) for name in ("torch", "scvi-tools", "anndata", "lightning", "numpy")},
    )
    bundle = Bundle(
        network=network,
        genes=cohort.store.header.genes,
        tree=cohort.tree,
        signatures=Signatures.read(label_file(config.labels.signatures)),
        config=config.model,
        n_categories=cohort.n_categories,
        gene_policy=config.ingest.exclude_genes,
        provenance=provenance,
        metrics=metrics,
    )
    bundle.card = write_card(bundle)
    return bundle
