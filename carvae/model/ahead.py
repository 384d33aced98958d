"""Work beside work: the next item is made by a thread, or on other processes, while this one is used."""

from __future__ import annotations

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


def on_dask(address: str, function: Callable[[Task], Item], tasks: Iterable[Task]) -> Iterator[Item]:
    """``function`` of each task in order, computed by the workers of a Dask cluster.

    What a worker was at when it died is done again by another. Only a few results more than there are workers are on
    their way at a time.

    Parameters
    ----------
    address
        A scheduler's address, or ``local`` or ``local:N`` for N processes on this machine.

    Raises
    ------
    ConfigError
        Dask is not installed, the address is none, or nobody answers there.
    """
    remaining = iter(tasks)
    with _client(address) as client:
        n_workers = max(1, sum(client.nthreads().values()))
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
            config.set({"distributed.worker.daemon": True}),
            LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
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
