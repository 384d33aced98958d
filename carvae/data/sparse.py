"""Sparse counts as tensors.

Axes: N cells, G genes, M non-zero counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CountsCSR:
    """The counts of some cells, compressed by row."""

    indptr_N: Tensor
    """int64 [N + 1], where each cell's entries begin."""
    gene_M: Tensor
    """int32 [M], gene of each entry."""
    count_M: Tensor
    """float32 [M], counts."""
    n_genes: int
    """G."""

    @classmethod
    def from_scipy(cls, counts: sp.csr_matrix) -> CountsCSR:
        """The tensors of a scipy matrix, in its own memory where its types are theirs."""
        return cls(
            torch.from_numpy(counts.indptr.astype(np.int64)),
            torch.from_numpy(counts.indices.astype(np.int32, copy=False)),
            torch.from_numpy(counts.data.astype(np.float32, copy=False)),
            counts.shape[1],
        )

    @property
    def n_cells(self) -> int:
        """N."""
        return self.indptr_N.numel() - 1

    def cell_M(self) -> Tensor:
        """Cell of each entry, int64 [M]. Entries after the last cell's (see `cuda_graph`) are given to it."""
        n_entries = self.gene_M.numel()
        size_N = self.indptr_N.diff(append=self.indptr_N.new_full((1,), n_entries))
        return torch.repeat_interleave(size_N, output_size=n_entries).clamp_(max=self.n_cells - 1)

    def library_N(self) -> Tensor:
        """Observed counts per cell, float [N]."""
        return torch.segment_reduce(self.count_M, "sum", offsets=self.indptr_N, initial=0, unsafe=True)

    def part(self, start: int, stop: int) -> CountsCSR:
        """Some cells in a row, in the same memory."""
        indptr_N = self.indptr_N[start : stop + 1]
        entries = slice(int(indptr_N[0]), int(indptr_N[-1]))
        return CountsCSR(indptr_N - indptr_N[0], self.gene_M[entries], self.count_M[entries], self.n_genes)

    def rows(self, rows_N: Tensor, n_entries: int | None = None) -> CountsCSR:
        """The given cells, in the given order.

        With ``n_entries``, how many entries they have together, nothing is read back from a GPU.
        """
        first_N = self.indptr_N[rows_N]
        size_N = self.indptr_N[rows_N + 1] - first_N
        indptr_N = torch.zeros(rows_N.numel() + 1, dtype=torch.int64, device=rows_N.device)
        torch.cumsum(size_N, 0, out=indptr_N[1:])
        if rows_N.device.type == "cpu" and rows_N.numel():  # whole rows: four times faster than entry by entry
            gene_M, count_M = self.gene_M.numpy(), self.count_M.numpy()
            rows = [slice(i, i + n) for i, n in zip(first_N.tolist(), size_N.tolist(), strict=True)]
            genes = np.concatenate([gene_M[row] for row in rows])
            counts = np.concatenate([count_M[row] for row in rows])
            return CountsCSR(indptr_N, torch.from_numpy(genes), torch.from_numpy(counts), self.n_genes)
        n = int(indptr_N[-1]) if n_entries is None else n_entries
        entry_M = torch.repeat_interleave(first_N - indptr_N[:-1], size_N, output_size=n)
        entry_M += torch.arange(n, device=rows_N.device)
        return CountsCSR(indptr_N, self.gene_M[entry_M], self.count_M[entry_M], self.n_genes)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Each gene's share of all counts, and its inverse dispersion by moments, float32 [G].

        With library l and share p, NB gives ``E[x^2] = p E[l] + p^2 E[l^2] (1 + 1 / theta)``.
        """
        library_N = self.library_N().double()
        gene_M, count_M = self.gene_M.long(), self.count_M.double()
        total_G = count_M.new_zeros(self.n_genes).index_add_(0, gene_M, count_M)
        square_G = torch.zeros_like(total_G).index_add_(0, gene_M, count_M.square()) / self.n_cells
        share_G = total_G / library_N.sum().clamp(min=1)
        expected_G = share_G.square() * library_N.square().mean()
        excess_G = square_G - share_G * library_N.mean() - expected_G
        return share_G.float(), (expected_G / excess_G.clamp(min=1e-6)).float()

    def to_scipy(self) -> sp.csr_matrix:
        """The scipy matrix of the tensors."""
        parts = (self.count_M.cpu().numpy(), self.gene_M.cpu().numpy(), self.indptr_N.cpu().numpy())
        return sp.csr_matrix(parts, shape=(self.n_cells, self.n_genes))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CountsCSR:
        """The same counts on another device."""
        return CountsCSR(
            self.indptr_N.to(device, non_blocking=non_blocking),
            self.gene_M.to(device, non_blocking=non_blocking),
            self.count_M.to(device, non_blocking=non_blocking),
            self.n_genes,
        )
