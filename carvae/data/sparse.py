"""Sparse counts as tensors: compact where they rest, wide in a minibatch.

Axes: N cells, G genes, M non-zero counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

NARROW = np.iinfo(np.uint16).max
"""Genes and counts up to here are kept in 16 bits."""


@dataclass(frozen=True, slots=True)
class CountsCSR:
    """The counts of some cells, compressed by row, in the types that the network computes with."""

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
        if self.count_M.device.type == "cpu" and self.count_M.dtype == torch.float32:
            from carvae.data.rows import sums  # numba is slow to import, and not needed to read a bundle

            return torch.from_numpy(sums(self.indptr_N.numpy(), self.count_M.contiguous().numpy()))
        return torch.segment_reduce(self.count_M, "sum", offsets=self.indptr_N, initial=0, unsafe=True)

    def dense(self, value_M: Tensor) -> Tensor:
        """``value_M`` in place of the counts, with the zeros between them, [N, G]."""
        dense_NG = value_M.new_zeros(self.n_cells, self.n_genes)
        return dense_NG.index_put_((self.cell_M(), self.gene_M.long()), value_M, accumulate=True)

    def part(self, start: int, stop: int) -> CountsCSR:
        """Some cells in a row, in the same memory."""
        indptr_N = self.indptr_N[start : stop + 1]
        entries = slice(int(indptr_N[0]), int(indptr_N[-1]))
        return CountsCSR(indptr_N - indptr_N[0], self.gene_M[entries], self.count_M[entries], self.n_genes)

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


@dataclass(frozen=True, slots=True)
class CompactCSR:
    """The counts of many cells at rest: 4 bytes per entry where genes and counts fit into 16 bits, else 8."""

    indptr_N: Tensor
    """int64 [N + 1], where each cell's entries begin."""
    entry_M2: Tensor
    """uint16 or int32 [M, 2], gene and count of each entry."""
    n_genes: int
    """G."""

    @classmethod
    def empty(cls, size_N: NDArray[np.int64], n_genes: int, largest: int, device: torch.device) -> CompactCSR:
        """Room for cells with ``size_N`` entries each and no count above ``largest``; `fill` writes them."""
        indptr_N = torch.zeros(size_N.size + 1, dtype=torch.int64)
        indptr_N[1:] = torch.from_numpy(size_N).cumsum(0)
        shape = (int(indptr_N[-1]), 2)
        return cls(indptr_N.to(device), torch.empty(shape, dtype=_entry_type(n_genes, largest), device=device), n_genes)

    @classmethod
    def from_scipy(cls, counts: sp.csr_matrix) -> CompactCSR:
        """The same counts."""
        size_N = np.diff(counts.indptr).astype(np.int64)
        compact = cls.empty(size_N, counts.shape[1], int(counts.data.max(initial=0)), torch.device("cpu"))
        compact.fill(0, counts.indices, counts.data)
        return compact

    def fill(self, first: int, gene_M: NDArray[np.integer], count_M: NDArray[np.number]) -> None:
        """Write entries from number ``first`` on."""
        entry_M2 = np.empty((gene_M.size, 2), np.uint16 if self.entry_M2.dtype == torch.uint16 else np.int32)
        entry_M2[:, 0], entry_M2[:, 1] = gene_M, count_M
        self.entry_M2[first : first + gene_M.size].copy_(torch.from_numpy(entry_M2))

    def rows(self, rows_N: Tensor, n_entries: int | None = None) -> CountsCSR:
        """The given cells in the given order, widened.

        With ``n_entries``, how many entries they have together, nothing is read back from a GPU.
        """
        first_N = self.indptr_N[rows_N]
        size_N = self.indptr_N[rows_N + 1] - first_N
        indptr_N = torch.zeros(rows_N.numel() + 1, dtype=torch.int64, device=rows_N.device)
        torch.cumsum(size_N, 0, out=indptr_N[1:])
        if rows_N.device.type == "cpu":
            gene_M, count_M = self._by_row(first_N, indptr_N)
        else:
            gene_M, count_M = self._by_entry(first_N, indptr_N, int(indptr_N[-1]) if n_entries is None else n_entries)
        return CountsCSR(indptr_N, gene_M, count_M, self.n_genes)

    def _by_row(self, first_N: Tensor, indptr_N: Tensor) -> tuple[Tensor, Tensor]:
        """Row by row: on a CPU several times faster than entry by entry."""
        from carvae.data.rows import widened  # numba is slow to import, and not needed to read a bundle

        gene_M, count_M = widened(first_N.numpy(), indptr_N.numpy(), self.entry_M2.numpy())
        return torch.from_numpy(gene_M), torch.from_numpy(count_M)

    def _by_entry(self, first_N: Tensor, indptr_N: Tensor, n_entries: int) -> tuple[Tensor, Tensor]:
        """One index per entry, as a GPU likes it; 16-bit pairs travel as one 32-bit word."""
        entry_M = torch.repeat_interleave(first_N - indptr_N[:-1], indptr_N.diff(), output_size=n_entries)
        entry_M += torch.arange(n_entries, device=entry_M.device)
        if self.entry_M2.dtype != torch.uint16:
            taken_M2 = self.entry_M2[entry_M]
            return taken_M2[:, 0].contiguous(), taken_M2[:, 1].float()
        word_M = self.entry_M2.view(torch.int32)[entry_M, 0]  # little endian: the gene is the lower half
        return word_M & NARROW, ((word_M >> 16) & NARROW).float()

    def to(self, device: torch.device) -> CompactCSR:
        """The same counts on another device; from pinned memory without waiting."""
        indptr_N = self.indptr_N.to(device, non_blocking=True)
        return CompactCSR(indptr_N, self.entry_M2.to(device, non_blocking=True), self.n_genes)

    def pin(self) -> CompactCSR:
        """A copy in memory that a GPU can read by itself."""
        return CompactCSR(self.indptr_N.pin_memory(), self.entry_M2.pin_memory(), self.n_genes)


