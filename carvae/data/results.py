"""Results beside the cells they belong to: in memory, as .h5ad or zarr, or as a table; all or nothing.

A query that is itself a file of the output's format is copied and added to, so that nothing of it is lost; any other is
written anew from its stream of counts.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset, write_elem
from anndata.utils import make_index_unique
from numpy.typing import NDArray

from carvae.data.atomic import replacing_file, replacing_folder
from carvae.data.readers import CountsSource
from carvae.errors import ConfigError

log = logging.getLogger(__name__)

LATENT = "X_carvae"
TABLES = (".csv", ".csv.gz")
ZARR_CHUNK = 1 << 17
"""Counts per file of a new zarr store; zarr would take one each for a matrix that begins empty."""
ZARR_SUMMARY_FORMAT = 2
"""Format of zarr whose specification knows a summary of all members (.zmetadata)."""


@dataclass(frozen=True, slots=True)
class CellResults:
    """What carvae says of every cell, in the order of the query."""

    obs: pd.DataFrame
    """Columns for ``obs``, all named ``carvae_...``."""
    latent: NDArray[np.float32]
    sample: NDArray[np.object_]
    """Sample of each cell."""
    probability: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Key of ``obsm`` -> probabilities."""
    uns: dict[str, Any] = field(default_factory=dict)
    """For ``uns["carvae"]``."""

    def uns_key(self, annotated: bool) -> str:
        """Key of ``uns``: an embedding of what was annotated before does not pass for the source of its labels."""
        return "carvae" if len(self.obs.columns) or not annotated else "carvae_embedding"

    def replaced(self, earlier: Mapping[str, Any]) -> set[str]:
        """Columns of ``obs`` that go: those of the same names, and when labelling those that an earlier run wrote."""
        written = earlier.get("columns", ()) if len(self.obs.columns) else ()
        return {*map(str, self.obs.columns), *map(str, written)}

    def obsm(self) -> dict[str, NDArray[np.float32]]:
        """Everything for ``obsm``."""
        return {LATENT: self.latent} | self.probability


def add_results(adata: AnnData, results: CellResults) -> None:
    """Put results into an AnnData; what an earlier run wrote is replaced, nothing else is touched."""
    adata.obs = _joined(adata.obs, results.obs, results.replaced(adata.uns.get("carvae", {})))
    adata.obsm.update(results.obsm())
    adata.uns[results.uns_key("carvae" in adata.uns)] = results.uns


def write_results(
    query: Path, sources: Sequence[CountsSource], results: CellResults, out: Path, samples: pd.DataFrame | None
) -> None:
    """Write results to ``out``, in the format that its name says, and the samples' table beside it.

    Raises
    ------
    ConfigError
        The name of ``out`` says no format, or ``out`` is the query.
    """
    check_output(query, out)
    with ExitStack() as stack:  # both files appear only when both are complete
        scratch = stack.enter_context(replacing_folder(out) if out.suffix == ".zarr" else replacing_file(out))
        if samples is not None:
            table = stack.enter_context(replacing_file(samples_path(out)))
            samples.to_csv(table, index=False)
        if out.name.endswith(TABLES):
            _table(sources, results).to_csv(scratch, index_label="cell", compression="infer")
        else:
            if query.suffix in {".h5ad", ".zarr"} and query.suffix != out.suffix:
                log.warning("%s takes counts and obs of %s, not its layers, obsm, uns and raw", out.name, query.name)
            _write_adata(query, sources, results, scratch)


def check_output(query: Path, out: Path) -> None:
    """Raise ConfigError where ``out`` cannot be written as asked."""
    if not out.name.endswith((".h5ad", ".zarr", *TABLES)):
        raise ConfigError(f"--out {str(out)!r} says no format; end it in .h5ad, .zarr, .csv or .csv.gz")
    if out.exists() and query.exists() and out.resolve() == query.resolve():
        raise ConfigError(f"--out {str(out)!r} is the query itself; choose another name")
    if not out.name.endswith(TABLES) and query.is_dir() and query.resolve() in out.resolve().parents:
        raise ConfigError(
            f"--out {str(out)!r} lies in the query and would be read as part of it; choose another folder"
        )
    if out.suffix != ".zarr" and out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder; choose another name")


def samples_path(out: Path) -> Path:
    """Where the table of samples lies: ``A.h5ad`` -> ``A.samples.csv``."""
    stem = next(out.name.removesuffix(end) for end in (".h5ad", ".zarr", ".csv.gz", ".csv") if out.name.endswith(end))
    return out.with_name(f"{stem}.samples.csv")


def _joined(obs: pd.DataFrame, results: pd.DataFrame, replaced: set[str]) -> pd.DataFrame:
    kept = obs.drop(columns=[c for c in obs if c in replaced])
    return pd.concat([kept, results.set_axis(kept.index)], axis=1)


