"""A pass over a query that workers share: every cell is done once, and the output's regions fit the tasks."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained import World

from carvae import predict
from carvae.config import PredictConfig
from carvae.model import query_pass, tasks
from carvae.model.tasks import (
    CHUNKS_PER_TASK,
    FEWEST_PER_TASK,
    TASKS_PER_WORKER,
    cells_per_region,
    cells_per_task,
)


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

    def three_workers(_: str, function: Any, tasks_for: Any) -> Generator[Any, None, None]:
        for task in tasks_for(3):
            seen.append(task.cells)
            yield function(task)

    monkeypatch.setattr(tasks, "on_dask", three_workers)
    monkeypatch.setattr(tasks, "FEWEST_PER_TASK", 5)
    for name, place in (("alone", None), ("shared", "local:3")):
        predict.run(world.query_path, world.bundle, tmp_path / f"{name}.csv", PredictConfig(dask=place), label=True)
    cells = [cell for task in seen for cell in range(world.query.n_obs)[task]]
    assert len(seen) >= 3 * (TASKS_PER_WORKER - 1)
    assert cells == list(range(world.query.n_obs))
    alone, shared = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("alone", "shared"))
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-4)


def test_no_worker_is_left_when_an_output_is_given_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wrote on would write into the place of a store that is gone."""
    left: list[list[str]] = []

    def two_workers(_: str, function: Any, tasks_for: Any) -> Generator[Any, None, None]:
        try:
            yield from map(function, tasks_for(2))
        finally:
            left.append([path.suffix for path in tmp_path.iterdir()])

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tasks, "on_dask", two_workers)
    monkeypatch.setattr(query_pass.Pass, "add", full)
    with pytest.raises(OSError, match="disk full"):
        predict.run(world.query_path, world.bundle, tmp_path / "o.zarr", PredictConfig(dask="local:2"), label=False)
    assert left == [[".zarr"]]
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(1, 64), st.integers(1, 10**4))
def test_of_one_file_a_task_is_a_region_and_of_several_most_rows_are_in_whole_ones(
    n_cells: list[int], n_workers: int, chunk_size: int
) -> None:
    step = cells_per_task(sum(n_cells), n_workers, chunk_size)
    region = cells_per_region(step, n_cells, chunk_size)
    if len(n_cells) == 1:
        assert region == step
    else:
        assert min(FEWEST_PER_TASK, chunk_size) <= region <= step
        assert region <= max(min(step, sum(n_cells) / len(n_cells)) / 8, FEWEST_PER_TASK)
