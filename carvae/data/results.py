"""Results beside the cells they belong to: in memory, as .h5ad or zarr, or as a table; all or nothing.

Results on disk are written as they come, some cells at a time. A query that is itself a file of the output's format is
copied and added to, so that nothing of it is lost; any other is written anew from its stream of counts.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from carvae.data.atomic import refuse_model, replacing_file, replacing_folder
from carvae.data.cells import hash_names
from carvae.data.on_disk import Columns, make_plain, opened, plain, readable_by_others, replace_element, write_counts
from carvae.data.palette import GREY, colours
from carvae.data.readers import CountsSource, is_zarr
from carvae.data.regions import Regions
from carvae.data.spreadsheet import neutral, text_file
from carvae.errors import ConfigError

log = logging.getLogger(__name__)

LATENT = "X_carvae"
TABLES = (".csv", ".csv.gz")
LATE_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class CellResults:
    """What carvae says of some cells, in the order of the query."""

    obs: pd.DataFrame
    """Columns for ``obs``, all named ``carvae_...``; none from an embedding."""
    latent: NDArray[np.float32]
    probability: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Key of ``obsm`` -> probabilities."""

    def obsm(self) -> dict[str, NDArray[np.float32]]:
        """Everything for ``obsm``."""
        return {LATENT: self.latent} | self.probability

    def without_rows(self) -> CellResults:
        """The same without the rows of ``obsm``, which are written elsewhere."""
        none = {key: np.empty((0, values.shape[1]), values.dtype) for key, values in self.probability.items()}
        return CellResults(self.obs, np.empty((0, self.latent.shape[1]), self.latent.dtype), none)

    @classmethod
    def joined(cls, parts: Sequence[CellResults]) -> CellResults:
        """The results of all cells from those of some after the other."""
        return cls(
            obs=pd.concat([part.obs for part in parts], ignore_index=True),
            latent=np.concatenate([part.latent for part in parts]),
            probability={key: np.concatenate([p.probability[key] for p in parts]) for key in parts[0].probability},
        )


class ResultsWriter(Protocol):
    """Takes results in the order of the cells."""

    def append(self, results: CellResults) -> None:
        """Write the results of the next cells."""
        ...

    def regions(self, chunk: int, widths: Mapping[str, int]) -> Regions | None:
        """Places for ``obsm`` that others write, before the first results; None where one process writes all."""
        ...

    def finish(self, sources: Sequence[CountsSource], late: pd.DataFrame, uns: dict[str, Any]) -> None:
        """Write what is known only at the end: further columns of ``obs``; ``sources`` are verified by now."""
        ...


