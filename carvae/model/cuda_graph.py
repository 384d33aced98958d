"""A training step on a GPU without the host: recorded once as a CUDA graph, then replayed. Not measured yet.

Axes: N cells, M non-zero counts.

A step of a small network is some hundred short kernels, which a GPU computes faster than a host can order them. A graph
orders them all at once; it reads and writes the same addresses each time. So a minibatch is copied to memory of its own
with room for more non-zero counts than any minibatch has (`StaticMinibatch`), and what changes from step to step is
read from tensors on the device: the learning rate and the KL weight; the random numbers follow the seed that was set
before the replay. Nothing is read back; sums over cells stay on the device until `GraphedStep.take_sums`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from carvae.data.loader import Minibatch
from carvae.data.sparse import CountsCSR

WARM_UP = 3
"""Steps before one is recorded: kernels are compiled, libraries find their memory, Adam makes its state."""


class StaticMinibatch:
    """A minibatch at addresses that stay, with room for ``capacity`` non-zero counts.

    `CountsCSR.indptr_N` says where the last cell ends. The entries after it count zero, and belong to no cell.

    Parameters
    ----------
    like
        A minibatch of the same number of cells.
    capacity
        Entries that there is room for.
    """

    def __init__(self, like: Minibatch, capacity: int) -> None:
        counts = like.counts
        own = CountsCSR(
            torch.empty_like(counts.indptr_N),
            counts.gene_M.new_zeros(capacity),
            counts.count_M.new_zeros(capacity),
            counts.n_genes,
        )
        self.batch = replace(
            like,
            counts=own,
            covariate_NC=torch.empty_like(like.covariate_NC),
            unmeasured_NG=None if like.unmeasured_NG is None else torch.empty_like(like.unmeasured_NG),
            code_NA=torch.empty_like(like.code_NA),
            weight_NA=torch.empty_like(like.weight_NA),
        )

    def load(self, batch: Minibatch) -> None:
        """Copy a minibatch here."""
        there, here = batch.counts, self.batch.counts
        n_entries = there.gene_M.numel()
        here.indptr_N.copy_(there.indptr_N)
        here.gene_M[:n_entries].copy_(there.gene_M)
        here.count_M[:n_entries].copy_(there.count_M)
        here.count_M[n_entries:].zero_()
        for own, tensor in zip(_beside(self.batch), _beside(batch), strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor)


def _beside(batch: Minibatch) -> tuple[Tensor | None, ...]:
    """All tensors but the counts."""
    return batch.covariate_NC, batch.unmeasured_NG, batch.code_NA, batch.weight_NA


class GraphedStep:
    """Takes optimiser steps; on CUDA, minibatches of the usual size are replays of a graph after `WARM_UP` steps.

    Others (the last of an epoch is smaller), and all of them on a CPU, run operation by operation.

    Parameters
    ----------
    step
        One step: forward, backward, optimiser. Returns named scalars on the device, to be summed over cells. It must
        not read anything back, and must read from tensors what changes from step to step.
    n_cells
        Cells of a minibatch.
    capacity
        Non-zero counts of so many cells, at most.
    """

    def __init__(self, step: Callable[[Minibatch], dict[str, Tensor]], n_cells: int, capacity: int) -> None:
        self.step, self.n_cells, self.capacity = step, n_cells, capacity
        self._static: StaticMinibatch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def __call__(self, batch: Minibatch) -> None:
        """Take a step on cells that are on the device."""
        if batch.counts.n_cells != self.n_cells:
            self._take(batch)
            return
        if self._static is None:
            self._static = StaticMinibatch(batch, self.capacity)
        self._static.load(batch)
        if not batch.counts.count_M.is_cuda:
            self._take(self._static.batch)
        elif self._warm < WARM_UP:
            self._warm_up(self._static.batch)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may read data meanwhile
                    self._take(self._static.batch)
            self._graph.replay()

    def take_sums(self) -> dict[str, Tensor]:
        """Sums over the cells since the last call, and ``n``, their number; still on the device."""
        if self._sums is None:
            return {}
        sums = self._sums.clone()
        self._sums.zero_()
        return dict(zip(self._names, sums.unbind(), strict=True))

    def _take(self, batch: Minibatch) -> None:
        parts = {name: value.detach() for name, value in self.step(batch).items()}
        parts["n"] = torch.ones_like(next(iter(parts.values())))
        values = torch.stack([*parts.values()])
        if self._sums is None:
            self._names, self._sums = tuple(parts), torch.zeros_like(values)
        self._sums.add_(values, alpha=batch.n_counted)

    def _warm_up(self, batch: Minibatch) -> None:
        """A step on a stream beside the usual one, as torch asks for before a recording."""
        self._warm += 1
        usual, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            self._take(batch)
        usual.wait_stream(aside)
