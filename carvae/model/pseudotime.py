"""The order of cells from the memory-like end: diffusion pseudotime on the latent space.

Haghverdi et al., Nature Methods 13:845 (2016), on scanpy's graph and diffusion map. The distance is computed here, as
published: scanpy's own (``sc.tl.dpt``) gives every component whose eigenvalue is above 0.9994 the weight of a finished
one, and on a few thousand cells in slow order that is the very component that holds the order. Where no eigenvalue is
so large the two are equal.

Axes: N cells, K latent, M components.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

MAX_CELLS = 20_000
"""Cells whose graph is made; the others take the mean of their nearest among these."""
NEIGHBOURS, NEAREST = 15, 5
LEAST_TOP = 10
"""Cells that a state needs to begin the order, and how many begin it where none has them."""
MEMORY_LIKE = 0.75
"""States whose mean score is at least this share of the highest are the memory-like end."""
MIN_CELLS = 50
COMPONENTS = 10


def root_cells(score_N: NDArray[np.floating], state_N: NDArray[np.generic]) -> NDArray[np.intp]:
    """The cells of the memory-like states by mean score, of which both CD4 and CD8 cells may have one.

    The cells of the highest score are not all at the memory-like end: where few are left, as months after infusion,
    most of them are effector memory cells. They stand in where no state has `LEAST_TOP` cells.
    """
    known = np.flatnonzero(np.isfinite(score_N))
    states = pd.Series(score_N[known]).groupby(state_N[known]).agg(["mean", "size"])
    states = states[states["size"] >= LEAST_TOP]
    if not states.empty:
        chosen = states.index[states["mean"] >= MEMORY_LIKE * states["mean"].max()]
        return known[np.isin(state_N[known], chosen)]
    n_top = min(len(known), LEAST_TOP)
    return known[np.argsort(-score_N[known], kind="stable")[:n_top]]


def pseudotime(
    latent_NK: NDArray[np.floating], roots: NDArray[np.intp], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Place of every cell in the order, 0 at the root to 1; NaN for cells that no path joins to it.

    Parameters
    ----------
    roots
        Cells of the beginning; the one nearest to their mean is the root.
    """
    place_N = np.full(len(latent_NK), np.nan, np.float32)
    if len(latent_NK) < MIN_CELLS or not len(roots):
        return place_N
    from sklearn.neighbors import NearestNeighbors

    gap_R = np.linalg.norm(latent_NK[roots] - latent_NK[roots].mean(0), axis=1)
    root = int(roots[gap_R.argmin()])
    drawn = np.arange(len(latent_NK))
    if len(drawn) > MAX_CELLS:
        drawn = np.sort(np.append(root, rng.choice(np.delete(drawn, root), MAX_CELLS - 1, replace=False)))
    place_N[drawn] = _diffusion(latent_NK[drawn], int(np.searchsorted(drawn, root)))
    if len(drawn) < len(place_N):
        rest = np.setdiff1d(np.arange(len(place_N)), drawn)
        near = NearestNeighbors(n_neighbors=NEAREST).fit(latent_NK[drawn]).kneighbors(latent_NK[rest])[1]
        place_N[rest] = place_N[drawn][near].mean(1)
    return place_N


def _diffusion(latent_NK: NDArray[np.floating], root: int) -> NDArray[np.float32]:
    """Diffusion distance of the cells that a path joins to the root, over the greatest."""
    import scanpy as sc

    place_N = np.full(len(latent_NK), np.nan, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy warns about its own libraries
        graph = _graph(latent_NK)
        component_N = connected_components(graph.obsp["connectivities"], directed=False)[1]
        own = component_N == component_N[root]
        if own.sum() < MIN_CELLS:
            return place_N
        joined = graph if own.all() else _graph(latent_NK[own])
        sc.tl.diffmap(joined, n_comps=COMPONENTS + 1, random_state=0)
    value_M = joined.uns["diffmap_evals"][1:].astype(np.float64)
    weighted_NM = joined.obsm["X_diffmap"][:, 1:].astype(np.float64) * (value_M / (1.0 - value_M))
    distance_N = np.linalg.norm(weighted_NM - weighted_NM[np.cumsum(own)[root] - 1], axis=1)
    place_N[own] = distance_N / distance_N.max()
    return place_N


def _graph(latent_NK: NDArray[np.floating]) -> AnnData:
    import scanpy as sc

    obs = pd.DataFrame(index=np.arange(len(latent_NK)).astype(str))
    adata = AnnData(obs=obs, obsm={"z": np.asarray(latent_NK, np.float32)})
    sc.pp.neighbors(adata, NEIGHBOURS, use_rep="z", method="gauss", transformer="sklearn", random_state=0)
    return adata
