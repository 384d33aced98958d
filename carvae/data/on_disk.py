"""An AnnData on disk (.h5ad, zarr v2 and v3) that is written a range of cells at a time, by anndata's specification."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, sparse_dataset, write_elem
from anndata.utils import make_index_unique
from numpy.typing import NDArray

from carvae.data.hdf5 import writing_hdf5
from carvae.data.readers import CountsSource
from carvae.data.rows import moved

COUNTS_PER_CHUNK = 1 << 17
"""Counts per chunk of a new matrix, a file in zarr; a matrix that begins empty would have one each."""
ZARR_SUMMARY_FORMAT = 2
"""Format of zarr whose specification knows a summary of all members (.zmetadata)."""
ROWS_AT_ONCE = 1 << 15
"""Cells whose results are written together: a file per column of a zarr store."""


def readable_by_others() -> AbstractContextManager[None]:
    """Anndata's settings for plain strings and zarr v3, of which older versions lack some."""
    wanted = {"allow_write_nullable_strings": False, "zarr_write_format": 3, "auto_shard_zarr_v3": False}
    known: AbstractContextManager[None] = ad.settings.override(
        **{name: value for name, value in wanted.items() if hasattr(ad.settings, name)}
    )
    return known


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The root of a file or store for writing; a zarr store's summary of its members must not hide what is new."""
    if path.suffix != ".zarr":
        with writing_hdf5(path) as file:
            yield file
        return
    yield zarr.open_group(path, mode="a", use_consolidated=False)
    if zarr.open_group(path, mode="r", use_consolidated=False).metadata.zarr_format == ZARR_SUMMARY_FORMAT:
        zarr.consolidate_metadata(path)
        return
    root = path / "zarr.json"
    described = json.loads(root.read_text(encoding="utf-8"))
    if described.pop("consolidated_metadata", None) is not None:
        root.write_text(json.dumps(described), encoding="utf-8")


