"""Minibatches of resident and of streamed cells, their order and their division among processes; thinning."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import counts_of, obs_of, write_store

from carvae.data import order, residence
from carvae.data.loader import CellData, MinibatchLoader, Thinning
from carvae.data.order import Share, Shuffle
from carvae.data.residence import Resident, Streamed
from carvae.data.sparse import CountsCSR
from carvae.data.store import CellStore
from carvae.model.heads import label_loss

N = 23
CPU = torch.device("cpu")
CHOSEN = st.sets(st.integers(0, N - 1))
KINDS = st.sampled_from(["resident", "stream"])


def resident(store: CellStore, rows: np.ndarray, device: torch.device = CPU) -> Resident:
    return Resident(residence.read(store, rows, device), rows)


def cells(store: CellStore, kind: str = "resident", missing_genes: bool = True) -> CellData:
    """Cells whose covariate is their own number."""
    n = store.n_cells
    number = torch.arange(n)
    return CellData(
        counts=resident(store, np.arange(n)) if kind == "resident" else Streamed(store, CPU),
        covariate_NC=torch.stack([number, -number], 1),
        unmeasured_SG=torch.eye(2, 12, dtype=torch.bool) if missing_genes else None,
        study_N=number % 2,
        code_NA=number[:, None] % 3 - 1,
        weight_NA=number[:, None].float(),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return write_store(tmp_path_factory.mktemp("cells") / "store.zarr", counts_of(N), obs_of({"a": N}))


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Windows of five cells in blocks of three, so that a few cells make many."""
    with mock.patch.object(Streamed, "window", 5), mock.patch.object(order, "BLOCK", 3):
        yield


def visited(loader: MinibatchLoader) -> list[int]:
    return [int(i) for batch in loader for i in batch.covariate_NC[:, 0]]


@settings(max_examples=30)
@given(KINDS, CHOSEN, st.integers(1, 30), st.integers(0, 3), st.integers(0, 3))
def test_every_cell_is_visited_once_per_epoch_with_its_own_counts(
    store: CellStore, kind: str, chosen: set[int], size: int, seed: int, epoch: int
) -> None:
    loader = MinibatchLoader(cells(store, kind), np.array(sorted(chosen), np.int64), size, seed, epoch)
    batches = [*loader]
    assert sorted(visited(loader)) == sorted(chosen)
    assert len(batches) == len(loader)
    assert all(batch.counts.n_cells == batch.n_counted == size for batch in batches[:-1])
    everything = counts_of(N).toarray()
    for batch in batches:
        rows = batch.covariate_NC[:, 0]
        assert np.array_equal(batch.counts.to_scipy().toarray(), everything[rows.numpy()])
        assert batch.code_NA.tolist() == loader.data.code_NA[rows].tolist()
        assert batch.weight_NA.tolist() == loader.data.weight_NA[rows].tolist()
        assert batch.unmeasured_NG is not None
        assert loader.data.unmeasured_SG is not None
        assert torch.equal(batch.unmeasured_NG, loader.data.unmeasured_SG[rows % 2])


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_the_order_is_a_function_of_seed_and_epoch_only(store: CellStore, kind: str) -> None:
    rows = np.arange(N)
    found = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            loader = MinibatchLoader(cells(store, kind), rows, 4, seed, epoch)
            found[seed, epoch] = visited(loader)
            np.random.seed(7)  # noqa: NPY002 - the global generator must not matter
            torch.manual_seed(7)
            assert visited(loader) == found[seed, epoch]
    assert len({tuple(o) for o in found.values()}) == 4


