"""The cells of a source: their barcodes and ``obs``, held, or left in the file until a part is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ALL = slice(None)
NAMES_AT_ONCE = 1 << 16


class Cells(Protocol):
    """Barcodes and ``obs``."""

    @property
    def n_cells(self) -> int:
        """How many."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns of ``obs``."""
        ...

    def names(self, cells: slice = ALL) -> NDArray[np.object_]:
        """Barcodes of some cells, in order."""
        ...

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """``obs``, its index the barcodes; or some of its columns, without barcodes."""
        ...


@dataclass(frozen=True, slots=True)
class HeldCells:
    """Cells whose ``obs`` is in memory."""

    obs: pd.DataFrame

    @property
    def n_cells(self) -> int:
        """How many."""
        return len(self.obs)

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns of ``obs``."""
        return [str(column) for column in self.obs.columns]

    def names(self, cells: slice = ALL) -> NDArray[np.object_]:
        """Barcodes of some cells, in order."""
        return self.obs.index[cells].to_numpy(object)

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """``obs``, its index the barcodes; or some of its columns, without barcodes."""
        if columns is None:
            return self.obs
        return self.obs[[column for column in self.obs if str(column) in columns]].reset_index(drop=True)


def hash_names(cells: Cells) -> NDArray[np.uint64]:
    """A hash of each barcode, the same in every process: 8 bytes for what takes 80 as text; 0 where it is blank."""
    hash_N = np.empty(cells.n_cells, np.uint64)
    for start in range(0, cells.n_cells, NAMES_AT_ONCE):
        part = slice(start, start + NAMES_AT_ONCE)
        text = [str(name) for name in cells.names(part)]
        hash_N[part] = pd.util.hash_array(np.array(text, dtype=object), categorize=False)
        hash_N[[start + i for i, name in enumerate(text) if not name.strip()]] = 0
    return hash_N


def each_has_its_own(cells: Cells) -> bool:
    """Whether every cell has a barcode that no other has."""
    hash_N = np.sort(hash_names(cells))
    return bool(hash_N[0] > 0) and not bool((hash_N[1:] == hash_N[:-1]).any())
