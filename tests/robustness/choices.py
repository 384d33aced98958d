"""Bytes as a list of choices: what a fuzzer changes, and what an input of it is made from, the same way each time."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import h5py
import numpy as np

T = TypeVar("T")

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e309, float("nan"), "", "0", "state",
    "x" * 2_000, "../x", "/etc/hostname", "\0", "\ud800", "é\n", [], {}, [[]], [None], {"": {}}, ["a", "a"],
    {"name": "a", "nodes": []}, "<i8", "|O", "object", "NaN",
)  # fmt: skip


class Choices:
    """Choices read from bytes from the front; the first of everything once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def more(self) -> bool:
        """Whether any byte is left."""
        return self._at < len(self._data)

    def number(self, n_bytes: int = 1) -> int:
        """A number of so many bytes."""
        taken = self._data[self._at : self._at + n_bytes]
        self._at += n_bytes
        return int.from_bytes(taken, "little")

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.number(1 if len(options) <= 256 else 2) % len(options)]

    def rest(self) -> bytes:
        """All bytes that are left."""
        taken, self._at = self._data[self._at :], len(self._data)
        return taken


def edited_bytes(content: bytes, choices: Choices) -> bytes:
    """The content with as many changes as the choices last for."""
    data = bytearray(content)
    while choices.more:
        kind, at = choices.number() % 7, choices.number(3) % (len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << choices.number() % 8
        elif kind == 1:
            del data[at : at + choices.pick((1, 2, 8, 64, 4096))]
        elif kind == 2:
            data[at : at + 1] = bytes([choices.number()])
        elif kind == 3:
            data[at : at + 4] = choices.number(4).to_bytes(4, "little")
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[choices.number(3) % (len(data) + 1) :][: choices.pick((1, 16, 256))]
        else:
            data[at : at + 8] = choices.pick((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"NaN", b'"', b"{", b"]"))
    return bytes(data)


MOST_COPIED = 10**7
"""Characters that edits of a tree copy within it, at most."""


def edited_tree(spec: Any, choices: Choices) -> Any:
    """JSON-like values with some replaced, removed, copied, renamed or added."""
    whole = {"": copy.deepcopy(spec)}
    copied = 0
    while choices.more and copied < MOST_COPIED:
        holder, key = _walk(whole, choices)
        kind = choices.number() % 7
        value = holder[key]
        if kind == 0:
            holder[key] = copy.deepcopy(choices.pick(ODD_VALUES))
        elif kind == 1:
            del holder[key]
            whole.setdefault("", {})
        elif kind == 2:
            holder[key] = _nudged(value, choices)
        elif kind == 3:
            other, name = _walk(whole, choices)
            copied += len(repr(other[name]))  # copies of copies would take all memory
            holder[key] = copy.deepcopy(other[name])
        elif kind == 4 and isinstance(holder, dict) and holder is not whole:
            holder[str(choices.pick(ODD_VALUES))] = holder.pop(key)
        elif kind == 5 and isinstance(value, list):
            value.append(copy.deepcopy(choices.pick(value) if value else None))
            copied += len(repr(value[-1]))
        elif isinstance(value, dict):
            value[str(choices.pick(ODD_VALUES))] = copy.deepcopy(choices.pick(ODD_VALUES))
    return whole[""]


def _walk(whole: dict[str, Any], choices: Choices) -> tuple[Any, Any]:
    """A place in the tree: the container and the key in it."""
    holder: Any = whole
    key: Any = ""
    for _ in range(8):
        inside = holder[key]
        if not isinstance(inside, dict | list) or not inside or choices.number() % 8 == 0:
            break
        holder, key = inside, choices.pick(list(inside) if isinstance(inside, dict) else range(len(inside)))
    return holder, key


LONGEST = 10_000
"""Characters of a text, or items of a list, that an edit starts from."""


def _nudged(value: Any, choices: Choices) -> Any:
    if isinstance(value, bool | int | float):
        return choices.pick((value + 1, value - 1, -value, value * 2, value * 10**6, str(value), [value]))
    if isinstance(value, str):
        value = value[:LONGEST]  # doubled again and again it would take the memory that the reader is watched for
        code = value.encode(errors="replace").hex()
        return choices.pick((value + "x", value[:-1], value.upper(), value + "\0", code, [value]))
    if isinstance(value, list):
        value = value[:LONGEST]
        return choices.pick((value[:-1], value[1:], value[::-1], value * 2, dict.fromkeys(map(str, value)), [value]))
    return choices.pick((json.dumps(value), [value], {"a": value}))


def odd_arrays() -> list[Any]:
    """What a data set may hold instead of what it should."""
    return [
        np.int64(-1), np.float64(np.nan), np.zeros(0, np.int32), np.zeros(1, np.int8), np.arange(20), np.arange(30),
        np.arange(21) * 7, np.full(20, -1), np.full(600, 2**62), np.zeros((20, 30), np.float64), np.eye(30)[:20],
        np.full((20, 30), np.inf), np.full((20, 30), np.nan, np.float32), np.full((20, 30), 2**31, np.uint32),
        np.zeros((30, 20)), np.zeros((2, 2, 2)), np.ones((20, 30), bool), np.ones((20, 30), np.complex64),
        np.ones((20, 30), np.float16), np.array([b"a"] * 20), np.array([b"\xff\xfe"] * 30), np.array([b""] * 20),
        np.array([f"GENE{g}" for g in range(30)], object), np.array(["é\0" * 50] * 20, object),
        np.zeros(20, np.dtype([("index", "S4"), ("n", "<f8")])), np.zeros(20, "V7"), np.zeros((20, 0)),
        h5py.Empty("f"), h5py.Empty("S"), np.array(20), np.array([20, 30]), np.array([30, 20]), np.array([2**40, 30]),
        np.array([-20, 30]), b"csr_matrix", "csc_matrix", "dataframe", "categorical", "array", "0.0.0", "9.9.9", "",
        np.zeros(20, h5py.enum_dtype({"a": 0, "b": 1})), "awkward-array", "null", "string-array", "rec-array", "dict",
        "nullable-integer", "nullable-string-array",
    ]  # fmt: skip


def edited_hdf5(image: bytes, choices: Choices) -> bytes:
    """An HDF5 file with some of its groups, data sets, links and attributes changed; the old one where HDF5 refuses."""
    arrays = odd_arrays()
    with h5py.File.in_memory(image) as file:
        while choices.more:
            names: list[str] = ["/"]
            file.visit(names.append)
            name, kind = choices.pick(names), choices.number() % 10
            try:
                _edit_hdf5(file, (name, choices.pick(names)), kind, arrays, choices)
            except (ValueError, KeyError, TypeError, RuntimeError, OSError, IndexError, AttributeError, OverflowError):
                continue  # HDF5 allows no such thing, as of moving a group into itself
        file.flush()
        return bytes(file.id.get_file_image())


MOST_VALUES = 10**6
ATTRIBUTES = ("encoding-type", "encoding-version", "shape", "_index", "column-order", "ordered", "odd")


def _edit_hdf5(file: Any, names: tuple[str, str], kind: int, arrays: list[Any], choices: Choices) -> None:
    """What a place holds is another, or it is a link, or has moved."""
    name, other = names
    if kind > 5:
        _edit_values(file, name, kind, arrays, choices)
    elif kind == 5:
        file.move(name, other + "/" + choices.pick(("X", "raw", "layers", "obs", "var", "odd", "matrix")))
    elif kind == 4:
        file[name + "/" + choices.pick(("X", "counts", "raw", "layers", "obs", "odd", "data"))] = choices.pick(arrays)
    elif kind == 3:
        file[name].attrs[choices.pick(ATTRIBUTES)] = choices.pick(arrays)
    elif name != "/":
        node = file[name]
        del file[name]
        outside = h5py.ExternalLink("/etc/hostname", "/")
        if kind == 2:
            file[name] = choices.pick((h5py.SoftLink("/" + other), h5py.SoftLink("/none"), outside, node))
        elif kind == 1:
            file[name] = choices.pick(arrays)


def _edit_values(file: Any, name: str, kind: int, arrays: list[Any], choices: Choices) -> None:
    """Some values of a data set are others, or it has another size, or an attribute is gone."""
    node = file[name]
    if kind == 6:
        del node.attrs[choices.pick(ATTRIBUTES)]
    elif kind == 7:
        at = choices.number(2) % max(node.shape[0], 1)
        node[at] = choices.pick((-1, 0, 1, 29, 30, 2**31, 0.5, np.nan, np.inf, b"", "x"))
    elif kind == 8:
        if node.size > MOST_VALUES:
            raise ValueError("an earlier edit made it too large to be read here")
        values = np.asarray(node)
        del file[name]
        file[name] = choices.pick((values[:-1], values[1:], values[:0], np.append(values, values), values[None]))
    else:
        shape = choices.pick(((10**6, 10**6), (20, 10**9), (2**40,), (20, 30), (601,)))
        del file[name]
        file.create_dataset(name, shape, choices.pick(("f4", "i8", "S1", "u1")), chunks=True, compression="gzip")