def test_resident_cells_of_one_process_come_as_numpy_permutes_them(store: CellStore) -> None:
    """The order before there were shards, which a run that goes on relies on."""
    loader = MinibatchLoader(cells(store), np.arange(N), 4, 3, 2)
    assert visited(loader) == np.random.default_rng((3, 2)).permutation(N).tolist()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_a_window_holds_whole_blocks_shuffled_together(n: int, window: int, shard: int, epoch: int) -> None:
    mixed = Shuffle(0, epoch)(np.arange(n), shard, window)
    assert sorted(mixed.tolist()) == list(range(n))
    opened = [{int(i) // 3 for i in mixed[start : start + window]} for start in range(0, n, window)]
    # neighbouring cells are read together: a window touches no more blocks than it has room for, and a cut one
    assert all(len(blocks) <= window // 3 + 2 + (n % 3 > 0) for blocks in opened)


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_without_a_seed_cells_come_in_order(store: CellStore, kind: str) -> None:
    rows = np.array([1, 3, 5, 8, 9, 20])
    assert visited(MinibatchLoader(cells(store, kind), rows, 4)) == rows.tolist()


def test_a_last_minibatch_of_one_cell_and_no_cells_at_all_work(store: CellStore) -> None:
    for kind in ("resident", "stream"):
        *_, last = MinibatchLoader(cells(store, kind), np.arange(9), 4)
        assert last.counts.n_cells == 1
        assert last.counts.to_scipy().shape == (1, 12)
        assert [*MinibatchLoader(cells(store, kind), np.arange(0), 4)] == []


def test_studies_that_measured_everything_need_no_mask(store: CellStore) -> None:
    batch = next(iter(MinibatchLoader(cells(store, missing_genes=False), np.arange(3), 3)))
    assert batch.unmeasured_NG is None
    assert batch.to("cpu").unmeasured_NG is None


def test_a_minibatch_moves_as_a_whole(store: CellStore) -> None:
    moved = next(iter(MinibatchLoader(cells(store), np.arange(3), 3))).to("meta")
    tensors = [moved.counts.indptr_N, moved.counts.gene_M, moved.counts.count_M, moved.covariate_NC]
    tensors += [moved.code_NA, moved.weight_NA]
    assert moved.unmeasured_NG is not None
    assert all(t.device.type == "meta" for t in [*tensors, moved.unmeasured_NG])


# -- several processes


def parts_of(
    store: CellStore, kind: str, rows: np.ndarray, size: int, world: int, shards: int, seed: int | None
) -> list[list[CellData]]:
    """The minibatches of every process, which holds no cells but its own."""
    found = []
    for rank in range(world):
        share = Share(rank, world, shards)
        data = cells(store, kind)
        if kind == "resident":
            data = data.beside(resident(store, np.unique(share.needed(rows))))
        found.append([*MinibatchLoader(data, rows, size, seed, 1, share)])
    return found


@settings(max_examples=15)
@given(
    KINDS, st.sets(st.integers(0, N - 1), min_size=1), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.data()
)
def test_processes_divide_the_minibatches_of_one(
    store: CellStore, kind: str, chosen: set[int], world: int, more: int, shuffled: bool, data: st.DataObject
) -> None:
    """With equal shards: the same minibatches, equal parts, every cell counted once, and the same label loss."""
    shards, rows = world * more, np.array(sorted(chosen))
    size, seed = data.draw(st.integers(shards, 12)), 5 if shuffled else None
    whole = [*MinibatchLoader(cells(store, kind), rows, size, seed, 1, Share(0, 1, shards))]
    parts = parts_of(store, kind, rows, size, world, shards, seed)
    assert {len(mine) for mine in parts} == {len(whole)}
    allowed = torch.eye(2, dtype=torch.bool)
    everything = counts_of(N).toarray()
    for one, *several in zip(whole, *parts, strict=True):
        counted = [part.covariate_NC[: part.n_counted, 0].tolist() for part in several]
        assert sorted(cell for mine in counted for cell in mine) == sorted(one.covariate_NC[:, 0].tolist())
        assert max(map(len, counted)) - min(map(len, counted)) <= more
        assert all(part.counts.n_cells > 0 for part in several), "a loss without cells is not a number"
        for part in several:
            assert np.array_equal(part.counts.to_scipy().toarray(), everything[part.covariate_NC[:, 0].numpy()])
        losses = []
        for batch in (one, *several):
            log_probability_NS = torch.log_softmax(batch.covariate_NC[:, :1] * torch.tensor([[0.1, 0.2]]), 1)
            losses.append(label_loss(log_probability_NS, batch.code_NA[:, 0], allowed, batch.weight_NA[:, 0]))
        mean = sum(n.n_counted * loss for n, loss in zip(several, losses[1:], strict=True)) / one.n_counted
        assert float(mean) == pytest.approx(float(losses[0]), rel=1e-5)


def test_a_process_reads_one_stretch_of_the_store(store: CellStore) -> None:
    shares = [Share(rank, 3, 6).cells(np.arange(N)) for rank in range(3)]
    assert np.concatenate(shares).tolist() == list(range(N))
    assert [*map(len, shares)] == [8, 8, 7]
    assert Share(2, 3, 3).cells(np.arange(2)).size == 0
    assert Share(2, 3, 3).needed(np.arange(2)).tolist() == [0]


# -- streaming


def test_streaming_holds_two_windows_and_reads_ahead_in_a_thread(store: CellStore) -> None:
    read, readers = residence.read, []

    def spy(*arguments: object) -> object:
        readers.append(threading.current_thread())
        return read(*arguments)  # type: ignore[arg-type]

    with mock.patch.object(residence, "read", spy):
        loader = iter(MinibatchLoader(cells(store, "stream"), np.arange(N), 5, 0))
        for n, _ in enumerate(loader, start=1):
            assert len(readers) <= min(n + 1, 5)
    assert len(readers) == 5
    assert threading.main_thread() not in readers


def test_a_pass_that_is_given_up_leaves_no_thread(store: CellStore) -> None:
    before = threading.active_count()
    loader = iter(MinibatchLoader(cells(store, "stream"), np.arange(N), 5, 0))
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_store_that_is_damaged_meanwhile_is_said(tmp_path: Path) -> None:
    from carvae.errors import ReadError

    damaged = write_store(tmp_path / "s", counts_of(N), obs_of({"a": N}))
    loader = iter(MinibatchLoader(cells(damaged, "stream"), np.arange(N), 5, 0))
    next(loader)
    part = next(p for p in (tmp_path / "s" / "gene" / "c").rglob("*") if p.is_file())
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(ReadError, match="gene is damaged"):
        list(loader)


# -- thinning


def many(n_cells: int = 400, count: int = 30) -> CountsCSR:
    """Cells with ``count`` counts of each of ten genes."""
    return CountsCSR(
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


# -- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_minibatches_are_made_on_the_gpu(store: CellStore, kind: str) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    counts = resident(store, np.arange(N), cuda) if kind == "resident" else Streamed(store, cuda)
    there = MinibatchLoader(cells(store).beside(counts), np.arange(N), 4, 0)
    for one, other in zip(there, MinibatchLoader(cells(store, kind), np.arange(N), 4, 0), strict=True):
        assert one.counts.count_M.device == one.code_NA.device == cuda
        assert (one.counts.to_scipy() != other.counts.to_scipy()).nnz == 0
        assert one.weight_NA.tolist() == other.weight_NA.tolist()
    batch = next(iter(there))
    assert torch.equal(Thinning(0.0, 0.1, 0.0, 0.9)(batch.counts).count_M, batch.counts.count_M)


@pytest.mark.gpu
def test_a_resident_minibatch_waits_for_nothing(store: CellStore) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    loader = iter(MinibatchLoader(cells(store).beside(resident(store, np.arange(N), cuda)), np.arange(N), 4, 0))
    next(loader)  # brings the order of the epoch
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in loader:
            batch.counts.cell_M()
    finally:
        torch.cuda.set_sync_debug_mode("default")
