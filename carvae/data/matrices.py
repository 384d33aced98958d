"""Matrices streamed as blocks of cells; each block is checked before anything is built from it.

A file is somebody else's: its indices may point outside the matrix (scipy then writes outside its memory), its
declared shape may be larger than the machine, and its bytes may lie in another file of this host. Every such
thing is a :class:`~carvae.errors.ReadError` here. N cells, G genes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import zarr

from carvae.errors import ReadError

Node = Any  # a group or array of h5py or zarr; the two share the parts used here
Ints = npt.NDArray[np.int64]

ALL = slice(None)
SMALL_BYTES = 1 << 28
MAX_RATIO = 2_000  # deflate reaches 1,032:1 at most
MAX_CHUNK_BYTES = 1 << 31
DENSE_READ_BYTES = 1 << 26
SCRATCH_VALUES = 1 << 23
MAX_DEPTH = 8


class Matrix(Protocol):
    """A matrix of N cells by G genes that comes in blocks of cells."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the values are stored."""
        ...

    def blocks(self, size: int, cells: slice = ALL) -> Iterator[sp.csr_matrix]:
        """Blocks of ``size`` cells in order, the last one shorter; copies, with the stored values."""
        ...


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """An N x G array in memory or on disk, read a few cells at a time."""

    array: Any
    where: str

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return int(self.array.shape[0]), int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the values are stored."""
        stored: np.dtype[Any] = np.dtype(self.array.dtype)
        return stored

    def _rows_per_read(self) -> int:
        row_bytes = max(1, self.shape[1] * self.dtype.itemsize)
        chunks = getattr(self.array, "chunks", None)
        stored_rows = int(chunks[0]) if chunks else 1
        return max(1, min(max(stored_rows, DENSE_READ_BYTES // row_bytes), 16 * DENSE_READ_BYTES // row_bytes))

    def blocks(self, size: int, cells: slice = ALL) -> Iterator[sp.csr_matrix]:
        """Blocks of ``size`` cells in order, the last one shorter; copies, with the stored values."""
        step = self._rows_per_read()
        first, last, _ = cells.indices(self.shape[0])
        for start in range(first, last, size):
            stop = min(start + size, last)
            bounds = [(a, min(a + step, stop)) for a in range(start, stop, step)]
            parts = [sp.csr_matrix(_plain(np.asarray(self.array[a:b]))) for a, b in bounds]
            yield parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


@dataclass(frozen=True, slots=True)
class CsrMatrix:
    """A compressed-sparse-row matrix whose three arrays may lie on disk.

    ``no_repeats`` refuses a cell that names a gene twice: so a lost piece of ``indices``, read as zeros, is seen.
    """

    data: Any
    indices: Any
    indptr: Ints
    n_genes: int
    where: str
    no_repeats: bool = False

    @classmethod
    def checked(
        cls, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], where: str, no_repeats: bool = False
    ) -> CsrMatrix:
        """The matrix, once its arrays agree with each other and with ``shape``.

        Raises
        ------
        ReadError
            If lengths differ, or ``indptr`` does not rise from 0 to the number of stored values.
        """
        n_cells, n_genes = shape
        if any(len(a.shape) != 1 for a in (data, indices, indptr)):
            raise _broken(where, "its data, indices and indptr are not one-dimensional")
        if np.dtype(indices.dtype).kind not in "iu" or np.dtype(indptr.dtype).kind not in "iu":
            raise _broken(where, "its indices are not whole numbers")
        if indptr.shape[0] != n_cells + 1:
            raise _broken(where, f"indptr has {indptr.shape[0]:,} entries for {n_cells:,} cells")
        if data.shape[0] != indices.shape[0]:
            raise _broken(where, f"{data.shape[0]:,} values but {indices.shape[0]:,} indices")
        starts = _in_pieces(indptr)
        per_cell = np.diff(starts)
        if starts[0] != 0 or starts[-1] != data.shape[0] or (per_cell < 0).any():
            raise _broken(where, f"indptr does not rise from 0 to the {data.shape[0]:,} stored values")
        return cls(data, indices, starts, n_genes, where, no_repeats)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.indptr) - 1, self.n_genes

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the values are stored."""
        stored: np.dtype[Any] = np.dtype(self.data.dtype)
        return stored

    def blocks(self, size: int, cells: slice = ALL) -> Iterator[sp.csr_matrix]:
        """Blocks of ``size`` cells in order, the last one shorter; copies, with the stored values."""
        first, last, _ = cells.indices(self.shape[0])
        for start in range(first, last, size):
            stop = min(start + size, last)
            low, high = int(self.indptr[start]), int(self.indptr[stop])
            indices, data = _copied(self.indices, low, high), _plain(_copied(self.data, low, high))
            if len(data) != high - low or len(indices) != high - low:
                raise _broken(self.where, f"fewer values than indptr promises after cell {start:,}")
            if len(indices) and (indices.min() < 0 or indices.max() >= self.n_genes):
                raise _broken(self.where, f"gene indices outside 0 to {self.n_genes - 1:,} after cell {start:,}")
            index_type = np.int32 if max(self.n_genes, high - low) < np.iinfo(np.int32).max else np.int64
            starts = (self.indptr[start : stop + 1] - low).astype(index_type)
            parts = data, indices.astype(index_type, copy=False), starts
            block = sp.csr_matrix(parts, shape=(stop - start, self.n_genes))
            if self.no_repeats:
                block.sort_indices()
                if not block.has_canonical_format:
                    raise _broken(self.where, f"a piece of indices is missing and reads as zeros after cell {start:,}")
            yield block


