"""Clones: cells of one patient that share their T-cell receptor, and a report of how that was found.

Two cells are one clone where the beta (delta) chain is equal and they share an alpha (gamma) chain, of which a cell may
have two. A cell with one chain joins the only clone of its patient that has it; if several have it there is no telling,
and if none has it the chain is a clone of its own.

Axes: N cells of the query, R cells with a receptor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from carvae.data.contigs import ARMS, CHAINS, FileMatch, Receptors, match_cells, read_receptors
from carvae.errors import ReadError
from carvae.section_patient import ClonesConfig

Ints = NDArray[np.int64]
NONE = -1
MULTICHAIN = "multichain"
PAIRED, JOINED, ALONE = 0, 1, 2
"""How a cell came to its clone: by both chains, by one chain of a clone with both, or by one chain alone."""


@dataclass(frozen=True, slots=True)
class CloneReport:
    """What became of the receptors, in numbers of cells."""

    files: tuple[FileMatch, ...]
    n_cells: int
    """Cells of the query."""
    n_receptor: int
    """Cells of the query with a receptor."""
    n_paired: int
    """Cells in a clone by both chains."""
    n_joined: int
    """Cells with one chain that joined the only clone that has it."""
    n_alone: int
    """Cells with one chain that no clone of two chains has."""
    n_ambiguous: int
    """Cells with one chain that several clones have: no clone."""
    n_multichain: int
    """Cells with more chains than a T cell has (doublets): no clone."""
    n_other: int
    """Cells of another receptor, of alpha-beta and gamma-delta chains together, or without the chain asked for."""
    n_gamma_delta: int
    """Cells in a clone of gamma-delta chains."""
    n_clones: int
    n_patients: int
    """Patients with a clone."""

    def sentence(self) -> str:
        """The report in words."""
        n_cloned = self.n_paired + self.n_joined + self.n_alone
        ways = {
            "both chains": self.n_paired,
            "one chain of such a clone": self.n_joined,
            "one chain alone": self.n_alone,
        }
        text = (
            f"{n_cloned:,} of {self.n_cells:,} cells are in {self.n_clones:,} clones of {self.n_patients} patient(s): "
            f"{', '.join(f'{n:,} by {way}' for way, n in ways.items() if n) or 'none'}"
        )
        if self.n_gamma_delta:
            text += f"; {self.n_gamma_delta:,} of them are gamma-delta"
        if out := self.n_receptor - n_cloned:
            text += (
                f"; {out:,} with a receptor are in none ({self.n_ambiguous:,} by a chain that several clones have, "
                f"{self.n_multichain:,} with too many chains, {self.n_other:,} without the chain or of another kind)"
            )
        return text


@dataclass(frozen=True, slots=True)
class Clonotypes:
    """The clone of every cell of a query."""

    code_N: Ints
    """-1 where a cell has none."""
    names: tuple[str, ...]
    """Patient and receptor of each clone: the same in every run in which the patient's receptors are the same."""
    patients: NDArray[np.object_] = field(repr=False)
    """Patient of each clone."""
    report: CloneReport | None = None
    """None where the clones are the query's own column."""

    def size_N(self) -> Ints:
        """Cells of each cell's clone in this query; 0 where it has none."""
        size_C = np.bincount(self.code_N[self.code_N >= 0], minlength=len(self.names))
        return np.where(self.code_N >= 0, size_C[self.code_N], 0)

    def columns(self) -> dict[str, object]:
        """``clone_id`` (missing where a cell has none) and ``clone_size`` for ``obs``."""
        names = pd.Index(np.array(self.names, dtype=object))
        return {"clone_id": pd.Categorical.from_codes(self.code_N, names), "clone_size": self.size_N()}


