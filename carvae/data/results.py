"""Results beside the cells they belong to: in memory, as .h5ad or zarr, or as a table; all or nothing.

A query that is itself a file of the output's format is copied and added to, so that nothing of it is lost; any other is
written anew from its stream of counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
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
from numpy.typing import NDArray

from carvae.data.atomic import replacing_file, replacing_folder
from carvae.data.readers import CountsSource
from carvae.errors import ConfigError

PREFIX = "carvae_"
LATENT = "X_carvae"
TABLES = (".csv", ".csv.gz")


@dataclass(frozen=True, slots=True)
class CellResults:
    """What carvae says of every cell, in the order of the query."""

    obs: pd.DataFrame
    """Columns for ``obs``, all named ``carvae_...``."""
    latent: NDArray[np.float32]
    probability: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Key of ``obsm`` -> probabilities."""
    uns: dict[str, Any] = field(default_factory=dict)
    """For ``uns["carvae"]``."""

    def obsm(self) -> dict[str, NDArray[np.float32]]:
        """Everything for ``obsm``."""
        return {LATENT: self.latent} | self.probability


def add_results(adata: AnnData, results: CellResults) -> None:
    """Put results into an AnnData; those of an earlier run of carvae are replaced, nothing else is touched."""
    adata.obs = _joined(adata.obs, results.obs)
    for key in [k for k in adata.obsm if k.startswith(PREFIX)]:
        del adata.obsm[key]
    adata.obsm.update(results.obsm())
    adata.uns["carvae"] = results.uns


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
            _write_adata(query, sources, results, scratch)


def check_output(query: Path, out: Path) -> None:
    """Raise ConfigError where ``out`` cannot be written as asked."""
    if not out.name.endswith((".h5ad", ".zarr", *TABLES)):
        raise ConfigError(f"--out {str(out)!r} says no format; end it in .h5ad, .zarr, .csv or .csv.gz")
    if out.exists() and query.exists() and out.resolve() == query.resolve():
        raise ConfigError(f"--out {str(out)!r} is the query itself; choose another name")


def samples_path(out: Path) -> Path:
    """Where the table of samples lies: ``A.h5ad`` -> ``A.samples.csv``."""
    stem = next(out.name.removesuffix(end) for end in (".h5ad", ".zarr", ".csv.gz", ".csv") if out.name.endswith(end))
    return out.with_name(f"{stem}.samples.csv")


def _joined(obs: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    kept = obs.drop(columns=[c for c in obs if str(c).startswith(PREFIX)])
    return pd.concat([kept, results.set_axis(kept.index)], axis=1)


def _table(sources: Sequence[CountsSource], results: CellResults) -> pd.DataFrame:
    """Cells as rows: barcode, sample where there are several, results, and the latent coordinates."""
    latent = pd.DataFrame(
        results.latent, index=results.obs.index, columns=[f"{LATENT}_{k + 1}" for k in range(results.latent.shape[1])]
    )
    table = pd.concat([results.obs, latent], axis=1)
    if len(sources) > 1:
        table.insert(0, "sample", np.concatenate([s.obs["sample"].astype(str).to_numpy() for s in sources]))
    return table


def _write_adata(query: Path, sources: Sequence[CountsSource], results: CellResults, scratch: Path) -> None:
    with ad.settings.override(allow_write_nullable_strings=False), ExitStack() as stack:
        copied = query.suffix == scratch.suffix and len(sources) == 1
        if copied and query.is_dir():
            shutil.copytree(query, scratch, dirs_exist_ok=True)
        elif copied:
            shutil.copyfile(query, scratch)
        root: Any = zarr.open_group(scratch, mode="a") if scratch.suffix == ".zarr" else h5py.File(scratch, "a")
        if isinstance(root, h5py.File):
            stack.enter_context(root)
        if not copied:
            _write_counts(root, sources)
        obs = read_elem(root["obs"]) if copied else pd.concat([source.obs for source in sources])
        _write(root, "obs", _joined(obs, results.obs))
        for key in [k for k in root["obsm"] if k.startswith(PREFIX) or k == LATENT]:
            del root["obsm"][key]
        for key, values in results.obsm().items():
            _write(root, f"obsm/{key}", values)
        _write(root, "uns/carvae", results.uns)


def _write(root: Any, key: str, value: Any) -> None:
    if key in root:
        del root[key]
    write_elem(root, key, value)


def _write_counts(root: Any, sources: Sequence[CountsSource]) -> None:
    """A new AnnData with the sources' counts, over the genes that all of them have, appended chunk by chunk."""
    genes = _shared_genes(sources)
    ids = sources[0].gene_ids
    var = pd.DataFrame(index=pd.Index(genes, dtype=object))
    if ids is not None:
        position = pd.Index(sources[0].genes).get_indexer(pd.Index(genes))
        var["gene_ids"] = [ids[i] for i in position]
    write_elem(root, "/", AnnData(sp.csr_matrix((0, len(genes)), dtype=np.int32), var=var))
    _write(root, "X", sp.csr_matrix((0, len(genes)), dtype=np.int32))
    counts = sparse_dataset(root["X"])
    for source in sources:
        columns = pd.Index(source.genes).get_indexer(pd.Index(genes))
        same = list(source.genes) == genes
        for chunk in source.chunks():
            counts.append(chunk if same else chunk[:, columns].tocsr())


def _shared_genes(sources: Sequence[CountsSource]) -> list[str]:
    first = list(sources[0].genes)
    others = [set(source.genes) for source in sources[1:]]
    return [gene for gene in first if all(gene in other for other in others)]
