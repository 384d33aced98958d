"""The label tree, and labels as sets of its leaves.

A tree has axes (lineage, state, cycling); an axis has nodes; nodes without children are leaves. A cell's label on an
axis is the set of leaves that it allows, so coarse, partial and missing labels are one thing. A flat vocabulary is a
tree with one axis of leaves.

Axes of arrays: N cells, S leaves of an axis, D nodes of an axis, A distinct sets of leaves in the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.errors import LabelError, join_problems, nearest
from carvae.labels.axis import RESERVED, TWO, Axis, axis_spec, parse_axis
from carvae.labels.read import entries, read_yaml, repeated, texts, wrong_keys

__all__ = [
    "NOT_A_LABEL",
    "RESERVED",
    "Axis",
    "AxisLabels",
    "EncodedLabels",
    "LabelTree",
    "Mapping",
    "concatenate",
    "encode",
    "encode_nodes",
    "prune",
]

NOT_A_LABEL = frozenset({"", "nan", "NaN", "NA", "<NA>", "None"})
"""How files write a missing label as text; always missing."""


@dataclass(frozen=True, slots=True)
class LabelTree:
    """Axes of labels; all node names are unique over the tree."""

    name: str
    axes: tuple[Axis, ...]

    @classmethod
    def read(cls, path: Path | str) -> LabelTree:
        """Return the tree of a YAML file; raises LabelError naming every fault of it."""
        return cls.from_dict(read_yaml(Path(path), "label tree"), source=str(path))

    @classmethod
    def flat(cls, labels: Iterable[object], missing: Sequence[str] = (), axis: str = "state") -> LabelTree:
        """Return the tree of depth one whose leaves are the labels that occur, sorted.

        Unused pandas categories and ``missing`` values are no leaves. Raises LabelError unless two labels are left.
        """
        occurring, _ = _occurring(pd.Series(labels), missing)
        if len(occurring) < TWO:
            raise LabelError(_no_contrast(occurring))
        spec = [{"name": leaf} for leaf in occurring]
        return cls.from_dict({"name": "flat", "axes": [{"name": axis, "nodes": spec}]}, source="the flat vocabulary")

    @classmethod
    def from_dict(cls, spec: dict[str, Any], source: str = "label tree") -> LabelTree:
        """Return the tree that ``to_dict`` or a YAML file describes; raises LabelError naming every fault."""
        problems = wrong_keys(spec, {"name", "axes"}, "the tree")
        axes = [parse_axis(entry, problems) for entry in entries(spec.get("axes"), "axes", problems)]
        problems += [f"there is more than one axis {name!r}; rename one" for name in repeated(a.name for a in axes)]
        nodes = [node for axis in axes for node in axis.nodes]
        problems += [f"node {name!r} is in more than one axis; rename one" for name in repeated(nodes)]
        if not axes and not problems:
            problems.append("there is no axis; give at least one under `axes`")
        if problems:
            raise LabelError(join_problems(f"{source} is not a valid label tree", problems))
        return cls(name=str(spec.get("name", "")), axes=tuple(axes))

    def to_dict(self) -> dict[str, Any]:
        """The tree as lists, strings and dictionaries for JSON; ``from_dict`` gives back an equal tree."""
        return {"name": self.name, "axes": [axis_spec(axis) for axis in self.axes]}

    def __getitem__(self, axis: str) -> Axis:
        for candidate in self.axes:
            if candidate.name == axis:
                return candidate
        raise LabelError(f"the label tree has no axis {axis!r}{nearest(axis, [a.name for a in self.axes])}")

    def names(self, axis: str) -> tuple[str, ...]:
        """Leaves of an axis, in the order of the model's classes."""
        return self[axis].leaves


