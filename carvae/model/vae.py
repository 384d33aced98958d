"""The scVI generative model on sparse counts, with an encoder that never sees the batch.

Axes: N cells, G genes, M non-zero counts, H hidden, K latent, C covariates.

Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2), as in scvi-tools' ``VAE`` with ``use_layer_norm="both"``,
``use_batch_norm="none"`` and ``deeply_inject_covariates=False``; `scvi_bridge` converts weights both ways.
LayerNorm, so that the embedding of a cell does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.model.fused import Target, small_products, sparse_product
from carvae.model.likelihood import reconstruction

VARIANCE_EPS = 1e-4
"""Least variance of q(z|x), as in scvi-tools."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """q(z|x), a diagonal normal."""

    mean_NK: Tensor
    variance_NK: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw of z per cell, differentiable in mean and variance."""
        noise_NK = torch.empty_like(self.mean_NK).normal_(generator=generator)
        return self.mean_NK + self.variance_NK.sqrt() * noise_NK

    def kl_N(self) -> Tensor:
        """KL divergence from the standard normal, in nats."""
        return 0.5 * (self.variance_NK + self.mean_NK.square() - 1 - self.variance_NK.log()).sum(1)


@dataclass(frozen=True, slots=True)
class Elbo:
    """The two terms of the negative ELBO, in nats per cell."""

    reconstruction: Tensor
    """Mean over the cells, differentiable."""
    reconstruction_N: Tensor
    """Each cell's, for reading: it carries no gradient."""
    kl_N: Tensor
    kl: Tensor
    """Their mean."""

    def loss(self, kl_weight: float | Tensor = 1.0) -> Tensor:
        """Mean negative ELBO with a weight on the KL term."""
        return self.reconstruction + kl_weight * self.kl


class SparseLinear(nn.Module):
    """A dense layer whose input is ``log1p`` of sparse counts; cost is proportional to the non-zeros."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        dense = nn.Linear(n_in, n_out)  # for its initialisation
        self.weight_GH = nn.Parameter(dense.weight.detach().t().contiguous())
        self.bias_H = nn.Parameter(dense.bias.detach())

    def forward(self, counts: CountsCSR) -> Tensor:
        """Hidden activations [N, H]."""
        return sparse_product(counts, counts.count_M.log1p(), self.weight_GH) + self.bias_H


class Encoder(nn.Module):
    """log1p counts to q(z|x)."""

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.first = SparseLinear(n_genes, config.n_hidden)
        self.layers = nn.ModuleList(nn.Linear(config.n_hidden, config.n_hidden) for _ in range(config.n_layers - 1))
        self.mean = nn.Linear(config.n_hidden, config.n_latent)
        self.log_variance = nn.Linear(config.n_hidden, config.n_latent)

    def forward(self, counts: CountsCSR) -> Posterior:
        """Posterior of each cell."""
        with small_products(self.first.bias_H):
            return self.posterior(self.hidden(counts))

    def hidden(self, counts: CountsCSR) -> Tensor:
        """Last hidden layer [N, H]."""
        return self.later_layers(self.first(counts))

    def posterior(self, hidden_NH: Tensor) -> Posterior:
        """Posterior of each cell, from the last hidden layer."""
        dtype = self.mean.weight.dtype  # under autocast too: z and its KL are not for bfloat16
        variance_NK = self.log_variance(hidden_NH).to(dtype).exp() + VARIANCE_EPS
        return Posterior(self.mean(hidden_NH).to(dtype), variance_NK)

    def fixed(self, dtype: torch.dtype) -> Callable[[CountsCSR], Tensor]:
        """What gives posterior means [N, K] alone, to be asked for many cells, without gradient.

        On a CPU the first layer's weights, laid out once, are in ``dtype``.
        """
        if self.first.weight_GH.is_cuda:
            return lambda counts: self.mean(self.hidden(counts))
        from carvae.model.gather import FixedLayer  # numba is slow to import, and not needed to read a bundle

        first, n_latent = FixedLayer(self.first.weight_GH, self.first.bias_H, dtype), len(self.mean.bias)
        room = -n_latent % 16  # a product of 16 columns takes PyTorch half the time of one of 10
        weight_KH = functional.pad(self.mean.weight.detach(), (0, 0, 0, room))
        bias_K = functional.pad(self.mean.bias.detach(), (0, room))
        return lambda counts: functional.linear(self._deeper_layers(first(counts)), weight_KH, bias_K)[:, :n_latent]

    def later_layers(self, hidden_NH: Tensor) -> Tensor:
        """Last hidden layer [N, H], from what the first layer gives."""
        return self._deeper_layers(self._activate(hidden_NH))

    def _deeper_layers(self, hidden_NH: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_NH = self._activate(layer(hidden_NH))
        return hidden_NH

    def _activate(self, hidden_NH: Tensor) -> Tensor:
        normed_NH = functional.layer_norm(hidden_NH, hidden_NH.shape[1:])
        return functional.dropout(normed_NH.relu(), self.dropout_rate, self.training)


class Decoder(nn.Module):
    """z and covariates to the parameters of the counts."""

    def __init__(self, n_genes: int, n_categories: Mapping[str, int], config: ModelConfig) -> None:
        super().__init__()
        self.first = nn.Linear(config.n_latent, config.n_hidden)
        self.tables = nn.ModuleDict({name: nn.Embedding(n, config.n_hidden) for name, n in n_categories.items()})
        for table in self.tables.values():  # at zero, so that a row that is never trained says nothing
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        self.n_trained = dict(n_categories)
        self.layers = nn.ModuleList(nn.Linear(config.n_hidden, config.n_hidden) for _ in range(config.n_layers - 1))
        self.scale = nn.Linear(config.n_hidden, n_genes)
        self.zero = nn.Linear(config.n_hidden, n_genes) if config.gene_likelihood == "zinb" else None

    def hidden(self, z_NK: Tensor, covariate_NC: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Last hidden layer [N, H]. A covariate of -1 (unknown) adds the mean of its table's trained rows.

        ``rows`` are used in place of the tables; the first of each are the trained ones.
        """
        with small_products(z_NK):
            hidden_NH = self.first(z_NK)
            for c, (name, rows_CH) in enumerate((self.rows() if rows is None else rows).items()):
                hidden_NH = hidden_NH + _rows(rows_CH, covariate_NC[:, c], self.n_trained[name])
            hidden_NH = functional.layer_norm(hidden_NH, hidden_NH.shape[1:]).relu()
            for layer in self.layers:
                hidden_NH = functional.layer_norm(layer(hidden_NH), hidden_NH.shape[1:]).relu()
        return hidden_NH

    def rows(self) -> dict[str, Tensor]:
        """Covariate -> all rows of its table, [C, H]."""
        return {name: table.get_parameter("weight") for name, table in self.tables.items()}

    def mean_row(self, name: str) -> Tensor:
        """What an unknown category adds, [H]: the mean of the trained rows, which rows added later leave as it is."""
        return self.rows()[name][: self.n_trained[name]].mean(0)

    def add_rows(self, added: Mapping[str, Tensor]) -> None:
        """Put rows [A, H] below those of some tables, for batches that were not trained on."""
        for name, added_AH in added.items():
            rows_CH = torch.cat([self.rows()[name].detach(), added_AH.detach()])
            self.tables[name] = nn.Embedding(len(rows_CH), rows_CH.shape[1], _weight=rows_CH)