def find_clones(
    source: Path | AnnData | Sequence[Path],
    names_N: NDArray[np.object_],
    sample_N: NDArray[np.object_],
    patient_N: NDArray[np.object_],
    config: ClonesConfig,
) -> Clonotypes:
    """Read receptors and give each cell of a query its clone.

    Parameters
    ----------
    source
        Contig file, AIRR table, .h5ad of scirpy, folder of those, several files, or an AnnData of scirpy.
    names_N, sample_N, patient_N
        Barcode, sample and patient of each cell of the query.

    Raises
    ------
    ReadError
        The receptors cannot be read, none of their barcodes is a cell, or two files have receptors of one cell.
    ConfigError
        scirpy is not installed.
    """
    several = [source] if isinstance(source, Path | AnnData) else source
    receptors = [found for one in several for found in read_receptors(one)]
    matches, parts = [], []
    for found in receptors:
        at_R, match = match_cells(found, names_N, sample_N)
        matches.append(match)
        parts.append(found.chains[at_R >= 0].assign(cell=at_R[at_R >= 0]))
    table = pd.concat(parts)
    if table.empty:
        raise ReadError(_nothing(receptors, matches, names_N))
    table = _once(table, matches)
    table["patient"] = patient_N[table["cell"].to_numpy()]
    return _clones(table, len(names_N), tuple(matches), config)


def own_clones(clone_N: pd.Series[str], patient_N: NDArray[np.object_]) -> Clonotypes:
    """The clones that the query's own column names, missing or blank where a cell has none.

    Names that occur in several patients are told apart by the patient: a clone is of one patient.
    """
    text = clone_N.astype("string").str.strip()
    has_N = (text.notna() & (text != "") & ~text.str.casefold().isin(["nan", "none", "na"])).to_numpy(bool)
    frame = pd.DataFrame({"clone": text[has_N].astype(object).to_numpy(), "patient": patient_N[has_N]})
    shared = frame.groupby("clone")["patient"].transform("nunique") > 1
    label = frame["clone"].where(~shared, frame["patient"].astype(str) + "_" + frame["clone"].astype(str))
    code, names = pd.factorize(label.astype(object), sort=True)
    code_N = np.full(len(has_N), NONE, np.int64)
    code_N[has_N] = code
    patients = frame.groupby(code)["patient"].first().to_numpy(object) if len(frame) else np.zeros(0, object)
    return Clonotypes(code_N, tuple(map(str, names)), patients)


def _nothing(receptors: Sequence[Receptors], matches: Sequence[FileMatch], names_N: NDArray[np.object_]) -> str:
    first = receptors[0].chains.index[0]
    if doubtful := sum(match.n_ambiguous for match in matches):
        return (
            f"{doubtful:,} barcodes of {receptors[0].path} are in several samples of the query; put each contig file "
            "into a folder with the name of its sample"
        )
    more = f" and {len(receptors) - 1} more" if receptors[1:] else ""
    looks = f"theirs look like {first!r}, the query's like {str(names_N[0])!r}"
    return f"no barcode of {receptors[0].path}{more} is a cell of the query: {looks}; give the contigs of its samples"


def _once(table: pd.DataFrame, matches: Sequence[FileMatch]) -> pd.DataFrame:
    """Each cell with one receptor.

    Copies of the same are one. Where alpha-beta and gamma-delta chains come from two libraries, the pair that is
    complete is the receptor: many alpha-beta cells also transcribe a gamma chain.
    """
    table = table[~table.duplicated(["cell", *(column for column in table.columns if column.endswith("_nt"))])]
    loci = table[[f"{c}_locus" for c in CHAINS]]
    delta_R = loci.isin([name for name, kind in ARMS.items() if kind == "gd"]).any(axis=1)
    complete_R = (table["VJ_1_nt"] != "") & (table["VDJ_1_nt"] != "")
    both = delta_R.groupby(table["cell"]).transform("nunique") > 1
    best = complete_R & (complete_R.groupby(table["cell"]).transform("sum") == 1)
    settled = both & best.groupby(table["cell"]).transform("any")
    table = table[~settled | best]
    if n_twice := int(table["cell"].duplicated().sum()):
        files = " and ".join(match.file for match in matches if match.n_matched)
        raise ReadError(
            f"{n_twice:,} cells have different receptors in {files}; put each file into a folder with the name of its "
            "sample, or give the one that belongs to the query"
        )
    return table


