"""How strange a cell is to a trained model.

Four views, since no single one sees every kind of stranger: the energy of the state head (ambiguous or unseen states),
the distance to the nearest known state in the encoder's last hidden layer beside the distance to all training cells
(unseen states), the misfit of the decoded counts (foreign cells, noise, shuffled genes), and a want of the genes that
every cell of the cohort expresses (cells that are no T cells). A cell is as strange as its strangest view, each
measured against held-out cells of known states with the same depth and gene overlap. A model that was shared without
its decoder has no misfit and judges by the other three, on a scale of their own.

Axes: N cells, G genes, H hidden, K latent, L label sets, T views, B bins, Q stored quantiles, M training samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from carvae.data.sparse import CountsCSR
from carvae.model.network import CELLS_PER_PASS, Network

Floats = NDArray[np.float32]

VIEWS = ("energy", "distance", "misfit", "identity")
DECODED = "misfit"
"""The view that needs the decoder."""
LEVELS = np.concatenate([np.linspace(0, 0.9, 19), 1 - 0.1 * np.geomspace(1, 0.005, 24)[1:], [1.0]])
"""Quantiles that are stored: close together where the threshold lies."""
MIDDLE = 10
"""Place of the median in `LEVELS`."""
VARIANCE_FLOOR = 0.01
"""Added to the variance of a count, so that a gene expected nowhere does not weigh without bound."""
MIN_CELLS = 2
"""Cells that make a label set a class of its own."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The training cells, as far as strangeness is measured from them."""

    mean_LH: Floats
    """Mean of each label set's cells in the hidden layer."""
    within_HH: Floats
    """Inverse covariance within label sets."""
    centre_H: Floats
    around_HH: Floats
    """Mean and inverse covariance of all training cells."""
    share_G: Floats
    """Share of each gene in all counts."""
    identity_G: Floats
    """1 for the genes that every cell should express, else 0."""
    sample_MK: Floats
    """Latent means of the training samples, in no order that says which they are."""
    scale_KK: Floats
    """Inverse covariance of the latent space within label sets."""

    def without_samples(self) -> Reference:
        """The same, in which the training samples have no places of their own but their middle."""
        return replace(self, sample_MK=self.sample_MK.mean(0, keepdims=True))


@dataclass(frozen=True, slots=True)
class Observed:
    """What one pass through the network says of cells."""

    latent_NK: Floats
    hidden_NH: Floats
    log_probability: dict[str, Floats]
    """Label axis -> [N, S]."""
    energy_N: Floats
    """-log sum exp of the latent view's logits, summed over label axes (Liu et al. 2020, arXiv:2010.03759)."""
    misfit_N: Floats | None
    """Mean over measured genes of the squared Pearson residual of the decoded counts; None without a decoder."""


@torch.inference_mode()
def observe(network: Network, counts: sp.csr_matrix, present_G: NDArray[np.bool_]) -> Observed:
    """Pass cells through encoder, head and decoder; ``present_G`` says which panel genes were measured in them."""
    network.eval()
    device = network.vae.device
    absent_G, views = torch.from_numpy(~present_G).to(device), network.head.views(present_G)
    parts: dict[str, list[Tensor]] = {"latent": [], "hidden": [], "energy": []}
    misfit: list[Tensor] = []
    said: dict[str, list[Tensor]] = {}
    for start in range(0, counts.shape[0], CELLS_PER_PASS):
        chunk = counts[start : start + CELLS_PER_PASS]
        cells = CountsCSR.from_scipy(chunk).to(device)
        hidden_NH = network.vae.encoder.hidden(cells)
        z_NK = network.vae.encoder.posterior(hidden_NH).mean_NK
        energy_N = torch.zeros(len(z_NK), device=device)
        for logits_NS in network.head.latent_logits(z_NK).values():
            energy_N -= torch.logsumexp(logits_NS, 1)
        for name, value in zip(parts, (z_NK, hidden_NH, energy_N), strict=True):
            parts[name].append(value.float().cpu())
        if network.vae.decodes:
            count_NG = torch.from_numpy(chunk.toarray().astype(np.float32)).to(device)
            misfit.append(_misfit(network, z_NK, count_NG, absent_G).float().cpu())
        for axis, log_NS in network.head(z_NK, cells, views).items():
            said.setdefault(axis, []).append(log_NS.float().cpu())
    joined = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return Observed(
        latent_NK=joined["latent"],
        hidden_NH=joined["hidden"],
        log_probability={axis: torch.cat(values).numpy() for axis, values in said.items()},
        energy_N=joined["energy"],
        misfit_N=torch.cat(misfit).numpy() if misfit else None,
    )


