"""How Lightning is set up: trainer, processes, callbacks, logs. What is trained and when is `train`'s business."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy as FabricStrategy
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from carvae.config import Config
from carvae.errors import ConfigError
from carvae.model import processes
from carvae.model.fused import has_bfloat16
from carvae.model.metrics import AxisScores
from carvae.model.run_log import rows_before, wandb_mode

log = logging.getLogger(__name__)

ACCELERATOR = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's name of each."""
SHOWN = (("train loss", "train_loss"), ("held-out loss", "val_loss"))
"""Losses on the line of progress."""
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: the first may have studies to read."""


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


def start_processes(config: Config) -> None:
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
    with quiet_lightning():
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


def trainer_of(
    config: Config, epochs: int, folder: Path, loggers: list[Logger], callbacks: list[Callback]
) -> lightning.Trainer:
    """The Trainer of one stage, on the devices and with the precision that the settings ask for."""
    settings = config.train
    shown = sys.stderr.isatty() and log.isEnabledFor(logging.INFO)
    return lightning.Trainer(
        accelerator=ACCELERATOR[settings.accelerator],
        strategy=_Processes(timeout=PATIENCE) if processes.world() > 1 else "auto",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        use_distributed_sampler=False,
        precision=_precision(config),
        max_epochs=epochs,
        logger=loggers,
        callbacks=[*callbacks, LiveLine()] if shown else callbacks,
        log_every_n_steps=50,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=shown,
        default_root_dir=folder,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and advertisements off the screen; its errors still come."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


@contextmanager
def older_objects_left_alone() -> Iterator[None]:
    """Keep the garbage collector from looking through all that was there before, time and again, while steps go by."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def interrupts_told(trainer: lightning.Trainer) -> Iterator[None]:
    """Let Ctrl-C end training as it ends any other command, but tell where it goes on; Lightning would exit with 1."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        log.warning("interrupted in epoch %d; the same command goes on from there", trainer.current_epoch + 1)
        raise KeyboardInterrupt from None


class LiveLine(ProgressBar):
    """One line on a terminal: how far the whole run is, the losses, the rate and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
            console=console or Console(stderr=True),
            transient=True,
        )
        self.task: TaskID | None = None

    def disable(self) -> None:
        """Show nothing, as in all processes but the first."""
        self.bar.disable = True

    def enable(self) -> None:
        """Show the line again."""
        self.bar.disable = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Begin where the run goes on."""
        self.task = self.bar.add_task("", total=pl_module.n_steps, completed=trainer.global_step, said="")
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Move on."""
        assert self.task is not None
        pace = pl_module.pace.said(trainer.global_step, time.monotonic())
        known = trainer.callback_metrics
        losses = [f"{name} {float(known[key]):.1f}" for name, key in SHOWN if key in known]
        self.bar.update(
            self.task,
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}",
            said=", ".join(filter(None, [*losses, pace])),
        )

    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Take the line away, however the run ends."""
        self.bar.stop()


class EveryFewEpochs(Callback):
    """Draws a picture after every ``every`` epochs, in the first process, for W&B as well."""

    def __init__(self, every: int, draw: Callable[[int], Path]) -> None:
        self.every, self.draw = every, draw

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw where it is due."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every or processes.rank():
            return
        picture = self.draw(epoch)
        for dashboard in _dashboards(trainer.loggers):
            dashboard.show_map(picture, epoch)


class _EarlyStopping(EarlyStopping):
    """Early stopping that a run which had stopped remembers when it is started again."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = self.wait_count >= self.patience


def callbacks_of(checkpoints: Path, *, held_out: bool, patience: int) -> tuple[ModelCheckpoint, list[Callback]]:
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
    stop = _EarlyStopping("val_loss", patience=patience, check_on_train_epoch_end=True)
    return keep, [stop] if held_out else []


def loggers_of(folder: Path, config: Config, checkpoint: Path) -> list[Logger]:
    """A CSV log always, and W&B unless it is switched off.

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
        from carvae.model.dashboard import Dashboard  # slow to import

        loggers.append(Dashboard(folder, config, mode))
    return loggers


def finish(loggers: Sequence[Logger], scores: dict[str, AxisScores]) -> None:
    """Write what is left, and close."""
    for logger in loggers:
        logger.save()
    for dashboard in _dashboards(loggers):
        dashboard.end(scores)


def _dashboards(loggers: Sequence[Logger]) -> list[Any]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]