@dataclass(frozen=True, slots=True)
class Mapping:
    """A study's author labels -> nodes of the tree that they allow, per axis.

    Attributes
    ----------
    labels
        Author label -> axis -> allowed nodes. An axis that is not named is missing for that label.
    missing
        Values of the column that mean "not labelled".
    """

    name: str
    labels: dict[str, dict[str, tuple[str, ...]]]
    missing: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | str) -> Mapping:
        """Return the mapping of a YAML file; raises LabelError naming every fault of its form."""
        spec = read_yaml(Path(path), "label mapping")
        problems = wrong_keys(spec, {"name", "missing", "labels"}, "the mapping")
        given = spec.get("labels")
        if not isinstance(given, dict) or not given:
            problems.append("`labels` must hold `author label: {axis: node}` for at least one label")
            given = {}
        labels = {str(label): _parse_target(str(label), target, problems) for label, target in given.items()}
        missing = texts(spec.get("missing"))
        problems += [f"label {label!r} is both mapped and missing; keep one" for label in labels if label in missing]
        if problems:
            raise LabelError(join_problems(f"{path} is not a valid label mapping", problems))
        return cls(name=str(spec.get("name", "")), labels=labels, missing=missing)

    @classmethod
    def identity(cls, tree: LabelTree) -> Mapping:
        """The mapping for labels that bear the names of the tree's nodes; each says something on its own axis only."""
        return cls("identity", {node: {axis.name: (node,)} for axis in tree.axes for node in axis.nodes})

    def problems(self, tree: LabelTree) -> list[str]:
        """One sentence for each axis or node that is named here and not in ``tree``."""
        found = []
        for label, target in self.labels.items():
            for axis_name, nodes in target.items():
                axis = next((a for a in tree.axes if a.name == axis_name), None)
                if axis is None:
                    known = [a.name for a in tree.axes]
                    found.append(f"label {label!r} names the unknown axis {axis_name!r}{nearest(axis_name, known)}")
                    continue
                wrong = [node for node in nodes if node not in axis.nodes]
                where = f"of axis {axis_name!r}"
                found += [f"label {label!r} names {n!r}, no node {where}{nearest(n, axis.nodes)}" for n in wrong]
        return found


@dataclass(frozen=True, slots=True)
class AxisLabels:
    """The labels of N cells on one axis.

    Attributes
    ----------
    code
        int32 (N,): row of ``allowed`` for each cell, -1 where the label is missing.
    allowed
        bool (A, S): leaves in each distinct set; only sets that occur, sorted, never empty, never all leaves.
    weak
        bool (N,): the label was derived from signatures, not given by an author.
    """

    axis: str
    code: NDArray[np.int32]
    allowed: NDArray[np.bool_]
    weak: NDArray[np.bool_]

    @property
    def leaf(self) -> NDArray[np.int32]:
        """int32 (N,): the leaf where the label allows exactly one, else -1; what accuracy can be counted on."""
        only_A = np.where(self.allowed.sum(axis=1) == 1, self.allowed.argmax(axis=1), -1)
        return np.append(only_A, -1)[self.code].astype(np.int32)

    @property
    def contrasted(self) -> bool:
        """Whether labels tell cells apart: no leaf is allowed by all of them, so one constant answer fails."""
        return bool(len(self.allowed)) and not self.allowed.all(axis=0).any()


@dataclass(frozen=True, slots=True)
class EncodedLabels:
    """The labels of N cells on every axis of a tree, in the tree's order."""

    axes: tuple[AxisLabels, ...]

    def __getitem__(self, axis: str) -> AxisLabels:
        return next(labels for labels in self.axes if labels.axis == axis)

    @property
    def n_cells(self) -> int:
        """Number of cells, labelled or not."""
        return len(self.axes[0].code)

    @property
    def weak(self) -> bool:
        """Whether any label here was derived from signatures."""
        return any(bool(labels.weak.any()) for labels in self.axes)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_] | slice) -> EncodedLabels:
        """Labels of some cells, in the order of ``index``; sets that no longer occur are gone."""
        return EncodedLabels(
            tuple(_canonical(x.axis, x.code[index], x.allowed, x.weak[index]) for x in self.axes),
        )

    def fill(self, other: EncodedLabels) -> EncodedLabels:
        """These labels with ``other``'s (same cells, same tree) where they are missing, axis by axis."""
        axes = []
        for mine, theirs in zip(self.axes, other.axes, strict=True):
            blank = mine.code < 0
            shifted = np.where(theirs.code < 0, -1, theirs.code + len(mine.allowed))
            code, weak = np.where(blank, shifted, mine.code), np.where(blank, theirs.weak, mine.weak)
            axes.append(_canonical(mine.axis, code, np.concatenate([mine.allowed, theirs.allowed]), weak))
        return EncodedLabels(tuple(axes))


