"""Cells in two dimensions: which are shown, and where.

Axes: N cells, M cells shown, K latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.page.annotated import Annotated

UMAP, PCA, OWN = "UMAP", "principal components", "the file's own X_umap"
FIT_CELLS = 12_000
"""Cells that UMAP lays out; the others go where their neighbours among these are."""
NEIGHBOURS = 10
MIN_UMAP = 30
"""Cells without which there is no UMAP, only principal components."""
KEEP = 20
"""Cells of a state in a sample that are shown, however many cells there are in all."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """The cells that are shown, and their places."""

    shown_M: NDArray[np.intp]
    """Rows of the file, ascending."""
    places: dict[str, Floats]
    """Name of the layout -> [M, 2]."""
    training_PC: Floats | None
    """Means of the training samples in the layout `PCA`."""
    n_cells: int

    @property
    def is_sampled(self) -> bool:
        """Whether some cells are not shown."""
        return len(self.shown_M) < self.n_cells

    @property
    def first(self) -> str:
        """The layout that is shown first."""
        return next(iter(self.places))


def lay_out(cells: Annotated, most: int, training: Floats | None, seed: int) -> Layout:
    """Choose at most about ``most`` cells and lay them out.

    UMAP (McInnes et al. 2018) is of the latent coordinates. Principal components are of the same coordinates, a linear
    map under which a training sample's mean has a place; UMAP has none for what it was not laid out with.

    Parameters
    ----------
    training
        Latent means of the training samples, where the model is at hand.
    """
    rng = np.random.default_rng(seed)
    shown_M = stratified(cells, most, rng)
    latent_MK = cells.latent_NK[shown_M].astype(np.float64)
    centre_K = latent_MK.mean(0)
    axes_KP = np.linalg.svd(np.cov((latent_MK - centre_K).T) + 0.0)[0][:, :2]
    # The sign of a component is free: the larger tail goes to the right, so that runs agree.
    pca_MP = (latent_MK - centre_K) @ axes_KP
    axes_KP = axes_KP * np.where(np.abs(pca_MP.max(0)) >= np.abs(pca_MP.min(0)), 1, -1)
    places: dict[str, Floats] = {}
    if len(shown_M) >= MIN_UMAP:
        places[UMAP] = _umap(cells.latent_NK[shown_M], seed, rng)
    places[PCA] = ((latent_MK - centre_K) @ axes_KP).astype(np.float32)
    if cells.own_map is not None:
        places[OWN] = cells.own_map[shown_M]
    projected = None if training is None else ((training - centre_K) @ axes_KP).astype(np.float32)
    return Layout(shown_M, places, projected, cells.n_cells)


def stratified(cells: Annotated, most: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Rows of the cells that are shown: all, or the same share of each state in each sample, but `KEEP` of each."""
    if cells.n_cells <= most:
        return np.arange(cells.n_cells)
    stratum = pd.Series(cells.sample_N) + "\0" + pd.Series(cells.state_N)
    order = pd.Series(rng.permutation(cells.n_cells)).groupby(stratum.to_numpy()).rank(method="first")
    size = stratum.groupby(stratum.to_numpy()).transform("size")
    wanted = np.maximum(np.minimum(size, KEEP), np.floor(size * most / cells.n_cells))
    return np.flatnonzero(order.to_numpy() <= wanted.to_numpy())


def _umap(latent_MK: Floats, seed: int, rng: np.random.Generator) -> Floats:
    import umap
    from sklearn.neighbors import NearestNeighbors

    fitted = np.sort(rng.permutation(len(latent_MK))[:FIT_CELLS])
    options: dict[str, Any] = {
        "n_neighbors": min(15, len(fitted) - 1),
        "min_dist": 0.3,
        "random_state": seed,
        "n_jobs": 1,
    }
    place_FP = umap.UMAP(**options).fit_transform(latent_MK[fitted]).astype(np.float32)
    place_MP = np.empty((len(latent_MK), 2), np.float32)
    place_MP[fitted] = place_FP
    rest = np.setdiff1d(np.arange(len(latent_MK)), fitted)
    if rest.size:
        finder = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(latent_MK[fitted])
        distance_RJ, near_RJ = finder.kneighbors(latent_MK[rest])
        weight_RJ = 1 / np.maximum(distance_RJ, 1e-6)
        weight_RJ /= weight_RJ.sum(1, keepdims=True)
        place_MP[rest] = np.einsum("rj,rjp->rp", weight_RJ, place_FP[near_RJ])
    return place_MP