def _misfit(network: Network, z_NK: Tensor, count_NG: Tensor, absent_G: Tensor) -> Tensor:
    decoder = network.vae.decoder
    unknown_NC = torch.full((len(z_NK), len(decoder.tables)), -1, device=z_NK.device)
    logits_NG = decoder.scale(decoder.hidden(z_NK, unknown_NC)).masked_fill(absent_G, -torch.inf)
    mean_NG = logits_NG.softmax(1) * count_NG.sum(1, keepdim=True)
    variance_NG = mean_NG + mean_NG.square() / network.vae.log_theta_G.exp() + VARIANCE_FLOOR
    misfit_N: Tensor = ((count_NG - mean_NG).square() / variance_NG).sum(1) / (~absent_G).sum()
    return misfit_N


def refer(
    observed: Observed,
    code_N: NDArray[np.integer],
    sample_N: NDArray[np.integer],
    share_G: NDArray[np.floating],
    identity_G: NDArray[np.bool_],
) -> Reference:
    """Describe the training cells.

    Parameters
    ----------
    observed
        The training cells.
    code_N
        Label set of each, -1 where missing.
    sample_N
        Sample of each.
    share_G
        Share of each gene in all counts.
    identity_G
        The genes that every cell should express.
    """
    hidden, latent = observed.hidden_NH.astype(np.float64), observed.latent_NK.astype(np.float64)
    sets = [s for s in np.unique(code_N[code_N >= 0]) if (code_N == s).sum() >= MIN_CELLS]
    if not sets:  # no labels worth a mean: one class of all
        code_N, sets = np.zeros_like(code_N), [0]
    means = np.stack([hidden[code_N == s].mean(0) for s in sets])
    means_of_latent = np.stack([latent[code_N == s].mean(0) for s in sets])
    known = np.isin(code_N, sets)
    row_N = np.searchsorted(sets, code_N[known])
    centre = hidden.mean(0)
    samples = np.stack([latent[sample_N == m].mean(0) for m in np.unique(sample_N)])
    arrays = (
        means,
        _precision(hidden[known] - means[row_N]),
        centre,
        _precision(hidden - centre),
        share_G,
        identity_G,
        samples[np.lexsort(samples.T)],
        _precision(latent[known] - means_of_latent[row_N]),
    )
    return Reference(*(np.ascontiguousarray(array, np.float32) for array in arrays))