def add_results(adata: AnnData, results: CellResults, late: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Put results into an AnnData; what an earlier run wrote is replaced, nothing else is touched."""
    gone = _replaced(results, _columns(adata.uns.get("carvae"))) | set(late)
    kept = adata.obs.drop(columns=[column for column in adata.obs if column in gone])
    adata.obs = pd.concat([kept, results.obs.set_axis(kept.index), late.set_axis(kept.index)], axis=1)
    adata.obsm.update(results.obsm())
    adata.uns[_uns_key(uns, "carvae" in adata.uns)] = uns
    adata.uns.update(_colours(uns))


@contextmanager
def writing_results(
    query: Path, sources: Sequence[CountsSource], sample: pd.Categorical, out: Path, cells: Path | None = None
) -> Iterator[ResultsWriter]:
    """What takes the results for ``out``, in the format that its name says; the file appears when all is done.

    Parameters
    ----------
    sample
        Sample of each cell.
    cells
        Table of cells that is written beside ``out``, without the latent coordinates.

    Raises
    ------
    ConfigError
        The name of ``out`` says no format, or ``out`` is the query.
    """
    check_output(query, out)
    with ExitStack() as stack:
        writers: list[ResultsWriter] = []
        if cells is not None:
            writers.append(stack.enter_context(_writing_table(cells, sources, sample, latent=False)))
        if out.name.endswith(TABLES):
            writers.append(stack.enter_context(_writing_table(out, sources, sample, latent=True)))
        else:
            writers.append(stack.enter_context(_writing_anndata(query, sources, sample, out)))
        yield _Together(writers)


@contextmanager
def _writing_table(
    out: Path, sources: Sequence[CountsSource], sample: pd.Categorical, *, latent: bool
) -> Iterator[ResultsWriter]:
    with replacing_file(out) as scratch, text_file(scratch) as file:
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="", dir=scratch.parent) as rows:
            yield _TableWriter(file, rows, sources, sample, latent=latent)


@contextmanager
def _writing_anndata(
    query: Path, sources: Sequence[CountsSource], sample: pd.Categorical, out: Path
) -> Iterator[ResultsWriter]:
    with replacing_folder(out) if out.suffix == ".zarr" else replacing_file(out) as scratch:
        copied = query.suffix == out.suffix and len(sources) == 1
        if query.suffix in {".h5ad", ".zarr"} and not copied:
            log.warning("%s takes counts and obs of %s, not its layers, obsm, uns and raw", out.name, query.name)
        if copied and query.is_dir():
            shutil.copytree(query, scratch, dirs_exist_ok=True)
        elif copied:
            shutil.copyfile(query, scratch)
        with readable_by_others(), opened(scratch) as root:
            yield _AnnDataWriter(root, sources, sample, copied, scratch if out.suffix == ".zarr" else None)


def check_output(query: Path, out: Path) -> None:
    """Raise ConfigError where ``out`` cannot be written as asked."""
    if not out.name.endswith((".h5ad", ".zarr", *TABLES)):
        raise ConfigError(f"--out {str(out)!r} says no format; end it in .h5ad, .zarr, .csv or .csv.gz")
    refuse_model(out)
    if out.exists() and query.exists() and out.resolve() == query.resolve():
        raise ConfigError(f"--out {str(out)!r} is the query itself; choose another name")
    inside = query.is_dir() and query.resolve() in out.resolve().parents
    if inside and (is_zarr(query) or not out.name.endswith(TABLES)):
        raise ConfigError(
            f"--out {str(out)!r} lies in the query and would be taken for a part of it; choose another folder"
        )
    if out.suffix != ".zarr" and out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder; choose another name")


def samples_path(out: Path) -> Path:
    """Where the table of samples lies: ``A.h5ad`` -> ``A.samples.csv``."""
    return out.with_name(f"{_stem(out)}.samples.csv")


def cells_path(out: Path) -> Path | None:
    """Where the table of cells lies: ``A.h5ad`` -> ``A.cells.csv.gz``; None where ``out`` is one."""
    return None if out.name.endswith(TABLES) else out.with_name(f"{_stem(out)}.cells.csv.gz")


def _stem(out: Path) -> str:
    return next(out.name.removesuffix(end) for end in (".h5ad", ".zarr", ".csv.gz", ".csv") if out.name.endswith(end))


def earlier_columns(query: Path | AnnData) -> set[str]:
    """Columns of ``obs`` that an earlier run wrote into the query."""
    if isinstance(query, AnnData):
        return _columns(query.uns.get("carvae"))
    if is_zarr(query):
        return _columns(made_before(zarr.open_group(query, mode="r", use_consolidated=False)))
    if query.suffix == ".h5ad":
        with h5py.File(query, "r", locking="best-effort") as file:
            return _columns(made_before(file))
    return set()


def made_before(root: Any) -> dict[str, Any]:
    """``uns["carvae"]`` of an open file; empty where there is none, or something else of the user's."""
    found = read_elem(root["uns/carvae"]) if "uns/carvae" in root else {}
    return dict(found) if isinstance(found, Mapping) else {}


def _columns(made: object) -> set[str]:
    """Columns of ``obs`` that are told in ``uns["carvae"]``."""
    return set(map(str, np.ravel(made.get("columns", ())))) if isinstance(made, Mapping) else set()


def _uns_key(uns: Mapping[str, Any], annotated: bool) -> str:
    """Key of ``uns``: an embedding of what was annotated before does not pass for the source of its labels."""
    return "carvae" if "columns" in uns or not annotated else "carvae_embedding"


def _colours(uns: Mapping[str, Any]) -> dict[str, NDArray[np.object_]]:
    """Key of ``uns`` by which scanpy colours the states of each axis -> a colour per category."""
    found = {}
    for axis, states in uns.get("states", {}).items():
        own = colours(list(map(str, states)))
        found[f"carvae_{axis}_colors"] = np.array([*own, GREY], dtype=object)  # the last category is unknown
        found[f"carvae_{axis}_best_colors"] = np.array(own, dtype=object)
    return found


def _replaced(results: CellResults, earlier: set[str]) -> set[str]:
    """Columns of ``obs`` that go: those of the same names, and when labelling those that an earlier run wrote."""
    return {*map(str, results.obs.columns), *(earlier if len(results.obs.columns) else ())}


class _Names:
    """Barcodes of the cells of several sources, which bear the sample where they would clash."""

    def __init__(self, sources: Sequence[CountsSource]) -> None:
        self.sources = sources
        self.first = np.cumsum([0, *(source.n_cells for source in sources)])
        hashes = np.concatenate([hash_names(source.cells) for source in sources]) if len(sources) > 1 else np.arange(1)
        self.clash = len(np.unique(hashes)) < len(hashes)

    def of(self, start: int, stop: int) -> list[str]:
        found: list[str] = []
        for source, first in zip(self.sources, self.first, strict=False):
            part = slice(max(start - first, 0), max(stop - first, 0))
            if part.start < min(part.stop, source.n_cells):
                found += [f"{cell}_{source.name}" if self.clash else str(cell) for cell in source.cells.names(part)]
        return found


class _Together:
    """Hands everything to several writers."""

    def __init__(self, writers: Sequence[ResultsWriter]) -> None:
        self.writers = writers

    def append(self, results: CellResults) -> None:
        for writer in self.writers:
            writer.append(results)

    def regions(self, chunk: int, widths: Mapping[str, int]) -> Regions | None:
        found = [writer.regions(chunk, widths) for writer in self.writers]
        return next((regions for regions in found if regions is not None), None)

    def finish(self, sources: Sequence[CountsSource], late: pd.DataFrame, uns: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.finish(sources, late, uns)


class _TableWriter:
    """Cells as rows: barcode, sample, results, with ``latent`` the coordinates, and what is known only at the end.

    Rows wait in a file without a name for their last columns.
    """

    def __init__(
        self, file: IO[str], rows: IO[str], sources: Sequence[CountsSource], sample: pd.Categorical, *, latent: bool
    ) -> None:
        self.file, self.rows, self.names, self.sample, self.done = file, rows, _Names(sources), sample, 0
        self.latent = latent

    def append(self, results: CellResults) -> None:
        stop = self.done + len(results.obs)
        table = results.obs.reset_index(drop=True)
        if self.latent:
            names = [f"{LATENT}_{k + 1}" for k in range(results.latent.shape[1])]
            table = pd.concat([table, pd.DataFrame(results.latent, columns=names)], axis=1)
        table.insert(0, "sample", pd.Series(self.sample[self.done : stop]))
        table.index = pd.Index(self.names.of(self.done, stop), dtype=object)
        neutral(table).to_csv(self.rows, index_label="cell", header=not self.done, lineterminator="\n")
        self.done = stop

    def regions(self, chunk: int, widths: Mapping[str, int]) -> Regions | None:
        return None

    def finish(self, sources: Sequence[CountsSource], late: pd.DataFrame, uns: dict[str, Any]) -> None:
        self.rows.seek(0)
        if not len(late.columns):
            shutil.copyfileobj(self.rows, self.file)
            return
        self.file.write(f"{self.rows.readline().rstrip()},{','.join(map(str, late))}\n")
        for start in range(0, len(late), LATE_AT_ONCE):
            some = neutral(late.iloc[start : start + LATE_AT_ONCE])
            for end in some.to_csv(index=False, header=False, lineterminator="\n").splitlines(keepends=True):
                self.file.write(f"{self.rows.readline().rstrip()},{end}")


class _AnnDataWriter:
    def __init__(
        self, root: Any, sources: Sequence[CountsSource], sample: pd.Categorical, copied: bool, store: Path | None
    ) -> None:
        self.root, self.copied, self.store = root, copied, store
        if copied:
            make_plain(root)
        else:
            write_elem(root, "/", AnnData(obs=plain(_obs(sources, sample))))
        for part in ("obsm", "uns"):
            if part not in root:
                write_elem(root, part, {})
        self.earlier = _columns(made_before(root))
        self.columns: Columns | None = None
        self.by_others: Regions | None = None
        self.n_cells = len(sample)

    def append(self, results: CellResults) -> None:
        if self.columns is None:
            self.columns = Columns(self.root, self.n_cells, _replaced(results, self.earlier))
        obsm = {} if self.by_others else {f"obsm/{key}": values for key, values in results.obsm().items()}
        self.columns.append({f"obs/{name}": results.obs[name] for name in results.obs} | obsm, len(results.obs))

    def regions(self, chunk: int, widths: Mapping[str, int]) -> Regions | None:
        if self.store is not None:  # HDF5 has one writer
            self.by_others = Regions.made(self.store, self.root, self.n_cells, chunk, widths)
        return self.by_others

    def finish(self, sources: Sequence[CountsSource], late: pd.DataFrame, uns: dict[str, Any]) -> None:
        assert self.columns is not None, "a query has cells"
        self.columns.close()
        if self.by_others is not None:
            self.by_others.finish()
        if len(late.columns):
            columns = Columns(self.root, self.n_cells, set(map(str, late)))
            columns.append({f"obs/{name}": late[name] for name in late}, len(late))
            columns.close()
        replace_element(self.root, f"uns/{_uns_key(uns, 'carvae' in self.root['uns'])}", uns)
        for key, colour in _colours(uns).items():
            replace_element(self.root, f"uns/{key}", colour)
        if not self.copied:
            write_counts(self.root, sources)


def _obs(sources: Sequence[CountsSource], sample: pd.Categorical) -> pd.DataFrame:
    """The ``obs`` of all cells; of several sources with the sample as a column, and in barcodes that clash."""
    if len(sources) == 1:
        return sources[0].obs
    obs = pd.concat([source.obs for source in sources])
    obs["sample"] = np.asarray(sample)
    obs.index = pd.Index(_Names(sources).of(0, len(obs)), dtype=object)
    return obs
