"""HDF5 files that are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py


@contextmanager
def writing_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for writing, a new one where there is none; raises OSError where a write failed, whichever it was.

    HDF5 itself is told of no failure: of one while a data set is let go of it only prints something, and the file
    seems complete; after one while the file is closed it ends the process.
    """
    with _Written(path) as file:
        with h5py.File(file, "a" if path.exists() and path.stat().st_size else "w") as root:
            yield root
        if file.error is not None:
            raise file.error


class _Written(io.FileIO):
    """A file that keeps its first failure for itself."""

    error: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+" if path.exists() else "x+")

    def write(self, content: Any, /) -> int:
        """Write all of it; after a failure nothing more."""
        view = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(view) and self.error is None:
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the length; after a failure no more."""
        try:
            return super().truncate(size) if self.error is None else 0
        except OSError as error:
            self.error = error
            return 0
