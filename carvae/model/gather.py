"""Sums of rows on a CPU: the sparse first layer of embedding, whose weights stay as they are, and its gradient.

Axes: N cells, G genes, M non-zero counts, H hidden, P parts of H, C columns of a part.

A cell's hidden values are a sum of weight rows, one per gene that it has: some 50,000 products and 200 kB of weights
for 400 genes and 128 columns, so the time is that of reading weights. They are laid out in parts of `COLUMNS` columns,
of which one (0.5 MB for 4,000 genes) stays in the processor's own cache while some cells go by, and one cell's sum of
a part stays in registers from its first gene to its last. Numba keeps an array's values in memory, hence `_add_rows`.

The gradient of the weights is such a sum for each gene, of the gradients of the cells that have it.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from carvae.data.sparse import CountsCSR

COLUMNS = 32
CELLS_AT_ONCE = 256
"""Cells that go by one part of the weights: they outweigh bringing it into the cache."""
LOGS = np.log1p(np.arange(256)).astype(np.float32)
"""``log1p`` of small counts, which nearly all are."""
CHAINS = 2
"""Sums side by side, so that an addition need not wait for the one before."""


class FixedLayer:
    """``log1p(counts) @ weight + bias``, to be asked for many cells.

    Parameters
    ----------
    weight_GH, bias_H
        On a CPU.
    dtype
        float32, or bfloat16 to hold the weights in half the memory; sums are float32 in both.
    """

    def __init__(self, weight_GH: Tensor, bias_H: Tensor, dtype: torch.dtype) -> None:
        padded_GH = functional.pad(weight_GH.detach().to(dtype), (0, -weight_GH.shape[1] % COLUMNS))
        parts_PGC = torch.stack(torch.split(padded_GH, COLUMNS, dim=1))
        self.parts_PGC = (parts_PGC.view(torch.uint16) if dtype == torch.bfloat16 else parts_PGC).numpy()
        self.n_hidden = len(bias_H)
        self.bias_PC = functional.pad(bias_H.detach(), (0, -self.n_hidden % COLUMNS)).view(-1, COLUMNS)

    def __call__(self, counts: CountsCSR) -> Tensor:
        """Hidden values [N, H].

        Raises
        ------
        ValueError
            If the counts are over another number of genes: the kernel would read beyond the weights.
        """
        if counts.n_genes != self.parts_PGC.shape[1]:
            raise ValueError(f"counts over {counts.n_genes} genes for weights of {self.parts_PGC.shape[1]}")
        out_NPC = self.bias_PC.repeat(counts.n_cells, 1, 1)
        indptr_N, gene_M, count_M, out = (
            tensor.numpy() for tensor in (counts.indptr_N, counts.gene_M, counts.count_M, out_NPC)
        )

        def some_cells(first: int, last: int) -> None:
            _sums(indptr_N[first : last + 1], gene_M, count_M, self.parts_PGC, out[first:last])

        n_threads = min(torch.get_num_threads(), -(-counts.n_cells // CELLS_AT_ONCE))
        if n_threads <= 1:
            some_cells(0, counts.n_cells)
        else:
            bounds = np.linspace(0, counts.n_cells, n_threads + 1).astype(int)
            with ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(some_cells, bounds[:-1], bounds[1:]))
        return out_NPC.flatten(1)[:, : self.n_hidden]


def weight_gradient(counts: CountsCSR, value_M: Tensor, grad_NH: Tensor) -> Tensor:
    """Sparse^T [G, N] x dense [N, H], with values in place of the counts: a gradient of weights, [G, H].

    By gene, since the gradients of a minibatch's cells stay in the cache, where the weights of all genes would not, and
    each gene's sum in registers.
    """
    n_hidden, room = grad_NH.shape[1], -grad_NH.shape[1] % COLUMNS
    padded_NH = functional.pad(grad_NH, (0, room)) if room else grad_NH
    parts_PNC = padded_NH.reshape(len(grad_NH), -1, COLUMNS).transpose(0, 1).contiguous()
    out_GH = grad_NH.new_empty(counts.n_genes, padded_NH.shape[1])
    if len(grad_NH) != counts.n_cells:
        raise ValueError(f"gradients of {len(grad_NH)} cells for counts of {counts.n_cells}")
    arrays = [tensor.detach().numpy() for tensor in (counts.indptr_N, counts.gene_M, value_M, parts_PNC, out_GH)]
    _sums_by_gene(*arrays)
    return out_GH[:, :n_hidden]


@intrinsic
def _add_rows(typing: Any, row_GC: Any, gene_M: Any, value_M: Any, span: Any, out_C: Any) -> Any:
    """``out_C += sum(value_M[j] * row_GC[gene_M[j]])`` over ``span[0] <= j < span[1]``, in registers.

    Rows are float32, or the bits of bfloat16. Unlike numba's own indexing it checks nothing and takes no negative gene.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        types_of = signature.args
        rows, gene, value, out = (_data(context, builder, types_of[k], args[k]) for k in (0, 1, 2, 4))
        start, stop = builder.extract_value(args[3], 0), builder.extract_value(args[3], 1)
        loops = _Loops(builder, (rows, gene, value))
        both = builder.add(start, builder.and_(builder.sub(stop, start), _I64(-CHAINS)))
        place = builder.bitcast(out, _VECTOR.as_pointer())
        nothing = ir.Constant(_VECTOR, [0.0] * COLUMNS)
        chains = loops.over(start, both, [builder.load(place, align=4)] + [nothing] * (CHAINS - 1))
        total = chains[0]
        for chain in chains[1:]:
            total = builder.fadd(total, chain)
        (total,) = loops.over(both, stop, [total])
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(row_GC, gene_M, value_M, span, out_C), generate


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Where the values of an array are."""
    return make_array(kind)(context, builder, array).data  # type: ignore[no-untyped-call]


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), COLUMNS)


class _Loops:
    """Writes loops over a cell's genes."""

    def __init__(self, builder: Any, arrays: tuple[Any, Any, Any]) -> None:
        self.builder, (self.rows, self.gene, self.value) = builder, arrays

    def over(self, start: Any, stop: Any, sums: list[Any]) -> list[Any]:
        """Add the genes ``start`` to ``stop`` to the sums in turn; as many at a time as there are sums."""
        builder, before = self.builder, self.builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", start, stop), loop, after)
        builder.position_at_end(loop)
        j, inside = builder.phi(_I64), [builder.phi(_VECTOR) for _ in sums]
        added = [self._plus_row(total, builder.add(j, _I64(k))) for k, total in enumerate(inside)]
        following = builder.add(j, _I64(len(sums)))
        builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
        builder.position_at_end(after)
        ends = [builder.phi(_VECTOR) for _ in sums]
        for phi, first, then in ((j, start, following), *zip(inside, sums, added, strict=True)):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        for phi, first, then in zip(ends, sums, added, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        return ends

    def _plus_row(self, total: Any, j: Any) -> Any:
        builder, fused = self.builder, ("contract",)
        gene = builder.zext(builder.load(builder.gep(self.gene, [j])), _I64)
        place = builder.gep(self.rows, [builder.mul(gene, _I64(COLUMNS))])
        is_float = self.rows.type.pointee == ir.FloatType()
        stored = _VECTOR if is_float else ir.VectorType(ir.IntType(16), COLUMNS)
        row = builder.load(builder.bitcast(place, stored.as_pointer()), align=2)
        if not is_float:
            words = ir.VectorType(_I32, COLUMNS)
            wide = builder.shl(builder.zext(row, words), ir.Constant(words, [16] * COLUMNS))
            row = builder.bitcast(wide, _VECTOR)
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        value = builder.insert_element(nothing, builder.load(builder.gep(self.value, [j])), _I32(0))
        value = builder.shuffle_vector(value, nothing, ir.Constant(ir.VectorType(_I32, COLUMNS), [0] * COLUMNS))
        return builder.fadd(total, builder.fmul(value, row, flags=fused), flags=fused)


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(
    indptr_N: NDArray[np.int64],
    gene_M: NDArray[np.int32],
    count_M: NDArray[np.float32],
    parts_PGC: Any,
    out_NPC: NDArray[np.float32],
) -> None:
    """Add the sums of their weight rows to some cells."""
    n_cells = out_NPC.shape[0]
    value_M, others_M = np.empty(0, np.float32), np.empty(0, np.int64)
    for first in range(0, n_cells, CELLS_AT_ONCE):
        last = min(first + CELLS_AT_ONCE, n_cells)
        start, stop = indptr_N[first], indptr_N[last]
        if value_M.size < stop - start:
            value_M, others_M = np.empty(stop - start, np.float32), np.empty(stop - start + 1, np.int64)
        _logs(count_M[start:stop], value_M, others_M)
        gene = gene_M[start:stop]
        for p in range(parts_PGC.shape[0]):
            for n in range(first, last):
                _add_rows(parts_PGC[p], gene, value_M, (indptr_N[n] - start, indptr_N[n + 1] - start), out_NPC[n, p])  # type: ignore[call-arg]


@njit(nogil=True, error_model="numpy")
def _logs(count_M: NDArray[np.float32], value_M: NDArray[np.float32], others_M: NDArray[np.int64]) -> None:
    """``log1p`` by the table, without a branch; then, where a count is not in it, by the function."""
    n_others = 0
    for j in range(count_M.size):
        number = np.int32(count_M[j])
        small = np.uint32(number) if np.uint32(number) < np.uint32(LOGS.size) else np.uint32(0)
        value_M[j] = LOGS[small]
        others_M[n_others] = j
        n_others += np.float32(small) != count_M[j]
    for j in others_M[:n_others]:
        value_M[j] = np.float32(math.log1p(count_M[j]))


@njit(nogil=True, cache=True, error_model="numpy")
def _sums_by_gene(
    indptr_N: NDArray[np.int64],
    gene_M: NDArray[np.int32],
    value_M: NDArray[np.float32],
    parts_PNC: NDArray[np.float32],
    out_GH: NDArray[np.float32],
) -> None:
    """Write the sum of its cells' rows to each gene; the entries are put in the order of genes first.

    What lies after the last cell's entries (room in `cuda_graph`) is passed over.
    """
    n_genes, last = out_GH.shape[0], indptr_N[-1]
    start_G = np.zeros(n_genes + 1, np.int64)
    for j in range(indptr_N[0], last):
        start_G[np.uint32(gene_M[j]) + 1] += 1
    for k in range(n_genes):
        start_G[k + 1] += start_G[k]
    place_G = start_G[:-1].copy()
    cell_M, ordered_M = np.empty(last, np.int32), np.empty(last, np.float32)
    for n in range(indptr_N.size - 1):
        for j in range(indptr_N[n], indptr_N[n + 1]):
            gene = np.uint32(gene_M[j])
            place = np.uint64(place_G[gene])
            cell_M[place], ordered_M[place] = n, value_M[j]
            place_G[gene] += 1
    for p in range(parts_PNC.shape[0]):
        for k in range(n_genes):
            row_C = out_GH[k, p * COLUMNS : (p + 1) * COLUMNS]
            row_C[:] = 0
            _add_rows(parts_PNC[p], cell_M, ordered_M, (start_G[k], start_G[k + 1]), row_C)  # type: ignore[call-arg]
