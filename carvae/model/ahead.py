"""Work beside work: the next item is made by a thread, or on other processes, while this one is used."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

from carvae.errors import ConfigError

Item = TypeVar("Item")
Task = TypeVar("Task")

RETRIES = 2
"""How often a task is tried again after an error; tasks of a worker that died are given to another anyway."""


def ahead(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The items, each made by a thread while the one before is used: two are there at a time."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        following: Future[Item | None] = pool.submit(next, items, None)
        try:
            while (item := following.result()) is not None:
                following = pool.submit(next, items, None)
                yield item
                del item
        finally:
            with suppress(Exception):  # the first error is the one to tell
                following.result()
            items.close()


class Behind:
    """Calls a function in a thread, one call after the other; an error comes up at the next call or at the end."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self.function = function
        self.pool = ThreadPoolExecutor(1, "behind")
        self.last: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True)
        if error[0] is None and self.last is not None:
            self.last.result()

    def __call__(self, item: Any) -> None:
        """Hand over an item, once the one before is done with."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(self.function, item)


def on_dask(
    address: str, function: Callable[[Task], Item], tasks_for: Callable[[int], Iterable[Task]]
) -> Generator[Item, None, None]:
    """``function`` of each task in order, computed by the workers of a Dask cluster.

    What a worker was at when it died is done again by another. Only a few results more than there are workers are on
    their way at a time.

    Parameters
    ----------
    address
        A scheduler's address, or ``local`` or ``local:N`` for N processes on this machine.
    tasks_for
        The tasks for so many workers.

    Raises
    ------
    ConfigError
        Dask is not installed, the address is none, or nobody answers there.
    """
    with _client(address) as client:
        n_workers = max(1, sum(client.nthreads().values()))
        remaining = iter(tasks_for(n_workers))
        waiting = deque(
            client.submit(function, task, pure=False, retries=RETRIES) for task in islice(remaining, 2 * n_workers)
        )
        while waiting:
            future = waiting.popleft()
            item: Item = future.result()
            future.release()
            waiting.extend(client.submit(function, task, pure=False, retries=RETRIES) for task in islice(remaining, 1))
            yield item


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from dask import config
        from distributed import Client, LocalCluster
    except ImportError:
        raise ConfigError("predict.dask needs Dask, which is not installed: pip install 'carvae[scale]'") from None
    kind, _, number = address.partition(":")
    if kind == "local":
        if number and not (number.isdecimal() and int(number)):
            raise ConfigError(f"predict.dask={address!r} says no number of processes; write for example local:2")
        n_workers = int(number) if number else None
        with (
            _warnings_alone(),
            config.set({"distributed.worker.daemon": True}),
            LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            client.run(_hush_worker)
            try:
                yield client
            finally:  # all results are here; a worker that is slow to end is killed, which harms nobody
                logging.getLogger("distributed").setLevel(logging.ERROR)
        return
    with _warnings_alone(), _client_of(address, Client) as client:
        yield client


@contextmanager
def _client_of(address: str, Client: Any) -> Iterator[Any]:
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        seen = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"predict.dask={address!r}: no Dask scheduler answers there ({seen}); give tcp://HOST:PORT of one, or local"
        ) from None
    with client:
        if not client.nthreads():
            raise ConfigError(
                f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`"
            )
        yield client


@contextmanager
def _warnings_alone() -> Iterator[None]:
    """Of Dask's own log, which is set to go to the screen once it is imported, let through warnings and errors."""
    own = logging.getLogger("distributed")
    before = own.level
    own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        own.setLevel(before)


def _hush_worker() -> None:
    """In a worker on this machine: an error of a task comes to the caller, and a dead worker is told by its nanny.

    Else a heartbeat that is under way when all is closed down is told as an error, with its stack.
    """
    logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
    logging.getLogger("distributed.worker.memory").setLevel(logging.WARNING)
