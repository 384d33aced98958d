"""A pass over a query that the workers of a Dask cluster share: what a task is, what a worker does, what comes home."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from carvae.config import PredictConfig
from carvae.data.readers import CountsSource, open_samples
from carvae.data.regions import Regions, Rest
from carvae.data.results import LATENT
from carvae.model.ahead import on_dask
from carvae.model.labeller import Labelled, Labeller
from carvae.model.machine import load_on

CHUNKS_PER_TASK = 8
"""Most chunks that a worker labels at a time."""
TASKS_PER_WORKER = 4
"""Tasks that each worker has at least, as far as there are cells: so none is idle, and slow ones have fewer."""
FEWEST_PER_TASK = 512
"""Fewer cells are not worth a task of their own. A power of two, so that products of matrices go by the same steps."""
REGIONS_PER_TASK = 8
"""Regions that a task of a query of several files has about. Of one file it has one, but files begin anywhere in the
output: so a region at each end of a task is shared with the next one, and the fewer its rows, the fewer travel."""

RegionsOf = Callable[[int], Regions | None]
"""Makes regions of so many rows; None where one process writes all."""


@dataclass(frozen=True, slots=True)
class Query:
    """All that a worker needs to know of a run."""

    query: Path
    model: Path
    config: PredictConfig
    label: bool
    whole: bool
    run: str
    """Tells runs apart: a later one may find other files in the same places."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some cells of one source."""

    query: Query
    source: int
    cells: slice
    first: int
    """Which cell of all sources the first one is."""
    regions: Regions | None


@dataclass(frozen=True, slots=True)
class Done:
    """What comes home of a task; where there are regions, its parts have no rows of ``obsm``."""

    task: Task
    parts: list[Labelled]
    rest: list[Rest]


def cells_per_task(n_cells: int, n_workers: int, chunk_size: int) -> int:
    """Cells of one task: few enough that every worker has some, whole chunks where that leaves enough tasks."""
    share = -(-n_cells // (TASKS_PER_WORKER * n_workers))
    if share > chunk_size:
        return min(share // chunk_size, CHUNKS_PER_TASK) * chunk_size
    fewest = min(FEWEST_PER_TASK, chunk_size)
    return max(share // fewest, 1) * fewest


def cells_per_region(cells_per_task: int, n_cells: Sequence[int], chunk_size: int) -> int:
    """Rows of a chunk of the output, where the sources have so many cells."""
    if len(n_cells) == 1:
        return cells_per_task
    usual = min(cells_per_task, sum(n_cells) // len(n_cells))
    return max(usual // REGIONS_PER_TASK, min(FEWEST_PER_TASK, chunk_size))


def by_workers(
    address: str, query: Query, n_cells: Sequence[int], regions_of: RegionsOf
) -> Generator[Labelled, None, None]:
    """What is said of each chunk, in order, by the workers of a cluster, who write ``obsm`` where there are regions.

    Parameters
    ----------
    n_cells
        Of each source.
    """

    def tasks_for(n_workers: int) -> Iterator[Task]:
        size = query.config.chunk_size
        step = cells_per_task(sum(n_cells), n_workers, size)
        regions = regions_of(cells_per_region(step, n_cells, size))
        for source, first in enumerate(np.cumsum([0, *n_cells])[:-1].tolist()):
            for start in range(0, n_cells[source], step):
                yield Task(query, source, slice(start, start + step), first + start, regions)

    with closing(on_dask(address, do, tasks_for)) as found:
        for done in found:
            yield from _home(done)


def do(task: Task) -> Done:
    """What a worker does."""
    source, labeller = _at_worker(task.query)[task.source]
    parts = [labeller(block) for block in source.blocks(task.query.config.chunk_size, task.cells)]
    if task.regions is None:
        return Done(task, parts, [])
    results = [part.results.obsm() for part in parts]
    obsm = {key: np.concatenate([part[key] for part in results]) for key in task.regions.keys}
    rest = task.regions.write(task.first, obsm)
    return Done(task, [replace(part, results=part.results.without_rows()) for part in parts], rest)


def _home(done: Done) -> Iterator[Labelled]:
    """The parts of a task; the rest is written, and coordinates are read again where samples are judged by them."""
    task, regions = done.task, done.task.regions
    if regions is None:
        yield from done.parts
        return
    for rest in done.rest:
        regions.write_rest(rest)
    if not task.query.label:
        yield from done.parts
        return
    latent = regions.read(LATENT, task.first, task.first + sum(len(part.total_N) for part in done.parts))
    start = 0
    for part in done.parts:
        stop = start + len(part.total_N)
        yield replace(part, results=replace(part.results, latent=latent[start:stop]))
        start = stop


@lru_cache(maxsize=1)
def _at_worker(query: Query) -> list[tuple[CountsSource, Labeller]]:
    """Model and sources, opened once by each worker."""
    bundle = load_on(query.model, query.config)
    sources = open_samples(query.query, counts=query.config.counts, whole=query.whole)
    return [(source, Labeller(source, bundle, query.config, label=query.label)) for source in sources]
