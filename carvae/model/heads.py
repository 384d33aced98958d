"""Heads on the latent space.

Axes: N cells, G genes, M non-zero counts, K latent, S leaves of one label axis, F parts of its leaves, L label sets of
one axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.model.fused import sparse_product

COUNTS_PER_CELL = 1e4
"""Depth to which the gene view scales a cell before it takes logarithms."""


class StateHead(nn.Module):
    """Latent coordinates and genes to leaf probabilities, one softmax per axis of the label tree.

    Two linear views answer, one from the latent space, which pools what is known of all cells, and one from the genes,
    which keeps what the latent space leaves out. The answer is the geometric mean of their probabilities, normalised.
    In it the genes of a cell with n counts over the panel weigh n / (n + depth), depth being the median of the
    labelled training cells: the fewer the counts, the more the latent space is asked, which knows shallow cells.

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

    def forward(self, z_NK: Tensor, counts: CountsCSR) -> dict[str, Tensor]:
        """Log probability of each leaf by both views, [N, S] for every axis."""
        if not self.names:
            return {}
        latent = self.latent_view(z_NK)
        value_M = log_normalised(counts)
        relative_N = counts.library_N() * self.get_buffer("inverse_depth")
        weight_N1 = (relative_N / (relative_N + 1))[:, None]
        answer = {}
        for (name, latent_NS), classifier in zip(latent.items(), self.axes, strict=True):
            gene_NS = torch.log_softmax(classifier.gene_logits(counts, value_M), 1)  # type: ignore[operator]
            answer[name] = torch.log_softmax(torch.lerp(latent_NS, gene_NS, weight_N1), 1)
        return answer

    def latent_view(self, z_NK: Tensor) -> dict[str, Tensor]:
        """Log probability of each leaf by the latent space alone."""
        return {name: torch.log_softmax(logits_NS, 1) for name, logits_NS in self.latent_logits(z_NK).items()}

    def latent_logits(self, z_NK: Tensor) -> dict[str, Tensor]:
        """What its softmax is taken of, [N, S] for every axis; their size tells a cell that fits no state."""
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

    def gene_logits(self, counts: CountsCSR, value_M: Tensor) -> Tensor:
        """Logits [N, S] by the genes, whose values are those of `log_normalised`."""
        gene_NF = sparse_product(counts, value_M, self.get_buffer("gene_weight_GF")) + self.get_buffer("gene_bias_F")
        return gene_NF @ self.get_buffer("parts_SF").t()


def log_normalised(counts: CountsCSR) -> Tensor:
    """``log1p`` of the counts scaled to `COUNTS_PER_CELL` per cell, [M]."""
    scale_N = COUNTS_PER_CELL / counts.library_N().clamp(min=1)
    return (counts.count_M * scale_N[counts.cell_M()]).log1p()


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
