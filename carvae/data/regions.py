"""Rows of ``obsm`` in a zarr store that several processes write at a time, each of them whole chunks alone.

Two processes that wrote rows of one chunk would each read it first, and the later one would undo the other's rows. So a
process writes the chunks of which it has all rows, as often as it likes; rows of chunks that it shares with others go
to the one process that made the arrays.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from carvae.data.on_disk import create_rows
from carvae.errors import ConfigError

Obsm = Mapping[str, NDArray[np.float32]]
"""Key of ``obsm`` -> some rows."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Rows of chunks that several processes have rows of."""

    start: int
    """Which cell of all the first one is."""
    obsm: Obsm


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the rows of ``obsm`` belong; crosses processes, which see the same folder.

    Parameters
    ----------
    store
        The zarr store.
    n_cells
        Rows of every array.
    chunk
        Rows of a chunk.
    keys
        The arrays in ``obsm``.
    """

    store: Path
    n_cells: int
    chunk: int
    keys: tuple[str, ...]

    @classmethod
    def made(cls, store: Path, root: Any, n_cells: int, chunk: int, widths: Mapping[str, int]) -> Regions:
        """The arrays without rows, in the place of earlier ones; ``widths``: key of ``obsm`` -> columns."""
        for key, width in widths.items():
            create_rows(root, f"obsm/{key}", np.empty((0, width), np.float32), n_cells, chunk)
        return cls(store, n_cells, chunk, tuple(widths))

    def write(self, start: int, obsm: Obsm) -> list[Rest]:
        """Write the whole chunks among the rows from ``start`` on; returns the other rows.

        Raises
        ------
        ConfigError
            This process does not see the store, or must not write there.
        """
        stop = start + len(next(iter(obsm.values())))
        first = -(-start // self.chunk) * self.chunk
        last = stop if stop == self.n_cells else stop // self.chunk * self.chunk
        if last <= first:
            return [Rest(start, obsm)]
        self._put(first, _cut(obsm, first - start, last - start))
        ends = (Rest(start, _cut(obsm, 0, first - start)), Rest(last, _cut(obsm, last - start, stop - start)))
        return [rest for rest in ends if len(next(iter(rest.obsm.values())))]

    def write_rest(self, rest: Rest) -> None:
        """Write rows of shared chunks: for the process alone that made the arrays."""
        self._put(rest.start, rest.obsm)

    def read(self, key: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows that were written."""
        with self._seen():
            rows: NDArray[np.float32] = self._array(key)[start:stop]
        return rows

    def finish(self) -> None:
        """What processes left that were killed as they wrote goes; all rows must be there by now."""
        for key in self.keys:
            for scrap in self._folder(key).rglob("*.partial"):
                scrap.unlink(missing_ok=True)
            array = self._array(key)
            found, wanted = array.nchunks_initialized, array.nchunks
            assert found == wanted, f"{found} of {wanted} chunks of obsm/{key} came"

    def _put(self, start: int, obsm: Obsm) -> None:
        with self._seen():
            for key, rows in obsm.items():
                self._array(key)[start : start + len(rows)] = rows

    def _array(self, key: str) -> Any:
        """Opened each time: where a run came to its end meanwhile, nothing is written in the place of its store."""
        with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is told from one that never came
            return zarr.open_array(self._folder(key), mode="r+")

    def _folder(self, key: str) -> Path:
        return self.store / "obsm" / key

    @contextmanager
    def _seen(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            lacks = "does not see" if isinstance(error, FileNotFoundError) else "must not write into"
            raise ConfigError(
                f"process {os.getpid()} on {socket.gethostname()} {lacks} the store that is written in "
                f"{self.store.parent}; give an --out in a folder that all Dask workers share and may write into, or an "
                ".h5ad, which one process writes"
            ) from None


def _cut(obsm: Obsm, start: int, stop: int) -> dict[str, NDArray[np.float32]]:
    return {key: rows[start:stop] for key, rows in obsm.items()}
