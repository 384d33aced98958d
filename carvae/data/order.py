"""In which order cells are visited, and by which process: a function of seed and epoch, the same in every process.

The cells are cut into shards, contiguous pieces of nearly equal size. Each shard has an order of its own, and the order
of all cells takes one cell of each shard in turn; minibatches are cut from that. So a process that has some shards
has its part of every minibatch and never needs another cell, and who has which shards changes nothing.

Axes: N cells of this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096
"""Neighbouring cells that are read together where cells stream from a store."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which shards a process has."""

    rank: int = 0
    world: int = 1
    """Processes."""
    shards: int = 1
    """A multiple of ``world``."""

    def has(self, shard_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the shards are this process's: neighbouring ones, so that it reads one stretch of a store."""
        mine: NDArray[np.bool_] = shard_N // (self.shards // self.world) == self.rank
        return mine

    def cells(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cells of this process."""
        pieces = np.array_split(rows, self.shards)
        return np.concatenate([piece for s, piece in enumerate(pieces) if self.has(np.array(s))])

    def needed(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same; where it has none, the first of all, which stands in (see `Visits.idle`)."""
        mine = self.cells(rows)
        return mine if mine.size else rows[:1]


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Chooses the order of a pass."""

    seed: int
    epoch: int

    def __call__(self, rows: NDArray[np.int64], shard: int, window: int | None) -> NDArray[np.int64]:
        """Shuffle the cells of a shard: all at once, or blocks of neighbours, and then within every ``window`` cells.

        A shard's zero as the last number of a seed changes nothing: one shard has the order of (seed, epoch).
        """
        rng = np.random.default_rng((self.seed, self.epoch, shard))
        if window is None:
            return rng.permutation(rows)
        blocks = np.split(rows, np.arange(BLOCK, rows.size, BLOCK))
        mixed = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
        for start in range(0, rows.size, window):
            rng.shuffle(mixed[start : start + window])
        return mixed


@dataclass(frozen=True, slots=True)
class Visits:
    """One pass of one process."""

    everyone: NDArray[np.int64]
    """Cells of all processes, in the order of their visits."""
    place_N: NDArray[np.int64]
    """This process's places in ``everyone``."""
    minibatches: NDArray[np.int64]
    """Where this process's part of each minibatch begins among its places, and where the last ends."""
    windows: NDArray[np.int64]
    """The minibatch with which each window of cells begins, and the number of minibatches."""
    idle: bool
    """Whether this process has no cell in the last minibatch: one of its own (the first of all, where it has none)
    stands in, and counts nothing."""

    def cells(self) -> list[list[NDArray[np.int64]]]:
        """The cells of this process: those of each minibatch of each window."""
        row_N, edges = self.everyone[self.place_N], self.minibatches
        minibatches = [row_N[a:b] for a, b in pairwise(edges)]
        return [minibatches[a:b] for a, b in pairwise(self.windows)]


def visits(
    rows: NDArray[np.int64], size: int, share: Share, shuffle: Shuffle | None = None, window: int | None = None
) -> Visits:
    """Return the pass over ``rows`` in minibatches of ``size`` cells, over all processes together.

    Parameters
    ----------
    shuffle
        None takes the cells as they come.
    window
        Cells of a shard that are in memory together (rounded up to whole minibatches); None for all.
    """
    n_batches = -(-rows.size // size)
    per_window = max(n_batches, 1)
    if window is not None:
        window = -(-window // size) * size  # cells of one shard; with all shards it holds whole minibatches
        per_window = window // size * share.shards
    everyone = np.empty_like(rows)
    for shard, piece in enumerate(np.array_split(rows, share.shards)):
        everyone[shard :: share.shards] = piece if shuffle is None else shuffle(piece, shard, window)
    place_N = np.flatnonzero(share.has(np.arange(rows.size) % share.shards))
    minibatches = np.searchsorted(place_N, np.arange(n_batches + 1) * size)
    windows = np.append(np.arange(0, n_batches, per_window), n_batches)
    idle = n_batches > 0 and bool(minibatches[-1] == minibatches[-2])
    if idle:
        place_N = np.append(place_N, place_N[-1:] if place_N.size else np.flatnonzero(everyone == rows[0]))
        minibatches[-1] += 1
    return Visits(everyone, place_N, minibatches, windows, idle)
