"""What 10x Genomics' Cell Ranger writes: HDF5 matrices (v2, v3) and matrix folders (v2, v3, packed or not)."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
import scipy.io

from carvae.data.cells import HeldCells
from carvae.data.counts import Candidate, Opened
from carvae.data.matrices import (
    MAX_RATIO,
    CsrMatrix,
    GeneSubset,
    Held,
    Matrix,
    Node,
    check_group,
    member,
    memory_matrix,
)
from carvae.errors import ReadError

GENE_EXPRESSION = "Gene Expression"
FEATURE_TYPES = frozenset(
    {
        GENE_EXPRESSION, "Antibody Capture", "Antigen Capture", "CRISPR Guide Capture", "Multiplexing Capture",
        "Custom", "Peaks",
    }
)  # fmt: skip
"""Cell Ranger's words; they tell a column of feature types from one of biotypes, which CELLxGENE calls alike."""
SHORTEST_LINE = len("1 1 1\n")
MTX_HEAD = "%%matrixmarket matrix coordinate"


@dataclass(frozen=True, slots=True)
class MtxParts:
    """The three files of a 10x matrix folder."""

    matrix: Path
    features: Path
    barcodes: Path


@dataclass(frozen=True, slots=True)
class _Place10x:
    """Opens the matrix of a 10x .h5; it is stored by cell."""

    path: Path
    group: str
    shape: tuple[int, int]
    keep: np.ndarray[Any, np.dtype[np.int64]]

    @contextmanager
    def __call__(self) -> Iterator[Matrix]:
        with h5py.File(self.path, "r", locking="best-effort") as file:
            group = file[self.group]
            arrays = (group["data"], group["indices"], group["indptr"])
            matrix: Matrix = CsrMatrix.checked(*arrays, self.shape, f"{self.path}/{self.group}")
            yield matrix if len(self.keep) == self.shape[1] else GeneSubset(matrix, self.keep)


def open_10x(path: Path, file: h5py.File, name: str) -> Opened:
    """The cells and the matrix of a 10x .h5 file, only its gene expression features.

    Raises
    ------
    ReadError
        If the file is broken or hostile, of several genomes, or not a feature-barcode matrix.
    """
    groups = [str(group) for group in file if _holds_barcodes(member(file, group, str(path)))]
    if "barcode_idx" in file:
        raise ReadError(f"{path} is a molecule_info file; give filtered_feature_bc_matrix.h5 instead")
    if len(groups) > 1:
        raise ReadError(f"{path} holds several genomes ({', '.join(groups)}); give the matrix of one genome")
    group = file[groups[0]]
    check_group(group, f"{path}/{groups[0]}")
    cells = _strings(group["barcodes"])
    if "features" in group:
        features = group["features"]
        table = [_strings(features[key]) for key in ("name", "id", "feature_type")]
    else:
        genes = _strings(group["gene_names"])
        table = [genes, _strings(group["genes"]), [GENE_EXPRESSION] * len(genes)]
    declared = tuple(int(n) for n in group["shape"][:])
    if declared != (len(table[0]), len(cells)) or len(table[1]) != len(table[0]):
        raise ReadError(f"{path} declares {declared} genes and cells but names {len(table[0]):,} and {len(cells):,}")
    names, ids, types = table
    keep, notes = gene_expression(types, str(path))
    place = _Place10x(path, groups[0], (len(cells), len(names)), keep)
    candidate = Candidate("matrix", [names[i] for i in keep], [ids[i] for i in keep], place, notes)
    return Opened(name, HeldCells(_sample_obs(cells, name)), [candidate])


def _holds_barcodes(node: Node) -> bool:
    return isinstance(node, h5py.Group) and "barcodes" in node  # ``in`` would read all of an array


def _strings(array: Node) -> list[str]:
    if array.ndim != 1:
        raise ReadError(f"{array.name} is no list of names; download or copy the file again")
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in array[:]]


