"""A query's genes against a panel: the way from one to the other, the receipt, and why genes do not match.

The names themselves are in ``gene_table``, the groups that the encoder never sees in ``gene_policy``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from carvae.data.gene_policy import POLICY_GROUPS, TRANSGENES, Names, excluded_by_policy, is_transgene
from carvae.data.gene_table import GeneTable, ResolvedGenes
from carvae.errors import GeneError

__all__ = [
    "POLICY_GROUPS",
    "TRANSGENES",
    "GeneAlignment",
    "GeneReceipt",
    "GeneTable",
    "Names",
    "ResolvedGenes",
    "align",
    "excluded_by_policy",
    "is_transgene",
    "looks_like_mouse",
    "mouse_genes_beside_human",
]

MIN_OVERLAP = 0.05
"""Below this share of the panel, and of the query, the genes are taken to be another species' or not genes at all."""

MIN_OVERLAP_MOUSE = 0.5
"""The same for names that look like mouse genes."""

MOVED = 0.05
"""Share of genes with another gene's id from which on it is no matter of a symbol that was given anew."""
MANY_OF_A_SPECIES = 0.1
"""Share of the genes from which on a second species is no accident of names."""

_BARCODE = re.compile(r"[ACGT]{10,}(?:[-_.]\S*)?$")
_MOUSE = re.compile(r"[A-Z][a-z]|mt-[A-Z]|H2-[A-Z]|\d{7}[A-Z]\d\d")