def _cells(sources: Sequence[CountsSource], results: CellResults) -> pd.DataFrame:
    """The ``obs`` of all cells; of several sources with the sample as a column, and in barcodes that clash."""
    if len(sources) == 1:
        return sources[0].obs
    obs = pd.concat([source.obs for source in sources])
    obs["sample"] = results.sample
    if not obs.index.is_unique:
        obs.index = pd.Index([f"{cell}_{source.name}" for source in sources for cell in source.obs.index], dtype=object)
    return obs


def _table(sources: Sequence[CountsSource], results: CellResults) -> pd.DataFrame:
    """Cells as rows: barcode, sample, results, and the latent coordinates."""
    cells = _cells(sources, results)
    names = [f"{LATENT}_{k + 1}" for k in range(results.latent.shape[1])]
    latent = pd.DataFrame(results.latent, index=cells.index, columns=names)
    table = pd.concat([results.obs.set_axis(cells.index), latent], axis=1)
    table.insert(0, "sample", results.sample)
    return table


def _write_adata(query: Path, sources: Sequence[CountsSource], results: CellResults, scratch: Path) -> None:
    copied = query.suffix == scratch.suffix and len(sources) == 1
    if copied and query.is_dir():
        shutil.copytree(query, scratch, dirs_exist_ok=True)
    elif copied:
        shutil.copyfile(query, scratch)
    with _readable_by_others(), _opened(scratch) as root:
        if not copied:
            _write_counts(root, sources)
        obs = read_elem(root["obs"]) if copied else _cells(sources, results)
        earlier = read_elem(root["uns/carvae"]) if "uns/carvae" in root else {}
        _write(root, "obs", _plain(_joined(obs, results.obs, results.replaced(earlier))))
        for part in ("obsm", "uns"):
            if part not in root:
                write_elem(root, part, {})
        for key, values in results.obsm().items():
            _write(root, f"obsm/{key}", values)
        _write(root, f"uns/{results.uns_key('carvae' in root['uns'])}", results.uns)


def _readable_by_others() -> AbstractContextManager[None]:
    """Anndata's settings for plain strings and zarr v3, of which older versions lack some."""
    wanted = {"allow_write_nullable_strings": False, "zarr_write_format": 3, "auto_shard_zarr_v3": False}
    known: AbstractContextManager[None] = ad.settings.override(
        **{name: value for name, value in wanted.items() if hasattr(ad.settings, name)}
    )
    return known


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The root of a file or store for writing; a zarr store's summary of its members must not hide what is new."""
    if path.suffix != ".zarr":
        with h5py.File(path, "a") as file:
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


def _plain(obs: pd.DataFrame) -> pd.DataFrame:
    """The table with text as categories and names as plain strings, which R and older anndata read."""
    plain = obs.copy()
    plain.index = pd.Index(obs.index.astype(str), dtype=object, name=obs.index.name)
    for position, column in enumerate(obs[name] for name in obs):
        if isinstance(column.dtype, pd.CategoricalDtype) and isinstance(column.cat.categories.dtype, pd.StringDtype):
            names = pd.Index(column.cat.categories.tolist(), dtype=object)
            plain.isetitem(position, pd.Categorical.from_codes(column.cat.codes, names, ordered=column.cat.ordered))
        elif isinstance(column.dtype, pd.StringDtype) or column.dtype == object:
            plain.isetitem(position, pd.Categorical(column.astype("string").astype(object)))
    return plain


def _write(root: Any, key: str, value: Any, **zarr_settings: Any) -> None:
    if key in root:
        del root[key]
    write_elem(root, key, value, dataset_kwargs={} if isinstance(root, h5py.File) else zarr_settings)


def _write_counts(root: Any, sources: Sequence[CountsSource]) -> None:
    """A new AnnData with the sources' counts, over the genes that all of them have, appended chunk by chunk."""
    keys = [_gene_keys(source) for source in sources]
    held = set.intersection(*map(set, keys))
    wanted = [key for key in keys[0] if key in held]
    columns = [pd.Index(of_source).get_indexer(pd.Index(wanted)) for of_source in keys]
    first = sources[0]
    names = make_index_unique(pd.Index([first.genes[i] for i in columns[0]], dtype=object))
    var = pd.DataFrame(index=names)
    if first.gene_ids is not None:
        var["gene_ids"] = [first.gene_ids[i] for i in columns[0]]
    write_elem(root, "/", AnnData(sp.csr_matrix((0, len(wanted)), dtype=np.int32), var=var))
    _write(root, "X", sp.csr_matrix((0, len(wanted)), dtype=np.int32), chunks=(ZARR_CHUNK,))
    counts = sparse_dataset(root["X"])
    for source, own in zip(sources, columns, strict=True):
        same = np.array_equal(own, np.arange(len(source.genes)))
        for chunk in source.chunks():
            counts.append(chunk if same else chunk[:, own].tocsr())


def _gene_keys(source: CountsSource) -> list[str]:
    """What tells each gene of a source from the others: its name, and which of that name it is."""
    seen = Counter[str]()
    keys = []
    for gene in source.genes:
        keys.append(f"{gene}\t{seen[gene]}")
        seen[gene] += 1
    return keys
