"""Minibatches and thinning."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import counts_of

from carvae.data.loader import CellData, MinibatchLoader, Thinning, gather
from carvae.data.sparse import CountsCSR

N = 23


def cells(n: int = N, missing_genes: bool = True) -> CellData:
    """Cells whose covariate is their own number."""
    number = torch.arange(n)
    return CellData(
        counts=CountsCSR.from_scipy(counts_of(n)),
        covariate_NC=torch.stack([number, -number], 1),
        unmeasured_SG=torch.eye(2, 12, dtype=torch.bool) if missing_genes else None,
        study_N=number % 2,
        code_NA=number[:, None] % 3 - 1,
        weight_NA=number[:, None].float(),
    )


def visited(loader: MinibatchLoader) -> list[int]:
    return [int(i) for batch in loader for i in batch.covariate_NC[:, 0]]


@given(st.sets(st.integers(0, N - 1)), st.integers(1, 30), st.integers(0, 3), st.integers(0, 3))
def test_every_cell_is_visited_once_per_epoch(chosen: set[int], size: int, seed: int, epoch: int) -> None:
    loader = MinibatchLoader(cells(), np.array(sorted(chosen), np.int64), size, seed, epoch)
    batches = [*loader]
    assert sorted(visited(loader)) == sorted(chosen)
    assert len(batches) == len(loader)
    assert all(batch.counts.n_cells == size for batch in batches[:-1])


def test_the_order_is_a_function_of_seed_and_epoch_only() -> None:
    rows = np.arange(N)
    order = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            loader = MinibatchLoader(cells(), rows, 4, seed, epoch)
            order[seed, epoch] = visited(loader)
            np.random.seed(7)  # noqa: NPY002 - the global generator must not matter
            torch.manual_seed(7)
            assert visited(loader) == order[seed, epoch]
            resumed = MinibatchLoader(cells(), rows, 4, seed)
            resumed.set_epoch(epoch)
            assert visited(resumed) == order[seed, epoch]
    assert len({tuple(o) for o in order.values()}) == 4


def test_without_a_seed_cells_come_in_order() -> None:
    rows = np.array([5, 3, 8, 1])
    assert visited(MinibatchLoader(cells(), rows, 3)) == [5, 3, 8, 1]


def test_a_last_minibatch_of_one_cell_and_no_cells_at_all_work() -> None:
    *_, last = MinibatchLoader(cells(), np.arange(9), 4)
    assert last.counts.n_cells == 1
    assert last.counts.to_scipy().shape == (1, 12)
    assert [*MinibatchLoader(cells(), np.arange(0), 4)] == []


@given(st.lists(st.integers(0, N - 1), max_size=9))
def test_gathering_is_slicing(rows: list[int]) -> None:
    data = cells()
    batch = gather(data, torch.tensor(rows, dtype=torch.int64))
    assert np.array_equal(batch.counts.to_scipy().toarray(), counts_of(N)[rows].toarray())
    assert batch.covariate_NC.tolist() == data.covariate_NC[rows].tolist()
    assert batch.code_NA.tolist() == data.code_NA[rows].tolist()
    assert batch.weight_NA.tolist() == data.weight_NA[rows].tolist()
    assert batch.unmeasured_NG is not None
    assert data.unmeasured_SG is not None
    assert [r.tolist() for r in batch.unmeasured_NG] == [data.unmeasured_SG[i % 2].tolist() for i in rows]


def test_studies_that_measured_everything_need_no_mask() -> None:
    batch = gather(cells(missing_genes=False), torch.arange(3))
    assert batch.unmeasured_NG is None
    assert batch.to("cpu").unmeasured_NG is None


def test_a_minibatch_moves_as_a_whole() -> None:
    moved = gather(cells(), torch.arange(3)).to("meta")
    tensors = [moved.counts.indptr_N, moved.counts.gene_M, moved.counts.count_M, moved.covariate_NC]
    tensors += [moved.code_NA, moved.weight_NA]
    assert moved.unmeasured_NG is not None
    assert all(t.device.type == "meta" for t in [*tensors, moved.unmeasured_NG])


def many(n_cells: int = 400, count: int = 30) -> CountsCSR:
    """Cells with ``count`` counts of each of ten genes."""
    return CountsCSR.from_scipy(counts_of(1)[:, :1].tocsr()).__class__(
        torch.arange(0, n_cells * 10 + 1, 10),
        torch.arange(10, dtype=torch.int32).repeat(n_cells),
        torch.full((n_cells * 10,), float(count)),
        10,
    )


SHARE = st.floats(0, 1)


@given(SHARE, SHARE, SHARE, SHARE, st.integers(0, 9))
def test_thinning_never_adds_counts_and_keeps_whole_ones(a: float, b: float, c: float, d: float, seed: int) -> None:
    torch.manual_seed(seed)
    counts = CountsCSR.from_scipy(counts_of(N))
    before = counts.count_M.clone()
    thinned = Thinning(a, b, c, d)(counts)
    assert torch.equal(counts.count_M, before), "the counts that are reconstructed were changed"
    assert torch.all(thinned.count_M <= before)
    assert torch.all(thinned.count_M >= 0)
    assert torch.equal(thinned.count_M, thinned.count_M.round())
    assert torch.equal(thinned.gene_M, counts.gene_M)
    assert torch.equal(thinned.indptr_N, counts.indptr_N)


def test_nothing_is_thinned_when_the_shares_are_zero() -> None:
    counts = many()
    assert torch.equal(Thinning(0.0, 0.1, 0.0, 0.9)(counts).count_M, counts.count_M)


def test_thinned_depth_is_log_uniform_down_to_the_least() -> None:
    torch.manual_seed(0)
    counts = many(4000, 100)
    depth = (Thinning(1.0, 0.1, 0.0, 0.0)(counts).library_N() / counts.library_N()).numpy()
    # the mean of 0.1 ** U is 0.9 / ln(10); binomial noise of 1,000 counts is far below the tolerance
    assert depth.mean() == pytest.approx(0.9 / np.log(10), abs=0.01)
    assert np.quantile(depth, [0.25, 0.5, 0.75]) == pytest.approx(0.1 ** np.array([0.75, 0.5, 0.25]), rel=0.05)
    assert depth.min() > 0.06


def test_thinning_is_binomial_given_the_depth() -> None:
    """At a fixed depth of one half the counts have mean n / 2 and variance n / 4."""
    torch.manual_seed(0)
    rand, drawn = torch.rand, []

    def unlucky(*shape: int, device: torch.device) -> torch.Tensor:
        drawn.append(shape)
        return rand(*shape, device=device).clamp(min=0.999999)

    with mock.patch.object(torch, "rand", unlucky):
        kept = Thinning(1.1, 0.5, 0.0, 0.0)(many(3000, 40)).count_M.numpy()
    assert drawn == [(4, 3000)]
    assert kept.mean() == pytest.approx(20, abs=0.2)
    assert kept.var() == pytest.approx(10, rel=0.05)


def test_the_shares_of_cells_and_genes_are_those_asked_for() -> None:
    torch.manual_seed(0)
    counts = many(8000, 30)
    library = counts.library_N()
    assert float((Thinning(0.3, 0.1, 0.0, 0.0)(counts).library_N() < library).float().mean()) == pytest.approx(
        0.3, abs=0.02
    )
    dropped = Thinning(0.0, 1.0, 0.4, 0.6)(counts).count_M.reshape(-1, 10)
    assert set(dropped.flatten().tolist()) == {0.0, 30.0}
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4 * 0.3, abs=0.01)
    assert float((Thinning(0.0, 1.0, 1.0, 0.6)(counts).count_M == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_thinning_is_repeated_by_the_generator() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(Thinning(0.5, 0.1, 0.5, 0.5)(many()).count_M)
    assert torch.equal(*runs)


@pytest.mark.gpu
def test_minibatches_and_thinning_on_the_gpu() -> None:
    batch = gather(cells(), torch.arange(9)).to("cuda")
    rows = torch.tensor([3, 1], device="cuda")
    assert np.array_equal(batch.counts.rows(rows).to_scipy().toarray(), counts_of(N)[[3, 1]].toarray())
    assert torch.equal(Thinning(0.0, 0.1, 0.0, 0.9)(batch.counts).count_M, batch.counts.count_M)
    for moment, expected in zip(batch.counts.moments(), batch.counts.to("cpu").moments(), strict=True):
        assert moment.cpu().numpy() == pytest.approx(expected.numpy(), rel=1e-4)
