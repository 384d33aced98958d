"""Work beside work: the order is kept, an error is told, and a Dask worker that is killed costs only its tasks."""

from __future__ import annotations

import logging
import os
import signal
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from trained import World, carvae

from carvae import predict
from carvae.config import PredictConfig
from carvae.errors import ConfigError, GeneError
from carvae.model import query_pass
from carvae.model.ahead import Behind, ahead, on_dask
from carvae.model.query_pass import CHUNKS_PER_TASK, FEWEST_PER_TASK, TASKS_PER_WORKER, cells_per_task


class Thing:
    def __init__(self, number: int) -> None:
        self.number = number


def things(n: int, closed: list[bool], fails_at: int = -1) -> Generator[Thing, None, None]:
    try:
        for i in range(n):
            if i == fails_at:
                raise OSError("cut short")
            yield Thing(i)
    finally:
        closed.append(True)


def test_items_come_in_order_and_few_are_there_at_a_time() -> None:
    closed: list[bool] = []
    seen: list[weakref.ref[Thing]] = []
    for number, thing in enumerate(ahead(things(20, closed))):
        assert thing.number == number
        seen.append(weakref.ref(thing))
        assert sum(ref() is not None for ref in seen) <= 2
    assert len(seen) == 20
    assert closed == [True]


def test_an_error_of_the_reader_and_of_the_user_end_the_reading() -> None:
    closed: list[bool] = []
    with pytest.raises(OSError, match="cut short"):
        for _ in ahead(things(5, closed, fails_at=3)):
            pass
    assert closed == [True]
    reading = ahead(things(5, closed))
    assert next(reading).number == 0
    reading.close()
    assert closed == [True, True]


def test_what_is_handed_over_is_done_in_order_and_an_error_comes_up() -> None:
    done: list[int] = []
    with Behind(done.append) as write:
        for i in range(20):
            write(i)
    assert done == list(range(20))

    def fails(_: Any) -> None:
        raise OSError("disk full")

    def hand_over(n: int) -> None:
        with Behind(fails) as write:
            for i in range(n):
                write(i)

    for n in (1, 2):
        with pytest.raises(OSError, match="disk full"):
            hand_over(n)


def test_places_where_no_cluster_is_are_one_sentence(world: World, tmp_path: Path) -> None:
    for place in ("local:none", "local:0"):
        with pytest.raises(ConfigError, match="says no number of processes; write for example local:2"):
            next(iter(on_dask(place, len, lambda _: [(1,)])))
    with pytest.raises(ConfigError, match="not on an AnnData in memory"):
        predict.embed(world.query, world.bundle, PredictConfig(dask="local"))
    config = PredictConfig(dask="tcp://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no Dask scheduler answers there"):
        predict.run(world.query_path, world.bundle, tmp_path / "o.csv", config, label=False)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 10**7), st.integers(1, 64), st.integers(1, 10**4))
def test_every_worker_has_tasks_and_none_is_tiny(n_cells: int, n_workers: int, chunk_size: int) -> None:
    step = cells_per_task(n_cells, n_workers, chunk_size)
    assert step <= chunk_size or step % chunk_size == 0
    assert min(FEWEST_PER_TASK, chunk_size) <= step <= CHUNKS_PER_TASK * chunk_size
    if step > FEWEST_PER_TASK:
        assert -(-n_cells // step) > (TASKS_PER_WORKER - 1) * n_workers


def test_a_study_of_ten_thousand_cells_is_shared_and_millions_go_in_large_tasks() -> None:
    assert -(-10_075 // cells_per_task(10_075, 2, 4096)) == 10
    assert cells_per_task(10_000_000, 16, 4096) == 8 * 4096


def test_a_pass_gives_every_worker_some_cells_and_every_cell_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def three_workers(_: str, function: Any, tasks_for: Any) -> Iterator[Any]:
        for task in tasks_for(3):
            seen.append(task.cells)
            yield function(task)

    monkeypatch.setattr(query_pass, "on_dask", three_workers)
    monkeypatch.setattr(query_pass, "FEWEST_PER_TASK", 5)
    for name, place in (("alone", None), ("shared", "local:3")):
        predict.run(world.query_path, world.bundle, tmp_path / f"{name}.csv", PredictConfig(dask=place), label=True)
    cells = [cell for task in seen for cell in range(world.query.n_obs)[task]]
    assert len(seen) >= 3 * (TASKS_PER_WORKER - 1)
    assert cells == list(range(world.query.n_obs))
    alone, shared = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("alone", "shared"))
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-4)