@dataclass(frozen=True, slots=True)
class GeneSubset:
    """Some genes of a matrix."""

    matrix: Matrix
    keep: Ints

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return self.matrix.shape[0], len(self.keep)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the values are stored."""
        return self.matrix.dtype

    def blocks(self, size: int, cells: slice = ALL) -> Iterator[sp.csr_matrix]:
        """Blocks of ``size`` cells in order, the last one shorter; copies, with the stored values."""
        for block in self.matrix.blocks(size, cells):
            yield block[:, self.keep]


@dataclass(frozen=True, slots=True)
class Held:
    """A matrix that needs no opening."""

    matrix: Matrix

    def __call__(self) -> AbstractContextManager[Matrix]:
        """The matrix, for a ``with`` block."""
        return nullcontext(self.matrix)


def transpose_on_disk(columns: CsrMatrix) -> CsrMatrix:
    """The same values by cell, for a matrix stored by gene (``columns`` is G x N).

    Two passes over the genes and a scratch file that vanishes with the result, so memory is bounded by one block
    of genes and eight bytes per cell whatever the matrix holds.

    Raises
    ------
    ReadError
        If the temporary folder has too little room.
    """
    n_genes, n_cells = columns.shape
    n_values = int(columns.indptr[-1])
    size = max(1, SCRATCH_VALUES * n_genes // max(n_values, 1))
    per_cell = np.zeros(n_cells, np.int64)
    for block in columns.blocks(size):
        per_cell += np.bincount(block.indices, minlength=n_cells)
    indptr = np.concatenate([[0], np.cumsum(per_cell)]).astype(np.int64)
    value_type = _plain(np.empty(0, columns.dtype)).dtype
    data, indices = _scratch(n_values, value_type, columns.where), _scratch(n_values, np.int32, columns.where)
    free_N, first_gene = indptr[:-1].copy(), 0
    for block in columns.blocks(size):
        by_cell = block.tocsc()
        length = np.diff(by_cell.indptr)
        to = np.repeat(free_N - by_cell.indptr[:-1], length) + np.arange(by_cell.nnz)
        data[to], indices[to] = by_cell.data, by_cell.indices + first_gene
        free_N += length
        first_gene += block.shape[0]
    return CsrMatrix(data, indices, indptr, n_genes, columns.where)


def stored_matrix(node: Node, shape: tuple[int, int], where: str) -> Matrix:
    """The matrix that anndata wrote at ``node``: dense, CSR, or CSC (turned around once, on disk)."""
    kind = _encoding(node)
    if not hasattr(node, "shape") and not kind.startswith(("csr", "csc")):
        raise ReadError(f"{where} is stored as {kind!r}, which is not a matrix; write it as CSR or dense by anndata")
    if hasattr(node, "shape"):
        check_values(node, where, complete=True)
        if tuple(node.shape) != shape:
            raise _shape_error(where, tuple(node.shape), shape)
        return DenseMatrix(node, where)
    declared = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))
    if declared != shape:
        raise _shape_error(where, declared, shape)
    lost = [check_values(node[part], f"{where}/{part}", part == "data") for part in ("data", "indices", "indptr")]
    arrays = node["data"], node["indices"], node["indptr"]
    if not stored_by_gene(node):
        return CsrMatrix.checked(*arrays, shape, where, any(lost))
    return transpose_on_disk(CsrMatrix.checked(*arrays, (shape[1], shape[0]), where, any(lost)))


def stored_by_gene(node: Node) -> bool:
    """Whether anndata wrote the matrix as CSC."""
    return _encoding(node).startswith("csc")


def memory_matrix(values: Any, where: str) -> Matrix:
    """A matrix in memory, with the checks of one on disk; the caller's arrays are never changed."""
    if sp.issparse(values):
        if values.format == "csc":
            columns = CsrMatrix.checked(values.data, values.indices, values.indptr, values.shape[::-1], where)
            for _ in columns.blocks(max(1, SCRATCH_VALUES * columns.shape[0] // max(1, int(columns.indptr[-1])))):
                pass  # only the checks: an index outside the matrix must not reach scipy's conversion
        rows = values.tocsr()
        return CsrMatrix.checked(rows.data, rows.indices, rows.indptr, rows.shape, where)
    if isinstance(values, np.ndarray) and values.ndim == 2:  # noqa: PLR2004
        return DenseMatrix(np.asarray(values), where)
    raise ReadError(f"{where} is a {type(values).__name__}; make it a numpy array or a scipy sparse matrix first")


def check_group(group: Node, where: str, depth: int = 0) -> None:
    """Refuse what must not be read below ``group``: other files' bytes, endless nesting, impossible sizes."""
    if depth > MAX_DEPTH:
        raise ReadError(f"{where} is nested without end; write the file again")
    for name in group:
        child = member(group, name, where)
        if hasattr(child, "shape"):
            check_values(child, f"{where}/{name}", complete=False)
        else:
            check_group(child, f"{where}/{name}", depth + 1)


def member(group: Node, name: str, where: str) -> Node:
    """The child ``name``, unless it is a link into another file."""
    if isinstance(group, h5py.Group) and isinstance(group.get(name, getlink=True), h5py.ExternalLink):
        raise ReadError(f"{where}/{name} is a link to another file; carvae reads only files that are complete")
    return group[name]


def check_values(array: Node, where: str, complete: bool) -> bool:
    """Whether pieces of the array are absent, after refusing what cannot be right.

    Parameters
    ----------
    complete
        Refuse absent pieces of a zarr array too. A zarr writer leaves out pieces that hold only zeros, so for
        columns of ``obs`` their absence is ordinary. An HDF5 writer never does: there it is always refused.
    """
    if not array.shape:
        return False
    declared = int(np.prod([int(n) for n in array.shape], dtype=object)) * np.dtype(array.dtype).itemsize
    if isinstance(array, h5py.Dataset):
        if array.is_virtual or array.external:
            raise ReadError(f"{where} keeps its values in another file; carvae reads only files that are complete")
        stored, lost = array.id.get_storage_size(), _lost_hdf5(array, declared)
        complete = True
    else:
        stored, lost = array.nbytes_stored(), _lost_zarr(array)
    if complete and lost:
        zeros = (
            ""
            if isinstance(array, h5py.Dataset)
            else (
                " (a writer leaves out pieces that are all zero, but an incomplete copy looks the same: copy again, "
                "or write the matrix sparse)"
            )
        )
        raise ReadError(f"{where} is incomplete: {lost:,} of its stored pieces are missing{zeros}")
    if declared > SMALL_BYTES and declared > MAX_RATIO * stored:
        raise ReadError(f"{where} declares {declared:,} bytes but only {stored:,} are stored; the file is broken")
    chunk = int(np.prod(array.chunks or (1,), dtype=object)) * np.dtype(array.dtype).itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ReadError(f"{where} is stored in pieces of {chunk:,} bytes; write it again with smaller chunks")
    return lost > 0


def _lost_hdf5(array: h5py.Dataset, declared: int) -> int:
    if array.chunks is None:
        return int(array.id.get_storage_size() < declared)
    wanted = int(np.prod([-(-int(n) // int(c)) for n, c in zip(array.shape, array.chunks, strict=True)], dtype=object))
    return max(0, wanted - int(array.id.get_num_chunks()))


def _lost_zarr(array: zarr.Array[Any]) -> int:
    return max(0, int(array.nchunks) - int(array.nchunks_initialized))


def _in_pieces(indptr: Any) -> Ints:
    """The whole array; HDF5 takes 6 kB for every stored chunk of one read, and appended matrices have tiny ones."""
    step = 4096 * max(1, int((getattr(indptr, "chunks", None) or indptr.shape or (1,))[0]))
    starts = np.empty(indptr.shape[0], np.int64)
    for first in range(0, len(starts), step):
        starts[first : first + step] = indptr[first : first + step]
    return starts


def _copied(array: Any, low: int, high: int) -> npt.NDArray[Any]:
    """Values that are the caller's own; what a file gives is that already."""
    part = array[low:high]
    return np.array(part) if isinstance(array, np.ndarray) else np.asarray(part)


def _plain(copied: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values in the machine's byte order, of a type that scipy's sparse matrices hold."""
    if copied.dtype.kind not in "biuf":
        raise ReadError(f"the matrix holds {copied.dtype.name} values, not numbers; give a matrix of counts")
    if copied.dtype == np.float16:
        return copied.astype(np.float32)
    if copied.dtype.kind == "b":
        return copied.astype(np.uint8)
    return copied.astype(copied.dtype.newbyteorder("="), copy=False)


def _scratch(n_values: int, dtype: npt.DTypeLike, where: str) -> npt.NDArray[Any]:
    if not n_values:
        return np.empty(0, dtype)
    needed, folder = n_values * np.dtype(dtype).itemsize, tempfile.gettempdir()
    if shutil.disk_usage(folder).free < needed + SMALL_BYTES:
        raise ReadError(f"{where} is stored by gene; turning it needs {needed:,} bytes in {folder}: set TMPDIR")
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(n_values,))


def _encoding(node: Node) -> str:
    return str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "array")))


def _broken(where: str, what: str) -> ReadError:
    return ReadError(f"{where} is broken: {what}; write or download the file again")


def _shape_error(where: str, declared: tuple[int, ...], shape: tuple[int, int]) -> ReadError:
    said = " x ".join(f"{n:,}" for n in declared)
    return _broken(where, f"it is {said} while obs and var name {shape[0]:,} cells and {shape[1]:,} genes")
