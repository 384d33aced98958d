"""Semi-supervised training: ELBO on all cells, label loss on the labelled, early stopping on held-out patients.

What is random is a function of the seed and a counter (order of cells: seed and epoch; noise: seed and step), so a run
that was killed and started again ends with the weights of an uninterrupted one. Several processes, on one machine or
more, each train on their part of every minibatch; the first alone writes.

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
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy as FabricStrategy
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy

from carvae import __version__
from carvae.config import Config, label_file
from carvae.data.loader import CellData, MinibatchLoader
from carvae.data.memory import Need, choose, free_bytes
from carvae.data.residence import Residence, Resident, Streamed, read
from carvae.data.sparse import GeneSums
from carvae.data.split import PatientSplit, split_patients
from carvae.data.store import CellStore
from carvae.errors import CarvaeError, ConfigError, TrainError
from carvae.ingest import run as ingest
from carvae.ingest import store_path, work_folder
from carvae.labels.signatures import Signatures
from carvae.model import processes
from carvae.model.bundle import Bundle, Provenance, check_place, leaf_parts
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.fused import has_bfloat16
from carvae.model.gene_view import fit_gene_view
from carvae.model.held_out import held_out_metrics
from carvae.model.metrics import AxisScores
from carvae.model.network import Network
from carvae.model.objective import STEPS_PER_CALL, Objective
from carvae.model.run_log import rows_before, wandb_mode

log = logging.getLogger(__name__)

ACCELERATOR = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's name of each."""
CELLS_PER_SUM = 4096
"""Cells whose moments are taken at a time."""
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: the first may have studies to read."""


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
    if config.train.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainError("train.accelerator is cuda, but torch finds no CUDA device here; set train.accelerator=auto")
    _start_processes(config)
    try:
        processes.share(config)
        processes.on_first(lambda: ingest(config))
        return _run(config)
    except CarvaeError:
        if processes.rank():
            raise SystemExit(1) from None  # the first says it
        raise


def _run(config: Config) -> Path:
    """Train on the store that is there, in each process; the first writes the bundle."""
    work = work_folder(config.output)
    if config.train.threads:  # after ingest: the choice of genes (numba) sets torch's threads too
        torch.set_num_threads(config.train.threads)
    cohort = Cohort.assemble(CellStore(store_path(config.output)), config)
    rng = np.random.default_rng((config.seed, 2))
    split = split_patients(cohort.obs["patient"], cohort.authored_N, config.train.validation_share, rng)
    log.info("%s", cohort.sentence(split))
    result = fit(cohort, split, config, work / "fit")
    is_first = processes.rank() == 0
    metrics = held_out_metrics(result.network, cohort, split, config.seed) if is_first else {}
    metrics["epochs"] = result.n_epochs
    for axis, score in metrics.get("held_out", {}).items():
        macro_f1 = f", macro-F1 {score['macro_f1']:.3f}" if len(score["recall"]) > 1 else ""
        log.info("held-out patients, %s: accuracy %.3f%s", axis, score["accuracy"], macro_f1)
    if config.train.refit and split.validation.size:
        everyone = np.arange(len(cohort.obs), dtype=np.int64)
        metrics["refit"] = True
        log.info("training again on all patients")
        result = fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, work / "refit")
        metrics["epochs"] = result.n_epochs
    if is_first:
        _bundle(result.network, cohort, config, metrics).save(config.output)
        for stage in ("fit", "refit"):
            shutil.rmtree(work / stage / "checkpoints", ignore_errors=True)
        log.info("model written to %s", config.output)
    return config.output


def fit(cohort: Cohort, split: PatientSplit, config: Config, folder: Path) -> Fit:
    """Train one network, continuing from ``folder``'s checkpoint where one of the same run is there.

    Raises
    ------
    TrainError
        The loss is not finite.
    """
    checkpoints = folder / "checkpoints" / _run_id(cohort, split, config)
    processes.on_first(lambda: _keep_only(checkpoints))
    last = checkpoints / "last.ckpt"
    keep, *others = _callbacks(checkpoints, held_out=bool(split.validation.size), patience=config.train.patience)
    n_batches = math.ceil(split.train.size / config.train.batch_size)
    epochs = max(config.train.max_epochs, math.ceil(config.train.min_steps / n_batches))
    with _quiet_lightning():
        trainer = _trainer(config, epochs, folder, _loggers(folder, config, last), [keep, *others])
        data = cohort.data(split.train, config)
        data = data.beside(_residence(cohort.store, split, config, checkpoints, trainer.strategy.root_device))
        torch.manual_seed(config.seed)
        n_genes = len(cohort.store.header.genes)
        network = Network(n_genes, cohort.n_categories, leaf_parts(cohort.tree, config.model), config.model)
        network.vae.start_from_moments(*_moments(data, split, config, n_genes))
        module = Objective(network, data, cohort, split, config)
        module.n_steps = epochs * n_batches
        if last.exists():
            log.info("continuing from %s", last)
        trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    n_trained = trainer.current_epoch
    if split.validation.size and isinstance(keep, ModelCheckpoint):
        best = torch.load(keep.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(best["state_dict"])
        n_trained = int(best["epoch"]) + 1
    _finish(trainer.loggers, module.scores)
    network = network.cpu().eval()
    if processes.rank() == 0:  # from the store: of resident counts it may have its own shards alone
        data, rng = cohort.data(split.train, config), np.random.default_rng((config.seed, 4))
        fit_gene_view(network.head, data, split.train, list(cohort.allowed().values()), config.model, rng)
    return Fit(network, n_trained)


def _precision(config: Config) -> Any:
    """Float32 where the processor has no bfloat16 products: done without them they take ten times as long."""
    on_cpu = config.train.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and config.train.precision != "32-true" and not has_bfloat16():
        log.info("this processor has no bfloat16 products; they are in float32")
        return "32-true"
    return config.train.precision


class _Processes(DDPStrategy):
    """Lightning's processes without torch's wrapper: `Objective` puts the gradients together, weighted by cells."""

    def configure_ddp(self) -> None:
        """Leave the model as it is."""


def _start_processes(config: Config) -> None:
    """Start this machine's other processes, or join them where torchrun, SLURM or the first one started this one.

    Raises
    ------
    ConfigError
        There are not as many processes or GPUs as the settings say.
    """
    settings = config.train
    n = settings.devices * settings.num_nodes
    if (started := int(os.environ.get("WORLD_SIZE", n))) != n:
        raise ConfigError(
            f"{started} processes were started, but train.devices x train.num_nodes is {n}; make them equal"
        )
    if n == 1:
        return
    if settings.accelerator != "cpu" and settings.devices > (gpus := torch.cuda.device_count()) > 0:
        raise ConfigError(f"train.devices is {settings.devices}, but this machine has {gpus} GPUs; lower it")
    with _quiet_lightning():
        fabric = Fabric(
            accelerator=ACCELERATOR[settings.accelerator],
            strategy=FabricStrategy(timeout=PATIENCE),
            devices=settings.devices,
            num_nodes=settings.num_nodes,
        )
        try:
            fabric.launch()
        except ValueError as error:
            raise ConfigError(f"the processes that were started do not fit train.devices: {error}") from None
    if fabric.global_rank:
        logging.getLogger("carvae").setLevel(logging.ERROR)


def _trainer(
    config: Config, epochs: int, folder: Path, loggers: list[Logger], callbacks: list[Callback]
) -> lightning.Trainer:
    settings = config.train
    return lightning.Trainer(
        accelerator=ACCELERATOR[settings.accelerator],
        strategy=_Processes(timeout=PATIENCE) if processes.world() > 1 else "auto",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        use_distributed_sampler=False,
        precision=_precision(config),
        max_epochs=epochs,
        logger=loggers,
        callbacks=callbacks,
        log_every_n_steps=50,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty() and log.isEnabledFor(logging.INFO),
        default_root_dir=folder,
    )


def _residence(
    store: CellStore, split: PatientSplit, config: Config, checkpoints: Path, device: torch.device
) -> Residence:
    """Where the counts are: as in the run that goes on, else by size; all processes do the same.

    Where cells stream they come in another order.
    """
    share, note = processes.share(config), checkpoints / "data.txt"
    rows = np.union1d(share.needed(split.train), share.needed(split.validation))
    wanted, because = str(config.train.data), "as train.data says"
    if note.exists():
        wanted, because = note.read_text(encoding="ascii"), "as in the run that goes on"
    free = free_bytes(device, config.train.devices)
    choice = choose(Need.of(store, rows, config, STEPS_PER_CALL), free, device, wanted, because)
    resident = processes.everywhere(choice.resident)
    log.info("%s", choice.reason)
    processes.on_first(lambda: note.write_text("resident" if resident else "stream", encoding="ascii"))
    return Resident(read(store, rows, device), rows) if resident else Streamed(store, device)


def _moments(data: CellData, split: PatientSplit, config: Config, n_genes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each gene's share of all counts, and its inverse dispersion, over the training cells of all processes."""
    loader = MinibatchLoader(data, processes.share(config).cells(split.train), CELLS_PER_SUM)
    sums = GeneSums.of((batch.counts for batch in loader), n_genes, data.counts.device)
    return GeneSums(*map(processes.total, (sums.sum_G, sums.square_G, sums.library))).moments()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and advertisements off the screen; its errors still come."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


def _run_id(cohort: Cohort, split: PatientSplit, config: Config) -> str:
    """Name of this very run: what its weights depend on. Who computes what is no part of it, but the shards are."""
    settings = config.model_dump(mode="json", include={"model", "train", "labels", "seed", "ingest"})
    del settings["train"]["devices"], settings["train"]["num_nodes"]
    settings["train"]["shards"] = processes.share(config).shards
    return hashlib.sha256(
        json.dumps([__version__, torch.__version__, cohort.store.content, settings]).encode() + split.train.tobytes()
    ).hexdigest()[:16]


def _keep_only(checkpoints: Path) -> None:
    """Make a folder, and remove those of other runs beside it."""
    for other in checkpoints.parent.glob("*"):
        if other != checkpoints:
            shutil.rmtree(other, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)


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

    Lightning's CSV log begins anew; here it keeps what was logged before ``checkpoint``, where that is there. The first
    process alone logs.
    """
    if processes.rank():
        return []
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
