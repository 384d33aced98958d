"""What users have, opened as raw counts: .h5ad, zarr, 10x .h5, 10x mtx folder, AnnData in memory, folders of those.

A source keeps no file open: every pass over its counts opens the file read-only and closes it. CSC matrices on disk
are turned around once into a scratch file; mtx text is read whole; everything else is streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from carvae.data.adata import open_anndata, open_memory
from carvae.data.counts import Opened, Verified, count_blocks, find_counts
from carvae.data.matrices import reading
from carvae.data.schema import named_column
from carvae.data.tenx import mtx_parts, open_10x, open_mtx
from carvae.errors import CarvaeError, CountsError, ReadError, join_problems

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
    obs: pd.DataFrame
    """One row per cell in the order of the counts; the index holds unique barcodes."""
    where: str
    """Where the counts were: "X", "layers/NAME", "raw", "matrix", or one of them with "(log1p CP10k inverted)"."""
    notes: tuple[str, ...]
    """What was found or assumed and is worth saying."""
    n_empty: int
    """Cells without any count; they keep their place."""
    _verified: Verified = field(repr=False)

    def chunks(self, size: int = 4096) -> Iterator[sp.csr_matrix]:
        """The counts as int32 CSR in blocks of ``size`` cells, in order; genes sorted, no stored zeros.

        Raises
        ------
        ReadError, CountsError
            If the file changed or broke since it was opened.
        """
        with reading(self.name):
            yield from count_blocks(self._verified, size)


def open_samples(path: Path | str | AnnData, *, counts: str = "auto") -> list[CountsSource]:
    """All sources at ``path``: one for a file, one per sample for a folder.

    In a folder each source without a sample column gets ``obs["sample"]``, the name of its file or folder.

    Raises
    ------
    ReadError, CountsError
        With all broken samples at once, or if the same cells are in two of them.
    """
    if isinstance(path, AnnData) or not _is_folder_of_samples(Path(path)):
        return [open_source(path, counts=counts)]
    root, sources, problems = Path(path), [], []
    parts = _find_samples(root)
    for part in parts:
        try:
            sources.append(_with_sample(open_source(part, counts=counts, name=_sample_name(part, root))))
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
    _refuse_shared(root, parts, sources)
    return sources


def _refuse_shared(root: Path, parts: Sequence[Path], sources: Sequence[CountsSource]) -> None:
    """Refuse cells that are in two files, which would leak between training and validation."""
    tables = [
        pd.DataFrame({"cell": source.obs.index, "print": source._verified.print_N, "file": number})[
            source._verified.total_N >= FEWEST_COUNTS_COPIED
        ]
        for number, source in enumerate(sources)
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table[table.duplicated(["cell", "print"], keep=False)]
    first = table.groupby(["cell", "print"])["file"].transform("first")
    pairs = (
        pd.DataFrame({"first": first, "file": table["file"]})[first != table["file"]]
        .value_counts(sort=False)
        .reset_index()
    )
    shared = [
        f"{parts[one].relative_to(root)} and {parts[other].relative_to(root)} share {n_cells:,} cells "
        "(same barcode, same counts)"
        for one, other, n_cells in pairs.itertuples(index=False, name=None)
    ]
    if shared:
        raise ReadError(f"{root} holds cells twice: {'; '.join(shared)}; keep one file of each pair")


def open_source(path: Path | str | AnnData, *, counts: str = "auto", name: str | None = None) -> CountsSource:
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

    Raises
    ------
    ReadError
        If the path is missing, broken, hostile, empty, or of a kind that is not read.
    CountsError
        If no place holds raw counts, or cells occur twice.
    """
    if isinstance(path, AnnData):
        return _finish(open_memory(path, counts, name or "AnnData"))
    path = Path(path)
    name = name or _sample_name(path, path)
    with reading(str(path)):
        return _finish(_open_path(path, counts, name))


def _open_path(path: Path, counts: str, name: str) -> Opened:
    if not path.exists():
        raise ReadError(f"{path} does not exist")
    if _is_zarr(path):
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
            if isinstance(file.get(group, getlink=True), h5py.HardLink) and "barcodes" in file[group]:
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


def _finish(opened: Opened) -> CountsSource:
    """The source once its counts are found, its cells told apart, and what is worth saying is said."""
    name, obs = opened.name, opened.obs
    if not len(obs) or not any(candidate.genes for candidate in opened.candidates):
        raise ReadError(f"{name} holds {'no genes' if len(obs) else 'no cells'}; give a file with both")
    cells = [str(cell) for cell in obs.index]
    if any(not cell.strip() for cell in cells):
        raise ReadError(f"{name} has cells without a barcode; write the file again")
    usable = [candidate for candidate in opened.candidates if candidate.genes]
    verified = find_counts(usable, name, cells)
    obs, copied = _told_apart(obs, cells, verified, name)
    n_empty = int((verified.total_N == 0).sum())
    notes = [*verified.candidate.notes, *copied]
    if verified.where not in ("X", "matrix"):
        notes.append(f"raw counts were found in {verified.where}")
    if n_empty:
        notes.append(f"{n_empty:,} cells have no counts at all")
    if verified.largest == 1:
        notes.append("every count is 0 or 1: the matrix may have been made binary")
    larger = max((c for c in usable if c.where == "raw"), key=lambda c: len(c.genes), default=verified.candidate)
    if len(larger.genes) > len(verified.candidate.genes):
        n_genes = len(verified.candidate.genes)
        notes.append(f"raw has {len(larger.genes):,} genes, {verified.where} only {n_genes:,}; `counts: raw` uses it")
    genes, ids = verified.candidate.genes, verified.candidate.gene_ids
    return CountsSource(name, len(obs), genes, ids, obs, verified.where, tuple(notes), n_empty, verified)


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
    if alike := int(table["print"].duplicated().sum()):
        notes.append(f"{alike:,} cells have the same counts as another cell under another barcode")
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
    if named_column(source.obs, "sample"):
        return source
    return replace(source, obs=source.obs.assign(sample=pd.Categorical([source.name] * source.n_cells)))


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def _is_folder_of_samples(path: Path) -> bool:
    return path.is_dir() and not _is_zarr(path) and len(mtx_parts(path)) != 1


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
            if _is_zarr(entry):
                found.append(entry)
            elif depth < SEARCH_DEPTH:
                found += _find_samples(entry, depth + 1)
        elif entry.suffix in (".h5ad", ".h5") and entry.is_file():
            found.append(entry)
    return found


def _sample_name(path: Path, root: Path) -> str:
    """The folders and the file between ``root`` and the sample, without Cell Ranger's own names."""
    stem = path.name if path.is_dir() and not _is_zarr(path) else _stem(path.name)
    words = [*path.relative_to(root).parts[:-1], stem]
    telling = [word for word in words if word and word not in PLAIN_NAMES]
    if telling:
        return "_".join(telling)
    above = (part for part in reversed(path.resolve().parts[:-1]) if part not in PLAIN_NAMES)
    return next(above, stem)


def _stem(file: str) -> str:
    for end in (".gz", ".h5ad", ".zarr", ".h5", "matrix.mtx"):
        file = file.removesuffix(end)
    for end in ("filtered_feature_bc_matrix", "raw_feature_bc_matrix"):
        file = file.removesuffix(f"sample_{end}").removesuffix(end)
    return file.rstrip("_.-")
