"""T-cell receptors as sequencers' software leaves them, read by scirpy and joined to a query's cells by barcode.

10x ``filtered_contig_annotations.csv``, AIRR TSV, and AnnData with ``obsm["airr"]``. scirpy reads and ranks the chains
of each cell; it is imported here alone, when there is something to read.

Axes: N cells of the query, R cells with a receptor.
"""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from numpy.typing import NDArray

from carvae.data.adata import root_of
from carvae.data.readers import PLAIN_NAMES
from carvae.errors import ConfigError, ReadError

CONTIGS = ("filtered_contig_annotations.csv", "filtered_contig_annotations.csv.gz")
AIRR = (".tsv", ".tsv.gz")
PLAIN = PLAIN_NAMES | set("vdj vdj_t vdj_t_gd vdj_b count airr_rearrangement filtered_contig_annotations multi".split())
"""Names of folders and files that say nothing about the sample."""
CHAINS = ("VJ_1", "VJ_2", "VDJ_1", "VDJ_2")
STORES, RECEPTORS = (".h5ad", ".zarr", ".h5mu"), "obsm/airr"
ARMS = {"TRA": "ab", "TRB": "ab", "TRG": "gd", "TRD": "gd"}
NEEDED_10X = ("barcode", "chain", "cdr3", "cdr3_nt", "productive")
NEEDED_AIRR = ("cell_id", "locus", "junction", "junction_aa", "productive")
INSTALL = "pip install 'carvae[tcr]'"
SEARCH_DEPTH = 6
CLEARLY = 5
CHANCE = 0.05
"""Share of the barcodes (or of the cells, where they are fewer) below which what is met is met by chance: of 10x's
737,000 barcodes two unrelated samples of some thousand cells have a few in common."""
PARTED = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What parts columns; a spreadsheet may have saved a file with another."""
_BARCODE = re.compile(r"(?<![A-Za-z])([ACGTN]{12,})(?:-(\d+))?(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Receptors:
    """The chains of the cells of one file."""

    names: tuple[str, ...]
    """What the file's path may say of the sample, the likeliest first."""
    path: str
    chains: pd.DataFrame
    """Indexed by barcode: for each of `CHAINS` the columns ``<chain>_nt``, ``<chain>_aa``, ``<chain>_locus``, and
    ``subtype``, ``pairing`` in scirpy's words."""


@dataclass(frozen=True, slots=True)
class FileMatch:
    """How the barcodes of one file met the query."""

    file: str
    sample: str
    """The only sample of the query in which it was looked for; empty where in all."""
    n_barcodes: int
    n_matched: int
    n_ambiguous: int
    """Barcodes that are cells of several samples."""

    def sentence(self) -> str:
        """The match in words."""
        where = f" of sample {self.sample}" if self.sample else ""
        text = f"{self.file}: {self.n_matched:,} of {self.n_barcodes:,} barcodes are cells of the query{where}"
        if self.n_ambiguous:
            text += (
                f"; {self.n_ambiguous:,} are in several samples and are left out: put each file into a folder with the "
                "name of its sample"
            )
        return text


def is_contigs(path: Path) -> bool:
    """Whether a file's name is that of contigs or of an AIRR table."""
    return path.name.endswith(CONTIGS) or (path.name.endswith(AIRR) and "airr" in path.name.casefold())


def beside(query: Path) -> list[Path]:
    """The receptors that a query has: its own of scirpy, else those of 10x below its folder or beside its matrix."""
    if not query.exists():
        return []
    if query.suffix in STORES:
        with root_of(query) as root:
            return [query] if RECEPTORS in root else []
    if query.is_dir() and (found := list(_below(query, 0))):
        return found
    if query.is_dir() and query.name not in PLAIN_NAMES:
        return []
    folders = (query.parent, *(query.parent.parent / name for name in ("vdj_t", "vdj_t_gd")))
    return [path for folder in folders for name in CONTIGS if (path := folder / name).is_file()]


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and is_contigs(entry):
            yield entry
        elif entry.is_dir() and depth < SEARCH_DEPTH:
            yield from _below(entry, depth + 1)


