"""Heads on the latent space.

Axes: N cells, G genes, M non-zero counts, K latent, S leaves of one label axis, F parts of its leaves, L label sets of
one axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.model.completion import Carrier, Completion, log_normalised
from carvae.model.fused import small_products, sparse_product

EVEN_AT = 0.45
"""Both views weigh the same in a cell with this share of the counts of the median labelled training cell."""
DEPTH_POWER = 2.0
"""1 in bundles before layout 6."""


@dataclass(frozen=True, slots=True)
class GeneViews:
    """The gene views of all label axes over the genes that were measured in a query."""

    weights: tuple[tuple[Tensor, Tensor], ...]
    """Weight [G, F] and bias [F] of each axis."""
    share: Tensor | float
    """Of a cell's counts over all genes, what those that were measured have."""
    measured: float
    """Share of the genes."""


class StateHead(nn.Module):
    """Latent coordinates and genes to leaf probabilities, one softmax per axis of the label tree.

    Two linear views answer, one from the latent space, which pools what is known of all cells, and one from the genes,
    which keeps what the latent space leaves out. The answer is the geometric mean of their probabilities, normalised.
    In it the genes of a cell with n counts over the panel weigh r^2 / (r^2 + `EVEN_AT`^2), r being n over the median of
    the labelled training cells: the fewer the counts, the more the latent space is asked, which knows shallow cells.

    Genes that were not measured are expected from those that were (`Completion`). The latent space, whose encoder reads
    zeros there, weighs less then, by the square of the share of genes that were measured.

    A leaf's logit is the sum over its parts (`Axis.parts`: the nodes above it and the words of its name), so that a
    state with few cells is learned from those that share a part with it.

    The latent view is trained with the network; the gene view is fitted after it (`gene_view.fit_gene_view`), and
    until then weighs nothing.

    Parameters
    ----------
    parts
        Axis name -> float [S, F], the weight of each part in each leaf.
    n_genes
        Genes of the panel.
    config
        The model's section of the config.
    """

    def __init__(self, parts: Mapping[str, Tensor], n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.names = tuple(parts)  # beside the modules: torch cannot call a module "type" or "a.b"
        self.axes = nn.ModuleList(_PartsClassifier(parts_SF, n_genes, config) for parts_SF in parts.values())
        self.register_buffer("inverse_depth", torch.zeros(()))
        self.register_buffer("depth_power", torch.full((), DEPTH_POWER))
        self.completion = Completion(n_genes if parts else 0)

    def views(self, present_G: NDArray[np.bool_] | None = None) -> GeneViews:
        """The gene views where ``present_G`` were measured, by default all genes; to be made once per query."""
        absent_A = self.completion.absent(present_G)
        carrier = self.completion.carrier(absent_A)
        weights = tuple(axis.gene_view(carrier) for axis in self.axes)  # type: ignore[operator]
        measured = 1.0 if absent_A is None or present_G is None else float(present_G.mean())
        return GeneViews(weights, self.completion.measured_share(absent_A), measured)

    def forward(self, z_NK: Tensor, counts: CountsCSR, views: GeneViews | None = None) -> dict[str, Tensor]:
        """Log probability of each leaf by both views, [N, S] for every axis."""
        if not self.names:
            return {}
        views = views or self.views()
        latent = self.latent_view(z_NK)
        value_M, weight_N1 = log_normalised(counts, views.share), self.gene_weight(counts, views)
        answer = {}
        for (name, latent_NS), classifier, view in zip(latent.items(), self.axes, views.weights, strict=True):
            gene_NS = torch.log_softmax(classifier.gene_logits(counts, value_M, view), 1)  # type: ignore[operator]
            answer[name] = torch.log_softmax(torch.lerp(latent_NS, gene_NS, weight_N1), 1)
        return answer

    def gene_weight(self, counts: CountsCSR, views: GeneViews) -> Tensor:
        """Weight of the genes in the answer, [N, 1]; none until the gene view is fitted."""
        relative_N1 = (counts.library_N() / views.share * self.get_buffer("inverse_depth"))[:, None]
        power_N1 = relative_N1 ** self.get_buffer("depth_power")
        return (1 - views.measured**2 / (power_N1 + 1)) * (self.get_buffer("inverse_depth") > 0)

    def latent_view(self, z_NK: Tensor) -> dict[str, Tensor]:
        """Log probability of each leaf by the latent space alone."""
        return {name: torch.log_softmax(logits_NS, 1) for name, logits_NS in self.latent_logits(z_NK).items()}

    def latent_logits(self, z_NK: Tensor) -> dict[str, Tensor]:
        """What its softmax is taken of, [N, S] for every axis; their size tells a cell that fits no state."""
        with small_products(z_NK):
            return {name: classifier(z_NK).float() for name, classifier in zip(self.names, self.axes, strict=True)}


class _PartsClassifier(nn.Module):
    def __init__(self, parts_SF: Tensor, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("parts_SF", parts_SF)
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.n_latent, parts_SF.shape[1])
        self.register_buffer("gene_weight_GF", torch.zeros(n_genes, parts_SF.shape[1]))
        self.register_buffer("gene_bias_F", torch.zeros(parts_SF.shape[1]))

    def forward(self, z_NK: Tensor) -> Tensor:
        """Logits [N, S] by the latent space."""
        logits_NS: Tensor = self.linear(self.dropout(z_NK)) @ self.get_buffer("parts_SF").t()
        return logits_NS

    def gene_view(self, carrier: Carrier | None) -> tuple[Tensor, Tensor]:
        """Weight [G, F] and bias [F], those of absent genes carried over to the others."""
        weight_GF, bias_F = self.get_buffer("gene_weight_GF"), self.get_buffer("gene_bias_F")
        if carrier is None:
            return weight_GF, bias_F
        carried_GF, more_F = carrier(weight_GF)
        return carried_GF, bias_F + more_F

    def gene_logits(self, counts: CountsCSR, value_M: Tensor, view: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [N, S] by the genes, whose values are those of `log_normalised`."""
        weight_GF, bias_F = view
        return (sparse_product(counts, value_M, weight_GF) + bias_F) @ self.get_buffer("parts_SF").t()


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
