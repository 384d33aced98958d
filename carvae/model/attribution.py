"""What each gene adds to the log-odds of a state: exact for the head's gene view, integrated for its latent view.

The log-odds of a state are its mixed log probability less the mean over all states of the axis. They are linear in the
views' logits, so that a cell's log-odds less those of a baseline are the sum over genes of two terms, with the weight w
that the head gives the genes of the cell:

* gene view: ``w * weight * (value - baseline value)``, the weight less its mean over the states;
* latent view: the integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) from the baseline to the cell of
  ``(1 - w)`` times encoder and latent classifier, and of what the gene view expects of genes that were not measured,
  which the latent coordinates say. The encoder's first layer is linear in the genes, so the gradients are averaged at
  its H outputs (by Captum) and then go through its weights: the same numbers as over all genes, at a small part of the
  cost.

Axes: N cells, G genes, H hidden, S leaves of one label axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.errors import ConfigError
from carvae.model.completion import log_normalised
from carvae.model.network import Network

Floats = NDArray[np.float32]

STEPS = 128
"""Points of the path (Gauss-Legendre); the ReLUs' kinks, not the method, limit what more of them gain."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where the path to a cell begins."""

    log1p_G: Floats
    """log1p of the counts, as the encoder reads them."""
    normalised_G: Floats
    """log1p of the counts scaled to a depth, as the gene view reads them."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the genes add to the log-odds of one state in each cell."""

    gene_NG: Floats
    """By the head's view of the genes."""
    latent_NG: Floats
    """By the latent space."""
    log_odds_N: Floats
    baseline_N: Floats
    """Log-odds of the baseline, with the cell's own weight of the gene view."""

    def error(self) -> Floats:
        """What the sum of all genes misses of the change of the log-odds, [N]; the integration's error."""
        whole = self.gene_NG.sum(1) + self.latent_NG.sum(1)
        return np.asarray(whole - (self.log_odds_N - self.baseline_N))


def measured_share(network: Network, present_G: NDArray[np.bool_] | None) -> float:
    """Share of a cell's counts that the genes which were measured are expected to have."""
    completion = network.head.completion
    return float(completion.measured_share(completion.absent(present_G)))


def baseline(panel: sp.csr_matrix, group_N: NDArray[np.integer], min_cells: int, share: float = 1.0) -> Baseline:
    """The mean over groups of the mean of their cells, so that a common state does not rule.

    ``share`` is that of `measured_share`.

    Groups with fewer than ``min_cells`` cells are left out, and negative ones; where none is left all cells are one.
    """
    read = panel.astype(np.float32).log1p(), normalised(panel, share)
    large = [g for g in np.unique(group_N[group_N >= 0]) if (group_N == g).sum() >= min_cells]
    members = [np.flatnonzero(group_N == g) for g in large] or [np.arange(panel.shape[0])]
    means = [[np.asarray(x[cells].mean(axis=0)).ravel() for cells in members] for x in read]
    return Baseline(*(np.mean(m, axis=0).astype(np.float32) for m in means))


def normalised(panel: sp.csr_matrix, share: float = 1.0) -> sp.csr_matrix:
    """The values that the gene view reads, [N, G]; ``share`` is that of `measured_share`."""
    value_M = log_normalised(CountsCSR.from_scipy(panel), share).numpy()
    return sp.csr_matrix((value_M, panel.indices, panel.indptr), shape=panel.shape)


@dataclass(frozen=True, slots=True)
class Asked:
    """Cells, and which leaf of a label axis is explained in each."""

    panel: sp.csr_matrix
    """Counts, [N, G]; dense later, so give some hundred cells at a time."""
    axis: str
    leaf_N: NDArray[np.integer]
    present_G: NDArray[np.bool_] | None = None
    """Genes that were measured; by default all."""


