"""Gene signatures: their scores per cell, and weak labels derived from the scores.

Scores are UCell scores (`ucell`; Andreatta and Carmona 2021, doi 10.1016/j.csbj.2021.06.043). A cell's score depends on
that cell alone; a weak label depends also on the cell's sample.

Axes of arrays: N cells, G genes, C signatures that compete on an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.errors import LabelError, join_problems, nearest
from carvae.labels.axis import Axis
from carvae.labels.read import entries, read_yaml, repeated, texts, wrong_keys
from carvae.labels.tree import AxisLabels, EncodedLabels, LabelTree, encode_nodes


@dataclass(frozen=True, slots=True)
class Source:
    """Where a signature was published; ``doi`` is empty where none is known."""

    citation: str
    doi: str = ""


@dataclass(frozen=True, slots=True)
class Signature:
    """Genes that are high (``genes``) or low (``down``) in a state, as HGNC symbols."""

    name: str
    genes: tuple[str, ...]
    down: tuple[str, ...] = ()
    description: str = ""
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """A signature that argues for a node: believed from ``min_z`` within the sample (None: any) and ``min_score``."""

    signature: str
    node: str
    min_z: float | None
    min_score: float


@dataclass(frozen=True, slots=True)
class AxisRule:
    """How signatures label one axis; the YAML file says it in words."""

    axis: str
    votes: tuple[Vote, ...]
    abstain: tuple[str, ...]
    margin: float
    otherwise: str | None
    max_score: float

    @property
    def competing(self) -> tuple[str, ...]:
        """Signatures that are compared: those with a vote, then those that abstain."""
        return (*(vote.signature for vote in self.votes), *self.abstain)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which genes of a signature the data hold, and whether that is enough for a score."""

    signature: str
    present: tuple[str, ...]
    missing: tuple[str, ...]
    scored: bool


