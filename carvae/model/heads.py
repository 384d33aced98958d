"""Heads on the latent space.

Axes: N cells, K latent, S leaves of one label axis, L label sets of one axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from carvae.config import ModelConfig


class StateHead(nn.Module):
    """Latent coordinates to leaf probabilities, one softmax per axis of the label tree.

    Parameters
    ----------
    n_leaves
        Axis name -> number of leaves.
    config
        The model's section of the config.
    """

    def __init__(self, n_leaves: Mapping[str, int], config: ModelConfig) -> None:
        super().__init__()
        self.axes = nn.ModuleDict({axis: _classifier(n, config) for axis, n in n_leaves.items()})

    def forward(self, z_NK: Tensor) -> dict[str, Tensor]:
        """Log probability of each leaf, [N, S] for every axis."""
        return {axis: torch.log_softmax(head(z_NK).float(), 1) for axis, head in self.axes.items()}


def _classifier(n_leaves: int, config: ModelConfig) -> nn.Module:
    dropout = nn.Dropout(config.head_dropout)
    if config.head_hidden == 0:
        return nn.Sequential(dropout, nn.Linear(config.n_latent, n_leaves))
    hidden = nn.Linear(config.n_latent, config.head_hidden)
    return nn.Sequential(hidden, nn.ReLU(), dropout, nn.Linear(config.head_hidden, n_leaves))


def label_loss(log_probability_NS: Tensor, code_N: Tensor, allowed_LS: Tensor, weight_N: Tensor) -> Tensor:
    """Mean over labelled cells of -log(summed probability of the leaves that the label allows).

    Parameters
    ----------
    log_probability_NS
        Log probabilities of the leaves.
    code_N
        Label set of each cell, -1 where missing (such cells add nothing).
    allowed_LS
        True where a label set allows a leaf; a coarse label allows several.
    weight_N
        Weight of each cell (class balance, weak labels).

    Returns
    -------
    Scalar in nats; zero when no cell is labelled.
    """
    labelled_N = code_N >= 0
    allowed_NS = allowed_LS[code_N.clamp(min=0)]
    loss_N = -torch.logsumexp(log_probability_NS.masked_fill(~allowed_NS, -torch.inf), 1)
    weight_N = torch.where(labelled_N, weight_N, 0.0)
    return (torch.where(labelled_N, loss_N, 0.0) * weight_N).sum() / labelled_N.sum().clamp(min=1)
