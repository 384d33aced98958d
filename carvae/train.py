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
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carvae import __version__
from carvae.config import Config, label_file
from carvae.data.atomic import alone
from carvae.data.loader import CellData, MinibatchLoader
from carvae.data.memory import Need, choose, free_bytes
from carvae.data.patients import patients_of
from carvae.data.residence import Residence, Resident, Streamed, read
from carvae.data.sparse import GeneSums
from carvae.data.split import PatientSplit, split_patients
from carvae.data.store import CellStore
from carvae.errors import CarvaeError, TrainError
from carvae.ingest import run as ingest
from carvae.ingest import store_path, work_folder
from carvae.labels.signatures import Signatures
from carvae.model import processes
from carvae.model.bundle import Bundle, Provenance, leaf_parts, libraries
from carvae.model.bundle_files import check_place
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.completion import fit_completion
from carvae.model.gene_view import fit_gene_view
from carvae.model.held_out import held_out_metrics
from carvae.model.membership import Faced, face, membership
from carvae.model.network import Network
from carvae.model.novelty import Reference
from carvae.model.objective import STEPS_PER_CALL, Objective
from carvae.model.responder import Responder
from carvae.model.response import HeadSettings
from carvae.model.teaching import teaching_folds, uncalibrated
from carvae.model.trainer import (
    EveryFewEpochs,
    callbacks_of,
    finish,
    interrupts_told,
    loggers_of,
    older_objects_left_alone,
    quiet_lightning,
    start_processes,
    trainer_of,
)
from carvae.model.witness import Witness, learn, measure, reference_of, usual_shares, witness
from carvae.response.allowed import informative
from carvae.response.cells import of_samples, patients_of_cohort
from carvae.response.learn import learn as learn_outcomes
from carvae.watch import Watch

log = logging.getLogger(__name__)

OUTCOME = "outcome"
"""Entry of ``respond.columns`` that asks for outcomes to be learned."""
CELLS_PER_SUM = 4096
"""Cells whose moments are taken at a time."""


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
    start_processes(config)
    with _callers_generators():
        return _alone(config)


@contextmanager
def _callers_generators() -> Iterator[None]:
    """Give the global generators back as they were: torch's is seeded here, and libraries draw from the others."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - the global one is what is meant


def _alone(config: Config) -> Path:
    """Hold the output, bring its store up to date, and train."""
    try:
        processes.share(config)
        with alone(config.output) if processes.rank() == 0 else nullcontext():
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
    if OUTCOME in config.respond.columns:
        _check_outcomes(cohort, config)
    rng = np.random.default_rng((config.seed, 2))
    split = split_patients(cohort.obs["patient"], cohort.authored_N, config.train.validation_share, rng)
    log.info("%s", cohort.sentence(split))
    folds = _teaching(cohort, config)
    result = fit(cohort, split, config, work / "fit")
    is_first = processes.rank() == 0
    metrics = held_out_metrics(result.network, cohort, split, config.seed) if is_first else {}
    metrics["epochs"] = result.n_epochs
    for axis, score in metrics.get("held_out", {}).items():
        macro_f1 = f", macro-F1 {score['macro_f1']:.3f}" if len(score["recall"]) > 1 else ""
        log.info("held-out patients, %s: accuracy %.3f%s", axis, score["accuracy"], macro_f1)
    witnesses, faced = _witnesses(cohort, folds, config, work)
    known = split.train
    if config.train.refit and split.validation.size:
        everyone = np.arange(len(cohort.obs), dtype=np.int64)
        metrics["refit"] = True
        log.info("training again on all patients")
        result = fit(cohort, PatientSplit(everyone, everyone[:0], ()), config, work / "refit")
        metrics["epochs"] = result.n_epochs
        known = everyone
    if is_first:
        bundle = _bundle(result.network, cohort, config, metrics)
        if witnesses:
            reference = reference_of(result.network, cohort, known, config.ingest.identity_genes)
            _judge(bundle, witnesses, faced, reference, config)
        if OUTCOME in config.respond.columns:
            bundle.responder = _responder(bundle, cohort, config)
        bundle.card = write_card(bundle)
        bundle.save(config.output)
        for checkpoints in work.glob("*/checkpoints"):
            shutil.rmtree(checkpoints, ignore_errors=True)
        log.info("model written to %s", config.output)
    return config.output


def _judge(bundle: Bundle, witnesses: list[Witness], faced: list[Faced], reference: Reference, config: Config) -> None:
    """What held-out patients teach of the model's errors, and of what it tells of its training patients."""
    bundle.trust = learn(witnesses, reference, config.train.unknown_rate)
    bundle.metrics["trust"] = measure(witnesses, config.train.unknown_rate)
    if bundle.trust is not None and bundle.tree is not None:
        bundle.metrics["membership"] = membership(faced, bundle.trust, np.random.default_rng((config.seed, 6)))
        leaves = {axis.name: axis.leaves for axis in bundle.tree.axes}
        bundle.metrics["composition"] = usual_shares(witnesses, bundle.trust, leaves)


