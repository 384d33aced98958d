"""How many clones a sample has and how unequal they are: indices, plain and at equal depth.

Axes: D draws (or samples), C clones. Every index takes cells per clone, zeros allowed, along the last axis, and is NaN
where it is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SIZE_BINS = {"single": (1, 1), "small": (2, 5), "medium": (6, 20), "large": (21, 100), "hyperexpanded": (101, None)}
"""Cells of a clone in a sample, first and last of each bin."""
RARE = 10
"""Most cells of a clone that ACE calls rare."""
INTERVAL = 0.95
DRAWN_AT_ONCE = 1 << 22
"""Numbers (draws by clones) in memory at a time."""


def richness(count_DC: Ints) -> Floats:
    """Distinct clones."""
    return _floats((count_DC > 0).sum(-1))


def shannon(count_DC: Ints) -> Floats:
    """Entropy of the clones' frequencies, in nats."""
    share_DC = _shares(count_DC)
    return _floats(-np.sum(share_DC * np.log(np.where(share_DC > 0, share_DC, 1.0)), axis=-1))


def inverse_simpson(count_DC: Ints) -> Floats:
    """One over the chance that two cells, drawn with replacement, are of one clone; clones of equal size alike."""
    return _floats(1.0 / np.sum(_shares(count_DC) ** 2, axis=-1))


def gini_simpson(count_DC: Ints) -> Floats:
    """Chance that two cells, drawn with replacement, are of different clones."""
    return _floats(1.0 - np.sum(_shares(count_DC) ** 2, axis=-1))


def evenness(count_DC: Ints) -> Floats:
    """Shannon's entropy over the logarithm of the clones (Pielou 1966), 0 to 1; 0 for a single clone, as in scirpy."""
    n_D = richness(count_DC)
    return np.where(n_D > 1, shannon(count_DC) / np.log(np.where(n_D > 1, n_D, 2.0)), np.where(n_D == 1, 0.0, np.nan))


def expansion(count_DC: Ints) -> Floats:
    """STARTRAC's expansion index, one minus `evenness` (Zhang et al., Nature 564:268, 2018)."""
    return 1.0 - evenness(count_DC)


