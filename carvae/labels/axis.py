"""One axis of a label tree: its nodes, how probabilities of leaves become probabilities of nodes, and its description.

Axes of arrays: N cells, S leaves, D nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carvae.labels.read import entries, wrong_keys

RESERVED = "unknown"
"""What carvae itself calls a cell without a sure label; no node may bear this name."""
TWO = 2
"""Answers that a question needs: with one there is nothing to tell apart."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One independent question about a cell, and its possible answers.

    Attributes
    ----------
    leaves
        The finest answers, in the order of the model's classes.
    nodes
        Every node, parents before children -> indices of the leaves below it (a leaf: its own).
    parents
        Every node -> its parent, None at the top.
    descriptions
        Every node -> one line about it.
    """

    name: str
    description: str
    leaves: tuple[str, ...]
    nodes: dict[str, tuple[int, ...]]
    parents: dict[str, str | None]
    descriptions: dict[str, str]

    def roll_up(self, probability_NS: NDArray[np.floating]) -> NDArray[np.floating]:
        """Probability of every node, shape (N, D), columns as in ``nodes``: the sum over the leaves below it."""
        return np.stack([probability_NS[:, list(below)].sum(axis=1) for below in self.nodes.values()], axis=1)

    def deepest_sure(self, probability_NS: NDArray[np.floating], threshold: float) -> list[str | None]:
        """The node with fewest leaves at or above ``threshold`` for each cell (ties: the likelier); else None."""
        node_ND = self.roll_up(probability_NS)
        breadth_D = np.array([len(below) for below in self.nodes.values()])
        # A probability is at most 1, so two per leaf puts breadth before probability.
        rank_ND = np.where(node_ND >= threshold, node_ND - 2.0 * breadth_D, -np.inf)
        names = list(self.nodes)
        best_N = rank_ND.argmax(axis=1)
        sure_N = rank_ND.max(axis=1) > -np.inf
        return [names[best] if sure else None for best, sure in zip(best_N.tolist(), sure_N.tolist(), strict=True)]

    def parts(self, own: float) -> NDArray[np.float32]:
        """What each leaf shares with others, float (S, F): one column per part, weighing 1 where the leaf has it.

        Parts are the nodes above a leaf and the words of its name ("CD4 CTL" shares CD4 with "CD4 TEM" and CTL with
        "CD8 CTL"), so a rare leaf is learned from its relatives. Parts that one leaf alone has stand last, with the
        weight ``own``; a leaf that no sum of shared parts would tell from another has one with weight 1.
        """
        having: dict[str, set[int]] = {}
        for row, leaf in enumerate(self.leaves):
            for part in {*leaf.split(), *self.above(leaf)}:
                having.setdefault(part, set()).add(row)
        shared = sorted({tuple(sorted(rows)) for rows in having.values() if 1 < len(rows) < len(self.leaves)})
        common_SF = np.zeros((len(self.leaves), len(shared)), np.float32)
        for column, rows in enumerate(shared):
            common_SF[list(rows), column] = 1.0
        alone = {row for rows in having.values() if len(rows) == 1 for row in rows}
        _, group, size = np.unique(common_SF, axis=0, return_inverse=True, return_counts=True)
        needed_S = [size[g] > 1 or row in alone for row, g in enumerate(group.ravel())]
        return np.hstack([common_SF, np.diag(np.where(needed_S, 1.0, own)).astype(np.float32)])

    def above(self, node: str) -> list[str]:
        """The nodes above ``node``, nearest first."""
        parent = self.parents[node]
        return [] if parent is None else [parent, *self.above(parent)]

    def children(self, node: str | None) -> list[str]:
        """Nodes directly below ``node``; the top nodes for None."""
        return [name for name, parent in self.parents.items() if parent == node]


def main_first(names: Iterable[str]) -> tuple[str, ...]:
    """Names of axes with the one whose columns and scores stand for the cell first: ``state`` where there is one."""
    return tuple(sorted(names, key=lambda name: name != "state"))


def parse_axis(spec: dict[str, Any], problems: list[str]) -> Axis:
    """Return the axis that ``spec`` describes; each fault of it is added to ``problems``."""
    name = _parse_name(spec, "an axis", problems)
    if "/" in name:
        problems.append(f"axis {name!r} holds a slash, which AnnData does not allow in the name of a column; rename it")
    problems += wrong_keys(spec, {"name", "description", "nodes"}, f"axis {name!r}")
    axis = _Draft([], {}, {}, {})
    axis.add(entries(spec.get("nodes"), f"`nodes` of axis {name!r}", problems), None, name, problems)
    return Axis(
        name=name,
        description=str(spec.get("description", "")),
        leaves=tuple(axis.leaves),
        nodes={node: tuple(below) for node, below in axis.nodes.items()},
        parents=axis.parents,
        descriptions=axis.descriptions,
    )


@dataclass(slots=True)
class _Draft:
    """An axis as it is being read."""

    leaves: list[str]
    nodes: dict[str, list[int]]
    parents: dict[str, str | None]
    descriptions: dict[str, str]

    def add(self, specs: list[dict[str, Any]], parent: str | None, where: str, problems: list[str]) -> list[int]:
        """Add the nodes below ``parent`` and return the leaves below them."""
        if len(specs) < TWO:
            found = f"one node, {specs[0].get('name')!r}," if specs else "no node"
            problems.append(f"{where!r} has {found} where at least two are needed to tell cells apart")
        below: list[int] = []
        for spec in specs:
            node = _parse_name(spec, f"a node of {where!r}", problems)
            problems += wrong_keys(spec, {"name", "description", "nodes"}, f"node {node!r}")
            if node in self.nodes:
                problems.append(f"node {node!r} occurs more than once; rename one")
                continue
            mine = self.nodes[node] = []
            self.parents[node], self.descriptions[node] = parent, str(spec.get("description", ""))
            if "nodes" in spec:
                children = entries(spec["nodes"], f"`nodes` of {node!r}", problems)
                mine += self.add(children, node, node, problems)
            else:
                mine.append(len(self.leaves))
                self.leaves.append(node)
            below += mine
        return below


def _parse_name(spec: dict[str, Any], what: str, problems: list[str]) -> str:
    name = spec.get("name", "")
    if not isinstance(name, str) or not name.strip():
        problems.append(f"{what} has no name (found {name!r})")
    elif name.casefold() == RESERVED:
        problems.append(f"{what} is called {name!r}, which carvae calls cells without a sure label; list it as missing")
    return str(name)


def axis_spec(axis: Axis) -> dict[str, Any]:
    """The axis as lists, strings and dictionaries; ``parse_axis`` gives back an equal axis."""

    def below(parent: str | None) -> list[dict[str, Any]]:
        specs = []
        for node in axis.children(parent):
            spec: dict[str, Any] = {"name": node, "description": axis.descriptions[node]}
            specs.append(spec | ({"nodes": children} if (children := below(node)) else {}))
        return specs

    return {"name": axis.name, "description": axis.description, "nodes": below(None)}