def gene_expression(types: list[str], where: str) -> tuple[np.ndarray[Any, np.dtype[np.int64]], tuple[str, ...]]:
    """Which features are genes by their types, and a note on the others.

    Raises
    ------
    ReadError
        If none is.
    """
    keep = np.array([i for i, kind in enumerate(types) if kind == GENE_EXPRESSION], dtype=np.int64)
    if not len(keep):
        raise ReadError(f"{where} has no {GENE_EXPRESSION!r} features, only {', '.join(sorted(set(types))) or 'none'}")
    others = sorted(set(types) - {GENE_EXPRESSION})
    notes = (f"{len(types) - len(keep):,} features of {', '.join(others)} are left out",) if others else ()
    return keep, notes


def _sample_obs(cells: list[str], name: str) -> pd.DataFrame:
    sample = pd.Categorical([name] * len(cells))
    return pd.DataFrame({"sample": sample}, index=pd.Index(cells, dtype=object))


def mtx_parts(path: Path) -> list[MtxParts]:
    """The 10x matrices in a folder (GEO puts several side by side, told apart by a prefix), or the one of a file.

    Raises
    ------
    ReadError
        If a matrix lacks its features or barcodes.
    """
    if path.is_file():
        matrices = [path] if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")) else []
    else:
        matrices = sorted([*path.glob("*matrix.mtx"), *path.glob("*matrix.mtx.gz")])
    parts: dict[str, MtxParts] = {}
    for matrix in matrices:
        prefix = matrix.name.removesuffix(".gz").removesuffix("matrix.mtx")
        beside = [
            next(
                (p for p in (matrix.with_name(prefix + n + z) for n in names for z in ("", ".gz")) if p.is_file()), None
            )
            for names in (("features.tsv", "genes.tsv"), ("barcodes.tsv",))
        ]
        if beside[0] is None or beside[1] is None:
            raise ReadError(f"{matrix} lacks {prefix}features.tsv or {prefix}barcodes.tsv beside it; add them")
        parts.setdefault(prefix, MtxParts(matrix, beside[0], beside[1]))
    return list(parts.values())


def open_mtx(parts: MtxParts, name: str) -> Opened:
    """The cells and the matrix of a 10x matrix folder, read whole; only its gene expression features.

    Raises
    ------
    ReadError
        If the three files do not agree, or one is cut.
    """
    cells = [fields[0] for fields in _table(parts.barcodes)]
    features = _table(parts.features)
    names = [fields[1] if len(fields) > 1 else fields[0] for fields in features]
    types = [fields[2] if len(fields) > 2 else GENE_EXPRESSION for fields in features]  # noqa: PLR2004 (v2 has two)
    _check_header(parts, len(features), len(cells))
    by_gene = scipy.io.mmread(parts.matrix)
    matrix = memory_matrix(by_gene.T.tocsr(), str(parts.matrix))
    keep, notes = gene_expression(types, str(parts.matrix))
    held = Held(matrix if len(keep) == len(features) else GeneSubset(matrix, keep))
    candidate = Candidate("matrix", [names[i] for i in keep], [features[i][0] for i in keep], held, notes)
    return Opened(name, HeldCells(_sample_obs(cells, name)), [candidate])


def _unpacked(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def _table(path: Path) -> list[list[str]]:
    with _unpacked(path) as file:
        return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]


def _check_header(parts: MtxParts, n_features: int, n_cells: int) -> None:
    """Refuse a matrix that names other sizes than its tables, or more values than its file can hold."""
    with _unpacked(parts.matrix) as file:
        head = file.readline()
        line = next((line for line in file if not line.startswith("%") and line.strip()), "")
    if not head.lower().startswith(MTX_HEAD) or "general" not in head.lower():
        raise ReadError(f"{parts.matrix} is not a sparse matrix market file; download or write it again")
    rows, columns, n_values = (int(word) for word in line.split())
    for found, wanted, path in ((rows, n_features, parts.features), (columns, n_cells, parts.barcodes)):
        if found != wanted:
            raise ReadError(
                f"{path} has {wanted:,} lines but {parts.matrix.name} needs {found:,}; take both from one run"
            )
    room = parts.matrix.stat().st_size * (MAX_RATIO if parts.matrix.suffix == ".gz" else 1)
    if n_values * SHORTEST_LINE > room + SHORTEST_LINE:
        raise ReadError(f"{parts.matrix} declares {n_values:,} values, more than it can hold; download it again")