def gini(count_DC: Ints) -> Floats:
    """Gini coefficient of the clones that are there, 0 where all are alike: Lorenz curve by trapezoids."""
    sorted_DC = np.sort(count_DC, axis=-1)
    n_D, total_D = richness(count_DC), sorted_DC.sum(-1)
    rank_DC = np.cumsum(sorted_DC > 0, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found_D = 2.0 * (rank_DC * sorted_DC).sum(-1) / (n_D * total_D) - (n_D + 1.0) / n_D
    return np.where(n_D > 0, np.maximum(found_D, 0.0), np.nan)


def chao1(count_DC: Ints) -> Floats:
    """Clones with those not seen, from those of one and two cells, bias-corrected (Chao, Scand J Stat 11:265, 1984)."""
    one_D, two_D = (count_DC == 1).sum(-1), (count_DC == 2).sum(-1)  # noqa: PLR2004 (doubletons)
    found_D = richness(count_DC) + one_D * (one_D - 1) / (2.0 * (two_D + 1))
    return np.where(richness(count_DC) > 0, found_D, np.nan)


def ace(count_DC: Ints) -> Floats:
    """Clones with those not seen, from clones of up to `RARE` cells (Chao and Lee, J Am Stat Assoc 87:210, 1992).

    NaN where all rare clones are single cells: `chao1` still stands there.
    """
    size = np.arange(1, RARE + 1)
    of_size = np.stack([(count_DC == i).sum(-1) for i in size], axis=-1).astype(np.float64)
    n_rare_D, cells_D, one_D = of_size.sum(-1), (of_size * size).sum(-1), of_size[..., 0]
    abundant_D = (count_DC > RARE).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cover_D = 1.0 - one_D / cells_D
        spread_D = n_rare_D * (of_size * size * (size - 1)).sum(-1) / (cover_D * cells_D * (cells_D - 1)) - 1.0
        found_D = abundant_D + n_rare_D / cover_D + one_D / cover_D * np.maximum(spread_D, 0.0)
    found_D = np.where((one_D > 0) & (one_D == n_rare_D), np.nan, found_D)
    return np.where(n_rare_D == 0, np.where(abundant_D > 0, abundant_D, np.nan), found_D)


def in_bin(count_DC: Ints, first: int, last: int | None) -> Floats:
    """Share of the cells that are in clones of ``first`` to ``last`` cells."""
    inside_DC = (count_DC >= first) & (True if last is None else count_DC <= last)
    return _floats(np.sum(_shares(count_DC) * inside_DC, axis=-1))


def _shares(count_DC: Ints) -> Floats:
    with np.errstate(invalid="ignore"):
        return _floats(count_DC / count_DC.sum(-1, keepdims=True))


def _floats(values: NDArray[np.generic]) -> Floats:
    return np.asarray(values, np.float64)


def _bin(first: int, last: int | None) -> Callable[[Ints], Floats]:
    return lambda count_DC: in_bin(count_DC, first, last)


INDICES: dict[str, Callable[[Ints], Floats]] = {
    "n": richness,
    **{name: _bin(*ends) for name, ends in SIZE_BINS.items()},
    "expansion": expansion,
    "shannon": shannon,
    "inverse_simpson": inverse_simpson,
    "gini_simpson": gini_simpson,
    "evenness": evenness,
    "gini": gini,
    "chao1": chao1,
    "ace": ace,
}
"""Name -> index, in the order of the table."""


@dataclass(frozen=True, slots=True)
class Rarefied:
    """An index at a smaller depth: mean over random draws of cells, and the interval that holds `INTERVAL` of them."""

    mean: float
    low: float
    high: float


def rarefied(count_C: Ints, depth: int, draws: int, rng: np.random.Generator) -> dict[str, Rarefied]:
    """Every index of ``INDICES`` on ``depth`` cells drawn without replacement, ``draws`` times.

    Draws in which an index is not defined are left out of it. NaN where there are fewer cells than ``depth``. The
    interval says what the thinning may have cost, and so narrows to nothing where ``depth`` is all cells; it does not
    say what another tube of blood would give.

    Parameters
    ----------
    count_C
        Cells of each clone.
    depth
        Cells drawn.
    """
    count_C = count_C[count_C > 0]
    if count_C.sum() < depth:
        return dict.fromkeys(INDICES, Rarefied(np.nan, np.nan, np.nan))
    step = max(1, DRAWN_AT_ONCE // len(count_C))
    parts: dict[str, list[Floats]] = {name: [] for name in INDICES}
    for first in range(0, draws, step):
        drawn_DC = rng.multivariate_hypergeometric(count_C, depth, size=min(step, draws - first))
        for name, index in INDICES.items():
            parts[name].append(index(drawn_DC))
    return {name: _summary(np.concatenate(values)) for name, values in parts.items()}


def _summary(value_D: Floats) -> Rarefied:
    value_D = value_D[np.isfinite(value_D)]
    if not len(value_D):
        return Rarefied(np.nan, np.nan, np.nan)
    tail = (1.0 - INTERVAL) / 2
    low, high = np.quantile(value_D, [tail, 1.0 - tail])
    return Rarefied(float(value_D.mean()), float(low), float(high))


def clonal_figures(
    clone_N: NDArray[np.integer],
    group_N: NDArray[np.integer],
    n_groups: int,
    depth: int | None,
    min_cells: int,
    draws: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """The indices of every sample, plain and at equal depth; one row per sample, columns ``clone_...``.

    Parameters
    ----------
    clone_N, group_N
        Clone of each cell (-1: none), and its sample.
    depth
        Cells to which samples are thinned; None takes what the smallest sample has that has ``min_cells``.
    min_cells
        Samples with fewer cells with a clone have no figures at equal depth.
    """
    has_N = clone_N >= 0
    pair = pd.DataFrame({"group": group_N[has_N], "clone": clone_N[has_N]}).value_counts(sort=False).reset_index()
    cells_B = np.bincount(group_N[has_N], minlength=n_groups)
    enough_B = cells_B >= min_cells
    if depth is None and enough_B.any():
        depth = int(cells_B[enough_B].min())
    rows = []
    for group in range(n_groups):
        count_C = np.sort(pair.loc[pair["group"] == group, "count"].to_numpy(np.int64))
        row: dict[str, float] = {"clone_cells": int(cells_B[group])}
        with np.errstate(divide="ignore", invalid="ignore"):
            row |= {
                f"clone_{name}": float(index(count_C)) if len(count_C) else np.nan for name, index in INDICES.items()
            }
        row["clone_depth"] = np.nan if depth is None else depth
        if depth is not None and enough_B[group]:
            for name, found in rarefied(count_C, depth, draws, rng).items():
                at = f"clone_{name}_at_depth"
                row |= {at: found.mean, f"{at}_low": found.low, f"{at}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)
