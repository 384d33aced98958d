"""Negative binomial likelihoods of sparse counts, with the analytic gradient.

Axes: N cells, G genes, M non-zero counts of the minibatch.

The parametrisation and the epsilon are those of scvi-tools (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2):
``p = softmax(logits)``, ``mu = library p``. Work that depends on the counts is done at non-zero counts alone:

* with ``u = mu / (theta + eps)``, a zero has log NB ``-theta log1p(u)``: no gamma function, and no difference of
  logarithms, which in float32 would leave nothing of a gene that is rare or nearly Poisson;
* at counts such differences remain (of gamma functions), so these few numbers are taken in float64;
* with ``r_g = mu_g d(log lik)/d(mu_g)``, the softmax gives ``d(-log lik)/d(logit_g) = p_g sum(r) - r_g``, so the
  backward pass keeps two tensors of size N x G: this gradient and that of theta.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from carvae.data.sparse import CountsCSR
from carvae.model import fused
from carvae.model.fused import Target

EPS = 1e-8
"""Added inside logarithms, as in scvi-tools."""


def reconstruction(
    hidden_NH: Tensor, scale: nn.Linear, zero: nn.Linear | None, log_theta_G: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of counts from the decoder's last hidden layer: `fused.decoder_loss` where it can be had.

    Else the same in plain torch. Arguments and results are those of `fused.decoder_loss`.
    """
    if fused.available(log_theta_G):
        return fused.decoder_loss(hidden_NH, scale, zero, log_theta_G, target)
    dtype = log_theta_G.dtype  # under autocast too: the likelihood is not for bfloat16
    logits_NG = scale(hidden_NH).to(dtype)
    if target.unmeasured_NG is not None:
        logits_NG = logits_NG.masked_fill(target.unmeasured_NG, -torch.inf)
    if zero is None:
        loss_N = nb_loss(logits_NG, log_theta_G, target.counts, target.library_N)
    else:
        loss_N = zinb_loss(logits_NG, zero(hidden_NH).to(dtype), log_theta_G, target.counts, target.library_N)
    return loss_N.mean(), loss_N.detach()


class _NegativeBinomial(torch.autograd.Function):
    """-log NB per cell, differentiable once in the logits and in log theta."""

    @staticmethod
    def forward(ctx: Any, logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor) -> Tensor:
        theta_G = log_theta_G.exp()
        p_NG = torch.softmax(logits_NG, 1)
        u_NG = (p_NG * library_N[:, None]).mul_((theta_G + EPS).reciprocal())
        log1p_NG = u_NG.log1p()
        flat_M, x_M, theta64_G = _position_M(counts), counts.count_M.double(), theta_G.double()
        u_M, theta_M = u_NG.view(-1)[flat_M].double(), theta64_G[counts.gene_M]
        mu_M, total_M = u_M * (theta_M + EPS), (1 + u_M) * (theta_M + EPS)
        loglik_M = _at_counts(x_M, mu_M, total_M, theta64_G, counts.gene_M)
        loglik_N = _sum_by_cell(loglik_M, counts).to(p_NG.dtype) - log1p_NG @ theta_G

        share_NG = u_NG.div_(u_NG + 1)  # mu / (theta + mu + eps)
        r_NG = share_NG * -theta_G
        r_NG.view(-1).index_add_(0, flat_M, (x_M * (mu_M / (mu_M + EPS) - mu_M / total_M)).to(r_NG.dtype))
        dlogits_NG = p_NG.mul_(r_NG.sum(1, keepdim=True)).sub_(r_NG)
        dtheta_NG = share_NG.mul_(theta_G / (theta_G + EPS)).sub_(log1p_NG)  # d(log lik) as of zeros
        ctx.save_for_backward(dlogits_NG, dtheta_NG, theta_G, total_M)
        ctx.counts = counts
        return -loglik_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        dlogits_NG, dtheta_NG, theta_G, total_M = ctx.saved_tensors
        counts: CountsCSR = ctx.counts
        x_M, theta64_G = counts.count_M.double(), theta_G.double()
        digamma_M = (x_M + theta64_G[counts.gene_M]).digamma() - theta64_G.digamma()[counts.gene_M]
        at_counts_M = digamma_M - x_M / total_M
        dense_G = (grad_N @ dtheta_NG).double()
        dtheta_G = dense_G.index_add(0, counts.gene_M, grad_N.double()[counts.cell_M()] * at_counts_M)
        return dlogits_NG * grad_N[:, None], (-dtheta_G * theta_G).to(theta_G.dtype), None, None


def _position_M(counts: CountsCSR) -> Tensor:
    """Place of each entry in a dense [N, G] tensor laid out flat."""
    return counts.cell_M() * counts.n_genes + counts.gene_M


def _at_counts(x_M: Tensor, mu_M: Tensor, total_M: Tensor, theta_G: Tensor, gene_M: Tensor) -> Tensor:
    """What log NB of a count adds to that of a zero, ``total`` being theta + mu + eps; zero for a stored zero."""
    gamma_M = (x_M + theta_G[gene_M]).lgamma() - theta_G.lgamma()[gene_M] - (x_M + 1).lgamma()
    return x_M * ((mu_M + EPS).log() - total_M.log()) + gamma_M


def _sum_by_cell(value_M: Tensor, counts: CountsCSR) -> Tensor:
    return value_M.new_zeros(counts.n_cells).index_add(0, counts.cell_M(), value_M)


def nb_loss(logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor) -> Tensor:
    """Negative log likelihood of each cell under NB, in nats.

    Parameters
    ----------
    logits_NG
        Unnormalised log expression; ``-inf`` marks a gene that the cell's study did not measure, which then
        adds nothing to the loss.
    log_theta_G
        Log inverse dispersion.
    counts, library_N
        Observed counts, and their expected sum over the genes.

    Returns
    -------
    Tensor [N], differentiable (once) in the logits and in ``log_theta_G``.
    """
    loss_N: Tensor = _NegativeBinomial.apply(logits_NG, log_theta_G, counts, library_N)  # type: ignore[no-untyped-call]
    return loss_N


def zinb_loss(
    logits_NG: Tensor, zero_logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor
) -> Tensor:
    """Negative log likelihood of each cell under zero-inflated NB, in nats.

    ``zero_logits_NG`` are the logits of the zero inflation; the other arguments are those of `nb_loss`. With
    ``a = -theta log1p(u) - pi``, a zero adds ``softplus(a) - softplus(-pi)`` and a count adds ``a - softplus(-pi)``
    and the NB terms at counts (scvi-tools' ``log_zinb_positive``).
    """
    theta_G = log_theta_G.exp()
    mu_NG = torch.softmax(logits_NG, 1) * library_N[:, None]
    a_NG = -theta_G * (mu_NG / (theta_G + EPS)).log1p() - zero_logits_NG
    as_zero_NG = functional.softplus(a_NG) - functional.softplus(-zero_logits_NG)
    as_zero_NG = as_zero_NG.masked_fill(logits_NG.isneginf(), 0.0)
    flat_M, x_M, theta64_G = _position_M(counts), counts.count_M.double(), theta_G.double()
    a_M, mu_M = a_NG.view(-1)[flat_M].double(), mu_NG.view(-1)[flat_M].double()
    nb_M = _at_counts(x_M, mu_M, mu_M + (theta64_G[counts.gene_M] + EPS), theta64_G, counts.gene_M)
    loglik_M = (nb_M + a_M - functional.softplus(a_M)).masked_fill(x_M == 0, 0.0)
    return -(as_zero_NG.sum(1) + _sum_by_cell(loglik_M, counts).to(as_zero_NG.dtype))
