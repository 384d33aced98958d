"""What users have, opened as raw counts: .h5ad, zarr, 10x .h5, 10x mtx folder, AnnData in memory, folders of those.

A source keeps no file open: every pass over its counts opens the file read-only and closes it. CSC matrices on disk
are turned around once into a scratch file; mtx text is read whole; everything else is streamed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from carvae.data.adata import open_anndata, open_memory
from carvae.data.broken import reading
from carvae.data.cells import Cells, HeldCells, each_has_its_own, hash_names
from carvae.data.counts import (
    Candidate,
    Checked,
    Opened,
    Verified,
    checked_blocks,
    count_blocks,
    find_counts,
    promising,
    refuse_totals,
)
from carvae.data.matrices import ALL, Ints
from carvae.data.schema import named_column
from carvae.data.tenx import mtx_parts, open_10x, open_mtx
from carvae.errors import CarvaeError, CountsError, ReadError, join_problems, refuse_stream

SEARCH_DEPTH = 5
FEWEST_COUNTS_COPIED = 10  # with fewer, cells of two raw matrices may agree by chance
PLAIN_NAMES = frozenset(
    "filtered_feature_bc_matrix filtered_gene_bc_matrices raw_feature_bc_matrix raw_gene_bc_matrices outs count matrix "
    "sample_filtered_feature_bc_matrix sample_raw_feature_bc_matrix filtered raw per_sample_outs GRCh38 hg19".split()
)
"""Names by Cell Ranger that say nothing about the sample."""


@dataclass(frozen=True, slots=True)
class CountsSource:
    """Verified raw counts of some cells, with their genes and ``obs``."""

    name: str
    n_cells: int
    genes: list[str]
    """Gene names as given; a name may occur twice."""
    gene_ids: list[str] | None
    cells: Cells
    """In the order of the counts; barcodes are unique."""
    where: str
    """Where the counts were: "X", "layers/NAME", "raw", "matrix", or one of them with "(log1p CP10k inverted)"."""
    notes: tuple[str, ...]
    """What was found or assumed and is worth saying."""
    n_empty: int
    """Cells without any count; they keep their place."""
    _counts: Verified | Candidate = field(repr=False)
    """A candidate where the counts are still to be verified."""

    @property
    def obs(self) -> pd.DataFrame:
        """One row per cell in the order of the counts; the index holds unique barcodes."""
        return self.cells.frame()

    def chunks(self, size: int = 4096) -> Iterator[sp.csr_matrix]:
        """The counts as int32 CSR in blocks of ``size`` cells, in order; genes sorted, no stored zeros.

        Raises
        ------
        ReadError, CountsError
            If the file changed or broke since it was opened.
        """
        assert isinstance(self._counts, Verified), "the counts are not verified; use `blocks` and `confirmed`"
        with reading(self.name):
            yield from count_blocks(self._counts, size)

    def blocks(self, size: int, cells: slice = ALL) -> Generator[Checked, None, None]:
        """The counts of some cells as in `chunks`, with what `confirmed` asks for; raises the same."""
        found = self._counts
        candidate, inverted = (found.candidate, found.inverted) if isinstance(found, Verified) else (found, False)
        try:
            with reading(self.name):
                yield from checked_blocks(candidate, size, cells, inverted=inverted, n_cells=self.n_cells)
        except CountsError as error:
            raise CountsError(f"{self.name}: {error}") from None  # of the plain kind, which crosses processes

    def confirmed(self, total_N: Ints, print_N: NDArray[np.uint64], largest: int) -> CountsSource:
        """The verified source, from what reading all of its `blocks` showed.

        Raises
        ------
        CountsError
            If they are no raw counts after all. Opening the source with ``whole`` finds those, or says why there are
            none.
        """
        if isinstance(self._counts, Verified):
            return self
        refuse_totals(total_N, largest)
        verified = Verified(self._counts, False, total_N, print_N, largest)
        return replace(self, notes=(*self.notes, *_notes(verified)), n_empty=_n_empty(verified), _counts=verified)


def open_samples(path: Path | str | AnnData, *, counts: str = "auto", whole: bool = True) -> list[CountsSource]:
    """All sources at ``path``: one for a file, one per sample for a folder; `open_source` explains the rest.

    In a folder each source without a sample column gets ``obs["sample"]``, the name of its file or folder.

    Raises
    ------
    ReadError, CountsError
        With all broken samples at once, or if the same cells are in two of them.
    """
    if isinstance(path, AnnData) or not _is_folder_of_samples(Path(path)):
        return [open_source(path, counts=counts, whole=whole)]
    root, sources, problems = Path(path), [], []
    parts = _find_samples(root)
    for part in parts:
        try:
            sources.append(_with_sample(open_source(part, counts=counts, name=_sample_name(part, root), whole=whole)))
        except CarvaeError as error:
            problems.append(error)
    if problems:
        kind = CountsError if all(isinstance(p, CountsError) for p in problems) else ReadError
        raise kind(join_problems(f"{root} cannot be used", [str(p) for p in problems]))
    if not sources:
        raise ReadError(f"{root} holds no .h5ad, zarr store, 10x .h5 or 10x matrix folder")
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ReadError(f"{root} holds several samples of one name ({', '.join(twice)}); rename the files or folders")
    if all(isinstance(source._counts, Verified) for source in sources):
        refuse_shared(sources)
    return sources


def refuse_shared(sources: Sequence[CountsSource]) -> None:
    """Raise ReadError where verified sources share cells, which would leak between training and validation."""
    tables = []
    for number, source in enumerate(sources):
        verified = source._counts
        assert isinstance(verified, Verified)
        table = pd.DataFrame({"cell": hash_names(source.cells), "print": verified.print_N, "file": number})
        tables.append(table[verified.total_N >= FEWEST_COUNTS_COPIED])
    table = pd.concat(tables, ignore_index=True)
    table = table[table.duplicated(["cell", "print"], keep=False)]
    first = table.groupby(["cell", "print"])["file"].transform("first")
    pairs = (
        pd.DataFrame({"first": first, "file": table["file"]})[first != table["file"]]
        .value_counts(sort=False)
        .reset_index()
    )
    shared = [
        f"{sources[one].name} and {sources[other].name} share {n_cells:,} cells (same barcode, same counts)"
        for one, other, n_cells in pairs.itertuples(index=False, name=None)
    ]
    if shared:
        raise ReadError(f"cells are there twice: {'; '.join(shared)}; keep one file of each pair")


def open_source(
    path: Path | str | AnnData, *, counts: str = "auto", name: str | None = None, whole: bool = True
) -> CountsSource:
    """The source at ``path``, its counts found and verified over the whole matrix.

    Parameters
    ----------
    path
        .h5ad, zarr store, 10x .h5, 10x matrix folder, or an AnnData, which is never changed.
    counts
        ``auto`` tries X, the layers counts, raw_counts and umi, raw, and the other layers but ambiguous, matrix,
        spliced and unspliced, in this order; ``X``, ``raw`` or ``layers/NAME`` looks only there.
    name
        Name of the source for messages and as sample; that of the file or folder if not given.
    whole
        False leaves the whole matrix to the reader of `CountsSource.blocks`, so that it is read once, and ``obs`` in
        the file; where the first cells do not show which place holds the counts, or barcodes repeat, it is as True.

    Raises
    ------
    ReadError
        If the path is missing, broken, hostile, empty, or of a kind that is not read.
    CountsError
        If no place holds raw counts, or cells occur twice.
    """
    if isinstance(path, AnnData):
        return _finish(open_memory(path, counts, name or "AnnData"), whole)
    path = Path(path)
    name = name or _sample_name(path, path)
    with reading(str(path)):
        return _finish(_open_path(path, counts, name), whole)


def _open_path(path: Path, counts: str, name: str) -> Opened:
    if not path.exists():
        raise ReadError(f"{path} does not exist")
    refuse_stream(path)
    if is_zarr(path):
        return open_anndata(path, counts, name)
    if parts := mtx_parts(path):
        if len(parts) == 1:
            return open_mtx(parts[0], name)
        raise ReadError(f"{path} holds {len(parts)} matrices; give their folder to a verb that takes several samples")
    if path.is_dir():
        if _find_samples(path):
            raise ReadError(f"{path} is a folder of samples; open it with open_samples, or give one of its samples")
        raise ReadError(f"{path} holds no .h5ad, zarr store, 10x .h5 or 10x matrix folder")
    return _open_hdf5(path, counts, name)


def _open_hdf5(path: Path, counts: str, name: str) -> Opened:
    if not h5py.is_hdf5(path):
        raise ReadError(f"{path} {_not_hdf5(path)}")
    with h5py.File(path, "r", locking="best-effort") as file:
        if "X" in file or "layers" in file or "raw" in file:
            return open_anndata(path, counts, name)
        for group in file:
            own = isinstance(file.get(group, getlink=True), h5py.HardLink)
            if own and isinstance(file[group], h5py.Group) and "barcodes" in file[group]:  # `in` reads all of an array
                return open_10x(path, file, name)
        inside = ", ".join(map(str, file)) or "nothing"
    raise ReadError(f"{path} is HDF5 but neither .h5ad nor a 10x matrix (it holds {inside}); export it as .h5ad")


def _not_hdf5(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if not head:
        return "is empty; download or write it again"
    if head[:1] == b"<":
        return "is a web page, not data: the download failed; download it again"
    if head[:2] in (b"\x1f\x8b", b"PK"):
        return "is compressed; unpack it first"
    return "is neither HDF5 (.h5ad, 10x .h5), a zarr store nor a 10x matrix folder; give one of those"


def _finish(opened: Opened, whole: bool) -> CountsSource:
    """The source once its counts are found, its cells told apart, and what is worth saying is said."""
    name, cells = opened.name, opened.cells
    if not cells.n_cells or not any(candidate.genes for candidate in opened.candidates):
        lacking = "genes" if cells.n_cells else "cells"
        raise ReadError(f"{name} holds no {lacking}; give a file that has both cells and genes")
    usable = [candidate for candidate in opened.candidates if candidate.genes]
    if not whole and (found := promising(usable)) and each_has_its_own(cells):
        notes = (*found.notes, *_elsewhere(found, found.where, usable))
        return CountsSource(name, cells.n_cells, found.genes, found.gene_ids, cells, found.where, notes, 0, found)
    obs = cells.frame()
    names = [str(cell) for cell in obs.index]
    if any(not cell.strip() for cell in names):
        raise ReadError(f"{name} has cells without a barcode; write the file again")
    verified = find_counts(usable, name, names)
    obs, copied = _told_apart(obs, names, verified, name)
    found = verified.candidate
    notes = (*found.notes, *copied, *_elsewhere(found, verified.where, usable), *_notes(verified))
    n_empty = _n_empty(verified)
    return CountsSource(
        name, len(obs), found.genes, found.gene_ids, HeldCells(obs), verified.where, notes, n_empty, verified
    )


def _n_empty(verified: Verified) -> int:
    return int((verified.total_N == 0).sum())


def _elsewhere(found: Candidate, where: str, usable: Sequence[Candidate]) -> Iterator[str]:
    """Notes on where the counts are and where more genes would be."""
    if where not in ("X", "matrix"):
        yield f"raw counts were found in {where}"
    larger = max((c for c in usable if c.where == "raw"), key=lambda c: len(c.genes), default=found)
    if len(larger.genes) > len(found.genes):
        yield f"raw has {len(larger.genes):,} genes, {where} only {len(found.genes):,}; `counts: raw` uses it"


def _notes(verified: Verified) -> Iterator[str]:
    """Notes on the counts themselves."""
    if n_empty := _n_empty(verified):
        yield f"{n_empty:,} cells have no counts at all"
    if verified.largest == 1:
        yield "every count is 0 or 1: the matrix may have been made binary"
    if alike := len(verified.print_N) - n_empty - len(np.unique(verified.print_N[verified.total_N > 0])):
        yield f"{alike:,} cells have the same counts as another cell under another barcode"


def _told_apart(
    obs: pd.DataFrame, cells: Sequence[str], verified: Verified, name: str
) -> tuple[pd.DataFrame, list[str]]:
    """The obs with unique barcodes, and notes on cells that look alike.

    A barcode that occurs twice with the same counts is a cell that was given twice, which would leak between
    training and validation: refused. With other counts it is the barcode of another sample: a suffix tells it apart.
    """
    table = pd.DataFrame({"cell": list(cells), "print": verified.print_N})[verified.total_N > 0]
    copies = int(table.duplicated().sum())
    if copies:
        raise CountsError(f"{name} holds {copies:,} cells twice (same barcode, same counts); drop the copies")
    notes = []
    unique = obs.copy()
    unique.index = pd.Index(cells, dtype=object)
    if repeated := int(unique.index.duplicated().sum()):
        notes.append(f"{repeated:,} barcodes occurred before with other counts; a suffix tells them apart")
        if "barcode" not in unique:
            unique["barcode"] = list(cells)
        unique.index = pd.Index(_suffixed(cells), dtype=object)
    return unique, notes


def _suffixed(cells: Sequence[str]) -> list[str]:
    taken, used, out = set(cells), set[str](), []
    for cell in cells:
        name, number = cell, 0
        while name in used or (number and name in taken):
            number += 1
            name = f"{cell}-{number}"
        used.add(name)
        out.append(name)
    return out


def _with_sample(source: CountsSource) -> CountsSource:
    if named_column(source.cells.columns, "sample"):
        return source
    return replace(source, cells=HeldCells(source.obs.assign(sample=pd.Categorical([source.name] * source.n_cells))))


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store."""
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def _is_folder_of_samples(path: Path) -> bool:
    return path.is_dir() and not is_zarr(path) and len(mtx_parts(path)) != 1


