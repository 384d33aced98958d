"""Work beside work: the order is kept, an error is told, and a Dask worker that is killed costs only its tasks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from trained import World, carvae

from carvae import predict
from carvae.config import PredictConfig
from carvae.data.regions import Regions
from carvae.errors import ConfigError, GeneError
from carvae.model import query_pass, tasks
from carvae.model.ahead import Behind, ahead, on_dask


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
    local = PredictConfig(chunk_size=32)
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
    remote = PredictConfig(chunk_size=32, dask=cluster.scheduler_address)
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


def members(store: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """Everything in a store: place -> attributes, and the values of an array; the settings name workers, or none."""
    root = zarr.open_group(store, mode="r", use_consolidated=False)
    return {
        place: (dict(node.attrs), np.asarray(node[...]) if isinstance(node, zarr.Array) else None)
        for place, node in root.members(max_depth=None)
        if not place.endswith("/settings")
    }


def assert_same_stores(one: Path, other: Path) -> None:
    first, second = members(one), members(other)
    assert first.keys() == second.keys()
    for place, (attributes, values) in first.items():
        assert attributes == second[place][0], place
        if values is not None:
            assert values.dtype == second[place][1].dtype, place
            np.testing.assert_array_equal(values, second[place][1], place)
    assert not list(other.rglob("*.partial"))
    pd.testing.assert_frame_equal(ad.read_zarr(one).obs, ad.read_zarr(other).obs, check_exact=True)


def dies_as_it_writes() -> int:
    """In a worker: the next write ends in its middle, with rows that are wrong and a file that no one renames."""
    import os
    import signal

    from carvae.data.regions import Regions

    def put(self: Any, start: int, obsm: Any) -> None:
        key, rows = next(iter(obsm.items()))
        self._array(key)[start : start + len(rows)] = -1
        (self._folder(key) / "0.cut.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    Regions._put = put  # type: ignore[method-assign]
    return os.getpid()


def and_one_dies(cluster: Any) -> int:
    """The worker that will die at its next write."""
    from cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from distributed import Client

    own = sys.modules[__name__]  # which workers do not know
    register_pickle_by_value(own)
    try:
        with Client(cluster) as client:
            worker = min(client.scheduler_info()["workers"])
            return int(client.run(dies_as_it_writes, workers=[worker])[worker])
    finally:
        unregister_pickle_by_value(own)


@pytest.mark.dask
@pytest.mark.filterwarnings("ignore")
def test_workers_write_regions_of_their_own_and_one_that_dies_as_it_writes_loses_no_row(
    world: World, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source with an earlier embedding, and several, whose cells begin anywhere in the output's chunks."""
    cells = longer(world.query, 4)
    cells.write_zarr(tmp_path / "plain.zarr")
    local, remote = PredictConfig(chunk_size=10), PredictConfig(chunk_size=10, dask=cluster.scheduler_address)
    predict.run(tmp_path / "plain.zarr", world.bundle, tmp_path / "one.zarr", local, label=False)
    (tmp_path / "several").mkdir()
    for name, part in (("a", slice(0, 53)), ("b", slice(53, 165)), ("c", slice(165, 172)), ("d", slice(172, 260))):
        cells[part].copy().write_h5ad(tmp_path / "several" / f"{name}.h5ad")
    home, came, told = tasks._home, [], []

    def and_look(done: Any) -> Iterator[Any]:
        came.append((done, [len(part.results.latent) for part in done.parts]))
        for part in home(done):
            told.append(part.results.latent)
            yield part

    monkeypatch.setattr(tasks, "_home", and_look)
    for query, label in (("one.zarr", False), ("several", True)):
        came.clear()
        told.clear()
        predict.run(tmp_path / query, world.bundle, tmp_path / "local.zarr", local, label=label)
        assert not came
        dying = and_one_dies(cluster)
        predict.run(tmp_path / query, world.bundle, tmp_path / "dask.zarr", remote, label=label)
        assert dying not in pids_of(cluster)
        assert_same_stores(tmp_path / "local.zarr", tmp_path / "dask.zarr")
        assert len(came) >= 8
        assert not any(n for _, rows in came for n in rows)
        if label:  # samples are judged by coordinates that did not travel
            np.testing.assert_array_equal(np.concatenate(told), ad.read_zarr(tmp_path / "dask.zarr").obsm["X_carvae"])
        travelled = sum(len(rest.obsm["X_carvae"]) for done, _ in came for rest in done.rest)
        assert travelled == 0 if query == "one.zarr" else 0 < travelled < 200
    assert (tmp_path / "local.samples.csv").read_bytes() == (tmp_path / "dask.samples.csv").read_bytes()
    cells_of = [pd.read_csv(tmp_path / f"{name}.cells.csv.gz") for name in ("local", "dask")]
    pd.testing.assert_frame_equal(*cells_of, check_exact=True)


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
    for name in ("o.csv", "o.zarr"):
        with pytest.raises(Exception, match=r"fractional values .*first in cell") as caught:
            predict.run(tmp_path / "late.h5ad", world.bundle, tmp_path / name, remote, label=True)
        assert type(caught.value).__name__ == "CountsError"
    assert [p.name for p in tmp_path.iterdir()] == ["late.h5ad"]


@pytest.mark.dask
@pytest.mark.filterwarnings("ignore")
def test_workers_that_do_not_see_the_output_are_one_sentence(
    world: World, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Regions.made

    def elsewhere(store: Path, *others: Any) -> Regions:
        return replace(made(store, *others), store=tmp_path / "not mounted" / store.name)

    monkeypatch.setattr(Regions, "made", elsewhere)
    remote = PredictConfig(dask=cluster.scheduler_address)
    with pytest.raises(ConfigError, match=r"does not see the store .*not mounted; give an --out in a folder that all"):
        predict.run(world.query_path, world.bundle, tmp_path / "o.zarr", remote, label=False)
    assert list(tmp_path.iterdir()) == []
    predict.run(world.query_path, world.bundle, tmp_path / "o.h5ad", remote, label=False)
    assert (tmp_path / "o.h5ad").exists()
