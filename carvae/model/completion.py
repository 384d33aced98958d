"""What is expected of genes that a query did not measure, given the latent coordinates of its cells.

The head's view of the genes sums weight times value over all genes. Where an assay lacks some of them, zeros in their
place would be evidence for the states that do not express them. Their expected value stands there instead: a ridge
regression of each gene's value on the latent coordinates, learned from the training cells. Of a cell the sum over its
missing genes is then linear in its coordinates, so that it costs a product with a small matrix.

Axes: N cells, G genes, A absent genes, K latent, F parts of the leaves, S studies, P sets of studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carvae.data.loader import CellData, MinibatchLoader
from carvae.data.sparse import CountsCSR
from carvae.model.vae import Encoder

COUNTS_PER_CELL = 1e4
"""Depth to which the gene view scales a cell before it takes logarithms."""
MAX_CELLS = 50_000
"""Training cells that are used, drawn at random where there are more."""
CELLS_AT_A_TIME = 1024
RIDGE = 0.01
"""Penalty of the squared slopes per cell; latent coordinates have a variance near 1."""
LEAST_SHARE = 0.01
"""The measured genes are never taken to have less of a cell's counts."""
ROUNDS = 10
"""In which the genes' shares are found where studies measured different genes."""


def log_normalised(counts: CountsCSR, share: float | Tensor = 1.0) -> Tensor:
    """``log1p`` of the counts scaled to `COUNTS_PER_CELL` per cell, [M].

    ``share`` is what the genes that were measured have of a cell's counts over all genes.
    """
    scale_N = COUNTS_PER_CELL * share / counts.library_N().clamp(min=1)
    return (counts.count_M * scale_N[counts.cell_M()]).log1p()


class Completion(nn.Module):
    """Expected values of genes; nothing is expected until `fit_completion` has seen the training cells."""

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("share_G", torch.zeros(n_genes))
        self.register_buffer("mean_G", torch.zeros(n_genes))
        self.register_buffer("slope_KG", torch.zeros(n_latent, n_genes))
        self.register_buffer("centre_K", torch.zeros(n_latent))

    def absent(self, present_G: NDArray[np.bool_] | None) -> Tensor | None:
        """Places of the genes that were not measured; None where all were, and where nothing is expected yet."""
        share_G = self.get_buffer("share_G")
        if present_G is None or present_G.all() or not share_G.any():
            return None
        return torch.from_numpy(np.flatnonzero(~present_G)).to(share_G.device)

    def measured_share(self, absent_A: Tensor | None) -> Tensor | float:
        """Share of a cell's counts over all genes that those which are not absent have, a scalar."""
        if absent_A is None:
            return 1.0
        return (1 - self.get_buffer("share_G")[absent_A].sum()).clamp(min=LEAST_SHARE)

    def logits(self, z_NK: Tensor, absent_A: Tensor, weight_GF: Tensor) -> Tensor:
        """The sum over absent genes of expected value times weight, [N, F]."""
        weight_AF = weight_GF[absent_A]
        slope_KF = self.get_buffer("slope_KG")[:, absent_A] @ weight_AF
        return self.get_buffer("mean_G")[absent_A] @ weight_AF + (z_NK - self.get_buffer("centre_K")) @ slope_KF


