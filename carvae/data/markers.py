"""Marker genes of groups of cells: mean expression and share of cells with a count.

Axes: N cells, E marker genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

PREDICTED, AUTHOR = "predicted", "author"


@dataclass(frozen=True, slots=True)
class Grouping:
    """One way to put cells into groups."""

    by: str
    """`PREDICTED` or `AUTHOR`."""
    name_N: NDArray[np.object_]
    order: Sequence[str]


def log_cp10k(counts: sp.csr_matrix, total_N: NDArray[np.integer]) -> sp.csr_matrix:
    """log1p of counts per 10,000 of all counts of the cell."""
    value = counts.astype(np.float64)
    value.data = np.log1p(value.data * np.repeat(1e4 / np.maximum(total_N, 1), np.diff(value.indptr)))
    return value


def marker_table(
    counts: sp.csr_matrix,
    total_N: NDArray[np.integer],
    measured_E: NDArray[np.bool_],
    genes: Sequence[str],
    groupings: Sequence[Grouping],
) -> pd.DataFrame:
    """Mean log1p(CP10k) and share of cells with a count, of every marker in every group that has cells.

    Parameters
    ----------
    counts
        Over the marker genes, [N, E].
    total_N
        Counts of each cell over all genes.
    measured_E
        Whether the query measured the gene; where not, its figures are empty.

    Returns
    -------
    One row per group and gene: ``by``, ``state``, ``n_cells``, ``gene``, ``mean``, ``share_expressing``.
    """
    value, rows = log_cp10k(counts, total_N), []
    for grouping in groupings:
        for name in grouping.order:
            own = np.flatnonzero(grouping.name_N == name)
            if not own.size:
                continue
            mean_E = np.asarray(value[own].mean(axis=0)).ravel()
            share_E = np.bincount(counts[own].indices, minlength=len(genes)) / own.size
            found = {"gene": list(genes), "mean": mean_E, "share_expressing": share_E}
            table = pd.DataFrame({"by": grouping.by, "state": name, "n_cells": own.size, **found})
            table.loc[~measured_E, ["mean", "share_expressing"]] = np.nan
            rows.append(table)
    return pd.concat(rows, ignore_index=True)