def read_receptors(source: Path | AnnData) -> list[Receptors]:
    """The receptors at ``source``: a file, a folder of files with samples in their paths, or an AnnData of scirpy.

    Raises
    ------
    ReadError
        There is no such file, it is broken, or it holds no receptors.
    ConfigError
        scirpy is not installed.
    """
    if isinstance(source, AnnData):
        with _scirpy() as scirpy:
            return [Receptors((), "the AnnData", _chains(source, scirpy, "the AnnData"))]
    if not source.exists():
        raise ReadError(f"--clones {str(source)!r} does not exist; give a contig file, an AIRR table or their folder")
    if source.is_file() or source.suffix == ".zarr":
        return [_read(source, source.parent)]
    files = list(_below(source, 0))
    if not files:
        raise ReadError(
            f"--clones {str(source)!r} holds no filtered_contig_annotations.csv and no AIRR table (its name holds "
            '"airr" and ends in .tsv); give the file itself'
        )
    return [_read(file, source) for file in files]


def _read(path: Path, root: Path) -> Receptors:
    names = _sample_names(path, root)
    with _scirpy() as scirpy:
        try:
            if path.suffix in STORES:
                adata = _read_anndata(path)
            elif path.name.endswith((".csv", ".csv.gz")):
                _check_columns(path, ",", NEEDED_10X)
                adata = scirpy.io.read_10x_vdj(path)
            elif path.name.endswith(AIRR):
                _check_columns(path, "\t", NEEDED_AIRR)
                adata = scirpy.io.read_airr(path)
            else:
                raise ReadError(
                    f"{path} is no receptor data that carvae reads; give filtered_contig_annotations.csv of 10x, an "
                    "AIRR table (.tsv), or an .h5ad or .h5mu of scirpy"
                )
            return Receptors(names, str(path), _chains(adata, scirpy, str(path)))
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            seen = " ".join(str(error).split())[:200]
            raise ReadError(f"{path} cannot be read as receptor data ({seen}); export it again") from None


def _read_anndata(path: Path) -> AnnData:
    """The cells and their receptors alone; of a MuData those of its part ``airr``."""
    with root_of(path) as root:
        part = root["mod/airr"] if "mod/airr" in root else root
        if RECEPTORS not in part:
            raise ReadError(f'{path} has no obsm["airr"], so it is no file of scirpy; read the contigs with scirpy.io')
        return AnnData(obs=pd.DataFrame(index=read_elem(part["obs"]).index), obsm={"airr": read_elem(part[RECEPTORS])})


def _check_columns(path: Path, sep: str, needed: Sequence[str]) -> None:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if any(line.rstrip(b"\r\n").count(b"\r") for line in file):  # they take pandas' parser all memory
            raise ReadError(f"{path} ends lines by single carriage returns; save it with newlines")
    columns = pd.read_csv(path, sep=sep, nrows=0).columns
    if len(columns) == 1 and (other := next((name for mark, name in PARTED.items() if mark in columns[0]), "")):
        raise ReadError(f"{path} parts its columns by {other}, not by {PARTED[sep]}; give the file as it was exported")
    if missing := [column for column in needed if column not in columns]:
        raise ReadError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, columns[:8]))}: is it really "
            f"{'10x contig annotations' if sep == ',' else 'an AIRR table'}?"
        )


def _chains(adata: AnnData, scirpy: Any, where: str) -> pd.DataFrame:
    """The ranked productive chains of every cell, and scirpy's judgement of the cell."""
    if "airr" not in adata.obsm:
        raise ReadError(f'{where} has no obsm["airr"], so it is no AnnData of scirpy; read the contigs with scirpy.io')
    if not adata.n_obs:
        raise ReadError(f"{where} holds no receptors of cells")
    adata = AnnData(obs=pd.DataFrame(index=adata.obs_names), obsm={"airr": adata.obsm["airr"]})
    scirpy.pp.index_chains(adata)
    scirpy.tl.chain_qc(adata)
    found = scirpy.get.airr(adata, ["junction", "junction_aa", "locus"], CHAINS)
    names = {"junction": "nt", "junction_aa": "aa", "locus": "locus"}
    table = pd.DataFrame(index=adata.obs_names.astype(str))
    for chain in CHAINS:
        for field, short in names.items():
            table[f"{chain}_{short}"] = found[f"{chain}_{field}"].fillna("").astype(str).to_numpy(object)
    table["subtype"] = adata.obs["receptor_subtype"].astype(str).to_numpy(object)
    table["pairing"] = adata.obs["chain_pairing"].astype(str).to_numpy(object)
    return table