def entry_bytes(n_genes: int, largest: int) -> int:
    """Bytes of one entry of a `CompactCSR` whose counts are at most ``largest``."""
    return 2 * _entry_type(n_genes, largest).itemsize


def _entry_type(n_genes: int, largest: int) -> torch.dtype:
    return torch.uint16 if max(n_genes - 1, largest) <= NARROW else torch.int32


@dataclass(frozen=True, slots=True)
class GeneSums:
    """What the moments of every gene are computed from; sums over parts of the cells add up."""

    sum_G: Tensor
    """float64, counts of each gene."""
    square_G: Tensor
    """float64, their squares."""
    library: Tensor
    """float64 [3]: cells, counts per cell, and their squares."""

    @classmethod
    def of(cls, chunks: Iterable[CountsCSR], n_genes: int, device: torch.device | str = "cpu") -> GeneSums:
        """The sums over some cells, a chunk at a time."""
        sum_G, square_G, library = (torch.zeros(n, dtype=torch.float64, device=device) for n in (n_genes, n_genes, 3))
        for counts in chunks:
            count_M, library_N = counts.count_M.double(), counts.library_N().double()
            sum_G += torch.bincount(counts.gene_M, count_M, n_genes)
            square_G += torch.bincount(counts.gene_M, count_M.square_(), n_genes)
            library += torch.stack([torch.ones_like(library_N).sum(), library_N.sum(), library_N.square().sum()])
        return cls(sum_G, square_G, library)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Each gene's share of all counts, and its inverse dispersion by moments, float32 [G].

        With library l and share p, NB gives ``E[x^2] = p E[l] + p^2 E[l^2] (1 + 1 / theta)``.
        """
        n, total, squares = self.library
        share_G = self.sum_G / total.clamp(min=1)
        expected_G = share_G.square() * squares / n
        excess_G = self.square_G / n - share_G * total / n - expected_G
        return share_G.float(), (expected_G / excess_G.clamp(min=1e-6)).float()
