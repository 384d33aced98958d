"""The places of an AnnData, on disk (.h5ad, zarr v2 and v3) or in memory, where counts may be."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData, OldFormatWarning
from anndata.io import read_elem

from carvae.data.broken import reading
from carvae.data.cells import ALL, Cells, HeldCells
from carvae.data.counts import Candidate, Opened
from carvae.data.matrices import (
    GeneSubset,
    Held,
    Matrix,
    Node,
    check_group,
    check_values,
    member,
    memory_matrix,
    stored_by_gene,
    stored_matrix,
)
from carvae.data.tenx import FEATURE_TYPES, gene_expression
from carvae.errors import CountsError, ReadError

ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_gene_id", "feature_id", "ensembl")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "gene_short_name")
TYPE_COLUMNS = ("feature_types", "feature_type", "modality")
COUNT_LAYERS = ("counts", "raw_counts", "umi")
"""Layers that are looked at before raw, in this order."""
TEXT = frozenset({"string-array", ""})
"""Encodings of plain text; the values of a nullable one bear none."""
PARTIAL_LAYERS = frozenset({"ambiguous", "matrix", "spliced", "unspliced"})
"""By velocyto and loom: a part of the counts, or counted otherwise; taken only if named."""


_Keep = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Genes:
    """The genes among the features of a var."""

    names: list[str]
    ids: list[str] | None
    keep: _Keep | None
    """Their positions; None if every feature is a gene."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Place:
    """Opens one matrix of an .h5ad or zarr store; a matrix stored by gene is turned around once and kept."""

    path: Path
    key: str
    shape: tuple[int, int]
    where: str
    keep: _Keep | None
    turned: Matrix | None = None

    @contextmanager
    def __call__(self) -> Iterator[Matrix]:
        if self.turned is not None:
            yield _kept(self.turned, self.keep)
            return
        with root_of(self.path) as root:
            matrix = stored_matrix(root[self.key], self.shape, self.where)
            if stored_by_gene(root[self.key]):
                self.turned = matrix
            yield _kept(matrix, self.keep)


def _kept(matrix: Matrix, keep: _Keep | None) -> Matrix:
    return matrix if keep is None else GeneSubset(matrix, keep)


@contextmanager
def root_of(path: Path) -> Iterator[Any]:
    """The root of an .h5ad file or a zarr store, for reading."""
    if path.is_dir():
        yield zarr.open_group(path, mode="r", use_consolidated=False)  # a stale summary would hide what is stored
    else:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file


def open_anndata(path: Path, counts: str, name: str) -> Opened:
    """The obs and the candidates of an .h5ad file or a zarr store.

    Raises
    ------
    ReadError, CountsError
        If a part is broken or hostile, or ``counts`` names a place that is not there.
    """
    with root_of(path) as root:
        cells, var = _cells(root, path), _frame(root, "var", str(path))
        candidates, places = [], _places(root, path)
        for where in _chosen(places, counts, name):
            is_raw = where == "raw"
            table = _frame(root["raw"], "var", f"{path}/raw") if is_raw else var
            key = "raw/X" if is_raw else where
            matrix = member(root["raw"], "X", f"{path}/raw") if is_raw else root[key]
            if not hasattr(matrix, "shape"):
                check_group(matrix, f"{path}/{key}")
            genes = _genes(table, f"{path}/{key}")
            place = _Place(path, key, (cells.n_cells, len(table)), f"{path}/{key}", genes.keep)
            candidates.append(Candidate(where, genes.names, genes.ids, place, genes.notes))
    return Opened(name, cells, candidates)


def _places(root: Node, path: Path) -> list[str]:
    names = []
    if "X" in root and not _is_null(member(root, "X", str(path))):
        names.append("X")
    if "layers" in root:
        layers = _group(root, "layers", str(path))
        names += [f"layers/{layer}" for layer in layers]
        for layer in layers:
            member(layers, layer, f"{path}/layers")
    if "raw" in root and not _is_null(member(root, "raw", str(path))) and "X" in _group(root, "raw", str(path)):
        names.append("raw")
    return _ordered(names)


def _group(root: Node, name: str, where: str) -> Node:
    """A child that holds others; of an array in its place every row would be read."""
    group = member(root, name, where)
    if hasattr(group, "shape"):
        raise ReadError(f"{where}/{name} is an array, not a group of matrices; write it again by anndata")
    return group


def _ordered(places: Iterable[str]) -> list[str]:
    """X, the layers named as counts, raw, the other layers."""
    first = ["X", *(f"layers/{layer}" for layer in COUNT_LAYERS), "raw"]
    return sorted(places, key=lambda place: (first.index(place) if place in first else len(first), place))


def _is_null(node: Node) -> bool:
    return bool(node.attrs.get("encoding-type") == "null")


def _chosen(places: list[str], counts: str, name: str) -> list[str]:
    if counts in places:
        return [counts]
    whole = [place for place in places if place.removeprefix("layers/").casefold() not in PARTIAL_LAYERS]
    if counts == "auto" and whole:
        return whole
    if counts == "auto" and places:
        raise CountsError(f"{name} has only {', '.join(places)}, never taken unasked; name one of them with `counts:`")
    asked = "" if counts == "auto" else f" at {counts!r}"
    raise CountsError(f"{name} has no matrix{asked}; it has {', '.join(places) or 'none at all'}")


