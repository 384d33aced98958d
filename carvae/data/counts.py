"""Where a source keeps its raw counts, verified over the whole matrix.

A matrix passes only if every stored value is finite, whole, not negative and small enough to be exact, if the cells do
not all have the same total, and if most cells have a count of 1. Nothing is sampled. N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from carvae.data.cells import Cells
from carvae.data.matrices import ALL, Matrix
from carvae.data.rows import look
from carvae.errors import CountsError, join_problems

REMEDY = "provide raw counts in layers['counts'] (or X or raw), and name the place with `counts:` if there are several"
LARGEST_COUNT = 1 << 24  # float32 is exact up to here; no gene is counted that often in one cell
LARGEST_IN_FLOAT16 = 1 << 11
LARGEST_ITEM = 8  # bytes of the numbers that compiled code takes
BLOCK_CELLS = 4096
CELLS_OF_A_FACTOR = 30
"""Cells whose totals have no common factor by chance."""
CELLS_OF_ONES, GENES_OF_ONES = 30, 50
"""So many cells with so many genes each have counts of 1 unless scaled, and others unless cut to zero and one."""
FEWEST_SCALED, SHARE_SCALED = 10, 0.02
"""Cells without a count of 1, and their share of a block, from which on they are no chance."""
FIRST_CELLS = 64
"""Cells by which a place is judged before all of it is read."""

CP10K = 1e4
TOTAL_TOLERANCE = 1.0  # of 10,000; float32 leaves about 0.01
WHOLE_TOLERANCE = 0.01
WHOLE_TOLERANCE_PER_COUNT = 5e-6  # log1p in float32 loses about 2e-6 of a value
LARGEST_INVERTED = 20_000  # above, the tolerance would no longer tell neighbours apart
FEWEST_GENES_INVERTED = 10  # with fewer genes per cell a common factor of the counts cannot be ruled out

EQUAL_TOTALS_CELLS = 3
EQUAL_TOTALS_MEAN = 1_000
EQUAL_TOTALS_SPREAD = 0.003  # rounding 2,000 genes to whole CP10K leaves 0.0013; counts spread above 0.05


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place that may hold the counts, with its own genes."""

    where: str
    genes: list[str]
    gene_ids: list[str] | None
    open: Callable[[], AbstractContextManager[Matrix]]
    notes: tuple[str, ...] = ()
    """What is worth saying if this place is the one."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A source before its counts are found."""

    name: str
    cells: Cells
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True)
class Checked:
    """Counts of some cells, each of which was looked at."""

    counts: sp.csr_matrix
    total_N: npt.NDArray[np.int64]
    """Counts per cell."""
    print_N: npt.NDArray[np.uint64]
    """A fingerprint per cell: equal for cells with equal counts."""
    largest: int


@dataclass(frozen=True, slots=True)
class Verified:
    """A place that holds counts, and what reading all of them showed."""

    candidate: Candidate
    inverted: bool
    total_N: npt.NDArray[np.int64]
    """Counts per cell."""
    print_N: npt.NDArray[np.uint64]
    """A fingerprint per cell: equal for cells with equal counts."""
    largest: int

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.candidate.where} (log1p CP10k inverted)" if self.inverted else self.candidate.where


def find_counts(candidates: Sequence[Candidate], name: str, cells: Sequence[str]) -> Verified:
    """The first candidate that holds raw counts; else the first whose log1p(CP10k) can be undone exactly.

    Parameters
    ----------
    candidates
        In the order of preference.
    name, cells
        Name of the source and of its cells, for messages.

    Raises
    ------
    CountsError
        If there is none; the message says what was seen in each place.
    ReadError
        If a matrix cannot be read or its structure is broken.
    """
    seen: dict[str, str] = {}
    fractional: list[Candidate] = []
    for candidate in candidates:
        try:
            return _verify(candidate, cells, inverted=False)
        except CountsError as error:
            seen[candidate.where] = f"{candidate.where} {error}"
            if isinstance(error, _FractionalError):
                fractional.append(candidate)
    for candidate in fractional:
        try:
            return _verify(candidate, cells, inverted=True)
        except CountsError as error:
            seen[candidate.where] += f", and {error}"
    raise CountsError(join_problems(f"{name} holds no raw counts ({REMEDY})", list(seen.values())))


def count_blocks(verified: Verified, size: int) -> Iterator[sp.csr_matrix]:
    """The counts in blocks of ``size`` cells: int32, no stored zeros, no gene twice, genes in order.

    Raises
    ------
    CountsError, ReadError
        If the file changed since it was verified.
    """
    if size < 1:
        raise ValueError("a block needs at least one cell")
    candidate = verified.candidate
    for block in checked_blocks(candidate, size, inverted=verified.inverted, n_cells=len(verified.total_N)):
        yield block.counts


