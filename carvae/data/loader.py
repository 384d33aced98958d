"""Minibatches of sparse counts, shuffled by (seed, epoch) alone, so that a resumed run sees the same ones.

Axes: N cells, G genes, M non-zero counts, C covariates, A label axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR


@dataclass(frozen=True, slots=True)
class CellData:
    """All cells of a store as tensors."""

    counts: CountsCSR
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


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Some cells of `CellData`."""

    counts: CountsCSR
    covariate_NC: Tensor
    unmeasured_NG: Tensor | None
    code_NA: Tensor
    weight_NA: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Minibatch:
        """The same cells on another device."""
        return Minibatch(
            self.counts.to(device, non_blocking=non_blocking),
            self.covariate_NC.to(device, non_blocking=non_blocking),
            None if self.unmeasured_NG is None else self.unmeasured_NG.to(device, non_blocking=non_blocking),
            self.code_NA.to(device, non_blocking=non_blocking),
            self.weight_NA.to(device, non_blocking=non_blocking),
        )


@dataclass(slots=True)
class MinibatchLoader:
    """Iterates over cells in minibatches; every cell once per epoch, the last minibatch may be smaller."""

    data: CellData
    rows: NDArray[np.int64]
    """Cells to visit."""
    batch_size: int
    seed: int | None = None
    """Shuffles when given; the order is a function of (seed, epoch)."""
    epoch: int = 0

    def __len__(self) -> int:
        return math.ceil(self.rows.size / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass (Lightning's protocol for samplers)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Minibatch]:
        rows = self.rows
        if self.seed is not None:
            rows = np.random.default_rng((self.seed, self.epoch)).permutation(rows)
        for start in range(0, rows.size, self.batch_size):
            yield gather(self.data, torch.from_numpy(rows[start : start + self.batch_size]))


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


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Make torch's random numbers on the CPU and on ``device`` a function of (seed, step).

    As `torch.manual_seed`, but for the stack traces that it keeps for kinds of device not in use (0.6 ms).
    """
    state = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)


def gather(data: CellData, rows_N: Tensor) -> Minibatch:
    """The minibatch of the given cells."""
    study_N = data.study_N[rows_N]
    return Minibatch(
        counts=data.counts.rows(rows_N),
        covariate_NC=data.covariate_NC[rows_N],
        unmeasured_NG=None if data.unmeasured_SG is None else data.unmeasured_SG[study_N],
        code_NA=data.code_NA[rows_N],
        weight_NA=data.weight_NA[rows_N],
    )


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
