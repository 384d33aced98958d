"""Minibatches of sparse counts, shuffled by (seed, epoch) alone, so that a resumed run sees the same ones.

Axes: N cells, G genes, M non-zero counts, C covariates, A label axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.order import Share, Shuffle, Visits, visits
from carvae.data.residence import Residence
from carvae.data.sparse import CountsCSR


@dataclass(frozen=True, slots=True)
class CellData:
    """All cells of a store: where their counts are, and the rest as tensors."""

    counts: Residence
    covariate_NC: Tensor
    """int64 category of each covariate, -1 where unknown."""
    unmeasured_SG: Tensor | None
    """bool, genes that a study did not measure; None when every study measured all."""
    study_N: Tensor
    """int64 study of each cell, a row of ``unmeasured_SG``."""
    code_NA: Tensor
    """int64 label set on each axis, -1 where missing."""
    weight_NA: Tensor
    """float32 weight of each label."""

    def beside(self, counts: Residence) -> CellData:
        """The same cells with their counts elsewhere, and all the rest on the same device."""
        return CellData(
            counts,
            self.covariate_NC.to(counts.device),
            None if self.unmeasured_SG is None else self.unmeasured_SG.to(counts.device),
            self.study_N.to(counts.device),
            self.code_NA.to(counts.device),
            self.weight_NA.to(counts.device),
        )


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Some cells of `CellData`."""

    counts: CountsCSR
    covariate_NC: Tensor
    unmeasured_NG: Tensor | None
    code_NA: Tensor
    weight_NA: Tensor
    n_counted: int
    """Cells, or 0 where the process had none and another of its cells stands in (`Visits.idle`)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Minibatch:
        """The same cells on another device."""
        return Minibatch(
            self.counts.to(device, non_blocking=non_blocking),
            self.covariate_NC.to(device, non_blocking=non_blocking),
            None if self.unmeasured_NG is None else self.unmeasured_NG.to(device, non_blocking=non_blocking),
            self.code_NA.to(device, non_blocking=non_blocking),
            self.weight_NA.to(device, non_blocking=non_blocking),
            self.n_counted,
        )


@dataclass(slots=True)
class MinibatchLoader:
    """Iterates over cells in minibatches; every cell once per epoch, the last minibatch may be smaller.

    Of several processes each has its part of every minibatch. The weights of labels are then such that the mean of the
    label losses of the parts, weighted by their cells, is the label loss of the minibatch.
    """

    data: CellData
    rows: NDArray[np.int64]
    """Cells to visit, of all processes."""
    batch_size: int
    """Cells of a minibatch, in all processes together."""
    seed: int | None = None
    """Shuffles when given; the order is a function of (seed, epoch)."""
    epoch: int = 0
    share: Share = field(default_factory=Share)
    """Which cells are this process's."""

    def __len__(self) -> int:
        return math.ceil(self.rows.size / self.batch_size)

    def visits(self) -> Visits:
        """The order of the next pass."""
        shuffle = None if self.seed is None else Shuffle(self.seed, self.epoch)
        return visits(self.rows, self.batch_size, self.share, shuffle, self.data.counts.window)

    def __iter__(self) -> Iterator[Minibatch]:
        order = self.visits()
        cells = order.cells()
        windows = self.data.counts.windows([np.concatenate(window) for window in cells])
        scale_BA = self._label_scales(order) if self.share.world > 1 else None
        number = 0
        for window, minibatches in zip(windows, cells, strict=True):
            first = 0
            for size in map(len, minibatches):
                n_counted = 0 if order.idle and number == len(self) - 1 else size
                scale_A = None if scale_BA is None else scale_BA[number]
                yield self._minibatch(*window.take(first, first + size), n_counted, scale_A)
                first, number = first + size, number + 1

    def _minibatch(self, counts: CountsCSR, row_N: Tensor, n_counted: int, scale_A: Tensor | None) -> Minibatch:
        data, weight_NA = self.data, self.data.weight_NA[row_N]
        return Minibatch(
            counts=counts,
            covariate_NC=data.covariate_NC[row_N],
            unmeasured_NG=None if data.unmeasured_SG is None else data.unmeasured_SG[data.study_N[row_N]],
            code_NA=data.code_NA[row_N],
            weight_NA=weight_NA if scale_A is None else weight_NA * scale_A,
            n_counted=n_counted,
        )

    def _label_scales(self, order: Visits) -> Tensor:
        """Factor of the weights, [minibatches, A]: the labelled share of the part here, of that of the whole."""
        labelled_NA = (self.data.code_NA >= 0).cpu().numpy()[order.everyone]
        mine = order.place_N[: order.place_N.size - order.idle]
        batch_N = np.arange(order.everyone.size) // self.batch_size
        n_batches, n_axes = len(self), labelled_NA.shape[1]
        whole_BA, here_BA = np.zeros((n_batches, n_axes)), np.zeros((n_batches, n_axes))
        np.add.at(whole_BA, batch_N, labelled_NA)
        np.add.at(here_BA, batch_N[mine], labelled_NA[mine])
        n_whole_B, n_here_B = np.bincount(batch_N, minlength=n_batches), np.bincount(batch_N[mine], minlength=n_batches)
        share_BA = np.divide(here_BA, whole_BA, out=np.zeros_like(whole_BA), where=whole_BA > 0)
        scale_BA = share_BA * (n_whole_B / np.maximum(n_here_B, 1))[:, None]
        return torch.from_numpy(scale_BA.astype(np.float32)).to(self.data.weight_NA.device)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Minibatches in lists of ``size``, so that what a trainer does between two of its steps is done once per list."""

    loader: MinibatchLoader
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.loader) / self.size)

    def __iter__(self) -> Iterator[list[Minibatch]]:
        minibatches = iter(self.loader)
        while chunk := list(islice(minibatches, self.size)):
            yield chunk


def seeds_of(seed: int, steps: range) -> list[int]:
    """A seed for each step, a function of (seed, step) and of the process.

    The first process's zero changes nothing, so its numbers are those of a single one.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return [int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]) >> 1 for step in steps]