@dataclass(frozen=True, slots=True)
class GeneReceipt:
    """How a query's genes met a panel.

    Attributes
    ----------
    n_panel, matched
        Genes asked for, and found.
    aliased
        ``OLD->NEW`` for the panel's genes that were found under another name.
    missing
        The panel's genes that were not found, in the panel's order.
    ambiguous
        The query's names that several genes bear; none was used for any of them.
    duplicated
        The panel's genes that several columns bear; these were summed.
    overlap
        ``matched / n_panel``.
    """

    n_panel: int
    matched: int
    aliased: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    overlap: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)

    def sentence(self) -> str:
        """The receipt for a person, in one line."""
        parts = [f"{self.matched:,} of {self.n_panel:,} genes found ({self.overlap:.1%})"]
        for names, text in (
            (self.aliased, "by another name"),
            (self.duplicated, "summed from several columns"),
            (self.missing, "missing"),
            (self.ambiguous, "ambiguous and left alone"),
        ):
            if names:
                parts.append(f"{len(names):,} {text} ({_some(names)})")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class GeneAlignment:
    """The way from a query's columns to a panel's.

    Attributes
    ----------
    column
        int64 [n_input_genes], place of each input column in the panel, -1 where the panel has not its gene.
    present
        bool [n_panel], whether the panel's gene was found.
    receipt
        What was matched, renamed, summed, missing and ambiguous.
    """

    column: NDArray[np.int64]
    present: NDArray[np.bool_]
    receipt: GeneReceipt

    def apply(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """The counts in the panel's columns: those of the same gene summed, missing genes zero, the type kept.

        The same matrix where the columns are the panel's already.
        """
        if np.array_equal(self.column, np.arange(len(self.present))):
            return counts
        from carvae.data.rows import moved  # numba is slow to import, and not needed to know genes

        return moved(counts, self.column, len(self.present))


def align(resolved: ResolvedGenes, panel: Names) -> GeneAlignment:
    """The way that brings a query's columns into the panel's order, and its receipt.

    Parameters
    ----------
    resolved
        The query's genes.
    panel
        Symbols, each once, in the order wanted.

    Raises
    ------
    GeneError
        When the panel repeats a gene, or when so few genes match that the query is of another species or does not hold
        genes in its columns.
    """
    position = {symbol: number for number, symbol in enumerate(panel)}
    if len(position) != len(panel):
        again = sorted(symbol for symbol, times in Counter(panel).items() if times > 1)
        raise GeneError(f"the gene panel names genes more than once ({_some(again)}); name each once")
    column = np.fromiter((position.get(symbol, -1) for symbol in resolved.symbols), np.int64, len(resolved.symbols))
    rows = np.flatnonzero(column >= 0).astype(np.int64)
    times = np.bincount(column[rows], minlength=len(panel))
    present = times > 0
    matched = int(present.sum())
    receipt = GeneReceipt(
        n_panel=len(panel),
        matched=matched,
        aliased=[f"{resolved.names[row]}->{resolved.symbols[row]}" for row in rows.tolist() if _renamed(resolved, row)],
        missing=[symbol for symbol, found in zip(panel, present, strict=True) if not found],
        ambiguous=list(dict.fromkeys(resolved.names[resolved.how == "ambiguous"])),
        duplicated=[panel[number] for number in np.flatnonzero(times > 1).tolist()],
        overlap=matched / max(len(panel), 1),
    )
    _refuse_moved_ids(resolved)
    _check_overlap(resolved, receipt, len(rows))
    return GeneAlignment(column=column, present=present, receipt=receipt)


def looks_like_mouse(names: Names) -> bool:
    """Whether most names are mouse Ensembl ids, or mouse symbols (``Cd3e``) that human genes bear in capitals."""
    ids = sum(name.startswith("ENSMUSG") for name in names)
    titled = [name for name in names if _MOUSE.match(name)]
    if 2 * (ids + len(titled)) <= len(names):
        return False
    human = GeneTable.default().symbols
    return ids > len(titled) or 5 * sum(name.upper() in human for name in titled) >= len(titled)


def mouse_genes_beside_human(resolved: ResolvedGenes) -> int:
    """How many mouse genes there are where human ones are too, as in two species' matrices joined; 0 for a few."""
    human = GeneTable.default().symbols
    n_human, n_mouse = 0, 0
    for name, symbol in zip(resolved.names, resolved.symbols, strict=True):
        if symbol in human:
            n_human += 1
        elif name.startswith("ENSMUSG") or (_MOUSE.match(name) and name.upper() in human):
            n_mouse += 1
    return n_mouse if min(n_human, n_mouse) > MANY_OF_A_SPECIES * len(resolved.names) else 0


def _renamed(resolved: ResolvedGenes, row: int) -> bool:
    """Whether a column's gene bears another name in the study; an Ensembl id is no name."""
    name: str = resolved.names[row]
    return name != resolved.symbols[row] and not name.startswith("ENSG")


def _refuse_moved_ids(resolved: ResolvedGenes) -> None:
    """Raise GeneError where many names are symbols of other genes than their ids, as after one column was sorted."""
    human = GeneTable.default().symbols
    named = [(n, s) for n, s in zip(resolved.names, resolved.symbols, strict=True) if n in human and s in human]
    other = [(name, symbol) for name, symbol in named if name != symbol]
    if len(other) > MOVED * len(named):
        name, symbol = other[0]
        raise GeneError(
            f"{len(other):,} of {len(named):,} genes bear the name of one gene and the Ensembl id of another, such as "
            f"{name!r} with the id of {symbol}; names and ids were not moved together, take both from the original file"
        )


def _check_overlap(resolved: ResolvedGenes, receipt: GeneReceipt, n_used: int) -> None:
    names: list[str] = list(resolved.names)
    few = receipt.overlap < MIN_OVERLAP and n_used < MIN_OVERLAP * len(names)
    if receipt.matched and not few and not (receipt.overlap < MIN_OVERLAP_MOUSE and looks_like_mouse(names)):
        return
    head = (
        f"only {receipt.matched:,} of the {receipt.n_panel:,} genes wanted are among the query's {len(names):,} genes"
    )
    raise GeneError(f"{head}: {_why_so_few(names)}")


def _why_so_few(names: list[str]) -> str:
    """The likeliest cause, with its remedy."""
    shown = _some(names)
    human = GeneTable.default()
    if not names:
        return "the query has no genes"
    if looks_like_mouse(names):
        return f"they look like mouse genes ({shown}), and the panel is human; convert them to their human orthologues"
    causes = (
        (
            lambda name: _BARCODE.match(name) is not None,
            "the gene names are cell barcodes; rows and columns are swapped, so transpose the matrix (adata.T)",
        ),
        (
            str.isdigit,
            "the gene names are bare numbers; set var_names to gene symbols or Ensembl ids (ENSG...)",
        ),
        (
            lambda name: name not in human.symbols and name.upper() in human.symbols,
            "they are human symbols in another case; write them in capitals if the cells are human "
            "(adata.var_names.str.upper()), or convert them to human orthologues if not",
        ),
        (
            lambda name: name.startswith("ENST"),
            "they are Ensembl transcripts; sum the counts by gene (ENSG...) first",
        ),
        (
            lambda name: name.startswith("ENS") and not name.startswith("ENSG"),
            "they are Ensembl ids of another species; convert them to human orthologues",
        ),
    )
    for is_so, cause in causes:
        if 2 * sum(map(is_so, names)) > len(names):
            return f"{cause} (found: {shown})"
    return f"the columns must be human genes by HGNC symbol or Ensembl id (found: {shown})"


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
