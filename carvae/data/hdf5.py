"""HDF5 files that are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
from anndata.io import write_elem


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


def write_anndata(adata: ad.AnnData, path: Path, compression: str | None = None) -> None:
    """As anndata's own ``write_h5ad``, but that a failed write raises OSError; strings are what R can read.

    Parameters
    ----------
    compression
        Of the matrices, such as ``gzip``.
    """
    adata.strings_to_categoricals()
    with ad.settings.override(allow_write_nullable_strings=False), writing_hdf5(path) as root:
        write_elem(root, "/", adata, dataset_kwargs={} if compression is None else {"compression": compression})
        if adata.raw is None and "raw" in root:
            del root["raw"]  # an empty one, which anndata cannot read when a file is backed


class _Written(io.FileIO):
    """A file that keeps its first failure for itself, and in memory what is written from then on.

    What HDF5 wrote it must be able to read: it ends the process where that is not so.
    """

    error: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+" if path.exists() else "x+")
        self._kept: list[tuple[int, bytes]] = []
        self._end = 0

    def write(self, content: Any, /) -> int:
        """Write all of it, or keep it."""
        view = memoryview(content).cast("B")
        start, done = self.tell(), 0
        try:
            while done < len(view) and self.error is None:
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = error
        if self.error is not None:
            self._kept.append((start, bytes(view)))
            self._end = max(self._end, start + len(view))
            self.seek(start + len(view))
        return len(view)

    def readinto(self, buffer: Any, /) -> int:
        """Read from the file, and over it what was kept."""
        start = self.tell()
        n_read = super().readinto(buffer) or 0
        if self.error is None:
            return n_read
        view = memoryview(buffer).cast("B")
        view[n_read:] = bytes(len(view) - n_read)
        for at, content in self._kept:
            first, last = max(at, start), min(at + len(content), start + len(view))
            if first < last:
                view[first - start : last - start] = content[first - at : last - at]
        self.seek(start + len(view))
        return len(view)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move; the end is that of what was kept, if it is further."""
        if whence == io.SEEK_END and self.error is not None:
            return super().seek(max(self._end, super().seek(0, io.SEEK_END)) + offset)
        return super().seek(offset, whence)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the length, if all is well."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        self._end = self.tell() if size is None else size
        return self._end
