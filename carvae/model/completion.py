"""What is expected of genes that a query did not measure, given those that it did.

The head's view of the genes sums weight times value over all genes. Where an assay lacks some of them, zeros in their
place would be evidence for the states that do not express them. Their expected value stands there instead, by a factor
model of the training cells: values are a mean, plus `N_FACTORS` common factors times each gene's loadings, plus noise
of each gene's own. The factors of a cell are read from the genes that are there (the regression estimate, Thomson
1951), and the expected values of the others follow. All of it is linear, so that the weights of absent genes are
carried over to those that were measured, once per query, and cells cost what they did.

Half of the weight in the model is the cells', and half that of the labelled ones, each label having the same: else what
is expected is what is common, and the rare states suffer.

Axes: N cells, G genes, A absent genes, R factors, F parts of the leaves, S studies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn

from carvae.data.loader import CellData, MinibatchLoader
from carvae.data.sparse import CountsCSR

COUNTS_PER_CELL = 1e4
"""Depth to which the gene view scales a cell before it takes logarithms."""
MAX_CELLS = 20_000
"""Training cells that are used, drawn at random where there are more."""
CELLS_AT_A_TIME = 1024
N_FACTORS = 100
LEAST_NOISE = 1e-4
"""Least variance of a gene beside its factors."""
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


@dataclass(frozen=True, slots=True)
class Carrier:
    """Carries weights of absent genes over to those that were measured."""

    absent_A: Tensor
    present_G1: Tensor
    """0 at the absent genes, 1 at the others."""
    mean_G: Tensor
    loading_AR: Tensor
    factor_GR: Tensor
    """By which a cell's factors are read from its values."""

    def __call__(self, weight_GF: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [G, F] and what to add to their bias [F], of which nothing is left at the absent genes.

        With them the sum over the measured genes is that over all, of values and of expected values.
        """
        whole_GF = weight_GF.double()
        absent_AF = whole_GF[self.absent_A]
        more_GF = self.factor_GR @ (self.loading_AR.t() @ absent_AF)
        bias_F = self.mean_G[self.absent_A] @ absent_AF - self.mean_G @ more_GF
        return (self.present_G1 * whole_GF + more_GF).to(weight_GF.dtype), bias_F.to(weight_GF.dtype)


class Completion(nn.Module):
    """Expected values of genes; nothing is expected until `fit_completion` has seen the training cells."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("share_G", torch.zeros(n_genes))
        self.register_buffer("mean_G", torch.zeros(n_genes))
        self.register_buffer("loading_GR", torch.zeros(n_genes, min(n_genes, N_FACTORS)))
        self.register_buffer("noise_G", torch.ones(n_genes))

    def absent(self, present_G: NDArray[np.bool_] | None) -> Tensor | None:
        """Places of the genes that were not measured; None where all were, and where nothing is expected yet."""
        share_G = self.get_buffer("share_G")
        if present_G is None or present_G.all() or not share_G.any():
            return None
        return torch.from_numpy(np.flatnonzero(~present_G)).to(share_G.device)

    def deviation_G(self) -> Tensor:
        """Standard deviation of each gene's values over the training cells that it was learned from."""
        return (self.get_buffer("loading_GR").square().sum(1) + self.get_buffer("noise_G")).sqrt()

    def measured_share(self, absent_A: Tensor | None) -> Tensor | float:
        """Share of a cell's counts over all genes that those which are not absent have, a scalar."""
        if absent_A is None:
            return 1.0
        return (1 - self.get_buffer("share_G")[absent_A].sum()).clamp(min=LEAST_SHARE)

    def carrier(self, absent_A: Tensor | None) -> Carrier | None:
        """What carries weights over from the absent genes; None where there are none.

        With loadings L, noise P and factors of unit variance, those of a cell are
        ``(I + L' P^-1 L)^-1 L' P^-1 (value - mean)``, all over the measured genes.
        """
        if absent_A is None:
            return None
        mean_G, loading_GR, noise_G = (self.get_buffer(name).double() for name in ("mean_G", "loading_GR", "noise_G"))
        present_G1 = torch.ones_like(noise_G)[:, None]
        present_G1[absent_A] = 0
        read_GR = present_G1 * loading_GR / noise_G[:, None]
        precision_RR = torch.eye(loading_GR.shape[1], dtype=torch.float64, device=mean_G.device)
        precision_RR += read_GR.t() @ loading_GR
        factor_GR = torch.linalg.solve(precision_RR, read_GR.t()).t()
        return Carrier(absent_A, present_G1, mean_G, loading_GR[absent_A], factor_GR)


@torch.no_grad()
def fit_completion(completion: Completion, data: CellData, rows: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Learn the factor model, in place, from the training cells in ``rows``, by principal components.

    A gene is learned from the studies that measured it, and two of them together from those that measured both.

    Parameters
    ----------
    completion
        What is fitted.
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
    cells = _Cells(data, studies, measured_S, ~unmeasured_SG, _weights(data, rows))
    mean_G, covariance_GG = cells.moments()
    loading_GR = _loadings(covariance_GG, completion.get_buffer("loading_GR").shape[1])
    noise_G = (covariance_GG.diagonal() - loading_GR.square().sum(1)).clamp(min=LEAST_NOISE)
    for name, value in (("share_G", share_G), ("mean_G", mean_G), ("loading_GR", loading_GR), ("noise_G", noise_G)):
        completion.get_buffer(name).copy_(value)


def _weights(data: CellData, rows: NDArray[np.int64]) -> Tensor:
    """Weight of every cell of ``data``, which for ``rows`` sum to 1, float64: half by cell, half by label."""
    code_N = data.code_NA[rows, 0]
    labelled_N = code_N >= 0
    weight_N = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    if labelled_N.any():
        _, label_N, n_L = torch.unique(code_N[labelled_N], return_inverse=True, return_counts=True)
        weight_N /= 2
        weight_N[labelled_N] += 1 / (2 * len(n_L) * n_L[label_N].double())
    whole_N = torch.zeros(len(data.code_NA), dtype=torch.float64)
    whole_N[torch.from_numpy(rows)] = weight_N
    return whole_N


def _loadings(covariance_GG: Tensor, n_factors: int) -> Tensor:
    """Leading eigenvectors times the roots of their eigenvalues, [G, R]."""
    n_genes = len(covariance_GG)
    value_R, vector_GR = eigh(covariance_GG.numpy(), subset_by_index=[n_genes - n_factors, n_genes - 1])
    # pairs of genes that no study measured together may leave a matrix with eigenvalues below zero
    return torch.from_numpy(vector_GR * np.sqrt(np.maximum(value_R, 0)))


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


class _Cells:
    """The values of the training cells, some at a time, study by study."""

    def __init__(
        self,
        data: CellData,
        studies: list[NDArray[np.int64]],
        share_S: Tensor,
        measured_SG: Tensor,
        weight_N: Tensor,
    ) -> None:
        self.data, self.studies, self.share_S, self.weight_N = data, studies, share_S, weight_N
        self.measured_SG = measured_SG.double()

    def values(self, s: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Values [N, G] of the cells of a study, and their weights [N]."""
        batches = MinibatchLoader(self.data, self.studies[s], CELLS_AT_A_TIME)
        weights = torch.split(self.weight_N[torch.from_numpy(self.studies[s])], CELLS_AT_A_TIME)
        for batch, weight_N in zip(batches, weights, strict=True):
            yield batch.counts.dense(log_normalised(batch.counts, float(self.share_S[s])).double()), weight_N

    def moments(self) -> tuple[Tensor, Tensor]:
        """Weighted mean [G] and covariance [G, G], each over the studies that measured the genes."""
        n = range(len(self.studies))
        weight_S = torch.stack([self.weight_N[torch.from_numpy(own)].sum() for own in self.studies])
        sum_SG = torch.stack([sum(weight_N @ value_NG for value_NG, weight_N in self.values(s)) for s in n])  # type: ignore[misc]
        mean_G = (self.measured_SG * sum_SG).sum(0) / (weight_S @ self.measured_SG).clamp(min=1e-12)
        product_GG = torch.zeros(len(mean_G), len(mean_G), dtype=torch.float64)
        for s in n:
            for value_NG, weight_N in self.values(s):
                centred_NG = ((value_NG - mean_G) * self.measured_SG[s] * weight_N.sqrt()[:, None]).float()
                product_GG += centred_NG.t() @ centred_NG  # sums of a thousand cells are exact enough
        together_GG = self.measured_SG.t() @ (weight_S[:, None] * self.measured_SG)
        return mean_G, product_GG / together_GG.clamp(min=1e-12)
