"""What training minimises, and its steps: ELBO on all cells, label loss on the labelled.

The noise of a step is a function of the seed and the step, the order of cells of the seed and the epoch. Of several
processes each computes its part of every minibatch; gradients, sums and predictions are put together (`processes`).

Axes: N cells, A label axes, S leaves.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.config import Config
from carvae.data.loader import CellData, Chunks, Minibatch, MinibatchLoader, Thinning, seeds_of, set_seed
from carvae.data.split import PatientSplit
from carvae.errors import TrainError
from carvae.model import processes
from carvae.model.alignment import state_gap
from carvae.model.cohort import Cohort
from carvae.model.cuda_graph import GraphedStep
from carvae.model.fused import small_products
from carvae.model.heads import label_loss
from carvae.model.metrics import AxisScores, score_axis
from carvae.model.network import Network
from carvae.model.progress import Pace

log = logging.getLogger(__name__)

LOSS = "(loss)"
"""Beside the label axes in what is kept of held-out cells."""
STEPS_PER_CALL = 16
"""Optimiser steps in one call of Lightning, whose own work between calls costs up to a quarter of a step."""
LR_WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""


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
        self.store, self.share = cohort.store, processes.share(config)
        self.leaves = {} if cohort.tree is None else {axis.name: axis.leaves for axis in cohort.tree.axes}
        self.truth = {axis: cohort.true_leaf(axis)[split.validation] for axis in self.leaves}
        for a, allowed_LS in enumerate(cohort.allowed().values()):
            self.register_buffer(f"allowed_{a}", allowed_LS, persistent=False)
        train = config.train
        self.thin = Thinning(train.thinning, train.min_depth, train.gene_dropout, train.max_gene_dropout)
        self.register_buffer("kl_weight", torch.zeros(()), persistent=False)  # on the device, where a graph reads it
        self.register_buffer("warmth", torch.zeros(()), persistent=False)
        self._graphed: GraphedStep | None = None
        self.scores: dict[str, AxisScores] = {}
        self._sums: dict[str, Tensor | float] = {}
        self._val_loss: float | None = None
        self._train_sums: dict[str, Tensor | float] = {}
        self._held_out: list[dict[str, Tensor]] = []
        self._due: Iterator[Minibatch] = iter(())
        self._cell_loss_N = torch.zeros(0)
        self.pace = Pace(1, 1.0, 0, time.monotonic())
        self.validation_study = cohort.study_N[split.validation]

    def train_dataloader(self) -> Chunks:
        """Training cells, in the order of this epoch."""
        rows, size, seed = self.split.train, self.config.train.batch_size, self.config.seed
        return Chunks(MinibatchLoader(self.data, rows, size, seed, self.current_epoch, self.share), STEPS_PER_CALL)

    def val_dataloader(self) -> MinibatchLoader | list[Any]:
        """Cells of held-out patients, in the same order every time."""
        return self._watched() if self.split.validation.size else []

    def on_train_batch_start(self, batch: list[Minibatch], batch_idx: int) -> None:
        """Note how many cells stand behind the gradients of the coming steps."""
        self._due = iter(batch)

    def on_train_start(self) -> None:
        """Make the optimiser, after a checkpoint was read, one that a graph can record: it reads a tensor each time."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        alone = processes.world() == 1  # a graph would not wait for the gradients of others
        graphs = self.device.type == "cuda" and self.config.train.cuda_graph and alone
        for group in optimizer.param_groups:
            group["capturable"] = graphs
            group["lr"] = torch.as_tensor(group["lr"], device=self.device) if graphs else float(group["lr"])
        optimizer._warned_capturable_if_run_uncaptured = True  # the first steps and small minibatches are not recorded
        size = self.config.train.batch_size
        mean_size = self.split.train.size / math.ceil(self.split.train.size / size)  # the last minibatch is smaller
        self.pace = Pace(self.n_steps, mean_size, self.global_step, time.monotonic())
        self._graphed = GraphedStep(self._optimise, size, self._most_entries()) if graphs else None

    def training_step(self, batches: list[Minibatch], batch_idx: int) -> None:
        """Some optimiser steps; what the encoder sees is thinned, what the decoder explains is not."""
        schedule: Any = self.lr_schedulers()
        steps = range(self.global_step, self.global_step + len(batches))
        for step, batch, state in zip(steps, batches, seeds_of(self.config.seed, steps), strict=True):
            set_seed(state, self.device)
            warmth = self.config.train.warmth((step + 1) / self.n_steps)  # full even for one step
            self.get_buffer("warmth").fill_(warmth)
            self.get_buffer("kl_weight").fill_(warmth * self.config.train.kl_weight)
            if self._graphed is None:
                self._accumulate(self._optimise(batch), batch)
            else:
                self._graphed(batch)
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
            schedule.step()
        for name, value in ({} if self._graphed is None else self._graphed.take_sums()).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means; stop where training has diverged."""
        means = self._means()
        self._refuse_divergence(means["train_loss"])
        self.log_dict(means)
        if not sys.stderr.isatty():  # on a terminal there is the progress bar
            said = [f"train loss {means['train_loss']:.2f}"]
            said += [] if self._val_loss is None else [f"held-out loss {self._val_loss:.2f}"]
            said += [f"{axis} macro-F1 {s.macro_f1:.3f}" for axis, s in self.scores.items() if len(s.recall) > 1]
            said.append(self.pace.said(self.global_step, time.monotonic()))
            log.info(
                "epoch %d of %d: %s", self.current_epoch + 1, self.trainer.max_epochs, ", ".join(filter(None, said))
            )

    def on_validation_epoch_start(self) -> None:
        """Put the training sums aside: validation has its own."""
        self._train_sums, self._sums = self._sums, {}
        self._held_out = []

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:
        """Loss of held-out cells with z at its mean, and their predictions."""
        loss, parts, answer = self._loss(batch, None, self.config.train.kl_weight)
        self._accumulate(parts | {"val_loss": loss}, batch)
        n = batch.n_counted
        self._held_out.append(
            {axis: log_NS[:n].exp().cpu() for axis, log_NS in answer.items()}
            | {LOSS: self._cell_loss_N[:n, None].float().cpu()}
        )

    def on_validation_epoch_end(self) -> None:
        """Log held-out losses and label scores over the whole held-out set."""
        means = self._means()
        self._refuse_divergence(means["val_loss"])  # comes before the training epoch's own end
        self._val_loss = means["val_loss"]
        self.log_dict({name if name == "val_loss" else f"val_{name}": value for name, value in means.items()})
        self.log_dict(self._losses_of_studies())
        for axis, leaves in self.leaves.items():
            scores = score_axis(self._held_out_of(axis), self.truth[axis], leaves)
            if scores is not None:
                self.scores[axis] = scores
                self.log_dict({f"val_{axis}_macro_f1": scores.macro_f1, f"val_{axis}_ece": scores.ece})
                self.log_dict({f"val_{axis}_recall/{leaf}": recall for leaf, recall in scores.recall.items()})
        self._sums = self._train_sums

    def configure_optimizers(self) -> Any:
        """Adam with a cosine schedule; eps at 1e-8, since gradients of rare genes are smaller than scvi's 0.01."""
        train, parameters = self.config.train, list(self.network.parameters())
        optimizer = torch.optim.Adam(parameters, lr=train.lr, eps=1e-8, weight_decay=train.weight_decay, fused=True)
        if processes.world() > 1:
            optimizer.register_step_pre_hook(lambda *_: processes.mean_gradients(parameters, next(self._due).n_counted))

        def factor(step: int) -> float:
            done = min(step / self.n_steps, 1.0)
            return min(1.0, done / LR_WARMUP + 0.02) * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(
        self, batch: Minibatch, thin: Thinning | None, kl_weight: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, its terms, and the head's log probabilities by the latent space."""
        posterior = self.network.vae.encoder(batch.counts if thin is None else thin(batch.counts))
        z_NK = posterior.mean_NK if thin is None else posterior.sample()
        elbo = self.network.vae.elbo(batch.counts, posterior, z_NK, batch.covariate_NC, batch.unmeasured_NG)
        loss = elbo.loss(kl_weight)
        if thin is None:
            self._cell_loss_N = elbo.reconstruction_N + elbo.kl_N
        parts = {"reconstruction": elbo.reconstruction, "kl": elbo.kl}
        answer = self.network.head.latent_view(posterior.mean_NK)  # the gene view is fitted when this is done
        for a, (axis, log_probability_NS) in enumerate(answer.items()):
            labels = batch.code_NA[:, a], self.get_buffer(f"allowed_{a}"), batch.weight_NA[:, a]
            parts[f"label_{axis}"] = label_loss(log_probability_NS, *labels)
            loss = loss + self.config.train.label_weight * parts[f"label_{axis}"]
        if self.config.train.align_weight and thin is not None:
            parts["gap"] = self._gap(posterior.mean_NK, answer, batch)
            loss = loss + self.config.train.align_weight * self.get_buffer("warmth") * parts["gap"]
        return loss, parts, answer

    def _gap(self, z_NK: Tensor, answer: dict[str, Tensor], batch: Minibatch) -> Tensor:
        """How far the batches of a state lie apart, the mean over axes of labels and covariates of several batches."""
        gaps = [
            state_gap(z_NK, log_NS.exp(), batch.covariate_NC[:, c], n)
            for c, n in enumerate(self.network.vae.decoder.n_trained.values())
            if n > 1
            for log_NS in answer.values()
        ]
        return torch.stack(gaps).mean() if gaps else z_NK.new_zeros(())

    def _optimise(self, batch: Minibatch) -> dict[str, Tensor]:
        """One optimiser step; returns the terms of the loss."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)  # without Lightning's wrappers: hooks of nobody
        loss, parts, _ = self._loss(batch, self.thin, self.get_buffer("kl_weight"))
        optimizer.zero_grad()
        with small_products(loss):
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return parts | {"train_loss": loss}

    def _most_entries(self) -> int:
        """Non-zero counts of a minibatch, at most: those of the cells that have most."""
        most_first_N = np.sort(self.store.entries(self.split.train))[::-1]
        return int(most_first_N[: self.config.train.batch_size].sum())

    def _accumulate(self, parts: dict[str, Tensor], batch: Minibatch) -> None:
        """Sum over cells on the device; nothing is read back before the epoch ends."""
        n = batch.n_counted
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + n * value.detach()
        self._sums["n"] = self._sums.get("n", 0.0) + n

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is not finite in epoch {self.current_epoch}; lower train.lr (now {self.config.train.lr:g})"
            )

    def _means(self) -> dict[str, float]:
        """Means over the cells of all processes."""
        sums = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in self._sums.values()]
        *sums, n = processes.total(torch.stack(sums)).tolist()
        means = {name: value / n for name, value in zip(self._sums, sums, strict=False)}
        self._sums = {}
        return means

    def _watched(self) -> MinibatchLoader:
        size = max(1024, self.config.train.batch_size)
        return MinibatchLoader(self.data, self.split.validation, size, share=self.share)

    def _losses_of_studies(self) -> dict[str, float]:
        """Held-out negative ELBO (nats per cell) of each study, where several have held-out cells.

        Studies are numbered in the order of the config, from 1: their names do not go into a log that may be shared.
        """
        studies = np.unique(self.validation_study)
        if studies.size < 2:  # noqa: PLR2004
            return {}
        loss_N = self._held_out_of(LOSS)[:, 0]
        return {f"val_elbo/study_{s + 1}": float(loss_N[self.validation_study == s].mean()) for s in studies.tolist()}

    def _held_out_of(self, name: str) -> NDArray[np.float32]:
        """Leaf probabilities of an axis, or losses, of the held-out cells in order, from all processes; (N, S)."""
        mine_NS = torch.cat([p[name] for p in self._held_out]).float()
        order, rows = self._watched().visits(), self.split.validation
        cells = order.everyone[order.place_N][: len(mine_NS)]
        all_NS = mine_NS.new_zeros(rows.size, mine_NS.shape[1])
        all_NS[np.searchsorted(rows, cells)] = mine_NS
        probability: NDArray[np.float32] = processes.total(all_NS.to(self.device)).cpu().numpy()
        return probability