@dataclass(frozen=True, slots=True)
class Signatures:
    """Signatures with the settings of their scores and the rule of weak labels (``rules`` is empty without one)."""

    items: tuple[Signature, ...]
    max_rank: int = 1500
    min_present: float = 0.5
    min_cells: int = 50
    rules: tuple[AxisRule, ...] = ()

    @classmethod
    def read(cls, path: Path | str) -> Signatures:
        """Return the signatures of a YAML file; raises LabelError naming every fault of it."""
        return cls.from_dict(read_yaml(Path(path), "signature file"), source=str(path))

    @classmethod
    def from_dict(cls, spec: dict[str, Any], source: str = "signatures") -> Signatures:
        """Return the signatures that ``to_dict`` or a YAML file describes; raises LabelError naming every fault."""
        problems = wrong_keys(spec, {"max_rank", "min_present", "signatures", "weak_labels"}, "the file")
        items = tuple(
            _parse_signature(entry, problems) for entry in entries(spec.get("signatures"), "signatures", problems)
        )
        names = [item.name for item in items]
        problems += [f"there is more than one signature {name!r}; rename one" for name in repeated(names)]
        if not items:
            problems.append("there is no signature; give at least one under `signatures`")
        weak = spec.get("weak_labels") or {}
        problems += wrong_keys(weak, {"min_cells", "axes"}, "weak_labels")
        weak = weak if isinstance(weak, dict) else {}
        rules = entries(weak.get("axes"), "`axes` of weak_labels", problems)
        parsed = cls(
            items=items,
            max_rank=int(_number(spec, "max_rank", 1500, problems, at_least=1)),
            min_present=_number(spec, "min_present", 0.5, problems, at_most=1),
            min_cells=int(_number(weak, "min_cells", 50, problems, at_least=2)),
            rules=tuple(_parse_rule(rule, names, problems) for rule in rules),
        )
        if problems:
            raise LabelError(join_problems(f"{source} is not a valid signature file", problems))
        return parsed

    def to_dict(self) -> dict[str, Any]:
        """The signatures as lists, numbers and strings for JSON; ``from_dict`` gives back equal signatures."""
        return {
            "max_rank": self.max_rank,
            "min_present": self.min_present,
            "signatures": [_signature_spec(item) for item in self.items],
            "weak_labels": {"min_cells": self.min_cells, "axes": [_rule_spec(rule) for rule in self.rules]},
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signatures, in order."""
        return tuple(item.name for item in self.items)

    @property
    def genes(self) -> tuple[str, ...]:
        """Every gene of any signature, sorted."""
        return tuple(sorted({gene for item in self.items for gene in (*item.genes, *item.down)}))

    def __getitem__(self, name: str) -> Signature:
        for item in self.items:
            if item.name == name:
                return item
        raise LabelError(f"there is no signature {name!r}{nearest(name, self.names)}")


def coverage(genes: Sequence[str], signatures: Signatures) -> tuple[Coverage, ...]:
    """Return, for each signature, which of its genes are in ``genes`` and whether it can be scored."""
    known = set(genes)
    found = []
    for item in signatures.items:
        wanted = (*item.genes, *item.down)
        present = tuple(gene for gene in wanted if gene in known)
        # Genes that are low everywhere say nothing alone: one gene that is high must be there.
        scored = len(present) >= signatures.min_present * len(wanted) and bool(known.intersection(item.genes))
        found.append(Coverage(item.name, present, tuple(gene for gene in wanted if gene not in known), scored))
    return tuple(found)


def score(counts: sp.spmatrix | sp.sparray, genes: Sequence[str], signatures: Signatures) -> pd.DataFrame:
    """Return UCell scores, one row per cell and one column per signature, in [0, 1].

    NaN for a signature with too few genes (``coverage`` lists them) and for a cell without counts. Genes that are
    absent are left out of a signature, not counted as zero. Columns of one gene are summed.

    Parameters
    ----------
    counts
        Raw counts (whole numbers), cells x genes. All measured genes belong here: a cell's ranks are among the genes
        that it is given.
    genes
        Symbol of each column.
    """
    from carvae.labels.ucell import ucell  # numba is slow to import, and not needed to read signatures

    matrix = sp.csr_matrix(counts)
    if matrix.shape[1] != len(genes):
        raise LabelError(f"the counts have {matrix.shape[1]} columns and {len(genes)} gene names; give one name each")
    gene_of, unique = pd.factorize(np.asarray(genes, dtype=object))
    able = [item.signature for item in coverage(genes, signatures) if item.scored]
    scores = np.full((matrix.shape[0], len(signatures.items)), np.nan, dtype=np.float32)
    number = {gene: i for i, gene in enumerate(unique)}
    up, down = (
        [[number[gene] for gene in listed if gene in number] for listed in lists]
        for lists in ([signatures[name].genes for name in able], [signatures[name].down for name in able])
    )
    max_rank = min(signatures.max_rank, len(unique))  # as UCell in R: no more ranks than genes
    scores[:, [signatures.names.index(name) for name in able]] = ucell(matrix, gene_of, up, down, max_rank)
    scores[np.asarray(matrix.sum(axis=1)).ravel() == 0] = np.nan
    return pd.DataFrame(scores, columns=list(signatures.names))


def weak_labels(
    scores: pd.DataFrame, sample: Sequence[str] | pd.Series[Any], tree: LabelTree, signatures: Signatures
) -> EncodedLabels:
    """Return labels derived from signature scores by the rules of the signature file, marked weak.

    Parameters
    ----------
    scores
        As ``score`` returns them, whole samples at a time: the z-scores are taken within the sample.
    sample
        The sample of each cell.

    Raises
    ------
    LabelError
        The signatures have no rules, or a rule names an axis or a node that the tree has not.
    """
    problems = [] if signatures.rules else ["the signature file has no `weak_labels`"]
    axes = {axis.name: axis for axis in tree.axes}
    for rule in signatures.rules:
        if rule.axis not in axes:
            problems.append(f"there is no axis {rule.axis!r} in the tree{nearest(rule.axis, axes)}")
            continue
        nodes = [vote.node for vote in rule.votes] + ([rule.otherwise] if rule.otherwise else [])
        known = axes[rule.axis].nodes
        problems += [f"axis {rule.axis!r} has no node {n!r}{nearest(n, known)}" for n in nodes if n not in known]
    if problems:
        raise LabelError(join_problems("weak labels cannot be derived", problems))
    sample_N, _ = pd.factorize(pd.Series(np.asarray(sample)))
    rules = {rule.axis: rule for rule in signatures.rules}
    labelled = [_apply(rules.get(axis.name), axis, scores, sample_N, signatures.min_cells) for axis in tree.axes]
    return EncodedLabels(tuple(labelled))


def _apply(
    rule: AxisRule | None, axis: Axis, scores: pd.DataFrame, sample_N: NDArray[np.intp], min_cells: int
) -> AxisLabels:
    """Weak labels of one axis: the winner of the z-scores where it is believed, else what is said of low scores."""
    nowhere_N = np.full(len(scores), -1)
    if rule is None:
        return encode_nodes(axis, (), nowhere_N, weak=True)
    score_NC = scores[list(rule.competing)].to_numpy(dtype=np.float64)
    z_NC = _within_sample(score_NC, sample_N, min_cells)
    rank_NC = np.where(np.isnan(z_NC), -np.inf, z_NC)
    winner_N = rank_NC.argmax(axis=1)
    top_N = np.take_along_axis(rank_NC, winner_N[:, None], axis=1).ravel()
    clear_N = np.ones(len(scores), dtype=bool)
    if len(rule.competing) > 1:
        second_N = np.partition(rank_NC, -2, axis=1)[:, -2]
        clear_N = np.isfinite(top_N) & np.isfinite(second_N)
        clear_N[clear_N] = top_N[clear_N] - second_N[clear_N] >= rule.margin
    code_N = nowhere_N.copy()
    for i, vote in enumerate(rule.votes):
        high_N = score_NC[:, i] >= vote.min_score
        if vote.min_z is not None:
            high_N &= top_N >= vote.min_z
        code_N[(winner_N == i) & clear_N & high_N] = i
    nodes = [vote.node for vote in rule.votes]
    if rule.otherwise is not None:
        low_N = (score_NC[:, : len(nodes)] <= rule.max_score).all(axis=1)
        code_N[low_N & (code_N < 0)] = len(nodes)
        nodes.append(rule.otherwise)
    # Where one competitor could not be scored, another would win in its place: such cells stay missing.
    return encode_nodes(axis, nodes, np.where(np.isnan(score_NC).any(axis=1), -1, code_N), weak=True)


def _within_sample(score_NC: NDArray[np.float64], sample_N: NDArray[np.intp], min_cells: int) -> NDArray[np.float64]:
    """Scores standardised within each sample; 0 where they are all equal, NaN in samples that are too small."""
    z_NC = np.full_like(score_NC, np.nan)
    for sample in np.unique(sample_N):
        inside = sample_N == sample
        part = score_NC[inside]
        measured = ~np.isnan(part).any(axis=1)
        if measured.sum() < min_cells:
            continue
        mean_C, sd_C = part[measured].mean(axis=0), part[measured].std(axis=0)
        z_NC[inside] = (part - mean_C) / np.where(sd_C > 0, sd_C, 1.0)
    return z_NC


def _parse_signature(spec: dict[str, Any], problems: list[str]) -> Signature:
    name = str(spec.get("name", ""))
    where = f"signature {name!r}"
    problems += wrong_keys(spec, {"name", "description", "genes", "down", "sources"}, where)
    genes, down = texts(spec.get("genes")), texts(spec.get("down"))
    sources = entries(spec.get("sources"), f"`sources` of {where}", problems)
    for source in sources:
        problems += wrong_keys(source, {"citation", "doi"}, f"a source of {where}")
    if not name.strip() or "/" in name:
        problems.append(f"{where} needs a name without a slash: it becomes the name of a column")
    if not genes:
        problems.append(f"{where} has no genes")
    if not any(source.get("citation") for source in sources):
        problems.append(f"{where} has no source; give at least one `citation`")
    problems += [f"{where} holds gene {gene!r} more than once" for gene in repeated((*genes, *down))]
    cited = tuple(Source(str(source.get("citation", "")), str(source.get("doi", ""))) for source in sources)
    return Signature(name, genes, down, str(spec.get("description", "")), cited)


def _parse_rule(spec: dict[str, Any], names: Sequence[str], problems: list[str]) -> AxisRule:
    where = f"the weak-label rule of axis {str(spec.get('axis', ''))!r}"
    problems += wrong_keys(spec, {"axis", "votes", "abstain", "margin", "otherwise"}, where)
    votes = []
    for vote in entries(spec.get("votes"), f"`votes` of {where}", problems):
        problems += wrong_keys(vote, {"signature", "node", "min_z", "min_score"}, f"a vote of {where}")
        min_z = _number(vote, "min_z", 0.0, problems, at_least=-np.inf) if "min_z" in vote else None
        min_score = _number(vote, "min_score", 0.0, problems, at_most=1)
        votes.append(Vote(str(vote.get("signature", "")), str(vote.get("node", "")), min_z, min_score))
    otherwise = spec.get("otherwise") or {}
    problems += wrong_keys(otherwise, {"node", "max_score"}, f"`otherwise` of {where}")
    otherwise = otherwise if isinstance(otherwise, dict) else {}
    rule = AxisRule(
        axis=str(spec.get("axis", "")),
        votes=tuple(votes),
        abstain=texts(spec.get("abstain")),
        margin=_number(spec, "margin", 0.0, problems),
        otherwise=str(otherwise["node"]) if "node" in otherwise else None,
        max_score=_number(otherwise, "max_score", 0.0, problems, at_most=1),
    )
    if not votes:
        problems.append(f"{where} has no votes")
    unknown = [name for name in rule.competing if name not in names]
    problems += [f"{where} names the unknown signature {name!r}{nearest(name, names)}" for name in unknown]
    problems += [f"{where} counts signature {name!r} more than once" for name in repeated(rule.competing)]
    return rule


def _number(
    spec: dict[str, Any],
    key: str,
    default: float,
    problems: list[str],
    at_least: float = 0.0,
    at_most: float = np.inf,
) -> float:
    given = spec.get(key, default)
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = np.nan
    if at_least <= number <= at_most and math.isfinite(number):
        return number
    limits = f"at least {at_least:g}" + (f" and at most {at_most:g}" if at_most < np.inf else "")
    problems.append(f"`{key}` must be a number, {limits}; found {given!r}")
    return default


def _signature_spec(item: Signature) -> dict[str, Any]:
    return {
        "name": item.name,
        "description": item.description,
        "genes": list(item.genes),
        "down": list(item.down),
        "sources": [{"citation": source.citation, "doi": source.doi} for source in item.sources],
    }


def _rule_spec(rule: AxisRule) -> dict[str, Any]:
    votes: list[dict[str, Any]] = [
        {"signature": vote.signature, "node": vote.node, "min_score": vote.min_score}
        | ({} if vote.min_z is None else {"min_z": vote.min_z})
        for vote in rule.votes
    ]
    spec: dict[str, Any] = {"axis": rule.axis, "margin": rule.margin, "votes": votes, "abstain": list(rule.abstain)}
    if rule.otherwise is not None:
        spec["otherwise"] = {"node": rule.otherwise, "max_score": rule.max_score}
    return spec
