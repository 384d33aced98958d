"""Sums of rows on a CPU: the sparse first layer of embedding, whose weights stay as they are, and its gradient.

Axes: N cells, G genes, M non-zero counts, H hidden, P parts of H, C columns of a part.

A cell's hidden values are a sum of weight rows, one per gene that it has: some 50,000 products and 200 kB of weights
for 400 genes and 128 columns, so the time is that of reading weights. They are laid out in parts of `COLUMNS` columns,
of which one (1 MB for 4,000 genes, half of it in bfloat16) stays in the processor's own cache while some cells go by,
and one cell's sum of a part stays in registers from its first gene to its last. Numba keeps an array's values in
memory, hence `_add_rows`. Rows begin where lines of the cache do, since PyTorch's memory does; else each of their
vectors would be read from two lines, in half as much time again.

The gradient of the weights is such a sum for each gene, of the gradients of the cells that have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

COLUMNS = 64
HALF = COLUMNS // 2
LINE = 64
"""Bytes of a line of the cache."""
AHEAD = 8
CELLS_AT_ONCE = 256
"""Cells that go by one part of the weights: they outweigh bringing it into the cache."""
LOGS = np.log1p(np.arange(4096)).astype(np.float32)
"""``log1p`` of counts, but for the largest; a power of two of them."""

LAYER_NORM_EPS = 1e-5
"""PyTorch's."""