@torch.no_grad()
def fit_completion(
    completion: Completion, encoder: Encoder, data: CellData, rows: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """Learn the expected values, in place, from the training cells in ``rows``.

    A gene is learned from the studies that measured it.

    Parameters
    ----------
    completion
        What is fitted.
    encoder
        Trained, on the CPU.
    data
        All cells, on the CPU.
    rows
        The training cells.
    rng
        Draws cells where there are more than `MAX_CELLS`.
    """
    if rows.size > MAX_CELLS:
        rows = np.sort(rng.choice(rows, MAX_CELLS, replace=False))
    study_N = data.study_N[rows].numpy()
    studies = [rows[study_N == s] for s in np.unique(study_N)]
    n_genes = completion.get_buffer("share_G").numel()
    unmeasured_SG = torch.zeros(len(studies), n_genes, dtype=torch.bool)
    if data.unmeasured_SG is not None:
        unmeasured_SG = data.unmeasured_SG[np.unique(study_N)]
    share_G, measured_S = _shares(data, studies, unmeasured_SG)
    sums = [_Sums.of(data, own, encoder, float(share)) for own, share in zip(studies, measured_S, strict=True)]
    centre_K = _Sums.joined(sums).z_K / rows.size
    completion.get_buffer("share_G").copy_(share_G)
    completion.get_buffer("centre_K").copy_(centre_K)
    sets_PS, set_G = torch.unique(~unmeasured_SG, dim=1, return_inverse=True)
    for p in range(sets_PS.shape[1]):
        chosen, genes_A = [s for s, has in zip(sums, sets_PS[:, p].tolist(), strict=True) if has], set_G == p
        if chosen:
            mean_A, slope_KA = _regression(_Sums.joined(chosen), genes_A, centre_K)
            completion.get_buffer("mean_G")[genes_A] = mean_A.float()
            completion.get_buffer("slope_KG")[:, genes_A] = slope_KA.float()


def _shares(data: CellData, studies: list[NDArray[np.int64]], unmeasured_SG: Tensor) -> tuple[Tensor, Tensor]:
    """Mean share of each gene of a cell's counts over all genes, and what the genes of each study have together."""
    share_SG = torch.stack([_mean_share(data, own, unmeasured_SG.shape[1]) for own in studies])
    n_S1 = torch.tensor([[own.size] for own in studies], dtype=torch.float64)
    n_SG = n_S1 * ~unmeasured_SG
    measured_S1 = torch.ones_like(n_S1)
    for _ in range(ROUNDS):
        share_G = (n_SG * share_SG * measured_S1).sum(0) / n_SG.sum(0).clamp(min=1)
        share_G /= share_G.sum().clamp(min=1e-12)
        measured_S1 = (share_G * ~unmeasured_SG).sum(1, keepdim=True).clamp(min=LEAST_SHARE)
    return share_G, measured_S1[:, 0]


def _mean_share(data: CellData, rows: NDArray[np.int64], n_genes: int) -> Tensor:
    """Mean over cells of each gene's share of the measured counts, float64 [G]."""
    total_G = torch.zeros(n_genes, dtype=torch.float64)
    for batch in MinibatchLoader(data, rows, CELLS_AT_A_TIME):
        counts = batch.counts
        share_M = counts.count_M / counts.library_N().clamp(min=1)[counts.cell_M()]
        total_G.index_add_(0, counts.gene_M.long(), share_M.double())
    return total_G / rows.size


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over cells, float64: what a regression of the genes' values on the latent coordinates needs."""

    n: int
    z_K: Tensor
    zz_KK: Tensor
    value_G: Tensor
    zvalue_KG: Tensor

    @classmethod
    def of(cls, data: CellData, rows: NDArray[np.int64], encoder: Encoder, share: float) -> _Sums:
        """Of the cells of a study whose genes have a ``share`` of the counts over all."""
        parts = []
        for batch in MinibatchLoader(data, rows, CELLS_AT_A_TIME):
            counts = batch.counts
            z_NK = encoder(counts).mean_NK.double()
            value_NG = counts.dense(log_normalised(counts, share).double())
            parts.append(cls(counts.n_cells, z_NK.sum(0), z_NK.t() @ z_NK, value_NG.sum(0), z_NK.t() @ value_NG))
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[_Sums]) -> _Sums:
        """Over the cells of all."""
        n = sum(part.n for part in parts)
        return cls(n, *(sum(getattr(part, f.name) for part in parts) for f in fields(cls)[1:]))


def _regression(sums: _Sums, genes_G: Tensor, centre_K: Tensor) -> tuple[Tensor, Tensor]:
    """Expected value [A] of the chosen genes at ``centre_K``, and its slopes [K, A]."""
    mean_K, mean_A = sums.z_K / sums.n, sums.value_G[genes_G] / sums.n
    spread_KK = sums.zz_KK - sums.n * torch.outer(mean_K, mean_K)
    together_KA = sums.zvalue_KG[:, genes_G] - sums.n * torch.outer(mean_K, mean_A)
    penalty_KK = RIDGE * sums.n * torch.eye(mean_K.numel(), dtype=torch.float64)
    slope_KA = torch.linalg.solve(spread_KK + penalty_KK, together_KA)
    return mean_A + (centre_K - mean_K) @ slope_KA, slope_KA
