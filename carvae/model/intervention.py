"""Genes set to another level in the counts of cells, and random genes of like expression to compare with.

Axes: N cells, G genes of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.data.genes import GeneTable
from carvae.errors import GeneError, nearest
from carvae.labels.signatures import Signatures

NEIGHBOURS = 50
"""Genes nearest in expression among which a control gene is drawn."""
TOGETHER = "+"
"""Between genes that are set at once."""

Direction = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class Intervention:
    """Genes of the model that are set up, and genes that are set to zero."""

    name: str
    direction: Direction
    up: tuple[int, ...]
    down: tuple[int, ...]
    absent: tuple[str, ...] = ()
    """Genes that were meant and that the model does not read."""

    @property
    def genes(self) -> tuple[int, ...]:
        """All that are set."""
        return (*self.up, *self.down)


@dataclass(frozen=True, slots=True)
class Expression:
    """How high the genes are in the cells at hand, in counts per ten thousand."""

    mean_G: NDArray[np.float64]
    level_G: NDArray[np.float64]
    """What a gene is set to when it goes up."""

    @classmethod
    def of(cls, panel: sp.csr_matrix, total_N: NDArray[np.int64], quantile: float) -> Expression:
        """From counts [N, G]: the level is this quantile of the cells that have the gene, 0 where none has."""
        cp10k = panel.astype(np.float64).multiply((1e4 / np.maximum(total_N, 1))[:, None]).tocsc()
        level_G = np.zeros(panel.shape[1])
        for g in range(panel.shape[1]):
            found = cp10k.data[cp10k.indptr[g] : cp10k.indptr[g + 1]]
            level_G[g] = np.quantile(found, quantile) if found.size else 0.0
        return cls(np.asarray(cp10k.mean(axis=0)).ravel(), level_G)


def intervention(name: str, direction: Direction, genes: Sequence[str], signatures: Signatures) -> Intervention:
    """What a name means: a signature, a gene, or genes joined by ``+``.

    A signature that goes up has its genes set up and its ``down`` genes set to zero; one that goes down the reverse.

    Raises
    ------
    GeneError
        It names no signature and no gene that the model reads.
    """
    place = {gene: g for g, gene in enumerate(genes)}
    known = {s.name: s for s in signatures.items}
    if name in known:
        rise, fall = known[name].genes, known[name].down
    else:
        wanted = [part.strip() for part in name.split(TOGETHER)]
        rise, fall = tuple(map(str, GeneTable.default().resolve(wanted).symbols)), ()
        if missing := [part for part, gene in zip(wanted, rise, strict=True) if gene not in place]:
            raise GeneError(
                f"perturb.{direction}: {missing[0]!r} is neither a gene that the model reads nor one of its signatures "
                f"({', '.join(known)}){nearest(missing[0], [*genes, *known])}"
            )
    if direction == "down":
        rise, fall = fall, rise
    found = [tuple(place[gene] for gene in part if gene in place) for part in (rise, fall)]
    if not any(found):
        raise GeneError(f"perturb.{direction}: the model reads no gene of the signature {name!r}; leave it out")
    absent = tuple(gene for gene in (*rise, *fall) if gene not in place)
    return Intervention(name, direction, found[0], found[1], absent)


def applied(
    panel: sp.csr_matrix, total_N: NDArray[np.int64], what: Intervention, expression: Expression
) -> sp.csr_matrix:
    """The counts with the genes set: up to the cell's share of the level (one count at least), or to zero.

    No gene that goes up falls, and no other gene moves: what a cell would make of the change is not modelled.
    """
    changed = panel.copy()
    changed.data[np.isin(changed.indices, what.down)] = 0
    up = list(what.up)
    if up:
        target = np.maximum(np.rint(np.outer(total_N / 1e4, expression.level_G[up])), 1).astype(panel.dtype)
        row_N, n = np.arange(panel.shape[0]), panel.shape[0]
        at = (np.repeat(row_N, len(up)), np.tile(up, n))
        changed = changed.maximum(sp.csr_array((target.ravel(), at), shape=panel.shape))
    changed.eliminate_zeros()
    return sp.csr_matrix(changed)


def control(
    what: Intervention, expression: Expression, measured_G: NDArray[np.bool_], rng: np.random.Generator
) -> Intervention:
    """The same done to random genes: each of them near its original in mean expression, none of them meant."""
    free_G = measured_G.copy()
    free_G[list(what.genes)] = False
    log_G = np.log1p(expression.mean_G)
    drawn: dict[int, int] = {}
    for gene in what.genes:
        candidates = np.flatnonzero(free_G)
        if not candidates.size:
            raise GeneError(f"{what.name!r} leaves no gene to compare with; name fewer genes")
        near = candidates[np.argsort(np.abs(log_G[candidates] - log_G[gene]), kind="stable")[:NEIGHBOURS]]
        drawn[gene] = int(rng.choice(near))
        free_G[drawn[gene]] = False
    up, down = (tuple(drawn[gene] for gene in part) for part in (what.up, what.down))
    return Intervention("control", what.direction, up, down)