def promising(candidates: Sequence[Candidate]) -> Candidate | None:
    """The first candidate whose first cells hold raw counts; None where it takes more to know.

    What is read from it has to pass `checked_blocks` and then `refuse_totals`; where it does not, `find_counts` says
    which place holds the counts, or why none does.
    """
    for candidate in candidates:
        try:
            next(checked_blocks(candidate, FIRST_CELLS, slice(FIRST_CELLS)), None)
        except CountsError:
            continue
        return candidate
    return None


def checked_blocks(
    candidate: Candidate, size: int, cells: slice = ALL, *, inverted: bool = False, n_cells: int | None = None
) -> Iterator[Checked]:
    """The counts of some cells as in `count_blocks`, checked as they are read.

    Raises
    ------
    CountsError
        At the first value that is no count, and where there are not ``n_cells`` cells.
    """
    convert = _inverted if inverted else _whole
    key_G = np.random.default_rng(0).integers(1, 1 << 63, len(candidate.genes), dtype=np.uint64)
    with candidate.open() as matrix:
        if n_cells is not None and matrix.shape != (n_cells, len(candidate.genes)):
            raise CountsError(f"{candidate.where} changed while it was read; start again")
        for block in matrix.blocks(size, cells):
            if not inverted and matrix.dtype.itemsize <= LARGEST_ITEM:
                seen = look(block, _limit(matrix.dtype), key_G)
                if seen.plain:
                    _refuse_scaled(block, seen.total_N)
                    yield Checked(_as_int32(block), seen.total_N, seen.print_N, seen.largest)
                    continue
            counts = convert(block, matrix.dtype)
            seen = look(counts, LARGEST_COUNT, key_G)
            _refuse_scaled(counts, seen.total_N)
            yield Checked(counts, seen.total_N, seen.print_N, seen.largest)


def _refuse_scaled(block: sp.csr_matrix, total_N: npt.NDArray[np.int64]) -> None:
    """Raise _CellError where some cells have no count of 1, as CPM that was rounded, of all samples or of one.

    Of 26,000 real cells with so many genes there is none. Cells of one total, and values with a common factor, are
    left to `refuse_totals`, which can say more.
    """
    n_genes_N = np.diff(block.indptr)
    rich = np.flatnonzero(n_genes_N >= GENES_OF_ONES)
    if len(rich) < CELLS_OF_ONES:
        return
    filled = np.flatnonzero(n_genes_N)
    smallest = np.minimum.reduceat(block.data, block.indptr[filled])[n_genes_N[filled] >= GENES_OF_ONES]
    scaled = smallest > 1
    if scaled.sum() < max(FEWEST_SCALED, SHARE_SCALED * len(rich)):
        return
    total = total_N[rich].astype(np.float64)
    if total.std() <= EQUAL_TOTALS_SPREAD * total.mean() or np.gcd.reduce(block.data.astype(np.int64)) > 1:
        return
    raise _CellError(
        f"was scaled before it was rounded: {int(scaled.sum()):,} of {len(rich):,} cells have no count of 1, their "
        f"smallest is {float(np.median(smallest[scaled])):,.0f}",
        int(rich[np.argmax(scaled)]),
        None,
    )


def _as_int32(block: sp.csr_matrix) -> sp.csr_matrix:
    counts = sp.csr_matrix((block.data.astype(np.int32, copy=False), block.indices, block.indptr), shape=block.shape)
    counts.has_canonical_format = True
    return counts


def _limit(dtype: np.dtype[Any]) -> int:
    return LARGEST_IN_FLOAT16 if dtype == np.float16 else LARGEST_COUNT


class _FractionalError(CountsError):
    """All values are finite and none is negative, but some are not whole: perhaps log1p."""


def _verify(candidate: Candidate, cells: Sequence[str], inverted: bool) -> Verified:
    totals: list[npt.NDArray[np.int64]] = []
    prints: list[npt.NDArray[np.uint64]] = []
    largest, first = 0, 0
    try:
        for block in checked_blocks(candidate, BLOCK_CELLS, inverted=inverted):
            totals.append(block.total_N)
            prints.append(block.print_N)
            largest = max(largest, block.largest)
            first += len(block.total_N)
    except _CellError as error:
        place = f"first in cell {cells[first + error.cell]!r}"
        if error.gene is not None:
            place += f", gene {candidate.genes[error.gene]!r}"
        kind = _FractionalError if error.fractional else CountsError
        raise kind(f"{error} ({place})") from None
    total_N = np.concatenate(totals)
    refuse_totals(total_N, largest)
    return Verified(candidate, inverted, total_N, np.concatenate(prints), largest)


