"""Negative binomial likelihoods of sparse counts, with the analytic gradient.

Axes: N cells, G genes, M non-zero counts of the minibatch.

The parametrisation and the epsilon are those of scvi-tools (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2):
``p = softmax(logits)``, ``mu = library p``. Work that depends on the counts is done at non-zero counts alone:

* for x = 0, log NB is ``theta (log(theta + eps) - log(theta + mu + eps))``: no gamma function;
* ``lgamma(x + 1)`` does not depend on the parameters: one number per cell;
* with ``r_g = mu_g d(log lik)/d(mu_g)``, the softmax gives ``d(-log lik)/d(logit_g) = p_g sum(r) - r_g``, so
  the gradient overwrites the logits and nothing else of size N x G is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carvae.data.sparse import CountsCSR

EPS = 1e-8
"""Added inside logarithms, as in scvi-tools."""


class _NegativeBinomial(torch.autograd.Function):
    """-log NB per cell; gradient with respect to the logits in place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor) -> Tensor:
        theta_G = log_theta_G.exp()
        p_NG = torch.softmax(logits_NG, 1)
        mu_NG = p_NG * library_N[:, None]
        total_NG = mu_NG + (theta_G + EPS)
        log_theta_eps_G = (theta_G + EPS).log()
        log_total_NG = total_NG.log()
        cell_M, gene_M, x_M = counts.cell_M(), counts.gene_M, counts.count_M
        flat_M = cell_M * counts.n_genes + gene_M
        mu_M, total_M, theta_M = mu_NG.view(-1)[flat_M], total_NG.view(-1)[flat_M], theta_G[gene_M]
        loglik_M = x_M * ((mu_M + EPS).log() - total_M.log()) + _log_gamma_ratio(x_M, theta_M)
        loglik_N = (theta_G * log_theta_eps_G).sum() - log_total_NG @ theta_G
        loglik_N = loglik_N.index_add(0, cell_M, loglik_M)

        share_NG = mu_NG.div_(total_NG)  # mu / (theta + mu + eps)
        r_NG = share_NG * -theta_G
        r_NG.view(-1).index_add_(0, flat_M, x_M * (mu_M / (mu_M + EPS) - mu_M / total_M))
        # d log lik / d theta, kept per cell and gene only where counts are; the rest is recomputed in backward
        ctx.save_for_backward(p_NG.mul_(r_NG.sum(1, keepdim=True)).sub_(r_NG), log_total_NG, total_NG, theta_G)
        ctx.counts = counts
        return -loglik_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        dlogits_NG, log_total_NG, total_NG, theta_G = ctx.saved_tensors
        counts: CountsCSR = ctx.counts
        cell_M, gene_M, x_M = counts.cell_M(), counts.gene_M, counts.count_M
        theta_M, weight_M = theta_G[gene_M], grad_N[cell_M]
        # d/dtheta: log(theta+eps) + theta/(theta+eps) - log(total) - theta/total, and at counts the gamma terms
        dense_G = grad_N.sum() * ((theta_G + EPS).log() + theta_G / (theta_G + EPS)) - grad_N @ log_total_NG
        dense_G = dense_G - theta_G * (grad_N @ total_NG.reciprocal())
        at_counts_M = _digamma_ratio(x_M, theta_M) - x_M / total_NG.view(-1)[cell_M * counts.n_genes + gene_M]
        dtheta_G = dense_G.index_add(0, gene_M, weight_M * at_counts_M)
        return dlogits_NG.mul_(grad_N[:, None]), -dtheta_G * theta_G, None, None


def _log_gamma_ratio(x: Tensor, theta: Tensor) -> Tensor:
    """log(Gamma(x + theta) / (Gamma(theta) Gamma(x + 1)))."""
    return torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)


def _digamma_ratio(x: Tensor, theta: Tensor) -> Tensor:
    return torch.digamma(x + theta) - torch.digamma(theta)


def nb_loss(logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor) -> Tensor:
    """Negative log likelihood of each cell under NB, in nats.

    Parameters
    ----------
    logits_NG
        Unnormalised log expression; ``-inf`` marks a gene that the cell's study did not measure, which then
        adds nothing to the loss. The caller must not use this tensor afterwards.
    log_theta_G
        Log inverse dispersion.
    counts, library_N
        Observed counts, and their expected sum over the genes.

    Returns
    -------
    Tensor [N], differentiable in the logits and in ``log_theta_G``.
    """
    loss_N: Tensor = _NegativeBinomial.apply(logits_NG, log_theta_G, counts, library_N)
    return loss_N


def zinb_loss(
    logits_NG: Tensor, zero_logits_NG: Tensor, log_theta_G: Tensor, counts: CountsCSR, library_N: Tensor
) -> Tensor:
    """Negative log likelihood of each cell under zero-inflated NB, in nats.

    ``zero_logits_NG`` are the logits of the zero inflation; the other arguments are those of `nb_loss`. With
    ``a = theta (log(theta + eps) - log(theta + mu + eps)) - pi``, a zero adds ``softplus(a) - softplus(-pi)`` and a
    count adds ``a - softplus(-pi)`` and the NB terms at counts (scvi-tools' ``log_zinb_positive``).
    """
    theta_G = log_theta_G.exp()
    mu_NG = torch.softmax(logits_NG, 1) * library_N[:, None]
    log_total_NG = (mu_NG + (theta_G + EPS)).log()
    a_NG = theta_G * ((theta_G + EPS).log() - log_total_NG) - zero_logits_NG
    observed_NG = torch.isfinite(logits_NG)
    zero_NG = torch.where(observed_NG, functional.softplus(a_NG) - functional.softplus(-zero_logits_NG), 0.0)
    cell_M, gene_M, x_M = counts.cell_M(), counts.gene_M, counts.count_M
    flat_M = cell_M * counts.n_genes + gene_M
    a_M, mu_M, theta_M = a_NG.view(-1)[flat_M], mu_NG.view(-1)[flat_M], theta_G[gene_M]
    at_count_M = a_M - functional.softplus(a_M) + x_M * ((mu_M + EPS).log() - log_total_NG.view(-1)[flat_M])
    return -zero_NG.sum(1).index_add(0, cell_M, at_count_M + _log_gamma_ratio(x_M, theta_M))