class Columns:
    """Arrays of ``obs`` and ``obsm`` with one row per cell, filled from the first cell to the last.

    Parameters
    ----------
    root
        The AnnData's root, with an ``obs``.
    n_cells
        Length of every array.
    replaced
        Columns of ``obs`` that are taken away first.
    """

    def __init__(self, root: Any, n_cells: int, replaced: set[str]) -> None:
        self.root, self.n_cells, self.done = root, n_cells, 0
        self.waiting: list[dict[str, Any]] = []
        self.n_waiting = 0
        for name in replaced & set(root["obs"]):
            del root[f"obs/{name}"]
        self.order = [str(name) for name in root["obs"].attrs["column-order"] if str(name) not in replaced]

    def append(self, rows: Mapping[str, Any], n_rows: int) -> None:
        """Add the next cells' rows: place (``obs/NAME``, ``obsm/NAME``) -> column or array, the same places always."""
        self.waiting.append(dict(rows))
        self.n_waiting += n_rows
        if self.n_waiting >= ROWS_AT_ONCE:
            self._write(self.n_waiting // ROWS_AT_ONCE * ROWS_AT_ONCE)

    def close(self) -> None:
        """Write what waits, and the order of the columns."""
        self._write(self.n_waiting)
        assert self.done == self.n_cells, f"{self.done} of {self.n_cells} cells came"
        self.root["obs"].attrs["column-order"] = self.order

    def _write(self, n_rows: int) -> None:
        if not self.waiting:
            return
        whole = {place: _stacked([rows[place] for rows in self.waiting]) for place in self.waiting[0]}
        if not self.done:
            for place, values in whole.items():
                create_rows(self.root, place, values[:0], self.n_cells)
            self.order += [place.removeprefix("obs/") for place in whole if place.startswith("obs/")]
        for place, values in whole.items():
            _array(self.root, place)[self.done : self.done + n_rows] = _codes(values)[:n_rows]
        self.done += n_rows
        self.n_waiting -= n_rows
        self.waiting = [{place: values[n_rows:] for place, values in whole.items()}] if self.n_waiting else []


def create_rows(root: Any, place: str, empty: Any, n_rows: int, chunk: int = ROWS_AT_ONCE) -> None:
    """An element as anndata writes it, but that its rows are still to come.

    Parameters
    ----------
    place
        Where it belongs; an older one is replaced.
    empty
        The element without rows.
    chunk
        Rows of a chunk in a zarr store.
    """
    replace_element(root, place, empty)
    array = _array(root, place)
    parent, name = root[array.name.strip("/").rpartition("/")[0]], array.name.rpartition("/")[2]
    attributes, dtype, shape = dict(array.attrs), array.dtype, (n_rows, *array.shape[1:])
    del parent[name]
    if isinstance(parent, h5py.Group):
        made = parent.create_dataset(name, shape=shape, dtype=dtype)
    else:
        made = parent.create_array(name, shape=shape, dtype=dtype, chunks=(min(chunk, n_rows), *shape[1:]))
    made.attrs.update(attributes)


def _array(root: Any, place: str) -> Any:
    node = root[place]
    return node if hasattr(node, "shape") else node["codes"]


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    joined = pd.concat([pd.Series(part) for part in parts], ignore_index=True)
    return joined.array if isinstance(joined.dtype, pd.CategoricalDtype) else joined.to_numpy()


def _codes(values: Any) -> NDArray[Any]:
    return values.codes if isinstance(values, pd.Categorical) else values


def replace_element(root: Any, key: str, value: Any, **settings: Any) -> None:
    """Write an element in the place of an older one."""
    if key in root:
        del root[key]
    write_elem(root, key, value, dataset_kwargs=settings)


def make_plain(root: Any) -> None:
    """Rewrite what R and older anndata do not read in a stored ``obs``: nullable text, or an old layout."""
    obs = root["obs"]
    if obs.attrs.get("encoding-version") != "0.2.0" or "column-order" not in obs.attrs:
        replace_element(root, "obs", plain(read_elem(obs)))
        return
    index = str(obs.attrs["_index"])
    for name in list(obs):
        node = obs[name]
        categories = node.get("categories") if not hasattr(node, "shape") else None
        if "nullable-string-array" not in {getattr(n, "attrs", {}).get("encoding-type") for n in (node, categories)}:
            continue
        if name == index:
            replace_element(root, f"obs/{name}", np.array([str(cell) for cell in read_elem(node)], dtype=object))
        else:
            replace_element(root, f"obs/{name}", plain(pd.DataFrame({name: read_elem(node)}))[name].array)


def plain(obs: pd.DataFrame) -> pd.DataFrame:
    """The table with text as categories and names as plain strings, which R and older anndata read."""
    table = obs.copy()
    table.index = pd.Index(obs.index.astype(str), dtype=object, name=obs.index.name)
    for position, column in enumerate(obs[name] for name in obs):
        if isinstance(column.dtype, pd.CategoricalDtype) and isinstance(column.cat.categories.dtype, pd.StringDtype):
            names = pd.Index(column.cat.categories.tolist(), dtype=object)
            table.isetitem(position, pd.Categorical.from_codes(column.cat.codes, names, ordered=column.cat.ordered))
        elif isinstance(column.dtype, pd.StringDtype) or column.dtype == object:
            table.isetitem(position, pd.Categorical(column.astype("string").astype(object)))
    return table


def write_counts(root: Any, sources: Sequence[CountsSource]) -> None:
    """X and var: the sources' counts over the genes that all of them have, appended chunk by chunk."""
    keys = [_gene_keys(source) for source in sources]
    held = set.intersection(*map(set, keys))
    wanted = [key for key in keys[0] if key in held]
    first, position = sources[0], {key: i for i, key in enumerate(keys[0])}
    kept = [position[key] for key in wanted]
    var = pd.DataFrame(index=make_index_unique(pd.Index([first.genes[i] for i in kept], dtype=object)))
    if first.gene_ids is not None:
        var["gene_ids"] = [first.gene_ids[i] for i in kept]
    replace_element(root, "var", var)
    replace_element(root, "X", sp.csr_matrix((0, len(wanted)), dtype=np.int32), chunks=(COUNTS_PER_CHUNK,))
    counts = sparse_dataset(root["X"])
    column_of = {key: i for i, key in enumerate(wanted)}
    for source, own in zip(sources, keys, strict=True):
        column_G = np.array([column_of.get(key, -1) for key in own])
        same = np.array_equal(column_G, np.arange(len(wanted)))
        for chunk in source.chunks():
            counts.append(chunk if same else _in_order(moved(chunk, column_G, len(wanted))))


def _in_order(counts: sp.csr_matrix) -> sp.csr_matrix:
    counts.sort_indices()
    return counts


def _gene_keys(source: CountsSource) -> list[str]:
    """What tells each gene of a source from the others: its name, and which of that name it is."""
    seen = Counter[str]()
    keys = []
    for gene in source.genes:
        keys.append(f"{gene}\t{seen[gene]}")
        seen[gene] += 1
    return keys
