"""Heads on the latent space.

Axes: N cells, K latent, S leaves of one label axis, F parts of its leaves, L label sets of one axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from carvae.config import ModelConfig


class StateHead(nn.Module):
    """Latent coordinates to leaf probabilities, one softmax per axis of the label tree.

    A leaf's logit is the sum over its parts (`Axis.parts`: the nodes above it and the words of its name), so that a
    state with few cells is learned from those that share a part with it.

    Parameters
    ----------
    parts
        Axis name -> float [S, F], the weight of each part in each leaf.
    config
        The model's section of the config.
    """

    def __init__(self, parts: Mapping[str, Tensor], config: ModelConfig) -> None:
        super().__init__()
        self.names = tuple(parts)  # beside the modules: torch cannot call a module "type" or "a.b"
        self.axes = nn.ModuleList(_PartsClassifier(parts_SF, config) for parts_SF in parts.values())

    def forward(self, z_NK: Tensor) -> dict[str, Tensor]:
        """Log probability of each leaf, [N, S] for every axis."""
        logits = {name: classifier(z_NK).float() for name, classifier in zip(self.names, self.axes, strict=True)}
        return {name: torch.log_softmax(logits_NS, 1) for name, logits_NS in logits.items()}


class _PartsClassifier(nn.Module):
    def __init__(self, parts_SF: Tensor, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("parts_SF", parts_SF)
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.n_latent, parts_SF.shape[1])

    def forward(self, z_NK: Tensor) -> Tensor:
        """Logits [N, S]."""
        logits_NS: Tensor = self.linear(self.dropout(z_NK)) @ self.get_buffer("parts_SF").t()
        return logits_NS


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
