"""The processes of one training run: what they add up, agree on, and leave to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed

from carvae.config import Config
from carvae.data.order import Share
from carvae.errors import ConfigError


def rank() -> int:
    """Number of this process; 0 for a single one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(config: Config) -> Share:
    """Which cells are this process's.

    Raises
    ------
    ConfigError
        The shards cannot be dealt to the processes, or a minibatch to the shards.
    """
    shards = config.train.shards or world()
    if shards % world():
        raise ConfigError(
            f"train.shards is {shards}, which {world()} processes cannot have equally; make it a multiple of them"
        )
    if config.train.batch_size < shards:
        raise ConfigError(
            f"train.batch_size is {config.train.batch_size}, less than the {shards} shards that each minibatch takes "
            "cells from; raise it"
        )
    return Share(rank(), world(), shards)


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each."""
    if world() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def everywhere(flag: bool) -> bool:
    """Whether all processes say so."""
    device = "cuda" if world() > 1 and distributed.get_backend() == "nccl" else "cpu"
    return int(total(torch.tensor([int(flag)], device=device))) == world()


def on_first(work: Callable[[], object]) -> None:
    """Let the first process work while the others wait; where it fails they leave without a word."""
    failure: BaseException | None = None
    if rank() == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below, when the others know
            failure = error
    done = everywhere(failure is None)
    if failure is not None:
        raise failure
    if not done:
        raise SystemExit(1)


def mean_gradients(parameters: Sequence[Tensor], n_cells: int) -> None:
    """Put the mean over all cells of the minibatch in place of each gradient, which is the mean over ``n_cells``."""
    flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters])
    flat = total(torch.cat([flat * n_cells, flat.new_full((1,), n_cells)]))
    means = torch.split(flat[:-1] / flat[-1], [p.numel() for p in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter)