def concatenate(parts: Sequence[EncodedLabels]) -> EncodedLabels:
    """Return the labels of all parts' cells (one tree), one after the other, over one table of sets per axis."""
    axes = []
    for same in zip(*(part.axes for part in parts), strict=True):
        start = np.cumsum([0, *(len(x.allowed) for x in same)])
        code = np.concatenate([np.where(x.code < 0, -1, x.code + s) for x, s in zip(same, start[:-1], strict=True)])
        allowed = np.concatenate([x.allowed for x in same])
        axes.append(_canonical(same[0].axis, code, allowed, np.concatenate([x.weak for x in same])))
    return EncodedLabels(tuple(axes))


def encode(
    labels: pd.Series[Any], tree: LabelTree, mapping: Mapping | None = None, missing: Sequence[str] = ()
) -> EncodedLabels:
    """Return the sets of leaves that author labels allow.

    Parameters
    ----------
    labels
        One value per cell; NaN and the values in ``missing`` or ``mapping.missing`` are missing.
    mapping
        None where the labels bear the names of the tree's nodes.

    Raises
    ------
    LabelError
        The mapping names what the tree has not, or the data hold labels that the mapping does not know (with counts).
    """
    given = mapping or Mapping.identity(tree)
    occurring, code = _occurring(labels, (*missing, *given.missing))
    count = np.bincount(code[code >= 0], minlength=len(occurring))
    problems = given.problems(tree)
    problems += [
        f"label {label!r} of {n} cells is not known{nearest(label, given.labels)}; map it, or list it as missing"
        for label, n in zip(occurring, count, strict=True)
        if label not in given.labels
    ]
    if problems:
        raise LabelError(join_problems("the labels do not fit the tree", problems))
    return EncodedLabels(tuple(_encode_axis(axis, occurring, code, given) for axis in tree.axes))


def encode_nodes(axis: Axis, nodes: Sequence[str], code: NDArray[np.integer], weak: bool) -> AxisLabels:
    """Return labels that are a node each: ``nodes[code]``, missing where the code is -1."""
    allowed = np.zeros((len(nodes), len(axis.leaves)), dtype=bool)
    for row, node in enumerate(nodes):
        allowed[row, list(axis.nodes[node])] = True
    return _canonical(axis.name, code, allowed, np.full(len(code), weak))


def prune(tree: LabelTree, labels: EncodedLabels) -> tuple[LabelTree, EncodedLabels]:
    """Return the part of the tree that these labels can teach, and the labels on it.

    Leaves that no label allows are gone (a model would have phantom classes); leaves of a node that no label tells
    apart give way to that node; axes without contrast are gone.

    Raises
    ------
    LabelError
        No axis is left: all labels agree, so there is nothing to tell apart.
    """
    specs, kept = [], []
    for axis, old in zip(tree.axes, labels.axes, strict=True):
        if not old.contrasted:
            continue
        spec = {"name": axis.name, "description": axis.description, "nodes": _taught(axis, None, old.allowed)}
        new = parse_axis(spec, [])
        columns = [list(axis.nodes[leaf]) for leaf in new.leaves]
        allowed = np.stack([old.allowed[:, below].any(axis=1) for below in columns], axis=1)
        specs.append(spec)
        kept.append(_canonical(axis.name, old.code, allowed, old.weak))
    if not specs:
        pairs = list(zip(tree.axes, labels.axes, strict=True))
        said = sorted({axis.leaves[leaf] for axis, old in pairs for leaf in np.unique(old.leaf) if leaf >= 0})
        raise LabelError(_no_contrast(said))
    return LabelTree.from_dict({"name": tree.name, "axes": specs}), EncodedLabels(tuple(kept))