def _precision(residual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of the covariance, shrunk as by Ledoit and Wolf 2004 (doi:10.1016/S0047-259X(03)00096-4)."""
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(residual, assume_centered=True)
    scale = np.trace(covariance) / len(covariance)
    return np.linalg.inv(covariance + 1e-6 * max(scale, 1e-6) * np.eye(len(covariance)))


def views(
    observed: Observed, reference: Reference, counts: sp.csr_matrix, present_G: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Strangeness of each cell in each of `VIEWS`, [N, T], on scales of their own; without misfit if there is none."""
    hidden = observed.hidden_NH
    to_class = np.stack([_square(hidden - mean, reference.within_HH) for mean in reference.mean_LH], axis=1)
    distance = to_class.min(1) - _square(hidden - reference.centre_H, reference.around_HH)
    measured_G = reference.share_G * present_G
    share = (measured_G * reference.identity_G).sum() / max(measured_G.sum(), 1e-12)
    expected = share * np.asarray(counts.sum(1)).ravel()
    seen = np.asarray(counts @ reference.identity_G).ravel()
    missing = (expected - seen) / np.sqrt(expected + 1)
    found = (observed.energy_N, distance, observed.misfit_N, missing)
    return np.stack([view_N for view_N in found if view_N is not None], axis=1)


def without_decoded(view_NT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Views of cells without the one that needs the decoder, [N, T - 1]."""
    return np.delete(view_NT, VIEWS.index(DECODED), axis=1)


def _square(residual_NH: NDArray[np.floating], precision_HH: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(((residual_NH @ precision_HH) * residual_NH).sum(1))


@dataclass(frozen=True, slots=True)
class Scale:
    """Strangeness as a share of held-out cells of known states that look less strange."""

    view_BTQ: Floats
    """Quantiles of each view in each bin, at `LEVELS`."""
    whole_BQ: Floats
    """Quantiles of the greatest of a cell's shares."""

    @classmethod
    def fit(cls, view_NT: NDArray[np.floating], bin_N: NDArray[np.int64], n_bins: int) -> Scale:
        """Fit on held-out cells; a bin without cells has the scale of all."""
        pools = [np.flatnonzero(bin_N == b) if (bin_N == b).any() else np.arange(bin_N.size) for b in range(n_bins)]
        view_BTQ = np.stack([np.quantile(view_NT[pool], LEVELS, axis=0).T for pool in pools])
        greatest = [_own_shares(view_NT[pool], table).max(1) for pool, table in zip(pools, view_BTQ, strict=True)]
        whole_BQ = np.stack([np.quantile(share, LEVELS) for share in greatest])
        return cls(view_BTQ.astype(np.float32), whole_BQ.astype(np.float32))

    def novelty(self, view_NT: NDArray[np.floating], bin_N: NDArray[np.int64]) -> Floats:
        """Novelty of each cell, 0 to 1: uniform on cells like the held-out ones."""
        novelty_N = np.empty(len(view_NT), np.float32)
        for b in np.unique(bin_N):
            cells = bin_N == b
            greatest = _shares(view_NT[cells], self.view_BTQ[b]).max(1)
            novelty_N[cells] = _share_below(greatest, self.whole_BQ[b])
        return novelty_N


def _shares(view_NT: NDArray[np.floating], table_TQ: NDArray[np.floating]) -> NDArray[np.floating]:
    """Share of held-out cells that look less strange in each view, [N, T]; above 1 where all of them do.

    Without the latter a few held-out cells, each the strangest in one of the views, would hide all that is stranger.
    """
    pairs = zip(view_NT.T, table_TQ, strict=True)
    return np.stack([_share_below(view, table) + _excess(view, table[-1], table[MIDDLE]) for view, table in pairs], 1)


def _own_shares(view_NT: NDArray[np.floating], table_TQ: NDArray[np.floating]) -> NDArray[np.floating]:
    """The same for the held-out cells themselves, each beside the others: one in each view is stranger than all."""
    share_NT = _shares(view_NT, table_TQ)
    if len(view_NT) > MIN_CELLS:
        for t, view_N in enumerate(view_NT.T):
            second, first = np.argsort(view_N)[-2:]
            if view_N[first] > view_N[second]:
                share_NT[first, t] = 1 + _excess(view_N[first], view_N[second], float(np.median(view_N)))
    return share_NT


def _excess(value_N: NDArray[np.floating], greatest: float, middle: float) -> NDArray[np.floating]:
    """How far values lie above the greatest of others, in units of its distance to their median."""
    spread = greatest - middle if greatest > middle else np.inf
    excess_N: NDArray[np.floating] = np.maximum(value_N - greatest, 0) / spread
    return excess_N


def _share_below(value_N: NDArray[np.floating], table_Q: NDArray[np.floating]) -> NDArray[np.floating]:
    """Share strictly below each value: where all cells are alike, as in a view that sees nothing here, it is 0.

    Of equal entries `numpy.interp` takes the last, so that the table is read from its end.
    """
    above_N: NDArray[np.float64] = np.interp(-value_N, -table_Q[::-1], 1 - LEVELS[::-1])
    return 1 - above_N
