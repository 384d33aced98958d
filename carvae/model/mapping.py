"""Rows for new batches in the decoder's tables: trained alone, by maximum a posteriori, everything else as it is.

The encoder never sees a batch and the heads read the encoder, so that embedding, labels, novelty and verdicts of every
cell are the same with the rows as without them. What the rows give is the decoder's side: expected counts in the
query's own batches, and so likelihood, normalised expression and differential expression free of them.

Refining each cell's embedding under the mapped decoder was tried (`scripts/bench_map.py`): over CARPALL's patients,
each left out in turn, accuracy of the latent view fell from 0.59 to 0.52 and mixing with the reference from 0.53 to
0.23. Novelty by the misfit under the rows was tried too: they take in what is strange (AUROC of that view for cells
that are no T cells 0.93 to 0.70).

A row is drawn to the mean of its table with the variance of the trained rows (an empirical Bayes prior), so that a
batch with few cells stays near what an unknown batch has.

Axes: N cells, G genes, H hidden, K latent, C covariates, A new rows of one covariate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.model.fused import Target
from carvae.model.likelihood import reconstruction
from carvae.model.network import CELLS_PER_PASS, Network
from carvae.model.vae import Posterior

MAX_EPOCHS = 20
"""Passes over the cells; more where they make fewer steps than the next."""
MIN_STEPS = 300
"""Steps of the optimiser at least."""
BATCH_SIZE = 256
"""Cells per minibatch."""
LEARNING_RATE = 0.03
"""Peak of Adam's, on a cosine schedule."""
PRIOR_VARIANCE = 0.1
"""Variance of a row's entries where a model has no table with several rows; CARPALL's samples have 0.09 to 0.11."""
DRAWS = 4
"""Draws of z by which the likelihood of a cell is measured."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells whose batches are learned."""

    panel: sp.csr_matrix
    """Counts over the panel, [N, G]."""
    absent_G: NDArray[np.bool_]
    """Genes of the panel that were not measured; they add nothing to a likelihood."""
    code_NC: NDArray[np.int64]
    """Row of each covariate, those from the table's end on being new; -1 where unknown."""

    def some(self, row_N: NDArray[np.integer]) -> Cells:
        """Some of them."""
        return Cells(self.panel[row_N], self.absent_G, self.code_NC[row_N])


class RowFit:
    """The rows of one query, and how likely they make its cells.

    Parameters
    ----------
    network
        Not changed.
    n_new
        Covariate -> number of new rows.
    """

    def __init__(self, network: Network, n_new: Mapping[str, int]) -> None:
        self.network, self.n_new = network.eval(), dict(n_new)
        self.device = network.vae.device
        self.variance = prior_variance(network)

    def fit(self, cells: Cells, seed: int) -> dict[str, Tensor]:
        """The new rows, covariate -> [A, H], from the cells; the same for the same seed."""
        decoder, n = self.network.vae.decoder, len(cells.code_NC)
        width = decoder.first.out_features
        delta = {name: torch.zeros(a, width, device=self.device, requires_grad=True) for name, a in self.n_new.items()}
        posterior = self._posterior(cells.panel)
        rng, noise = np.random.default_rng(seed), torch.Generator(self.device).manual_seed(seed)
        steps = max(MIN_STEPS, MAX_EPOCHS * math.ceil(n / BATCH_SIZE))
        optimizer = torch.optim.Adam(delta.values(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order_N = np.empty(0, np.int64)
        for _ in range(steps):
            if not order_N.size:
                order_N = rng.permutation(n)
            row_N, order_N = order_N[:BATCH_SIZE], order_N[BATCH_SIZE:]
            part = Posterior(posterior.mean_NK[row_N], posterior.variance_NK[row_N])
            prior = torch.stack([d.square().sum() / (2 * self.variance[name]) for name, d in delta.items()]).sum()
            rows = self._tables({name: decoder.mean_row(name).detach() + d for name, d in delta.items()})
            loss = self._loss(cells.some(row_N), part.sample(noise), rows)[0] + prior / n
            delta_gradients = torch.autograd.grad(loss, [*delta.values()])  # of nothing else
            for d, gradient in zip(delta.values(), delta_gradients, strict=True):
                d.grad = gradient
            optimizer.step()
            schedule.step()
        return {name: (decoder.mean_row(name) + d).detach() for name, d in delta.items()}

    @torch.no_grad()
    def nll(self, cells: Cells, added: Mapping[str, Tensor], seed: int) -> NDArray[np.float64]:
        """Mean negative log likelihood of each cell over draws of z from q(z|x), in nats, [N].

        The KL term does not depend on the rows: differences of this are differences of the ELBO.
        """
        noise, rows = torch.Generator(self.device).manual_seed(seed), self._tables(added)
        found = []
        for start in range(0, len(cells.code_NC), CELLS_PER_PASS):
            part = cells.some(np.arange(start, min(start + CELLS_PER_PASS, len(cells.code_NC))))
            posterior = self._posterior(part.panel)
            draws = [self._loss(part, posterior.sample(noise), rows)[1] for _ in range(DRAWS)]
            found.append(torch.stack(draws).double().mean(0).cpu().numpy())
        return np.concatenate(found)

    def _tables(self, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All rows of every table, the new ones last."""
        tables = {name: rows_CH.detach() for name, rows_CH in self.network.vae.decoder.rows().items()}
        return {name: torch.cat([t, added[name]]) if name in added else t for name, t in tables.items()}

    def _loss(self, cells: Cells, z_NK: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        vae, counts = self.network.vae, CountsCSR.from_scipy(cells.panel).to(self.device)
        hidden_NH = vae.decoder.hidden(z_NK, torch.from_numpy(cells.code_NC).to(self.device), rows)
        absent_G = torch.from_numpy(cells.absent_G).to(self.device)
        unmeasured_NG = absent_G.expand(counts.n_cells, -1) if cells.absent_G.any() else None
        target = Target(counts, counts.library_N(), unmeasured_NG)
        return reconstruction(hidden_NH, vae.decoder.scale, vae.decoder.zero, vae.log_theta_G, target)

    @torch.no_grad()
    def _posterior(self, panel: sp.csr_matrix) -> Posterior:
        parts = [
            self.network.vae.encoder(CountsCSR.from_scipy(panel[start : start + CELLS_PER_PASS]).to(self.device))
            for start in range(0, panel.shape[0], CELLS_PER_PASS)
        ]
        return Posterior(torch.cat([p.mean_NK for p in parts]), torch.cat([p.variance_NK for p in parts]))


def prior_variance(network: Network) -> dict[str, float]:
    """Variance of the trained rows around their mean, covariate -> mean over H.

    A table with one trained row has the mean of the others', or `PRIOR_VARIANCE` where no table has several.
    """
    decoder, found = network.vae.decoder, {}
    for name, rows_CH in decoder.rows().items():
        trained_CH = rows_CH[: decoder.n_trained[name]].detach()
        if len(trained_CH) > 1:
            found[name] = max(float(trained_CH.var(0).mean()), 1e-4)
    typical = sum(found.values()) / len(found) if found else PRIOR_VARIANCE
    return {name: found.get(name, typical) for name in decoder.rows()}