def _rows(table_CH: Tensor, code_N: Tensor, n_trained: int) -> Tensor:
    if code_N.device.type == "cpu" and not (code_N < 0).any():  # to ask a GPU would make the host wait
        return functional.embedding(code_N, table_CH)
    rows_NH = functional.embedding(code_N.clamp(min=0), table_CH)
    return torch.where(code_N[:, None] >= 0, rows_NH, table_CH[:n_trained].mean(0))


class CellVAE(nn.Module):
    """scVI on sparse counts.

    Parameters
    ----------
    n_genes
        Genes of the panel.
    n_categories
        Covariate name -> number of categories, in the order of ``covariate_NC``.
    config
        The model's section of the config.
    decodes
        Whether there is a decoder; a model that was shared without it embeds and labels all the same.
    """

    def __init__(
        self, n_genes: int, n_categories: Mapping[str, int], config: ModelConfig, *, decodes: bool = True
    ) -> None:
        super().__init__()
        self.encoder, self.decodes = Encoder(n_genes, config), decodes
        if decodes:
            self.decoder = Decoder(n_genes, n_categories, config)
            self.log_theta_G = nn.Parameter(torch.zeros(n_genes))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.first.weight_GH.device

    def elbo(
        self,
        counts: CountsCSR,
        posterior: Posterior,
        z_NK: Tensor,
        covariate_NC: Tensor,
        unmeasured_NG: Tensor | None = None,
    ) -> Elbo:
        """Negative ELBO of each cell.

        Parameters
        ----------
        counts
            What is reconstructed (the encoder may have seen a thinned copy).
        posterior, z_NK
            q(z|x) and a draw from it.
        covariate_NC
            int64 category of each covariate, -1 where unknown.
        unmeasured_NG
            True where the cell's study did not measure the gene; such genes add nothing.
        """
        hidden_NH = self.decoder.hidden(z_NK, covariate_NC)
        target = Target(counts, counts.library_N(), unmeasured_NG)
        mean, loss_N = reconstruction(hidden_NH, self.decoder.scale, self.decoder.zero, self.log_theta_G, target)
        kl_N = posterior.kl_N()
        return Elbo(mean, loss_N, kl_N, kl_N.mean())

    @torch.no_grad()
    def start_from_moments(self, mean_share_G: Tensor, theta_G: Tensor) -> None:
        """Begin at the data's own mean and dispersion.

        ``mean_share_G`` is each gene's share of all counts and ``theta_G`` the inverse dispersion by moments. With
        Adam's eps at 1e-8 this alone reaches in a few epochs the held-out ELBO that random starts reach in hundreds.
        """
        log_mean_G = mean_share_G.clamp(min=1e-8).log()
        self.decoder.scale.bias.copy_(log_mean_G - log_mean_G.mean())
        self.log_theta_G.copy_(theta_G.clamp(0.05, 50.0).log())
