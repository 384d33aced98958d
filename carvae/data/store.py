"""Many studies as one zarr v3 store: panel counts by row in shards, and the contract's columns of every cell.

Axes: N cells, G panel genes, M non-zero counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from carvae.errors import ReadError

FORMAT = 2
"""Version of the layout; a store of another version is built again."""
CHUNK = 1 << 17
"""Entries of a compressed chunk."""
SHARD = 1 << 22
"""Entries of a shard (one file)."""
GAP = 1 << 10
"""Unwanted cells between wanted ones that are read along: fewer would not make up for another access."""
WHOLE: Any = {"write_empty_chunks": True}
"""Parts that hold nothing but zeros are written too, so that one which is not there was lost."""


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What a store holds besides its cells."""

    fingerprint: str
    """Hash of the inputs and settings it was built from."""
    genes: tuple[str, ...]
    """Panel, in the order of the columns."""
    studies: tuple[str, ...]
    """Studies, in the order of ``measured``."""
    receipt: dict[str, Any]
    """What happened on the way in, per study: cells kept and left out, where the counts were, gene receipt."""


class StoreWriter:
    """Appends cells to a new store; memory is bounded by one chunk of cells.

    Parameters
    ----------
    path
        An empty folder (the caller puts it in place when it is complete).
    header
        What the store holds.
    measured
        bool [n_studies, G], which panel genes each study measured.
    """

    def __init__(self, path: Path, header: StoreHeader, measured: NDArray[np.bool_]) -> None:
        self.header = header
        self._group = zarr.open_group(path, mode="w", zarr_format=3)
        self._group.create_array("measured", data=measured, config=WHOLE)
        index_type = np.uint16 if len(header.genes) <= np.iinfo(np.uint16).max + 1 else np.uint32
        self._gene = self._grow("gene", index_type)
        self._count = self._grow("count", np.uint32)
        self._indptr: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._obs: list[pd.DataFrame] = []
        self._content = {part: hashlib.sha256() for part in ("size", "gene", "count")}
        self._pending: list[sp.csr_matrix] = []
        self._n_entries = self._largest = 0

    def append(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Add cells: integer counts over the panel and their contract columns."""
        if counts.shape != (len(obs), len(self.header.genes)):
            raise AssertionError("counts and obs do not fit the panel")
        counts.sort_indices()
        self._indptr.append(counts.indptr[1:].astype(np.int64) + self._indptr[-1][-1])
        self._obs.append(obs)
        self._pending.append(counts)
        self._largest = max(self._largest, int(counts.data.max(initial=0)))
        self._content["size"].update(np.diff(counts.indptr).astype(np.int64).tobytes())
        self._content["gene"].update(counts.indices.astype(np.int64).tobytes())
        self._content["count"].update(counts.data.astype(np.int64).tobytes())
        if sum(block.nnz for block in self._pending) >= SHARD:
            self._flush(whole_shards=True)

    def close(self) -> None:
        """Write what is left; the store is complete afterwards."""
        self._flush(whole_shards=False)
        indptr = np.concatenate(self._indptr)
        self._group.create_array("indptr", data=indptr, chunks=(min(CHUNK, indptr.size),), config=WHOLE)
        obs = pd.concat(self._obs, ignore_index=True)
        for name in obs:
            self._write_column(str(name), obs[name])
        self._group.attrs.update(
            {
                "format": FORMAT,
                "fingerprint": self.header.fingerprint,
                "content": self._fingerprint(obs),
                "largest": self._largest,
                "genes": list(self.header.genes),
                "studies": list(self.header.studies),
                "receipt": self.header.receipt,
                "columns": [str(name) for name in obs],
            }
        )

    def _fingerprint(self, obs: pd.DataFrame) -> str:
        """Hash of all cells, counts and columns, however they were cut into chunks."""
        whole = hashlib.sha256("".join(part.hexdigest() for part in self._content.values()).encode())
        whole.update("\t".join(map(str, obs)).encode())
        whole.update(pd.util.hash_pandas_object(obs, index=False).to_numpy().tobytes())
        return whole.hexdigest()

    def _grow(self, name: str, dtype: Any) -> zarr.Array[Any]:
        return self._group.create_array(name, shape=(0,), dtype=dtype, chunks=(CHUNK,), shards=(SHARD,), config=WHOLE)

    def _flush(self, *, whole_shards: bool) -> None:
        """Write pending entries; only whole shards before the end, so that no shard is written twice."""
        if not self._pending:
            return
        gene = np.concatenate([block.indices for block in self._pending])
        count = np.concatenate([block.data for block in self._pending])
        n = gene.size // SHARD * SHARD if whole_shards else gene.size
        for array, values in ((self._gene, gene), (self._count, count)):
            array.resize((self._n_entries + n,))
            array[self._n_entries :] = values[:n].astype(array.dtype)
        self._n_entries += n
        rest = sp.csr_matrix((count[n:], gene[n:], [0, gene.size - n]), shape=(1, len(self.header.genes)))
        self._pending = [rest]

    def _write_column(self, name: str, column: pd.Series[Any]) -> None:
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            self._group.create_array(f"obs/{name}", data=column.to_numpy(np.float64), config=WHOLE)
            return
        codes, categories = pd.factorize(column.astype("string"), sort=True)
        array = self._group.create_array(f"obs/{name}", data=codes.astype(np.int32), config=WHOLE)
        array.attrs["categories"] = [str(c) for c in categories]


class CellStore:
    """A complete store, read only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._group = zarr.open_group(path, mode="r")
            attrs: dict[str, Any] = dict(self._group.attrs)
            if attrs["format"] != FORMAT:
                raise ReadError(
                    f"store {path} has layout {attrs['format']!r}, this carvae reads {FORMAT}; ingest again"
                )
            self.header = StoreHeader(
                fingerprint=str(attrs["fingerprint"]),
                genes=tuple(attrs["genes"]),
                studies=tuple(attrs["studies"]),
                receipt=attrs["receipt"],
            )
            self.content = str(attrs["content"])
            self.largest = int(attrs["largest"])
            self.columns = tuple(str(name) for name in attrs["columns"])
            arrays = ("measured", "indptr", "gene", "count", *(f"obs/{name}" for name in self.columns))
            if lost := [name for name in arrays if _lost(self._array(name))]:
                raise ReadError(f"store {path} has lost a part of {' and '.join(lost)}; delete it and ingest again")
        except (KeyError, OSError, ValueError, TypeError, json.JSONDecodeError) as error:
            raise ReadError(
                f"{path} is no complete carvae store ({type(error).__name__}); delete it and ingest again"
            ) from None

    @property
    def n_cells(self) -> int:
        """N, the number of cells."""
        return int(self._array("indptr").shape[0]) - 1

    @cached_property
    def indptr(self) -> NDArray[np.int64]:
        """Where each cell's entries begin, int64 [N + 1]."""
        return self._values("indptr").astype(np.int64)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Bool [n_studies, G], which panel genes each study measured."""
        return self._values("measured").astype(np.bool_)

    def obs(self) -> pd.DataFrame:
        """The contract's columns of every cell, categories where they are text."""
        columns: dict[str, Any] = {}
        for name in self.columns:
            values = self._values(f"obs/{name}")
            categories: Any = self._array(f"obs/{name}").attrs.get("categories")
            columns[name] = values if categories is None else pd.Categorical.from_codes(values, categories)
        return pd.DataFrame(columns)

    def entries(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many counts of each of the given cells are not zero."""
        sizes: NDArray[np.int64] = self.indptr[rows + 1] - self.indptr[rows]
        return sizes

    def counts(self, rows: NDArray[np.int64] | None = None) -> sp.csr_matrix:
        """Panel counts of the given cells (ascending; by default all) in memory, float32."""
        rows = np.arange(self.n_cells) if rows is None else rows
        indptr = np.append(0, np.cumsum(self.entries(rows)))
        gene, count = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        first = 0
        for gene_M, count_M in self.read(rows):
            here = slice(first, first + gene_M.size)
            gene[here], count[here] = gene_M, count_M
            first = here.stop
        return sp.csr_matrix((count, gene, indptr), shape=(rows.size, len(self.header.genes)))

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.uint32]]]:
        """Genes and counts of the entries of the given cells (ascending), in order, at most about a shard at a time."""
        apart = np.flatnonzero(np.diff(rows) > GAP) + 1
        for stretch in np.split(rows, apart) if rows.size else []:
            begin = self.indptr[stretch[0]]
            pieces = np.flatnonzero(np.diff((self.indptr[stretch] - begin) // SHARD)) + 1
            for piece in np.split(stretch, pieces):
                start, stop = int(piece[0]), int(piece[-1]) + 1
                first, last = int(self.indptr[start]), int(self.indptr[stop])
                gene, count = self._values("gene", first, last), self._values("count", first, last)
                if piece.size < stop - start:
                    wanted = np.zeros(stop - start, np.bool_)
                    wanted[piece - start] = True
                    kept = np.repeat(wanted, np.diff(self.indptr[start : stop + 1]))
                    gene, count = gene[kept], count[kept]
                yield gene, count

    def _values(self, name: str, first: int = 0, last: int | None = None) -> NDArray[Any]:
        try:
            return np.asarray(self._array(name)[first:last])
        except (OSError, ValueError, RuntimeError) as error:
            raise ReadError(
                f"{self.path}/{name} is damaged ({type(error).__name__}); delete the store and ingest again"
            ) from None

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise ReadError(f"{self.path}/{name} is not an array; delete the store and ingest again")
        return array


def _lost(array: zarr.Array[Any]) -> bool:
    """Whether a part is missing, which zarr would read as zeros."""
    return bool(array.nchunks_initialized < array.nchunks)