def _find_samples(folder: Path, depth: int = 0) -> list[Path]:
    """What can be opened below the folder; a filtered matrix hides the raw one and its own second format."""
    matrices = [parts.matrix for parts in mtx_parts(folder)]
    found = [folder] if len(matrices) == 1 else matrices
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = {entry.name for entry in entries}
    for entry in entries:
        twin = entry.name.replace("raw_", "filtered_", 1)
        if entry.name == "multi" and "per_sample_outs" in names:
            continue  # the raw matrix of all samples together
        if entry.name.removeprefix("sample_").startswith(("raw_", "molecule_info")) and (
            {twin, f"{twin}.h5", twin.removesuffix(".h5")} & names
        ):
            continue
        if entry.is_dir() and f"{entry.name}.h5" not in names:
            if is_zarr(entry):
                found.append(entry)
            elif depth < SEARCH_DEPTH:
                found += _find_samples(entry, depth + 1)
        elif entry.suffix in (".h5ad", ".h5") and entry.is_file():
            found.append(entry)
    return found


def _sample_name(path: Path, root: Path) -> str:
    """The folders and the file between ``root`` and the sample, without Cell Ranger's own names."""
    stem = path.name if path.is_dir() and not is_zarr(path) else _stem(path.name)
    words = [*path.relative_to(root).parts[:-1], stem]
    telling = [word for word in words if word and word not in PLAIN_NAMES]
    if telling:
        return "_".join(telling)
    above = (part for part in reversed(path.resolve().parts[:-1]) if part not in PLAIN_NAMES)
    return next(above, stem)


def names_a_sample(file: str) -> bool:
    """Whether the name of a file or folder says whose cells it holds; Cell Ranger's own names do not."""
    return _stem(file) not in {"", *PLAIN_NAMES}


def _stem(file: str) -> str:
    for end in (".gz", ".h5ad", ".zarr", ".h5", "matrix.mtx"):
        file = file.removesuffix(end)
    for end in ("filtered_feature_bc_matrix", "raw_feature_bc_matrix"):
        file = file.removesuffix(f"sample_{end}").removesuffix(end)
    return file.rstrip("_.-")
