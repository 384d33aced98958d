"""The trained thing: scVI and the state head over its latent space.

Axes: N cells, K latent, S leaves of one label axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.model.heads import StateHead
from carvae.model.vae import CellVAE, Posterior

CELLS_PER_PASS = 1024
"""Cells embedded at once."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of cells."""

    latent_NK: NDArray[np.float32]
    probability_NS: dict[str, NDArray[np.float32]]
    """Leaf probabilities per label axis."""


class Network(nn.Module):
    """scVI with a state head.

    Parameters
    ----------
    n_genes
        Genes of the panel.
    n_categories
        Covariate name -> number of categories.
    parts
        Label axis -> weight of each part in each leaf (see `StateHead`); empty for a model without labels.
    config
        The model's section of the config.
    """

    def __init__(
        self, n_genes: int, n_categories: Mapping[str, int], parts: Mapping[str, Tensor], config: ModelConfig
    ) -> None:
        super().__init__()
        self.vae = CellVAE(n_genes, n_categories, config)
        self.head = StateHead(parts, n_genes, config)

    def forward(self, counts: CountsCSR) -> tuple[Posterior, dict[str, Tensor]]:
        """Posterior of z and, from its mean and the counts, the log probability of each leaf [N, S] per axis."""
        posterior = self.vae.encoder(counts)
        return posterior, self.head(posterior.mean_NK, counts)

    @torch.inference_mode()
    def predict(self, counts: sp.csr_matrix) -> Prediction:
        """Latent means and leaf probabilities of cells, from counts over the panel [N, G]."""
        self.eval()
        device = self.vae.log_theta_G.device
        latent, probability = [], []
        for start in range(0, counts.shape[0], CELLS_PER_PASS):
            posterior, log_probability = self(CountsCSR.from_scipy(counts[start : start + CELLS_PER_PASS]).to(device))
            latent.append(posterior.mean_NK.float().cpu().numpy())
            probability.append({axis: p.exp().cpu().numpy() for axis, p in log_probability.items()})
        if not latent:
            raise AssertionError("predict needs cells")
        return Prediction(
            np.concatenate(latent), {axis: np.concatenate([p[axis] for p in probability]) for axis in probability[0]}
        )