@contextmanager
def _scirpy() -> Iterator[Any]:
    """The library; what it and its own libraries have to warn about is not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import scirpy
        except ImportError:
            raise ConfigError(f"receptors are read by scirpy, which is not installed; {INSTALL}") from None
        yield scirpy


def _sample_names(path: Path, root: Path) -> tuple[str, ...]:
    """What the folders and the file say without customary names: all from ``root`` on as one, then each, last first."""
    stem = path.name
    for end in (*CONTIGS, ".airr.tsv.gz", ".airr.tsv", ".tsv.gz", ".tsv", ".csv", *STORES):
        stem = stem.removesuffix(end)
    stem = re.sub(r"airr(_rearrangement)?$", "", stem).rstrip("_.-")
    below = [part for part in (*path.relative_to(root).parts[:-1], stem) if part and part not in PLAIN]
    above = [part for part in path.resolve().parts[:-1] if part not in PLAIN]
    return tuple(dict.fromkeys(["_".join(below), *reversed(below), *reversed(above)]))


def match_cells(
    receptors: Receptors, names_N: NDArray[np.object_], sample_N: NDArray[np.object_]
) -> tuple[NDArray[np.intp], FileMatch]:
    """Place in the query of each barcode of a file, or -1, and what was found.

    They are sought in the sample that the file's path names or that has nearly all of them, else in all. Barcodes are
    compared whole; where fewer than half are found so, by their nucleotides (``AAAC...-1``), and one that several cells
    have is left out. A few that are met by chance are none.

    Parameters
    ----------
    names_N, sample_N
        Barcode and sample of each cell of the query.
    """
    wanted, samples = list(receptors.chains.index.astype(str)), set(sample_N)
    within = next((name for name in receptors.names if name in samples), "") or _whose(wanted, names_N, sample_N)
    own = np.flatnonzero(sample_N == within) if within else np.arange(len(names_N))
    best, ambiguous = np.full(len(wanted), -1, np.intp), 0
    for key in (str, _with_lane, _without_lane):
        at, doubtful = _lookup([key(name) for name in names_N[own]], [key(name) for name in wanted])
        if (at >= 0).sum() > (best >= 0).sum() or not (best >= 0).any():
            best, ambiguous = np.where(at >= 0, own[at], -1), doubtful
        if (best >= 0).mean() >= 0.5:  # noqa: PLR2004 (half)
            break
    if (best >= 0).sum() < CHANCE * min(len(wanted), len(own)):
        best[:] = -1
    return best, FileMatch(receptors.path, within, len(wanted), int((best >= 0).sum()), ambiguous)


def _whose(wanted: Sequence[str], names_N: NDArray[np.object_], sample_N: NDArray[np.object_]) -> str:
    """The sample that has `CLEARLY` times as many of the barcodes as any other; empty where none has."""
    keys = {_without_lane(name) for name in wanted} - {""}
    has_N = np.fromiter((_without_lane(name) in keys for name in names_N), np.bool_, len(names_N))
    found = pd.Series(sample_N[has_N]).value_counts()
    if len(found) and found.iloc[0] >= CLEARLY * (found.iloc[1] if len(found) > 1 else 1):
        return str(found.index[0])
    return ""


def _lookup(cells: Sequence[str], wanted: Sequence[str]) -> tuple[NDArray[np.intp], int]:
    """Place of each wanted key among the cells' keys, -1 where none or several have it; and how many several have."""
    once: dict[str, int] = {}
    repeated: set[str] = set()
    for place, key in enumerate(cells):
        if key in once:
            repeated.add(key)
        once[key] = place
    for key in repeated:
        del once[key]
    at = np.array([once.get(key, -1) if key else -1 for key in wanted], dtype=np.intp)
    return at, sum(key in repeated for key in wanted if key)


def _with_lane(name: str) -> str:
    found = _BARCODE.search(str(name))
    return f"{found[1]}-{found[2] or 1}" if found else ""


def _without_lane(name: str) -> str:
    found = _BARCODE.search(str(name))
    return found[1] if found else ""