class FixedLayer:
    """``relu(layer_norm(log1p(counts) @ weight + bias))``, to be asked for many cells.

    Parameters
    ----------
    weight_GH, bias_H
        On a CPU.
    dtype
        float32, or bfloat16 to hold the weights in half the memory; sums are float32 in both.
    """

    def __init__(self, weight_GH: Tensor, bias_H: Tensor, dtype: torch.dtype) -> None:
        if len(bias_H) != weight_GH.shape[1]:
            raise ValueError(f"a bias of {len(bias_H)} for weights of {weight_GH.shape[1]} columns")
        padded_GH = functional.pad(weight_GH.detach().to(dtype), (0, -weight_GH.shape[1] % COLUMNS))
        parts_PGC = torch.stack(torch.split(padded_GH, COLUMNS, dim=1))
        self.parts_PGC = (_in_words(parts_PGC) if dtype == torch.bfloat16 else parts_PGC).numpy()
        self.n_hidden = len(bias_H)
        self.bias_H = functional.pad(bias_H.detach().float(), (0, -self.n_hidden % COLUMNS))

    def __call__(self, counts: CountsCSR) -> Tensor:
        """Hidden activations [N, H].

        Raises
        ------
        ValueError
            If the counts are over another number of genes: the kernel would read beyond the weights.
        """
        if counts.n_genes != self.parts_PGC.shape[1]:
            raise ValueError(f"counts over {counts.n_genes} genes for weights of {self.parts_PGC.shape[1]}")
        out_NH = self.bias_H.repeat(counts.n_cells, 1)
        inputs = counts.indptr_N, counts.gene_M, counts.count_M
        (indptr_N, gene_M, count_M), out = (tensor.contiguous().numpy() for tensor in inputs), out_NH.numpy()

        def some_cells(first: int, last: int) -> None:
            _sums(indptr_N[first : last + 1], gene_M, count_M, self.parts_PGC, self.n_hidden, out[first:last])

        n_threads = min(torch.get_num_threads(), -(-counts.n_cells // CELLS_AT_ONCE))
        if n_threads <= 1:
            some_cells(0, counts.n_cells)
        else:
            bounds = np.linspace(0, counts.n_cells, n_threads + 1).astype(int)
            with ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(some_cells, bounds[:-1], bounds[1:]))
        return out_NH[:, : self.n_hidden]


def weighted_rows(counts: CountsCSR, value_M: Tensor, weight_GH: Tensor) -> Tensor:
    """Sparse [N, G] x dense [G, H], with values in place of the counts; H is a multiple of `COLUMNS`.

    The weights lie as they are, which change from step to step. As `torch.embedding_bag`, in four fifths of its time on
    one thread.
    """
    if len(weight_GH) != counts.n_genes or weight_GH.shape[1] % COLUMNS:
        raise ValueError(f"weights of shape {tuple(weight_GH.shape)} for counts over {counts.n_genes} genes")
    out_NH = weight_GH.new_empty(counts.n_cells, weight_GH.shape[1])
    _sums_of_rows(*_arrays(counts, value_M, weight_GH), out_NH.numpy())  # type: ignore[call-arg]
    return out_NH


def weight_gradient(counts: CountsCSR, value_M: Tensor, grad_NH: Tensor) -> Tensor:
    """Sparse^T [G, N] x dense [N, H], with values in place of the counts: a gradient of weights, [G, H].

    By gene, since the gradients of a minibatch's cells stay in the cache, where the weights of all genes would not, and
    each gene's sum in registers.
    """
    n_hidden, room = grad_NH.shape[1], -grad_NH.shape[1] % COLUMNS
    padded_NH = functional.pad(grad_NH, (0, room)) if room else grad_NH
    out_GH = grad_NH.new_empty(counts.n_genes, padded_NH.shape[1])
    if len(grad_NH) != counts.n_cells:
        raise ValueError(f"gradients of {len(grad_NH)} cells for counts of {counts.n_cells}")
    _sums_by_gene(*_arrays(counts, value_M, padded_NH), out_GH.numpy())  # type: ignore[call-arg]
    return out_GH[:, :n_hidden]


def _arrays(counts: CountsCSR, value_M: Tensor, rows: Tensor) -> list[Any]:
    """Where the counts' entries are, their values and the rows; the kernels check nothing of it."""
    if value_M.numel() != counts.gene_M.numel():
        raise ValueError(f"{value_M.numel()} values for {counts.gene_M.numel()} counts")
    if value_M.dtype != rows.dtype:
        raise ValueError(f"values of {value_M.dtype} for rows of {rows.dtype}")
    tensors = counts.indptr_N, counts.gene_M, value_M, rows
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _in_words(parts_PGC: Tensor) -> Tensor:
    """Two columns of bfloat16 in each word, [P, G, C / 2]: the halves of a part, the second in the lower bits."""
    bits_PGC = parts_PGC.view(torch.int16).int()
    return (bits_PGC[..., :HALF] << 16) | (bits_PGC[..., HALF:] & 0xFFFF)


@intrinsic
def _add_rows(typing: Any, row_GC: Any, gene_M: Any, value_M: Any, logs: Any, span: Any, out_C: Any) -> Any:
    """``out_C += sum(value_M[j] * row_GC[gene_M[j]])`` over ``span[0] <= j < span[1]``, in registers.

    With ``logs``, ``value_M`` are counts, and their values are looked up there. Rows are float32, or words as of
    `_in_words`. Unlike numba's own indexing it checks nothing and takes no negative gene.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = {
            name: _made_of(context, builder, signature.args[k], args[k]).data
            for k, name in enumerate(("rows", "gene", "value", "logs", "span", "out"))
            if isinstance(signature.args[k], types.Array)
        }
        arrays["stride"] = builder.extract_value(_made_of(context, builder, signature.args[0], args[0]).strides, 0)
        start, stop = (builder.extract_value(args[4], k) for k in (0, 1))
        arrays["last"] = builder.sub(stop, _I64(1))
        places = [builder.gep(builder.bitcast(arrays["out"], _VECTOR.as_pointer()), [_I64(k)]) for k in (0, 1)]
        before, sums = builder.block, [builder.load(place, align=4) for place in places]
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", start, stop), loop, after)
        builder.position_at_end(loop)
        j, inside = builder.phi(_I64), [builder.phi(_VECTOR) for _ in sums]
        added = _plus_row(builder, arrays, inside, j)
        following = builder.add(j, _I64(1))
        builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
        builder.position_at_end(after)
        ends = [builder.phi(_VECTOR) for _ in sums]
        pairs = zip(inside + ends, sums * 2, added * 2, strict=True)
        for phi, first, then in ((j, start, following), *pairs):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        for end, place in zip(ends, places, strict=True):
            builder.store(end, place, align=4)
        return context.get_dummy_value()

    return types.void(row_GC, gene_M, value_M, logs, span, out_C), generate


def _made_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """What an array is made of: where its values are, its strides."""
    return make_array(kind)(context, builder, array)  # type: ignore[no-untyped-call]


_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR, _WORDS = ir.VectorType(ir.FloatType(), HALF), ir.VectorType(_I32, HALF)


def _row(builder: Any, arrays: Mapping[str, Any], gene: Any) -> Any:
    """Where the row of a gene begins."""
    offset = builder.mul(builder.zext(gene, _I64), arrays["stride"])
    return builder.gep(builder.bitcast(arrays["rows"], _I8.as_pointer()), [offset])


def _fetch(builder: Any, arrays: Mapping[str, Any], j: Any) -> None:
    """Ask for the row of an entry that comes `AHEAD` of ``j``: in training the weights are not in the near cache."""
    coming, last = builder.add(j, _I64(AHEAD)), arrays["last"]
    entry = builder.select(builder.icmp_signed("<", coming, last), coming, last)
    row = _row(builder, arrays, builder.load(builder.gep(arrays["gene"], [entry])))
    kind = ir.FunctionType(ir.VoidType(), (_I8.as_pointer(), _I32, _I32, _I32))
    fetch = builder.module.declare_intrinsic("llvm.prefetch", (_I8.as_pointer(),), kind)
    for line in range(0, COLUMNS * 4, LINE):
        builder.call(fetch, [builder.gep(row, [_I64(line)]), _I32(0), _I32(3), _I32(1)])  # to read, to stay, data


def _plus_row(builder: Any, arrays: Mapping[str, Any], sums: Sequence[Any], j: Any) -> list[Any]:
    """The two halves of the sum and of the row of entry ``j``, added."""
    gene, value = (builder.load(builder.gep(arrays[name], [j])) for name in ("gene", "value"))
    if "logs" in arrays:
        value = builder.load(builder.gep(arrays["logs"], [builder.fptosi(value, _I64)]))
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    every = builder.insert_element(nothing, value, _I32(0))
    every = builder.shuffle_vector(every, nothing, ir.Constant(_WORDS, [0] * HALF))
    rows, row = arrays["rows"], _row(builder, arrays, gene)
    if "logs" not in arrays:
        _fetch(builder, arrays, j)
    if rows.type.pointee == ir.FloatType():
        place = builder.bitcast(row, _VECTOR.as_pointer())
        halves = [builder.load(builder.gep(place, [_I64(k)]), align=4) for k in (0, 1)]
    else:
        words = builder.load(builder.bitcast(row, _WORDS.as_pointer()), align=4)
        upper = builder.and_(words, ir.Constant(_WORDS, [-0x10000] * HALF))
        lower = builder.shl(words, ir.Constant(_WORDS, [16] * HALF))
        halves = [builder.bitcast(bits, _VECTOR) for bits in (upper, lower)]
    fused = ("contract",)
    return [
        builder.fadd(total, builder.fmul(every, half, flags=fused), flags=fused)
        for total, half in zip(sums, halves, strict=True)
    ]


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(
    indptr_N: NDArray[np.int64],
    gene_M: NDArray[np.int32],
    count_M: NDArray[np.float32],
    parts_PGC: Any,
    n_hidden: int,
    out_NH: NDArray[np.float32],
) -> None:
    """Add the sums of their weight rows to some cells, and activate them."""
    n_cells = out_NH.shape[0]
    for first in range(0, n_cells, CELLS_AT_ONCE):
        last = min(first + CELLS_AT_ONCE, n_cells)
        start, stop = indptr_N[first], indptr_N[last]
        are_in_table = _are_in_table(count_M[start:stop])
        value_M = np.empty(0, np.float32) if are_in_table else _logs(count_M[start:stop])
        for p in range(parts_PGC.shape[0]):
            for n in range(first, last):
                row_C = out_NH[n, p * COLUMNS : (p + 1) * COLUMNS]
                if are_in_table:
                    _add_rows(parts_PGC[p], gene_M, count_M, LOGS, (indptr_N[n], indptr_N[n + 1]), row_C)  # type: ignore[call-arg]
                else:
                    span = (indptr_N[n] - start, indptr_N[n + 1] - start)
                    _add_rows(parts_PGC[p], gene_M[start:stop], value_M, None, span, row_C)  # type: ignore[call-arg]
        for n in range(first, last):
            _activate(out_NH[n, :n_hidden])


@njit(nogil=True, error_model="numpy")
def _logs(count_M: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values of any counts, rounded as those in `LOGS` are, so that no cell's depends on its company."""
    value_M = np.empty(count_M.size, np.float32)
    for j in range(count_M.size):
        value_M[j] = math.log1p(np.float64(count_M[j]))
    return value_M


@njit(nogil=True, error_model="numpy")
def _are_in_table(count_M: NDArray[np.float32]) -> bool:
    """Whether `LOGS` has the values of all of them."""
    others = np.int32(0)  # in 32 bits throughout, else it makes no vector instructions
    for j in range(count_M.size):
        number = np.int32(count_M[j])  # whatever it is of what does not fit
        others |= (number & np.int32(-LOGS.size)) | np.int32(np.float32(number) != count_M[j])
    return bool(others == 0)


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _activate(row_H: NDArray[np.float32]) -> None:
    """Layer norm and rectifier, as PyTorch's, while the row is at hand."""
    total, squares, n = np.float32(0), np.float32(0), np.float32(row_H.size)
    for h in range(row_H.size):
        total += row_H[h]
    mean = total / n
    for h in range(row_H.size):
        squares += (row_H[h] - mean) ** 2
    scale = np.float32(1) / np.sqrt(squares / n + np.float32(LAYER_NORM_EPS))
    for h in range(row_H.size):
        normed = (row_H[h] - mean) * scale
        row_H[h] = np.float32(0) if normed < 0 else normed  # what is no number stays none


@njit(nogil=True, cache=True, error_model="numpy")
def _sums_of_rows(
    indptr_N: NDArray[np.int64],
    gene_M: NDArray[np.int32],
    value_M: NDArray[np.float32],
    weight_GH: NDArray[np.float32],
    out_NH: NDArray[np.float32],
) -> None:
    """Write the sum of its genes' rows to each cell, or of its cells' rows to each gene."""
    for n in range(out_NH.shape[0]):
        for first in range(0, out_NH.shape[1], COLUMNS):
            row_C, columns = out_NH[n, first : first + COLUMNS], weight_GH[:, first : first + COLUMNS]
            row_C[:] = 0
            _add_rows(columns, gene_M, value_M, None, (indptr_N[n], indptr_N[n + 1]), row_C)  # type: ignore[call-arg]


@njit(nogil=True, cache=True, error_model="numpy")
def _sums_by_gene(
    indptr_N: NDArray[np.int64],
    gene_M: NDArray[np.int32],
    value_M: NDArray[np.float32],
    grad_NH: NDArray[np.float32],
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
    _sums_of_rows(start_G, cell_M, ordered_M, grad_NH, out_GH)
