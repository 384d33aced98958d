"""Whether states can be told from batches at all, in these data.

A state and a batch are told apart only where the state meets another one inside a batch: in the two-way table of states
and batches, contrasts are estimable within a connected part and nowhere else (Bose 1949; Searle 1971, Linear Models,
section 7.4). Where every batch holds one state, a classifier of batches scores as well as one of states, and no figure
of the labels means anything. Axes: N cells, S states, B batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from carvae.evaluation.cells import Cells

MIN_CELLS = 2
"""Cells of a state that a batch must hold for the two to meet there, unless the state is rarer everywhere."""
MIN_SHARE = 0.05
"""And the share of the state's cells or of the batch's, whichever is fewer: a few strays make no bridge."""
NESTED = 0.9
"""Share of the errors of guessing the commonest state that knowing the batch takes away (Goodman and Kruskal's lambda,
1954), from which on states count as nested however they hang together."""
TWO = 2


@dataclass(frozen=True, slots=True)
class Nesting:
    """States and batches of one kind."""

    batch: str
    """Column of the batches."""
    n_batches: int
    parts: tuple[tuple[str, ...], ...]
    """States that can be told from each other, the part with most cells first."""
    best_guess: float
    """Share of the labelled cells whose state is the commonest of their batch: what the batch alone says."""
    told: float
    """Goodman and Kruskal's lambda."""

    @property
    def identifiable(self) -> tuple[str, ...]:
        """States whose figures mean something; none where even the largest part has one state."""
        return self.parts[0] if len(self.parts[0]) >= TWO and self.told < NESTED else ()


@dataclass(frozen=True, slots=True)
class Identifiability:
    """What may be scored."""

    nestings: tuple[Nesting, ...]
    scored: tuple[str, ...]
    """States that are identifiable among batches of every kind."""
    refused: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if not self.refused:
            return "every state meets others within batches: states can be told from batches"
        worst = min(self.nestings, key=lambda nesting: len(nesting.identifiable))
        what = ", ".join(self.refused) if self.scored else "all states"
        return (
            f"not identifiable: {what} (nested in the {worst.n_batches} values of {worst.batch!r}, which alone tell "
            f"{worst.best_guess:.0%} of the labels); what tells states apart is then what tells batches apart, so no "
            "figure is given for them"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = [asdict(nesting) | {"identifiable": list(nesting.identifiable)} for nesting in self.nestings]
        return {
            "verdict": "not identifiable" if self.refused else "identifiable",
            "sentence": self.sentence,
            "scored": list(self.scored),
            "not_identifiable": list(self.refused),
            "batches": tables,
        }


def identifiability(cells: Cells, covariates: Sequence[str]) -> Identifiability:
    """What the labelled cells allow, with batches by patient and by every covariate that has several values."""
    known = cells.truth_N >= 0
    truth, leaves = cells.truth_N[known], cells.leaves
    found = []
    for column in dict.fromkeys(["patient", *covariates]):
        batch = cells.obs.loc[known, column].astype("string").fillna("").to_numpy(dtype=str)
        if len(set(batch)) >= TWO:
            found.append(nesting(truth, batch, leaves, column))
    occurring = [leaves[s] for s in np.unique(truth)]
    scored = [leaf for leaf in occurring if all(leaf in n.identifiable for n in found)]
    scored = scored if len(scored) >= TWO else []
    refused = [leaf for leaf in occurring if leaf not in scored]
    return Identifiability(tuple(found), tuple(scored), tuple(refused))


def nesting(truth_N: NDArray[np.integer], batch_N: NDArray[np.str_], leaves: Sequence[str], column: str) -> Nesting:
    """The connected parts of the table of states and batches."""
    table = pd.crosstab(truth_N, batch_N)
    count_SB = table.to_numpy()
    fewer_SB = np.minimum(count_SB.sum(1, keepdims=True), count_SB.sum(0, keepdims=True))
    least_S = np.where(count_SB.max(1, keepdims=True) < MIN_CELLS, 1, MIN_CELLS)
    meets_SB = (count_SB >= least_S) & (count_SB >= MIN_SHARE * fewer_SB)
    n_states, n_batches = count_SB.shape
    states, batches = np.nonzero(meets_SB)
    size = n_states + n_batches
    edges = csr_matrix((np.ones(states.size), (states, n_states + batches)), shape=(size, size))
    _, part = connected_components(edges, directed=False)
    named = [leaves[s] for s in table.index]
    cells = pd.Series(count_SB.sum(1)).groupby(part[:n_states]).sum().sort_values(ascending=False, kind="stable")
    parts = tuple(tuple(n for n, p in zip(named, part[:n_states], strict=True) if p == k) for k in cells.index)
    best, blind, n = count_SB.max(0).sum(), count_SB.sum(1).max(), count_SB.sum()
    told = float((best - blind) / (n - blind)) if n > blind else 0.0
    return Nesting(column, n_batches, parts, float(best / n), told)
