"""Choice of the gene panel: variable genes across studies, and the genes that the labels rest on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import IngestConfig
from carvae.data.genes import excluded_by_policy
from carvae.errors import GeneError

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

MIN_GENES = 10
"""Fewer genes make no model."""
SPANS = (0.3, 0.6, 1.0)
"""Shares of the genes that seurat_v3's curve looks at, scanpy's own first; few or shallow cells need more."""
MIN_CELLS_PER_BATCH = 50
"""Batches with fewer drawn cells are ranked with the largest: the loess fit of seurat_v3 needs points."""


@dataclass(frozen=True, slots=True)
class Panel:
    """The genes a model sees, and why the others are not among them."""

    genes: tuple[str, ...]
    n_variable: int
    """Genes chosen because they vary."""
    n_signature: int
    """Genes added because a label signature holds them, or as identity genes."""
    excluded: dict[str, int]
    """Gene-policy group -> measured genes left out by it."""


def choose_panel(
    counts: sp.csr_matrix,
    batch: NDArray[np.object_],
    universe: NDArray[np.object_],
    measured: NDArray[np.bool_],
    signature_genes: Sequence[str],
    config: IngestConfig,
) -> Panel:
    """Return the panel chosen on drawn cells.

    Parameters
    ----------
    counts
        Raw counts of the drawn cells, [cells, universe].
    batch
        Batch of each drawn cell.
    universe
        Symbols of all measured genes.
    measured
        bool [n_studies, universe].
    signature_genes
        Genes that enter whether or not they vary, if any study measured them and the policy allows.
    config
        The ingest section.

    Raises
    ------
    GeneError
        Too few genes are shared by the studies.
    """
    groups = excluded_by_policy(universe, config.exclude_genes)
    if "transgene" in groups:
        own = {name.casefold() for name in config.transgenes}
        groups["transgene"] |= np.fromiter((str(name).casefold() in own for name in universe), bool, len(universe))
    allowed = ~np.logical_or.reduce([*groups.values(), np.zeros(len(universe), np.bool_)])
    detected = np.asarray((counts > 0).sum(axis=0)).ravel() >= max(3, counts.shape[0] // 10_000)
    shared = measured.mean(axis=0) >= config.min_study_share
    candidates = np.flatnonzero(allowed & detected & shared)
    if candidates.size < MIN_GENES:
        raise GeneError(
            f"only {candidates.size} detected genes are measured by {config.min_study_share:.0%} of the studies; "
            "check that the studies use the same species and identifiers, or lower ingest.min_study_share"
        )
    variable = candidates[_most_variable(counts[:, candidates], batch, config.n_top_genes)]
    wanted = np.isin(universe, [*signature_genes, *config.identity_genes]) & allowed & measured.any(axis=0)
    chosen = np.union1d(variable, np.flatnonzero(wanted))
    return Panel(
        genes=tuple(str(g) for g in np.sort(universe[chosen].astype(str))),
        n_variable=int(variable.size),
        n_signature=int(chosen.size - variable.size),
        excluded={name: int(mask.sum()) for name, mask in groups.items()},
    )


def _most_variable(counts: sp.csr_matrix, batch: NDArray[np.object_], n_top: int) -> NDArray[np.intp]:
    """Columns ranked first by scanpy's seurat_v3 within batches."""
    import anndata as ad

    if counts.shape[1] <= n_top:
        return np.arange(counts.shape[1])
    names = pd.Series(list(batch), dtype=str)
    sizes = names.value_counts()
    names = names.where(names.map(sizes) >= MIN_CELLS_PER_BATCH, sizes.index[0])
    obs = pd.DataFrame({"batch": names.astype("category").to_numpy()}, index=names.index.astype(str))
    drawn = ad.AnnData(counts.astype(np.float32), obs=obs)
    return np.flatnonzero(highly_variable(drawn, n_top, "batch" if names.nunique() > 1 else None))


def highly_variable(adata: AnnData, n_top: int, batch_key: str | None = None) -> NDArray[np.bool_]:
    """Genes that vary most by scanpy's ``seurat_v3`` on raw counts, or by variance over mean where it fails."""
    import scanpy as sc
    from sklearn.utils.sparsefuncs import mean_variance_axis

    for span in SPANS:
        with warnings.catch_warnings(), suppress(ValueError):  # of loess
            warnings.simplefilter("ignore")  # scanpy warns about its own use of pandas
            table = sc.pp.highly_variable_genes(
                adata, flavor="seurat_v3", n_top_genes=n_top, batch_key=batch_key, span=span, inplace=False
            )
            return np.asarray(table["highly_variable"], dtype=bool)
    log.warning(
        "the cells are too few or too shallow for seurat_v3: genes are ranked by their variance over their mean"
    )
    mean_G, variance_G = mean_variance_axis(adata.X.astype(np.float64), axis=0)
    chosen = np.argsort(-variance_G / np.maximum(mean_G, 1e-12), kind="stable")[:n_top]
    return np.isin(np.arange(adata.n_vars), chosen)