def _clones(table: pd.DataFrame, n_cells: int, matches: tuple[FileMatch, ...], config: ClonesConfig) -> Clonotypes:
    arms = {c: table[f"{c}_{config.sequence}"].to_numpy(object) for c in CHAINS}
    locus = {c: table[f"{c}_locus"].map(ARMS).fillna("").to_numpy(object) for c in CHAINS}
    kinds = pd.DataFrame(locus)
    mixed_R = (kinds == "ab").any(axis=1).to_numpy() & (kinds == "gd").any(axis=1).to_numpy()
    multi_R = (table["pairing"] == MULTICHAIN).to_numpy()
    kind_R = np.where((kinds == "gd").any(axis=1), "gd", "ab")
    scope_R = pd.factorize(pd.MultiIndex.from_arrays([table["patient"].astype(str), kind_R]))[0]
    usable_R = ~mixed_R & ~multi_R & (kinds != "").any(axis=1).to_numpy()
    alpha = [np.where(usable_R & (locus[c] != ""), arms[c], "") for c in ("VJ_1", "VJ_2")]
    beta_R = np.where(usable_R & (locus["VDJ_1"] != ""), arms["VDJ_1"], "")
    if config.chains == "beta":
        alpha = [np.full(len(table), "", object)] * 2
    group_R, how_R = group_receptors(scope_R, alpha[0], alpha[1], beta_R)
    label_R = _labels(table, group_R, how_R, kind_R, config)
    cloned_R = group_R >= 0
    code, names = pd.factorize(label_R[cloned_R], sort=True)
    code_N = np.full(n_cells, NONE, np.int64)
    code_N[table["cell"].to_numpy()[cloned_R]] = code
    patients = pd.Series(table["patient"].to_numpy(object)[cloned_R]).groupby(code).first().to_numpy(object)
    no_chain_R = (alpha[0] == "") & (alpha[1] == "") & (beta_R == "") & ~multi_R
    report = CloneReport(
        files=matches,
        n_cells=n_cells,
        n_receptor=len(table),
        n_paired=int((cloned_R & (how_R == PAIRED)).sum()),
        n_joined=int((how_R == JOINED).sum()),
        n_alone=int((how_R == ALONE).sum()),
        n_ambiguous=int((~cloned_R & ~multi_R & ~no_chain_R).sum()),
        n_multichain=int(multi_R.sum()),
        n_other=int(no_chain_R.sum()),
        n_gamma_delta=int((cloned_R & (kind_R == "gd")).sum()),
        n_clones=len(names),
        n_patients=len(set(patients)),
    )
    return Clonotypes(code_N, tuple(map(str, names)), patients, report)


def group_receptors(
    scope_R: NDArray[np.integer],
    alpha_R: NDArray[np.object_],
    second_alpha_R: NDArray[np.object_],
    beta_R: NDArray[np.object_],
) -> tuple[Ints, Ints]:
    """Number of each cell's clone (-1: none), and how it came to it (`PAIRED`, `JOINED`, `ALONE`; -1).

    Parameters
    ----------
    scope_R
        Patient (and kind of receptor) within which clones are sought.
    alpha_R, second_alpha_R, beta_R
        Sequences; empty where a cell lacks the chain.
    """
    n = len(scope_R)
    both = _keys(np.append(scope_R, scope_R), np.append(alpha_R, second_alpha_R))
    a_R, c_R, b_R = both[:n], both[n:], _keys(scope_R, beta_R)
    has_a, has_b = (a_R >= 0) | (c_R >= 0), b_R >= 0
    paired = has_a & has_b
    group_R, how_R = np.full(n, NONE, np.int64), np.full(n, NONE, np.int64)
    group_R[paired], n_groups = _components(a_R[paired], c_R[paired], b_R[paired])
    how_R[paired] = PAIRED
    alone = (has_a | has_b) & ~paired
    holders: dict[tuple[str, int], set[int]] = {}
    for i in np.flatnonzero(paired):
        for kind, key in (("b", b_R[i]), ("a", a_R[i]), ("a", c_R[i])):
            if key >= 0:
                holders.setdefault((kind, int(key)), set()).add(int(group_R[i]))
    new: dict[tuple[str, int], int] = {}
    for i in np.flatnonzero(alone):
        keys = [("b", int(b_R[i]))] if has_b[i] else [("a", int(k)) for k in (a_R[i], c_R[i]) if k >= 0]
        found = set().union(*(holders.get(key, set()) for key in keys))
        if len(found) == 1:
            group_R[i], how_R[i] = found.pop(), JOINED
        elif not found:
            group_R[i], how_R[i] = n_groups + new.setdefault(keys[0], len(new)), ALONE
    return group_R, how_R


