"""Values of a column of ``obs`` as text: 3 and 3.0 are the same, spaces around a name are no part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.errors import SchemaError


@dataclass(frozen=True, slots=True)
class Texts:
    """A column as text."""

    code_N: NDArray[np.intp]
    """Label of each cell, -1 where it is missing."""
    labels: list[str]
    merged: list[str]
    """Labels that were written in several ways, with other spaces around them."""


def texts(values: pd.Series[Any], missing: frozenset[str]) -> Texts:
    """The values as text, without those that ``missing`` holds (in lower case).

    Raises
    ------
    SchemaError
        A value is a list or the like.
    """
    try:
        raw, uniques = pd.factorize(values.astype(object), use_na_sentinel=True)
    except TypeError:
        raise SchemaError(f"obs[{values.name!r}] holds no plain values; keep one text or number per cell") from None
    written = [_as_text(value) for value in uniques]
    stripped = [text.strip() for text in written]
    labels = list(dict.fromkeys(text for text in stripped if text.casefold() not in missing))
    position = {label: code for code, label in enumerate(labels)}
    lookup = np.array([*(position.get(text, -1) for text in stripped), -1], dtype=np.intp)
    ways: dict[str, set[str]] = {}
    for text, label in zip(written, stripped, strict=True):
        ways.setdefault(label, set()).add(text)
    return Texts(lookup[raw], labels, [label for label in labels if len(ways[label]) > 1])


def _as_text(value: object) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