def set_seed(state: int, device: torch.device) -> None:
    """Seed torch's random numbers on the CPU and on ``device``.

    As `torch.manual_seed`, but for the stack traces that it keeps for kinds of device not in use (0.6 ms).
    """
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)


@dataclass(frozen=True, slots=True)
class Thinning:
    """Random loss of depth and of genes in what the encoder sees."""

    thinned_share: float
    """Share of cells with fewer counts."""
    min_depth: float
    """Least share of counts kept, drawn log-uniformly up to 1."""
    gene_dropout_share: float
    """Share of cells with genes missing."""
    max_gene_dropout: float
    """Greatest share of genes missing."""

    def __call__(self, counts: CountsCSR) -> CountsCSR:
        """A copy with binomially thinned counts and genes dropped, by torch's generator.

        Entries that reach zero stay in place: ``log1p(0) = 0``, so they add nothing.
        """
        if not (self.thinned_share or self.gene_dropout_share):
            return counts
        n = counts.n_cells
        cell_M, count_M = counts.cell_M(), counts.count_M
        uniform = torch.rand(4, n, device=count_M.device)
        depth_N = torch.where(uniform[0] < self.thinned_share, self.min_depth ** uniform[1], 1.0)
        dropped_N = torch.where(uniform[2] < self.gene_dropout_share, uniform[3] * self.max_gene_dropout, 0.0)
        thinned_M = torch.binomial(count_M, depth_N[cell_M])
        kept_M = torch.rand_like(count_M) >= dropped_N[cell_M]
        return CountsCSR(counts.indptr_N, counts.gene_M, thinned_M * kept_M, counts.n_genes)
