"""Whether the counts of training fit on the device: computed beforehand, against what is free there.

Axes: N cells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from carvae.config import Config
from carvae.data.sparse import entry_bytes
from carvae.data.store import CellStore
from carvae.errors import TrainError

SAFE_SHARE = 0.8
"""Share of the free memory that training may plan with; the rest is for what cannot be computed."""
DENSE_COPIES = 4
"""Minibatch x genes tensors of float32 that are alive together: logits, their gradient and what kernels lay aside."""
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of training in bytes."""

    counts: int
    """Counts at rest, and the labels and covariates of all cells."""
    minibatch: int
    """Minibatches on their way, the network, its gradients and the optimiser's state."""

    @classmethod
    def of(cls, store: CellStore, rows: NDArray[np.int64], config: Config, minibatches_ahead: int) -> Need:
        """What training needs where the counts of ``rows`` are resident."""
        n_genes, size_N = len(store.header.genes), store.entries(rows)
        per_cell = 8 * (3 + len(config.model.covariates)) + 24  # indptr, study, labels on a few axes with weights
        counts = int(size_N.sum()) * entry_bytes(n_genes, store.largest) + store.n_cells * per_cell
        batch, width = config.train.batch_size, 2 if config.model.gene_likelihood == "zinb" else 1
        entries = int(batch * size_N.max(initial=0))
        network = 4 * 4 * n_genes * config.model.n_hidden * (1 + width)  # weights, gradients, two moments of Adam
        return cls(counts, network + 4 * batch * n_genes * DENSE_COPIES * width + 16 * entries * minibatches_ahead)


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the counts will be."""

    resident: bool
    reason: str
    """One line."""


def choose(need: Need, free: float, device: torch.device, wanted: str, because: str) -> Choice:
    """Return where the counts go.

    Parameters
    ----------
    need
        What training needs.
    free
        Bytes that are free for this process on ``device``.
    wanted
        ``resident``, ``stream``, or ``auto``: by what is free.
    because
        Who wants it.

    Raises
    ------
    TrainError
        The counts are to be resident and memory does not suffice.
    """
    total = need.counts + need.minibatch
    size = (
        f"counts and labels take {need.counts / GIGABYTE:.2f} GB and minibatches {need.minibatch / GIGABYTE:.2f} GB, "
        f"{free / GIGABYTE:.2f} GB are free on {device}"
    )
    if wanted == "stream":
        return Choice(False, f"counts stream from the store, {because} ({size})")
    if wanted == "resident":
        if total > free:
            raise TrainError(f"counts are to be resident, {because}, but {size}; set train.data=stream")
        return Choice(True, f"counts are resident, {because} ({size})")
    if total <= SAFE_SHARE * free:
        return Choice(True, f"counts are resident: {size}")
    return Choice(False, f"counts stream from the store: {size}, of which {SAFE_SHARE:.0%} may be planned with")


def free_bytes(device: torch.device, processes: int = 1) -> float:
    """Memory that is free on the device; of the machine's memory each of its ``processes`` has its part."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_free_on_machine(), _free_in_group()) / processes


def _free_on_machine() -> float:
    """Memory that the machine can give without swapping; where it does not say so, half of what it has."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_group(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float:
    """Memory left under the limits of the process's control groups (containers, SLURM); infinite without limits."""
    try:
        lines = groups.read_text(encoding="ascii").splitlines()
    except OSError:
        return np.inf
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    free = np.inf
    for folder in [root / own, *(root / own).parents]:
        if (folder / "memory.max").exists():
            limit = (folder / "memory.max").read_text(encoding="ascii").strip()
            used = int((folder / "memory.current").read_text(encoding="ascii"))
            free = min(free, np.inf if limit == "max" else int(limit) - used + _reclaimable(folder))
    return free


def _reclaimable(group: Path) -> int:
    """Bytes of cached files, which give way."""
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