@pytest.mark.dask
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_dasks_own_log_is_on_the_screen_but_its_warnings(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = logging.getLogger("distributed")
    before, propagated = own.level, own.propagate
    own.propagate = True  # as it is where carvae's own messages were set up first
    own.setLevel(logging.INFO)
    add = query_pass.Pass.add

    def and_warn(self: Any, part: Any) -> None:
        logging.getLogger("distributed.nanny").warning("a worker uses much memory")
        add(self, part)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(query_pass.Pass, "add", and_warn)
            asked = ("annotate", world.query_path, "--model", world.bundle, "--out", tmp_path / "o.csv")
            answer = carvae(*asked, "predict.dask=local:2")
        assert answer.code == 0, answer.err
        assert own.level == logging.INFO
    finally:
        own.setLevel(before)
        own.propagate = propagated
    of_dask = [record.getMessage() for record in caplog.records if record.name.startswith("distributed")]
    assert set(of_dask) == {"a worker uses much memory"}
    assert any(record.name.startswith("carvae") for record in caplog.records)
    printed = capfd.readouterr()
    assert "distributed" not in printed.err + printed.out + answer.err


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes; afterwards none of them is left."""
    from dask import config
    from distributed import LocalCluster

    with config.set({"distributed.worker.daemon": True}):
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        try:
            yield cluster
            pids = pids_of(cluster)
        finally:
            cluster.close()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def pids_of(cluster: Any) -> list[int]:
    return [int(nanny.pid) for nanny in cluster.workers.values() if nanny.pid]


def longer(query: AnnData, n: int) -> AnnData:
    """Some copies of the cells, each thinned at random, so that no two cells are the same."""
    rng, parts = np.random.default_rng(0), []
    for _ in range(n):
        part = query.copy()
        part.X.data = rng.binomial(part.X.data.astype(np.int64), 0.9).astype(part.X.dtype)
        parts.append(part)
    return ad.concat(parts, index_unique="-", merge="same")


@pytest.mark.dask
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_costs_only_its_tasks(
    world: World, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = tmp_path / "q.h5ad"
    longer(world.query, 4).write_h5ad(query)
    local = PredictConfig(chunk_size=10)
    for ending in ("h5ad", "csv"):
        predict.run(query, world.bundle, tmp_path / f"local.{ending}", local, label=True)
    killed: list[int] = []
    add = query_pass.Pass.add

    def and_kill(self: Any, part: Any) -> None:
        if not killed:
            killed.append(pids_of(cluster)[0])
            os.kill(killed[0], signal.SIGKILL)
        add(self, part)

    monkeypatch.setattr(query_pass.Pass, "add", and_kill)
    remote = PredictConfig(chunk_size=10, dask=cluster.scheduler_address)
    predict.run(query, world.bundle, tmp_path / "dask.h5ad", remote, label=True)
    assert killed
    assert killed[0] not in pids_of(cluster)
    one, other = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("local", "dask"))
    pd.testing.assert_frame_equal(one.obs, other.obs, check_exact=True)
    for key in one.obsm:
        np.testing.assert_array_equal(one.obsm[key], other.obsm[key])
    assert (tmp_path / "local.samples.csv").read_bytes() == (tmp_path / "dask.samples.csv").read_bytes()
    predict.run(query, world.bundle, tmp_path / "dask.csv", remote, label=True)
    assert (tmp_path / "local.csv").read_bytes() == (tmp_path / "dask.csv").read_bytes()


@pytest.mark.dask
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_with_the_query_is_told_as_without_workers(world: World, tmp_path: Path, cluster: Any) -> None:
    config = PredictConfig(min_overlap=1.0, dask=cluster.scheduler_address)
    with pytest.raises(GeneError):
        predict.run(world.query_path, world.bundle, tmp_path / "o.csv", config, label=True)
    late = world.query.copy()
    late.X = late.X.astype(np.float32)
    late.X.data[-1] = 0.5  # beyond the first cells, so that a worker finds it
    late.write_h5ad(tmp_path / "late.h5ad")
    remote = PredictConfig(chunk_size=10, dask=cluster.scheduler_address)
    with pytest.raises(Exception, match=r"fractional values .*first in cell") as caught:
        predict.run(tmp_path / "late.h5ad", world.bundle, tmp_path / "o.csv", remote, label=True)
    assert type(caught.value).__name__ == "CountsError"
    assert [p.name for p in tmp_path.iterdir()] == ["late.h5ad"]
