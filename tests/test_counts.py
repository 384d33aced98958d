from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.counts import Candidate, Verified, count_blocks, find_counts
from carvae.data.matrices import CsrMatrix, Held, memory_matrix, transpose_on_disk
from carvae.errors import CountsError, ReadError

RNG = np.random.default_rng(7)


def counts_of(n_cells: int = 40, n_genes: int = 60, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.6, 2.0, (n_cells, n_genes)) * rng.uniform(0.5, 2.0, (n_cells, 1)))
    dense[:, :12] += 1  # every cell has a gene seen once, as real cells do
    dense[:, 0] = 1
    return dense.astype(np.int32)


def cp10k(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(axis=1, keepdims=True).astype(np.float64)
    return np.log1p(counts / np.maximum(totals, 1) * 1e4)


def find(*matrices: object) -> Verified:
    candidates = []
    for position, values in enumerate(matrices):
        matrix = memory_matrix(values, f"place{position}")
        genes = [f"G{i}" for i in range(matrix.shape[1])]
        candidates.append(Candidate(f"place{position}", genes, None, Held(matrix)))
    return find_counts(candidates, "toy", [f"c{i}" for i in range(matrix.shape[0])])


def all_of(verified: Verified, size: int = 7) -> np.ndarray:
    return sp.vstack(list(count_blocks(verified, size))).toarray()


@st.composite
def sparse_parts(draw: st.DrawFn) -> tuple[sp.csr_matrix, int]:
    """A CSR matrix in any layout that scipy allows: unsorted genes, genes named twice, stored zeros."""
    n_cells, n_genes = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.tuples(st.integers(0, n_genes - 1), st.integers(0, 120)), max_size=12),
                         min_size=n_cells, max_size=n_cells))  # fmt: skip
    dtype = draw(st.sampled_from(["i1", "u1", "i2", ">i4", "i8", "u8", "f4", ">f8", "f8"]))
    data = np.array([value for row in rows for _, value in row], dtype=dtype)
    indices = np.array([gene for row in rows for gene, _ in row], dtype=draw(st.sampled_from(["i4", "i8"])))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(indices.dtype)
    matrix = sp.csr_matrix((n_cells, n_genes), dtype=np.dtype(dtype).newbyteorder("="))
    matrix.data, matrix.indices, matrix.indptr = data, indices, indptr
    return matrix, draw(st.integers(1, 14))


def dense_of(matrix: sp.csr_matrix) -> np.ndarray:
    dense = np.zeros(matrix.shape, np.int64)
    cells = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    np.add.at(dense, (cells, matrix.indices), matrix.data.astype(np.int64))
    return dense


@given(sparse_parts())
def test_blocks_of_any_sparse_layout_put_together_are_the_matrix(drawn: tuple[sp.csr_matrix, int]) -> None:
    matrix, size = drawn
    truth = dense_of(matrix)
    before = matrix.data.copy(), matrix.indices.copy()
    if not truth.any():
        with pytest.raises(CountsError, match="only zeros"):
            find(matrix)
        return
    blocks = list(count_blocks(find(matrix), size))
    assert [b.shape[0] for b in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert all(b.dtype == np.int32 and b.has_canonical_format and (b.data > 0).all() for b in blocks)
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), truth)
    np.testing.assert_array_equal(matrix.data, before[0])
    np.testing.assert_array_equal(matrix.indices, before[1])


@given(sparse_parts())
def test_turning_a_matrix_stored_by_gene_keeps_every_value(drawn: tuple[sp.csr_matrix, int]) -> None:
    by_gene, size = drawn
    parts = by_gene.data, by_gene.indices, by_gene.indptr
    turned = transpose_on_disk(CsrMatrix.checked(*parts, by_gene.shape, "toy"))
    blocks = [dense_of(block) for block in turned.blocks(size)]
    np.testing.assert_array_equal(np.vstack(blocks), dense_of(by_gene).T)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.coo_matrix])
def test_every_whole_number_type_and_layout_is_read(dtype: str, layout: type) -> None:
    truth = np.minimum(counts_of(), 1 if dtype == "?" else 100)
    np.testing.assert_array_equal(all_of(find(layout(truth.astype(dtype)))), truth)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize(
    ("bad", "seen"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "scaled/z-scored"), (0.5, "fractional"), (1e9, r"above 16,777,216")],
)
def test_one_bad_value_anywhere_is_named_with_its_cell_and_gene(layout: type, bad: float, seen: str) -> None:
    values = np.tile(counts_of().astype(np.float32), (150, 1))
    values[5900, 17] = bad
    with pytest.raises(CountsError, match=seen) as caught:
        find(layout(values))
    assert "cell 'c5900', gene 'G17'" in str(caught.value)
    assert "layers['counts']" in str(caught.value)


def test_float16_is_read_but_not_above_its_exact_range() -> None:
    values = counts_of().astype(np.float16)
    np.testing.assert_array_equal(all_of(find(values)), counts_of())
    values[3, 3] = 2050
    with pytest.raises(CountsError, match="float16 is no longer exact"):
        find(values)


def test_equal_totals_are_refused_as_normalised_and_the_next_place_is_tried() -> None:
    counts = counts_of(200, 300)
    cpm = np.rint(counts / counts.sum(axis=1, keepdims=True) * 1e6)
    with pytest.raises(CountsError, match=r"constant total: all 200 cells sum to about (999,9|1,000,0)"):
        find(sp.csr_matrix(cpm))
    found = find(cpm, counts)
    assert found.where == "place1"


