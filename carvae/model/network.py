"""The trained thing: scVI and the state head over its latent space.

Axes: N cells, K latent, S leaves of one label axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """What was said of all cells, from what was said of some after the other."""
        axes = parts[0].probability_NS
        return cls(
            np.concatenate([part.latent_NK for part in parts]),
            {axis: np.concatenate([part.probability_NS[axis] for part in parts]) for axis in axes},
        )


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
    decodes
        Whether there is a decoder.
    """

    def __init__(
        self,
        n_genes: int,
        n_categories: Mapping[str, int],
        parts: Mapping[str, Tensor],
        config: ModelConfig,
        *,
        decodes: bool = True,
    ) -> None:
        super().__init__()
        self.vae = CellVAE(n_genes, n_categories, config, decodes=decodes)
        self.head = StateHead(parts, n_genes, config)

    def forward(self, counts: CountsCSR) -> tuple[Posterior, dict[str, Tensor]]:
        """Posterior of z and, from its mean and the counts, the log probability of each leaf [N, S] per axis."""
        posterior = self.vae.encoder(counts)
        return posterior, self.head(posterior.mean_NK, counts)

    @torch.inference_mode()
    def predict(
        self,
        counts: sp.csr_matrix,
        precision: str = "32-true",
        *,
        label: bool = True,
        present_G: NDArray[np.bool_] | None = None,
    ) -> Prediction:
        """Latent means, and with ``label`` leaf probabilities, of cells from counts over the panel [N, G].

        ``precision`` "bf16" holds the weights of the encoder's first layer, its most work, in bfloat16. ``present_G``
        says which genes were measured in the cells; by default all.
        """
        self.eval()
        device = self.vae.device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        parts, cells = [], CountsCSR.from_scipy(counts)
        mean_of, views = self.vae.encoder.fixed(dtype), self.head.views(present_G) if label else None
        for start in range(0, counts.shape[0], CELLS_PER_PASS):
            part = cells.part(start, min(start + CELLS_PER_PASS, counts.shape[0])).to(device)
            mean_NK = mean_of(part)
            answer = self.head(mean_NK, part, views) if label else {}
            probability = {axis: log_NS.exp().cpu().numpy() for axis, log_NS in answer.items()}
            parts.append(Prediction(mean_NK.cpu().numpy(), probability))
        if not parts:
            raise AssertionError("predict needs cells")
        return Prediction.joined(parts)

    def predict_studies(
        self, counts: sp.csr_matrix, present_SG: NDArray[np.bool_], study_N: NDArray[np.integer]
    ) -> Prediction:
        """As `predict`, of cells of studies that measured different genes: a row of ``present_SG`` for each study."""
        own = [np.flatnonzero(study_N == study) for study in np.unique(study_N)]
        parts = [self.predict(counts[rows], present_G=present_SG[study_N[rows[0]]]) for rows in own]
        back_N, whole = np.argsort(np.concatenate(own)), Prediction.joined(parts)
        return Prediction(whole.latent_NK[back_N], {axis: p_NS[back_N] for axis, p_NS in whole.probability_NS.items()})
