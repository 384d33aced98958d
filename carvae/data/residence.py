"""Where the counts of training are: all on the device, or streamed from the store a window of cells at a time.

Axes: N cells, M non-zero counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CompactCSR, CountsCSR
from carvae.data.store import CellStore

WINDOW = 1 << 15
"""Cells of a shard that are shuffled together where cells stream; one such window is in use and one is being read."""


@dataclass(frozen=True, slots=True)
class Window:
    """Some cells on the device, in the order of their visits."""

    counts: CompactCSR
    at_N: Tensor
    """int64, where each cell is among ``counts``."""
    row_N: Tensor
    """int64, its number in the store."""
    size_N: NDArray[np.int64]
    """Its entries; on the host, so that a GPU need not be asked."""

    @classmethod
    def of(
        cls, counts: CompactCSR, held: NDArray[np.int64], part: NDArray[np.int64], size_N: NDArray[np.int64]
    ) -> Window:
        """The cells ``part`` out of ``counts``, which has the cells ``held`` (ascending) with ``size_N`` entries."""
        at = np.searchsorted(held, part)
        device = counts.indptr_N.device
        return cls(counts, torch.from_numpy(at).to(device), torch.from_numpy(part).to(device), size_N[at])

    def take(self, first: int, last: int) -> tuple[CountsCSR, Tensor]:
        """Counts and numbers of neighbouring visits."""
        counts = self.counts.rows(self.at_N[first:last], int(self.size_N[first:last].sum()))
        return counts, self.row_N[first:last]


class Residence(Protocol):
    """Brings cells to the device of training."""

    device: torch.device
    window: int | None
    """Cells of a shard that are there together; None for all."""

    def windows(self, parts: Sequence[NDArray[np.int64]]) -> Iterator[Window]:
        """The given cells of the store, one part after the other."""
        ...


class Resident:
    """The counts of some cells, all on the device.

    Parameters
    ----------
    counts
        The cells, where training runs.
    rows
        Their numbers, ascending.
    """

    window: int | None = None

    def __init__(self, counts: CompactCSR, rows: NDArray[np.int64]) -> None:
        self.device = counts.indptr_N.device
        self._counts, self._rows = counts, rows
        self._size_N: NDArray[np.int64] = counts.indptr_N.diff().cpu().numpy()

    def windows(self, parts: Sequence[NDArray[np.int64]]) -> Iterator[Window]:
        """The given cells, which are all here."""
        for part in parts:
            yield Window.of(self._counts, self._rows, part, self._size_N)


class Streamed:
    """The counts of a store, read as they are visited: memory holds two windows, one in use and one being read."""

    window: int | None = WINDOW

    def __init__(self, store: CellStore, device: torch.device) -> None:
        self.store, self.device = store, device

    def windows(self, parts: Sequence[NDArray[np.int64]]) -> Iterator[Window]:
        """The given cells; a thread reads the next part meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._read, part) for part in parts[:1]]
            for following in [*parts[1:], None]:
                if not ahead:
                    return
                window = ahead.pop().result()
                if following is not None:
                    ahead.append(reader.submit(self._read, following))
                if self.device.type == "cuda":  # made on the reader's stream: not to be given away while in use here
                    for tensor in (window.counts.indptr_N, window.counts.entry_M2, window.at_N, window.row_N):
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield window

    def _read(self, part: NDArray[np.int64]) -> Window:
        rows = np.unique(part)
        counts, size_N = read(self.store, rows, torch.device("cpu")), self.store.entries(rows)
        if self.device.type != "cuda":
            return Window.of(counts, rows, part, size_N)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            window = Window.of(counts.pin().to(self.device), rows, part, size_N)
            stream.synchronize()  # waits in this thread alone
        return window


def read(store: CellStore, rows: NDArray[np.int64], device: torch.device) -> CompactCSR:
    """The counts of the cells ``rows`` (ascending), brought to the device a piece at a time."""
    counts = CompactCSR.empty(store.entries(rows), len(store.header.genes), store.largest, device)
    first = 0
    for gene_M, count_M in store.read(rows):
        counts.fill(first, gene_M, count_M)
        first += gene_M.size
    return counts