def test_cpm_that_was_rounded_and_cut_to_some_genes_is_refused() -> None:
    counts = counts_of(200, 300)
    cpm = np.rint(counts / counts.sum(axis=1, keepdims=True) * 1e6)
    cut = cpm[:, ::3]
    assert cut.sum(axis=1).std() > 0.01 * cut.sum(axis=1).mean()  # its totals give nothing away
    rich = np.flatnonzero((cut > 0).sum(axis=1) >= 50)
    smallest = np.where(cut > 0, cut, np.inf).min(axis=1)[rich]
    said = f"{len(rich)} of {len(rich)} cells have no count of 1, their smallest is {np.median(smallest):,.0f}"
    for matrix in (cut, sp.csr_matrix(cut), sp.csr_matrix(cut.astype(np.int32))):
        with pytest.raises(CountsError, match=f"scaled before it was rounded: {said}.*first in cell 'c{rich[0]}'"):
            find(matrix)
    raw = counts[rich][:, ::3]
    find(np.concatenate([raw[9:], cut[rich][:9]]))  # nine cells are no proof
    with pytest.raises(CountsError, match=f"10 of {len(rich)} cells have no count of 1"):  # one sample among others
        find(np.concatenate([raw[10:], cut[rich][:10]]))
    few = np.where(np.cumsum(cut > 0, axis=1) < 50, cut, 0)
    find(few)  # of less than 50 genes a cell may well have none with a count of 1


def test_counts_that_were_multiplied_are_refused() -> None:
    counts = counts_of(60, 80)
    find(counts)
    with pytest.raises(CountsError, match="is multiplied: every value is a multiple of 10"):
        find(10 * counts)
    find(np.ones((40, 20)))  # equal totals of ones have no factor


def test_cells_that_were_brought_to_the_median_depth_and_rounded_are_refused() -> None:
    rng = np.random.default_rng(0)
    raw = rng.poisson(rng.lognormal(0, 0.6, (400, 1)) * rng.lognormal(-1, 1.5, 600))
    total = raw.sum(axis=1, keepdims=True)
    find(raw)
    with pytest.raises(CountsError, match="cells have no count of 1, their smallest is 2"):
        find(np.rint(raw / total * np.median(total)))


def test_counts_that_were_cut_to_zero_and_one_are_refused() -> None:
    with pytest.raises(CountsError, match="holds zeros and ones alone: which genes were seen in a cell, not how often"):
        find((np.random.default_rng(0).random((60, 200)) < 0.4).astype(int))
    find((np.random.default_rng(0).random((60, 200)) < 0.1).astype(int))  # twenty molecules may all be of other genes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p_cp10k_is_undone_to_the_very_counts(dtype: type) -> None:
    counts = counts_of(300, 400)
    counts[5] = 0  # an empty cell stays empty
    found = find(sp.csr_matrix(cp10k(counts).astype(dtype)))
    assert found.where == "place0 (log1p CP10k inverted)"
    np.testing.assert_array_equal(all_of(found), counts)


def test_real_counts_win_over_undoing_log1p() -> None:
    counts = counts_of()
    assert find(cp10k(counts), counts).where == "place1"


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda x: x * 1.001, "sums to"),
        (lambda x: np.log1p(np.expm1(x) * 100), "sums to 1e\\+06"),
        (lambda x: x.astype(np.float16), "fractional"),
        (lambda x: x[:, 3:] / np.log(2), "sums to"),
    ],
)
def test_what_only_resembles_log1p_cp10k_is_refused(change: object, seen: str) -> None:
    with pytest.raises(CountsError, match=seen):
        find(change(cp10k(counts_of(30, 200))))  # type: ignore[operator]


def test_log1p_of_non_counts_that_sum_to_10000_is_refused() -> None:
    values = RNG.gamma(1.0, size=(20, 100))
    with pytest.raises(CountsError, match="does not give whole numbers"):
        find(np.log1p(values / values.sum(axis=1, keepdims=True) * 1e4))


def test_a_cell_of_few_genes_proves_nothing() -> None:
    counts = counts_of()
    counts[4] = 0
    counts[4, :3] = 2
    with pytest.raises(CountsError, match=r"fewer than 10 genes as proof \(first in cell 'c4'\)"):
        find(cp10k(counts))


def broken_csr(**change: np.ndarray) -> sp.csr_matrix:
    matrix = sp.csr_matrix(counts_of())
    for part, values in change.items():
        setattr(matrix, part, values)
    return matrix


def test_hostile_structure_is_refused_before_scipy_sees_it() -> None:
    good = sp.csr_matrix(counts_of())
    far, below, low, cut = good.indices.copy(), good.indices.copy(), good.indptr.copy(), good.indptr.copy()
    far[-1], below[100], low[5], cut[-1] = 10**6, -1, low[7], cut[-1] - 1
    for change in ({"indices": far}, {"indices": below}):
        with pytest.raises(ReadError, match="gene indices outside 0 to 59"):
            find(broken_csr(**change))
    for change in ({"indptr": low}, {"indptr": cut}, {"indptr": good.indptr + 1}):
        with pytest.raises(ReadError, match="indptr does not rise"):
            find(broken_csr(**change))
    with pytest.raises(ReadError, match="values but"):
        find(broken_csr(data=good.data[:-1]))
    by_gene = good.tocsc()
    by_gene.indices = by_gene.indices + 30
    with pytest.raises(ReadError, match="outside"):
        find(by_gene)
    with pytest.raises(ReadError, match="not numbers"):
        find(np.array([["a", "b"]]))


def test_fingerprints_are_equal_exactly_for_equal_cells() -> None:
    counts = counts_of()
    counts[7] = counts[3]
    prints = find(counts).print_N
    assert prints[7] == prints[3]
    assert len(np.unique(prints)) == len(counts) - 1