def attribute(network: Network, asked: Asked, start: Baseline) -> Attribution:
    """What each gene adds to the log-odds of a leaf of each cell.

    Parameters
    ----------
    network
        With a state head.
    asked
        The cells.
    start
        The baseline.

    Raises
    ------
    ConfigError
        Captum is not installed.
    """
    view = _Views(network.eval(), asked.axis, asked.present_G)
    cells = CountsCSR.from_scipy(asked.panel).to(view.device)
    leaf_N1 = torch.from_numpy(np.asarray(asked.leaf_N, np.int64)).to(view.device)[:, None]
    log1p_NG = cells.dense(cells.count_M.log1p())
    value_NG = cells.dense(log_normalised(cells, view.views.share))
    from_G, value_from_G = (torch.from_numpy(x).to(view.device) for x in (start.log1p_G, start.normalised_G))
    with torch.no_grad():
        weight_N1 = network.head.gene_weight(cells, view.views)
        gene_GS = view.gene_weight()
        gene_NG = weight_N1 * (value_NG - value_from_G) * gene_GS.t()[leaf_N1[:, 0]]
        first_NH, from_NH = view.first(log1p_NG), view.first(from_G[None]).expand(len(log1p_NG), -1)
    mean_gradient_NH = _mean_gradient(view, (first_NH, from_NH), leaf_N1[:, 0], weight_N1)
    with torch.no_grad():
        latent_NG = (log1p_NG - from_G) * (mean_gradient_NH @ network.vae.encoder.first.weight_GH.t())
        odds = []
        for hidden_NH, of_gene_NG in ((first_NH, value_NG), (from_NH, value_from_G[None])):
            by_gene_NS = of_gene_NG @ gene_GS + view.gene_bias()
            both_NS = view.through(hidden_NH, weight_N1) + weight_N1 * by_gene_NS
            odds.append(both_NS.gather(1, leaf_N1)[:, 0])
    return Attribution(*(x.cpu().numpy() for x in (gene_NG, latent_NG, *odds)))


class _Views:
    """The two views of a head on one label axis, their logits less the mean over the leaves."""

    def __init__(self, network: Network, axis: str, present_G: NDArray[np.bool_] | None) -> None:
        self.network, self.device = network, network.vae.device
        self.classifier = network.head.axes[network.head.names.index(axis)]
        self.views = network.head.views(present_G)
        self.weight_GF, self.bias_F = self.views.weights[network.head.names.index(axis)]

    def gene_weight(self) -> Tensor:
        """[G, S]."""
        return self._centred(self.weight_GF @ self.classifier.get_buffer("parts_SF").t())

    def gene_bias(self) -> Tensor:
        """[S]."""
        return self._centred(self.bias_F @ self.classifier.get_buffer("parts_SF").t())

    def first(self, log1p_NG: Tensor) -> Tensor:
        """What the encoder's first layer gives, [N, H]."""
        layer = self.network.vae.encoder.first
        return log1p_NG @ layer.weight_GH + layer.bias_H

    def through(self, first_NH: Tensor, weight_N1: Tensor) -> Tensor:
        """What comes of the first layer by way of the latent coordinates, [N, S]."""
        encoder = self.network.vae.encoder
        z_NK = encoder.mean(encoder.later_layers(first_NH))
        return self._centred((1 - weight_N1) * self.classifier(z_NK))

    @staticmethod
    def _centred(logits_NS: Tensor) -> Tensor:
        return logits_NS - logits_NS.mean(-1, keepdim=True)


def _mean_gradient(view: _Views, ends: tuple[Tensor, Tensor], leaf_N: Tensor, weight_N1: Tensor) -> Tensor:
    """Mean over the path, which ends at a cell and begins at the baseline, of the gradient of its leaf, [N, H]."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ConfigError("carvae explain needs Captum; install it with: pip install 'carvae[explain]'") from None
    integrated = IntegratedGradients(view.through, multiply_by_inputs=False)
    mean_NH: Tensor = integrated.attribute(
        *ends, leaf_N, weight_N1, n_steps=STEPS, method="gausslegendre", internal_batch_size=8192
    )
    return mean_NH.detach().to(ends[0].dtype)