def _no_contrast(said: Sequence[str]) -> str:
    found = f"nothing but {', '.join(map(repr, said))}" if said else "nothing that tells cells apart"
    remedy = "give labels of at least two kinds, or none at all"
    return f"the labels hold {found}: a model that always gives one answer would be right; {remedy}"


def _occurring(labels: pd.Series[Any], missing: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Labels that occur, sorted, and each cell's index into them (-1: missing); unused categories are not there."""
    raw_code, raw = pd.factorize(labels)
    names = [str(value) for value in raw]
    absent = NOT_A_LABEL.union(missing)
    occurring = sorted(set(names) - absent)
    position = {name: i for i, name in enumerate(occurring)}
    index: NDArray[np.intp] = np.array([*(position.get(name, -1) for name in names), -1], dtype=np.intp)
    return occurring, index[raw_code]


def _encode_axis(axis: Axis, occurring: list[str], code: NDArray[np.intp], mapping: Mapping) -> AxisLabels:
    allowed = np.zeros((len(occurring), len(axis.leaves)), dtype=bool)
    for row, label in enumerate(occurring):
        for node in mapping.labels[label].get(axis.name, ()):
            allowed[row, list(axis.nodes[node])] = True
    return _canonical(axis.name, code, allowed, np.zeros(len(code), dtype=bool))


def _canonical(axis: str, code: NDArray[np.integer], allowed: NDArray[np.bool_], weak: NDArray[np.bool_]) -> AxisLabels:
    """The same labels over the sorted, distinct sets that occur; sets of no leaf or of all leaves say nothing."""
    size = allowed.sum(axis=1)
    informative = set(np.flatnonzero((size > 0) & (size < allowed.shape[1])).tolist())
    used = [row for row in np.unique(code[code >= 0]).tolist() if row in informative]
    members = {row: tuple(np.flatnonzero(allowed[row])) for row in used}
    ordered = sorted(set(members.values()))
    position = {leaves: i for i, leaves in enumerate(ordered)}
    new_row = np.full(len(allowed) + 1, -1, dtype=np.int32)
    for row in used:
        new_row[row] = position[members[row]]
    table = np.zeros((len(ordered), allowed.shape[1]), dtype=bool)
    for i, leaves in enumerate(ordered):
        table[i, list(leaves)] = True
    new_code = new_row[code]
    return AxisLabels(axis, new_code, table, weak & (new_code >= 0))


def _parse_target(label: str, target: object, problems: list[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(target, dict) or not target:
        problems.append(
            f"label {label!r} must have `{{axis: node}}`, found {target!r}; if it says nothing, list it as missing"
        )
        return {}
    nodes = {str(axis): texts(value) for axis, value in target.items()}
    problems += [f"label {label!r} names no node on axis {axis!r}" for axis, found in nodes.items() if not found]
    return nodes


def _taught(axis: Axis, parent: str | None, allowed: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Specifications of the nodes below ``parent`` that sets of leaves (A, S) can teach."""
    specs: list[dict[str, Any]] = []
    for node in axis.children(parent):
        seen = allowed[:, [leaf for leaf in axis.nodes[node] if allowed[:, leaf].any()]]
        together = seen.shape[1] > 1 and bool((seen == seen[:, :1]).all())
        spec: dict[str, Any] = {"name": node, "description": axis.descriptions[node]}
        if seen.shape[1] == 0:
            continue
        if together or not axis.children(node):
            specs.append(spec)
            continue
        children = _taught(axis, node, allowed)
        specs += [spec | {"nodes": children}] if len(children) > 1 else children
    while parent is None and len(specs) == 1 and "nodes" in specs[0]:  # one top node says what the axis says
        specs = specs[0]["nodes"]
    return specs