def _teaching(cohort: Cohort, config: Config) -> list[PatientSplit]:
    """What calibration holds out; none unless asked for, or where it could teach nothing, which is told."""
    if cohort.cohort_labels is None or not config.train.calibration_folds:
        return []
    labels = cohort.cohort_labels.labels
    folds = teaching_folds(cohort.obs, labels, config.train.calibration_folds)
    if lacking := uncalibrated(labels, folds):
        log.warning("%s", lacking)
    return folds


def _witnesses(
    cohort: Cohort, folds: list[PatientSplit], config: Config, work: Path
) -> tuple[list[Witness], list[Faced]]:
    """Networks beside cells that they did not see, and what the same networks say of all patients, seen and not."""
    rng, identity = np.random.default_rng((config.seed, 5)), config.ingest.identity_genes
    found, faced = [], []
    for k, fold in enumerate(folds):
        log.info("training without group %d of %d, to learn how sure labels are", k + 1, len(folds))
        result = fit(cohort, PatientSplit(fold.train, fold.train[:0], ()), config, work / f"fold{k}")
        found.append(witness(result.network, cohort, fold, identity, rng))
        own = np.random.default_rng((config.seed, 7, k))
        if cohort.tree is not None and cohort.tree.axes[0].name in found[-1].axes:  # of which the attack is
            faced.append(face(result.network, cohort, fold, found[-1].reference, own))
    return found, faced


def _check_outcomes(cohort: Cohort, config: Config) -> None:
    """Raise, before anything is trained, where the outcomes of these patients cannot be learned."""
    if cohort.tree is None:
        raise TrainError("respond.columns names an outcome, but no study has labels, on which its prediction rests")
    samples = of_samples(cohort.obs).reset_index()
    patients = patients_of(samples, config.respond)
    allowed = informative(patients)
    log.info("outcomes of %d patients, %d studies with both", len(patients.names), len(allowed.studies))


def _responder(bundle: Bundle, cohort: Cohort, config: Config) -> Responder:
    """What predicts outcomes from the trained network, which has not seen them."""
    patients = patients_of_cohort(bundle.network, cohort, config, bundle.signatures)
    settings = HeadSettings(with_study=config.respond.with_study)
    return learn_outcomes(patients, config.seed, lambda name: bundle.digest("product", name), settings)


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
    keep, others = callbacks_of(checkpoints, held_out=bool(split.validation.size), patience=config.train.patience)
    n_batches = math.ceil(split.train.size / config.train.batch_size)
    epochs = max(config.train.max_epochs, math.ceil(config.train.min_steps / n_batches))
    if epochs > config.train.max_epochs:
        log.info("%d epochs in place of %d, which would be fewer than train.min_steps", epochs, config.train.max_epochs)
    with quiet_lightning():
        trainer = trainer_of(config, epochs, folder, loggers_of(folder, config, last), [keep, *others])
        data = cohort.data(split.train, config)
        data = data.beside(_residence(cohort.store, split, config, checkpoints, trainer.strategy.root_device))
        torch.manual_seed(config.seed)
        n_genes = len(cohort.store.header.genes)
        network = Network(n_genes, cohort.n_categories, leaf_parts(cohort.tree, config.model), config.model)
        network.vae.start_from_moments(*_moments(data, split, config, n_genes))
        module = Objective(network, data, cohort, split, config)
        module.n_steps = epochs * n_batches
        if config.train.map_every:
            watch = Watch(network, cohort, split, config, folder / "maps")
            trainer.callbacks.append(EveryFewEpochs(config.train.map_every, watch))  # type: ignore[attr-defined]
        if last.exists():
            log.info("continuing from %s", last)
        with interrupts_told(trainer), older_objects_left_alone():
            trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    n_trained = trainer.current_epoch
    if split.validation.size:
        best = torch.load(keep.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(best["state_dict"])
        n_trained = int(best["epoch"]) + 1
    finish(trainer.loggers, module.scores)
    network = network.cpu().eval()
    if processes.rank() == 0:  # from the store: of resident counts it may have its own shards alone
        data, rng = cohort.data(split.train, config), np.random.default_rng((config.seed, 4))
        if network.head.names:
            fit_completion(network.head.completion, data, split.train, rng)
        fit_gene_view(network.head, data, split.train, list(cohort.allowed().values()), config.model, rng)
    return Fit(network, n_trained)


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


def _run_id(cohort: Cohort, split: PatientSplit, config: Config) -> str:
    """Name of this very run: what its weights depend on. Who computes what is no part of it, but the shards are."""
    settings = config.model_dump(mode="json", include={"model", "train", "labels", "seed", "ingest"})
    del settings["train"]["devices"], settings["train"]["num_nodes"], settings["train"]["map_every"]
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


def _bundle(network: Network, cohort: Cohort, config: Config, metrics: dict[str, Any]) -> Bundle:
    provenance = Provenance(
        carvae_version=__version__,
        seed=config.seed,
        data_fingerprint=cohort.store.content,
        n_cells=len(cohort.obs),
        n_patients=int(cohort.obs["patient"].nunique()),
        n_studies=int(cohort.obs["study"].nunique()),
        weak_labels=cohort.weak,
        libraries=libraries(),
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
