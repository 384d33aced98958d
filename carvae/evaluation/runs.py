"""All folds, seeds and methods, several folds at a time; what was answered before is not asked again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from carvae.config import Config
from carvae.data.memory import SAFE_SHARE, free_bytes
from carvae.evaluation.answers import Answer, answer, key_of, load, save
from carvae.evaluation.baselines import METHODS
from carvae.evaluation.cells import Cells
from carvae.evaluation.folds import Fold, checked
from carvae.evaluation.own import carvae
from carvae.evaluation.scvi_baselines import scanvi, scvi_logistic
from carvae.evaluation.task import Method, Task
from carvae.ingest import work_folder

log = logging.getLogger(__name__)

ALL: dict[str, Method] = {"carvae": carvae, **METHODS, "scvi_logistic": scvi_logistic, "scanvi": scanvi}
COPIES = 6
"""Times the counts of all cells that one process may hold: training cells, scaled genes, a store, a network's own."""
BASE_BYTES = 1.5e9
"""Memory of a process before it holds any cell."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is to be asked."""

    config: Config
    cells: Cells
    fingerprint: str
    folds: Sequence[Fold]
    methods: tuple[str, ...]

    def task(self, fold: Fold, seed: int) -> Task:
        """The work of every method in a fold."""
        folder = work_folder(self.config.output) / fold.design / fold.file / f"seed{seed}"
        return Task(self.cells, fold, self.config, seed, folder, self.fingerprint)


def path_of(task: Task, name: str) -> Path:
    """Where a method's answer lies."""
    return task.folder / f"{name}.npz"


def run(plan: Plan) -> None:
    """Have every answer on disk, computing those that are not there.

    Raises
    ------
    CarvaeError
        A method cannot be trained on a fold; the answers that were had stay.
    """
    jobs = [(f, seed) for f in range(len(plan.folds)) for seed in plan.config.evaluate.seeds]
    open_jobs = [job for job in jobs if _open(plan, *job)]
    log.info("%d of %d folds are answered already", len(jobs) - len(open_jobs), len(jobs))
    n = min(processes_for(plan.config.evaluate.processes, plan.cells.n_bytes), len(open_jobs))
    if n <= 1:
        for job in open_jobs:
            _work(plan, *job)
        return
    for name in THREADS:  # read when a process loads its libraries
        os.environ.setdefault(name, "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, initializer=_start, initargs=(plan,)) as pool:
        futures = [pool.submit(_work_here, *job) for job in open_jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def processes_for(wanted: int, n_bytes: int) -> int:
    """How many processes memory suffices for, at least one."""
    import torch

    each = BASE_BYTES + COPIES * n_bytes
    fits = max(1, int(SAFE_SHARE * free_bytes(torch.device("cpu")) / each))
    if fits < wanted:
        log.warning("memory suffices for %d of %d processes of about %.1f GB each", fits, wanted, each / 1e9)
    return min(wanted, fits)


def collect(plan: Plan) -> dict[str, dict[int, list[Answer]]]:
    """Method -> seed -> the answers of all folds, in their order."""
    found: dict[str, dict[int, list[Answer]]] = {}
    for name in plan.methods:
        for seed in plan.config.evaluate.seeds:
            tasks = [plan.task(fold, seed) for fold in plan.folds]
            answers = [load(path_of(task, name), key_of(task, name)) for task in tasks]
            found.setdefault(name, {})[seed] = [a for a in answers if a is not None]
            assert len(found[name][seed]) == len(tasks), "an answer is gone"
    return found


_HERE: list[Plan] = []
"""The plan of a worker process, sent once."""


def _start(plan: Plan) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    _HERE.append(plan)


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on with its fold, and then wait for ever for the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # answers are whole or not there, whenever a worker ends


def _work_here(fold: int, seed: int) -> None:
    _work(_HERE[0], fold, seed)


def _open(plan: Plan, fold: int, seed: int) -> list[str]:
    """Methods that have no answer yet."""
    task = plan.task(plan.folds[fold], seed)
    keys = {name: key_of(task, name) for name in plan.methods}
    return [name for name, key in keys.items() if load(path_of(task, name), key) is None]


def _work(plan: Plan, fold: int, seed: int) -> None:
    """All open methods of a fold, one after the other."""
    import torch

    task = plan.task(checked(plan.folds[fold], plan.cells), seed)
    task.folder.mkdir(parents=True, exist_ok=True)
    for name in _open(plan, fold, seed):
        torch.set_num_threads(1)
        with _hushed():
            found = answer(task, name, ALL[name])
        save(found, path_of(task, name), key_of(task, name))
        log.info("%s %s, seed %d, %s: %.0f s", task.fold.design, task.fold.name, seed, name, found.seconds)
    for reference in task.folder.glob("scvi-*"):
        shutil.rmtree(reference, ignore_errors=True)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the messages of the many trainings and their libraries; warnings and errors of ours are heard."""
    names = ("carvae", "carvae.evaluation", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING if name.startswith("carvae") else logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