@dataclass(frozen=True, slots=True)
class StoredCells:
    """Cells whose ``obs`` stays in the file."""

    path: Path
    n_cells: int
    columns: tuple[str, ...]
    index: str
    """Where the barcodes are, below ``obs``."""

    def names(self, cells: slice = ALL) -> np.ndarray[Any, np.dtype[np.object_]]:
        """Barcodes of some cells, in order."""
        with root_of(self.path) as root:
            array = root[f"obs/{self.index}"]
            values = array.asstr()[cells] if isinstance(array, h5py.Dataset) else array[cells]
        return np.asarray(values, dtype=object)

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """``obs``, its index the barcodes; or some of its columns, without barcodes."""
        with root_of(self.path) as root:
            if columns is None:
                return _frame(root, "obs", str(self.path))
            found = {column: _element(root["obs"][column], f"{self.path}/obs/{column}") for column in columns}
        return pd.DataFrame(found, index=pd.RangeIndex(self.n_cells))


def _cells(root: Node, path: Path) -> Cells:
    """The cells; left in the file where barcodes and columns are of today's plain kinds."""
    group = _checked_frame(root, "obs", str(path))
    index = str(group.attrs["_index"])
    array = group[index]
    if not hasattr(array, "shape") and array.attrs.get("encoding-type") == "nullable-string-array":
        index, array = f"{index}/values", array["values"]
    today = group.attrs.get("encoding-version") == "0.2.0" and "column-order" in group.attrs
    if not today or len(getattr(array, "shape", ())) != 1 or array.attrs.get("encoding-type", "") not in TEXT:
        return HeldCells(_frame(root, "obs", str(path)))
    columns = tuple(str(column) for column in group.attrs["column-order"])
    return StoredCells(path, int(array.shape[0]), columns, index)


def _frame(root: Node, key: str, where: str) -> pd.DataFrame:
    table = _element(_checked_frame(root, key, where), f"{where}/{key}")
    if not isinstance(table, pd.DataFrame):
        raise ReadError(f"{where}/{key} is not a table; write it again by anndata")
    return table


def _checked_frame(root: Node, key: str, where: str) -> Node:
    if key not in root:
        raise ReadError(f"{where} has no {key}; write it again by anndata")
    group = member(root, key, where)
    if hasattr(group, "shape"):
        raise ReadError(f"{where}/{key} was written by anndata older than 0.7; open and save it by a current one")
    check_group(group, f"{where}/{key}")
    index = group[str(group.attrs["_index"])]
    if hasattr(index, "shape"):
        check_values(index, f"{where}/{key} index", complete=True)
    return group


def _element(node: Node, where: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldFormatWarning)  # what an R writer leaves out does no harm here
        try:
            return read_elem(node)
        except Exception as error:  # anndata's error for an unknown encoding is private
            seen = " ".join(str(error).split())[:200]
            raise ReadError(f"{where} cannot be read ({seen}); write it again, or update anndata") from error


def _gene_names(var: pd.DataFrame) -> tuple[list[str], list[str] | None]:
    names = [str(name) for name in var.index]
    columns = {str(column).casefold(): column for column in var.columns}
    ids = next((columns[c] for c in ID_COLUMNS if c in columns), None)
    if ids is not None:
        return names, var[ids].astype(str).tolist()
    symbols = next((columns[c] for c in SYMBOL_COLUMNS if c in columns), None)
    if symbols is not None and sum(n.upper().startswith("ENS") for n in names) > len(names) // 2:
        return var[symbols].astype(str).tolist(), names
    return names, None


def _genes(var: pd.DataFrame, where: str) -> _Genes:
    """The genes of a var; features that it calls other than gene expression are left out, as from a 10x matrix."""
    names, ids = _gene_names(var)
    columns = {str(column).casefold(): column for column in var.columns}
    for column in (columns[c] for c in TYPE_COLUMNS if c in columns):
        types = var[column].astype(str).tolist()
        if not FEATURE_TYPES.isdisjoint(types):
            keep, notes = gene_expression(types, where)
            if len(keep) < len(types):
                return _Genes([names[i] for i in keep], ids and [ids[i] for i in keep], keep, notes)
            break
    return _Genes(names, ids, None, ())


def open_memory(adata: AnnData, counts: str, name: str) -> Opened:
    """The obs and the candidates of an AnnData, which is never changed; a backed one is read from its file.

    Raises
    ------
    ReadError, CountsError
        If a matrix is broken or not one, or ``counts`` names a place that is not there.
    """
    if adata.isbacked:
        if adata.is_view:
            raise ReadError(f"{name} is a view of a backed file; call .to_memory() on it first")
        with reading(str(adata.filename)):
            opened = open_anndata(Path(str(adata.filename)), counts, name)
        return replace(opened, cells=_same_cells(adata.obs.copy(), opened.cells, name))
    values: dict[str, tuple[Any, pd.DataFrame]] = {}
    if adata.X is not None:
        values["X"] = adata.X, adata.var
    for layer in adata.layers:
        values[f"layers/{layer}"] = adata.layers[layer], adata.var
    if adata.raw is not None:
        values["raw"] = adata.raw.X, adata.raw.var
    candidates = []
    with reading(name):
        for where in _chosen(_ordered(values), counts, name):
            matrix = memory_matrix(values[where][0], f"{name} {where}")
            genes = _genes(values[where][1], f"{name} {where}")
            held = Held(_kept(matrix, genes.keep))
            candidates.append(Candidate(where, genes.names, genes.ids, held, genes.notes))
    return Opened(name, HeldCells(adata.obs.copy()), candidates)


def _same_cells(obs: pd.DataFrame, stored: Cells, name: str) -> Cells:
    if len(obs) != stored.n_cells:
        raise ReadError(f"{name} has {len(obs):,} cells but its file {stored.n_cells:,}; save it or call .to_memory()")
    return HeldCells(obs)
