"""The labels of all cells of a cohort on one tree: the authors' where they gave any, else weak ones of signatures."""

from __future__ import annotations

import logging
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carvae.errors import LabelError, join_problems, nearest
from carvae.labels.signatures import Signatures, weak_labels
from carvae.labels.tree import NOT_A_LABEL, EncodedLabels, LabelTree, Mapping, concatenate, encode, prune

log = logging.getLogger(__name__)

TWO = 2
SOUNDS_MISSING = frozenset({"unlabelled", "unlabeled", "unassigned", "unclassified", "doublet", "nan", "none"})
"""Words, in lower case, that rarely name a cell state."""


@dataclass(frozen=True, slots=True)
class StudyLabels:
    """How the labels of one study map onto the tree."""

    mapping: Path | None
    """None where they bear the names of the tree's nodes (or the tree is flat)."""
    missing: tuple[str, ...]
    """Values that mean "not labelled", beside the empty one."""
    labelled: bool
    """Whether the study has an author's label column."""


@dataclass(frozen=True, slots=True)
class CohortLabels:
    """A tree and every cell's label on it."""

    tree: LabelTree
    labels: EncodedLabels


def label_cells(
    label: pd.Series[str],
    study: pd.Series[str],
    how: MappingOf[str, StudyLabels],
    tree_file: Path | None,
    weak: tuple[pd.DataFrame, Signatures, pd.Series[Any]] | None = None,
) -> CohortLabels | None:
    """Return the labels of all cells; None where no study has labels and no weak ones are wanted.

    Parameters
    ----------
    label
        Author's label of each cell, empty where missing.
    study
        Study of each cell, one of ``how``.
    how
        Study -> how its labels are read.
    tree_file
        YAML of the tree; None for a flat vocabulary, whose leaves are the labels that occur.
    weak
        Signature scores of each cell, their signatures and each cell's sample: labels the cells of studies without
        author's labels.

    Raises
    ------
    LabelError
        Labels, mapping and tree do not fit; the problems of all studies at once.
    """
    if weak is None and not any(entry.labelled for entry in how.values()):
        return None
    tree = LabelTree.read(tree_file) if tree_file else _flat(label, study, how)
    parts, rows, problems = [], [], []
    for name, entry in how.items():
        cells = (study == name).to_numpy()
        if not cells.any():
            continue
        rows.append(np.flatnonzero(cells))
        try:
            if entry.labelled:
                _tell_labels(name, label[cells], entry.missing)
            mapping = None if entry.mapping is None else Mapping.read(entry.mapping)
            parts.append(encode(label[cells], tree, mapping, ("", *entry.missing)))
            if weak is not None and not entry.labelled:
                scores, signatures, sample = weak
                parts[-1] = parts[-1].fill(weak_labels(scores[cells], sample[cells], tree, signatures))
        except LabelError as error:
            problems.append(f"study {name!r}: {error}")
    if problems:
        raise LabelError(problems[0] if len(problems) == 1 else join_problems("labels cannot be used", problems))
    if tree_file is None:
        _warn_of_missing(tree)
    by_study = np.concatenate(rows)
    assert by_study.size == len(label), "a cell is of no study"
    return CohortLabels(*prune(tree, concatenate(parts).take(np.argsort(by_study))))


def refuse_confounded(labels: EncodedLabels, study: pd.Series[str], patient: pd.Series[str]) -> None:
    """Warn where no label is in two studies; for training, which would learn the study and call it a state.

    Raises
    ------
    LabelError
        The labels are the studies' or the patients' names by other words.
    """
    of_study, of_patient = _overlap(labels, study), _overlap(labels, patient)
    for unit, (_, alone, n) in (("study", of_study), ("patient", of_patient)):
        if alone and n >= TWO:
            raise LabelError(
                f"each {unit} bears one label and no two the same, so that nothing tells a state from its {unit}; add "
                f"a {unit} with several of these labels, give the column of states, or leave the labels out"
            )
    shared, _, n_studies = of_study
    if shared or n_studies < TWO:
        return
    log.warning(
        "no label occurs in two studies: a state is told from its study by what both lack; map labels that mean"
        " the same onto one tree (labels.tree)"
    )


def _overlap(labels: EncodedLabels, name_N: pd.Series[str]) -> tuple[bool, bool, int]:
    """Whether any label is in two of the named groups, whether they are one to one, and how many groups there are."""
    shared, alone, n_groups = False, True, 0
    for axis in labels.axes:
        known = (axis.code >= 0) & ~axis.weak
        pairs = pd.DataFrame({"name": name_N.to_numpy()[known], "label": axis.code[known]}).drop_duplicates()
        shared |= bool(pairs["label"].duplicated().any())
        alone &= not pairs["name"].duplicated().any()
        n_groups = max(n_groups, pairs["name"].nunique())
    return shared, alone and not shared, n_groups


def _tell_labels(study: str, label: pd.Series[str], missing: tuple[str, ...]) -> None:
    """Log the labels of one study with their counts; refuse a missing label that does not occur: it is misspelt."""
    counts = label.astype(str).value_counts()
    occurring = sorted(set(counts.index) - NOT_A_LABEL)
    absent = [value for value in missing if value not in occurring and value not in NOT_A_LABEL]
    if absent:
        raise LabelError(
            f"missing_labels names {', '.join(map(repr, absent))}, which no cell of the study bears"
            f"{nearest(absent[0], occurring)}"
        )
    kept = [text for text in occurring if text not in missing]
    said = ", ".join(f"{text} ({counts[text]:,})" for text in kept) or "none"
    unlabelled = int(counts.sum()) - int(counts[kept].sum())
    log.info("study %r: labels %s; %s cells without a label", study, said, f"{unlabelled:,}")


def _warn_of_missing(tree: LabelTree) -> None:
    for leaf in tree.axes[0].leaves:
        if leaf.casefold() in SOUNDS_MISSING:
            log.warning("%r is taken as a cell state; if it means 'not labelled', name it in missing_labels", leaf)


def _flat(label: pd.Series[str], study: pd.Series[str], how: MappingOf[str, StudyLabels]) -> LabelTree:
    if mapped := [name for name, entry in how.items() if entry.mapping is not None]:
        raise LabelError(
            f"study {mapped[0]!r} maps its labels, but labels.tree is 'flat'; set labels.tree=tree or drop the mapping"
        )
    occurring = pd.DataFrame({"label": label.to_numpy(), "study": study.to_numpy()}).drop_duplicates().astype(str)
    pairs = zip(occurring["label"], occurring["study"], strict=True)
    return LabelTree.flat([text for text, name in pairs if text and text not in how[name].missing])
