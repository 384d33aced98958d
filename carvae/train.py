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

from carvae import __version__
from carvae.config import Config, label_file
from carvae.data.split import PatientSplit, patient_folds, split_patients
from carvae.data.store import CellStore
from carvae.errors import TrainError
from carvae.ingest import run as ingest
from carvae.ingest import work_folder
from carvae.labels.signatures import Signatures
from carvae.model.bundle import Bundle, Provenance, check_place, leaf_parts
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.fused import has_bfloat16
from carvae.model.gene_view import fit_gene_view
from carvae.model.held_out import held_out_metrics
from carvae.model.metrics import AxisScores
from carvae.model.network import Network
from carvae.model.objective import Objective
from carvae.model.run_log import rows_before, wandb_mode
from carvae.model.witness import Witness, learn, measure, reference_of, witness

log = logging.getLogger(__name__)


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
    witnesses = _witnesses(cohort, config, work)
    known = split.train
    if config.train.refit and split.validation.size:
        everyone = np.arange(len(cohort.obs), dtype=np.int64)
        metrics["refit"] = True
        log.info("training again on all patients")
        result = fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, work / "refit")
        metrics["epochs"] = result.n_epochs
        known = everyone
    bundle = _bundle(result.network, cohort, config, metrics)
    if witnesses:
        reference = reference_of(result.network, cohort, known, config.ingest.identity_genes)
        bundle.trust = learn(witnesses, reference, config.train.unknown_rate)
        metrics["trust"] = measure(witnesses, config.train.unknown_rate)
    bundle.card = write_card(bundle)
    path = bundle.save(config.output)
    for checkpoints in work.glob("*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)
    log.info("model written to %s", path)
    return path


def _witnesses(cohort: Cohort, config: Config, work: Path) -> list[Witness]:
    """Networks beside cells that they did not see; none unless asked for, or without labels or patients to hold out.

    Whole studies are held out where several have labels: a query is of another study, which is stranger than a patient.
    """
    if cohort.tree is None or not config.train.calibration_folds:
        return []
    several = cohort.obs["study"][cohort.labelled_N].nunique() > 1
    unit = cohort.obs["study" if several else "patient"]
    folds = patient_folds(unit, cohort.labelled_N, config.train.calibration_folds)
    if len(folds) == 1:
        return []
    rng, identity = np.random.default_rng((config.seed, 4)), config.ingest.identity_genes
    found = []
    for k, fold in enumerate(folds):
        log.info("training without group %d of %d, to learn how sure labels are", k + 1, len(folds))
        result = fit(cohort, PatientSplit(fold.train, fold.train[:0], ()), config, work / f"fold{k}")
        found.append(witness(result.network, cohort, fold, identity, rng))
    return found


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
            precision=_precision(config),
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
    network = network.cpu().eval()
    rng = np.random.default_rng((config.seed, 4))
    fit_gene_view(network.head, data, split.train, list(cohort.allowed().values()), config.model, rng)
    return Fit(network, n_trained)


def _precision(config: Config) -> Any:
    """Float32 where the processor has no bfloat16 products: done without them they take ten times as long."""
    on_cpu = config.train.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and config.train.precision != "32-true" and not has_bfloat16():
        log.info("this processor has no bfloat16 products; they are in float32")
        return "32-true"
    return config.train.precision


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
        save_top_k=1 if held_out else 0,  # with nothing held out the last is the best
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
    return Bundle(
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