def refuse_totals(total_N: npt.NDArray[np.int64], largest: int) -> None:
    """Raise CountsError where all cells together show that these are no raw counts.

    A factor that the totals of many cells and the largest count have in common is one that all counts were multiplied
    by: n totals share a factor k by chance in k^-n of all matrices.
    """
    filled = total_N[total_N > 0]
    if not len(filled):
        raise CountsError("holds only zeros")
    mean = float(filled.mean())
    if (
        len(filled) >= EQUAL_TOTALS_CELLS
        and mean >= EQUAL_TOTALS_MEAN
        and float(filled.std()) <= EQUAL_TOTALS_SPREAD * mean
    ):
        raise CountsError(f"is normalised to a constant total: all {len(filled):,} cells sum to about {mean:,.0f}")
    if largest == 1 and len(filled) >= CELLS_OF_ONES and mean >= GENES_OF_ONES:
        raise CountsError("holds zeros and ones alone: which genes were seen in a cell, not how often")
    factor = int(np.gcd(np.gcd.reduce(filled), largest))
    if factor > 1 and len(filled) >= CELLS_OF_A_FACTOR:
        raise CountsError(f"is multiplied: every value is a multiple of {factor:,}")


class _CellError(CountsError):
    """A value that is not a count, with the cell (and gene) of its block."""

    def __init__(self, what: str, cell: int, gene: int | None, fractional: bool = False) -> None:
        super().__init__(what)
        self.cell, self.gene, self.fractional = cell, gene, fractional


def _whole(block: sp.csr_matrix, dtype: np.dtype[Any]) -> sp.csr_matrix:
    """The block as int32 counts.

    Raises
    ------
    _CellError
        At the first value that is no count.
    """
    values = block.data
    limit = _limit(dtype)
    if values.dtype.kind == "f":
        _refuse(block, ~np.isfinite(values), "holds NaN or infinite values")
    if values.dtype.kind != "u" and values.min(initial=0) < 0:
        seen = f"holds negative values (down to {values.min():.4g}), so it is scaled/z-scored or otherwise transformed"
        _refuse(block, values < 0, seen)
    if values.dtype.kind == "f":
        seen = f"holds fractional values (up to {values.max(initial=0):.4g}), so it is normalised or log-transformed"
        _refuse(block, values != np.rint(values), seen, fractional=True)
    if values.max(initial=0) > limit:
        seen = f"holds values up to {values.max():.6g}, above {limit:,}, "
        seen += "where float16 is no longer exact" if dtype == np.float16 else "which no UMI count reaches"
        _refuse(block, values > limit, seen)
    return _canonical(sp.csr_matrix((values.astype(np.int32), block.indices, block.indptr), shape=block.shape))


def _inverted(block: sp.csr_matrix, dtype: np.dtype[Any]) -> sp.csr_matrix:
    """The counts whose log1p(counts / total * 10,000) the block is, given that each cell's smallest count is 1.

    Raises
    ------
    _CellError
        At the first cell where that is not certain.
    """
    if not np.isfinite(block.data).all() or block.data.min(initial=0) < 0:
        raise _CellError("holds NaN, infinite or negative values", 0, None)
    logs = _canonical(sp.csr_matrix((block.data.astype(np.float64), block.indices, block.indptr), shape=block.shape))
    n_genes_N = np.diff(logs.indptr)
    filled = np.flatnonzero(n_genes_N)
    if not len(filled):
        return logs.astype(np.int32)
    with np.errstate(over="ignore"):
        scaled = np.expm1(logs.data)
    starts = logs.indptr[filled]
    total, smallest = np.add.reduceat(scaled, starts), np.minimum.reduceat(scaled, starts)
    off = np.flatnonzero(~(np.abs(total - CP10K) <= TOTAL_TOLERANCE))
    if len(off):
        seen = f"is not log1p of counts per 10,000: expm1 of a cell sums to {total[off[0]]:,.6g}"
        raise _CellError(seen, int(filled[off[0]]), None)
    few = np.flatnonzero(n_genes_N[filled] < FEWEST_GENES_INVERTED)
    if len(few):
        seen = f"may be log1p of counts per 10,000, but a cell has fewer than {FEWEST_GENES_INVERTED} genes as proof"
        raise _CellError(seen, int(filled[few[0]]), None)
    ratio = scaled / np.repeat(smallest, n_genes_N[filled])
    whole = np.rint(ratio)
    wrong = (np.abs(ratio - whole) > WHOLE_TOLERANCE + WHOLE_TOLERANCE_PER_COUNT * whole) | (whole > LARGEST_INVERTED)
    _refuse(logs, wrong, "looks like log1p of counts per 10,000, but undoing it does not give whole numbers")
    return sp.csr_matrix((whole.astype(np.int32), logs.indices, logs.indptr), shape=logs.shape)


def _canonical(block: sp.csr_matrix) -> sp.csr_matrix:
    """The block itself with genes in order, each once, and no stored zeros."""
    block.sum_duplicates()
    if block.nnz and not block.data.all():
        block.eliminate_zeros()
    return block


def _refuse(block: sp.csr_matrix, bad: npt.NDArray[np.bool_], what: str, fractional: bool = False) -> None:
    if bad.any():
        at = int(np.argmax(bad))
        cell = int(np.searchsorted(block.indptr, at, side="right")) - 1
        raise _CellError(
            f"{what}, {int(bad.sum()):,} of the {len(bad):,} read", cell, int(block.indices[at]), fractional
        )