def _keys(scope_R: NDArray[np.integer], text_R: NDArray[np.object_]) -> Ints:
    """A number for each sequence within a scope, -1 where there is none."""
    number = pd.factorize(pd.MultiIndex.from_arrays([scope_R, text_R]))[0]
    return np.where(text_R == "", NONE, number).astype(np.int64)


def _components(a_R: Ints, c_R: Ints, b_R: Ints) -> tuple[Ints, int]:
    """Cells of one beta chain that are linked by shared alpha chains."""
    n = len(b_R)
    if not n:
        return np.zeros(0, np.int64), 0
    rows = np.append(np.arange(n), np.arange(n))
    alpha, beta = np.append(a_R, c_R), np.append(b_R, b_R)
    kept = alpha >= 0
    link = pd.factorize(pd.MultiIndex.from_arrays([beta[kept], alpha[kept]]))[0]
    graph = sp.coo_matrix((np.ones(kept.sum()), (rows[kept], n + link)), shape=(n + link.max() + 1,) * 2)
    number = connected_components(graph, directed=False)[1][:n]
    code, groups = pd.factorize(number)
    return code.astype(np.int64), len(groups)


def _labels(
    table: pd.DataFrame,
    group_R: Ints,
    how_R: Ints,
    kind_R: NDArray[np.object_],
    config: ClonesConfig,
) -> NDArray[np.object_]:
    """A name for each cell's clone from its commonest pair of chains, the first of the alphabet where several are."""
    alpha, beta = table["VJ_1_aa"].to_numpy(object), table["VDJ_1_aa"].to_numpy(object)
    exact = table["VDJ_1_nt"].to_numpy(object)
    if config.chains == "beta":
        alpha = np.full(len(table), "", object)
    else:
        exact = table["VJ_1_nt"].to_numpy(object) + "|" + exact
    frame = pd.DataFrame({"group": group_R, "patient": table["patient"].to_numpy(object), "how": how_R})
    frame["pair"] = [f"{a or '-'}_{b or '-'}" for a, b in zip(alpha, beta, strict=True)]
    frame["exact"] = exact if config.sequence == "nt" else frame["pair"]
    frame["kind"] = kind_R
    # Cells with one chain do not name a clone of two.
    naming = frame[(group_R >= 0) & (how_R != JOINED)]
    count = naming.value_counts(["group", "patient", "kind", "pair", "exact"]).reset_index()
    count = count.sort_values(["group", "count", "exact"], ascending=[True, False, True]).drop_duplicates("group")
    tag = [hashlib.sha256(text.encode()).hexdigest()[:6] for text in count["exact"]]
    kind = np.where(count["kind"] == "gd", "gd:", "")
    suffix = [f"_{t}" for t in tag] if config.sequence == "nt" else [""] * len(tag)
    names = count["patient"].astype(str) + "_" + kind + count["pair"] + suffix
    by_group = pd.Series(names.to_numpy(object), index=count["group"].to_numpy())
    return by_group.reindex(group_R).to_numpy(object)
