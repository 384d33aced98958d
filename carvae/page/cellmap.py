"""Section 4: the cells in two dimensions, to look at and to choose from.

The values travel as bytes in the page: places and most numbers in 16 bits, categories as codes, genes in 8 bits, so
that 50,000 cells take a few MB. Axes: M cells shown.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from carvae.data.markers import log_cp10k
from carvae.data.palette import GREY
from carvae.page.blocks import Block, Map, Section, Text
from carvae.page.facts import Facts
from carvae.page.layout import KEEP, PCA
from carvae.page.picture import picture
from carvae.plots.cells import plot_umap
from carvae.plots.look import NO_LABEL, styles

WIDE, NARROW = 65534, 254
"""Steps of numbers in 16 and in 8 bits; the next is "no value"."""
NO_INTEGER = -(1 << 31)
NO_CODE = 65535
"""No category."""
PLACE = 65535
MOST_CATEGORIES = 400
"""Categories above which a column is no help as colours."""
TOP = 0.999
GENES = "genes (log1p CP10k)"
OF_MODEL = {
    "carvae_confidence": "confidence",
    "carvae_novelty": "novelty",
    "carvae_car_probability": "CAR probability",
    "carvae_pseudotime": "pseudotime",
}
CONTRACT = ("sample", "study", "patient", "timepoint", "timepoint_days", "tissue", "product", "response")


@dataclass(frozen=True, slots=True)
class Column:
    """One way to colour the map."""

    name: str
    group: str
    spec: dict[str, Any]
    values: bytes


def section(facts: Facts) -> Section:
    """The interactive map, and the same by state for print."""
    layout = facts.layout
    blocks: list[Block] = [Text(_what(facts))]
    if layout.is_sampled:
        blocks.append(
            Text(
                f"Of {layout.n_cells:,} cells {len(layout.shown_M):,} are shown: the same share of every state in "
                "every "
                f"sample, but {KEEP} of each where there are so many, drawn with seed {facts.seed}. Everything else in "
                "this report is said of all cells."
            )
        )
    blocks += [_map(facts), _still(facts)]
    return Section("map", "Map of the cells", tuple(blocks))


def _what(facts: Facts) -> str:
    text = (
        "Each dot is a cell; cells that lie close together are alike to the model. Distances between far groups mean "
        "little in UMAP, and its islands no kinds: judge by states, confidence and genes."
    )
    if facts.bundle is not None and facts.layout.training_PC is not None:
        return text + (
            " A model holds no cells of those that it was trained on, so none can lie beneath these. It does hold "
            "the mean "
            f"of each of its {len(facts.layout.training_PC)} training samples: large grey dots, drawn in the layout of "
            "principal components, which is the only one in which they have a true place."
        )
    return text + (
        " A model holds no cells of those that it was trained on, so none can lie beneath these; how far each sample "
        "is "
        "from the training samples is said under quality."
    )


def _still(facts: Facts) -> Block:
    layout, cells = facts.layout, facts.cells

    def draw() -> Axes:
        ax = plot_umap(layout.places[layout.first], cells.state.iloc[layout.shown_M], "", cells.order)
        ax.set(xlabel=f"{layout.first} 1", ylabel=f"{layout.first} 2")
        return ax

    shows = f"{len(layout.shown_M):,} cells by the state that they are called, with the number of cells of each."
    return picture("map", "The cells by state", shows, draw, instead=True)


def _map(facts: Facts) -> Map:
    layout, parts = facts.layout, []
    header: dict[str, Any] = {"n": len(layout.shown_M), "layouts": [], "columns": []}
    offset = 0

    def put(values: bytes) -> int:
        nonlocal offset
        parts.append(values)
        start, offset = offset, offset + len(values) + (-len(values)) % 4
        parts.append(b"\0" * ((-len(values)) % 4))
        return start

    for name, place_MP in layout.places.items():
        training = layout.training_PC if name == PCA and layout.training_PC is not None else np.zeros((0, 2))
        packed, packed_training = _packed(place_MP, training)
        entry = {"name": name, "offset": put(packed), "training": put(packed_training), "nTraining": len(training)}
        header["layouts"].append(entry)
    columns = list(_columns(facts))
    for column in columns:
        header["columns"].append(
            {"name": column.name, "group": column.group, **column.spec, "offset": put(column.values)}
        )
    names = "\n".join(map(str, facts.cells.obs.index[layout.shown_M])).encode()
    header["barcodes"] = {"offset": put(names), "length": len(names)}
    return Map(
        header=json.dumps(header, allow_nan=False),
        values=base64.b64encode(gzip.compress(b"".join(parts), mtime=0)).decode(),
        layouts=tuple(layout.places),
        columns=tuple(column.name for column in columns),
    )


def _packed(place_MP: NDArray[np.floating[Any]], training: NDArray[np.floating[Any]]) -> tuple[bytes, bytes]:
    """Places on one scale for both directions, so that the layout keeps its shape: x of all, then y of all."""
    both = np.concatenate([place_MP, training])
    low, high = both.min(0), both.max(0)
    span = max(float((high - low).max()), 1e-9)
    unit = (both - (low + high) / 2) / span + 0.5
    code = np.round(unit * PLACE).astype("<u2")
    return code[: len(place_MP)].T.tobytes(), code[len(place_MP) :].T.tobytes()


def _columns(facts: Facts) -> Iterator[Column]:
    """What the map can be coloured by, the state first."""
    cells, shown = facts.cells, facts.layout.shown_M
    obs = cells.obs.iloc[shown]
    yield _category("state", "carvae", cells.state.iloc[shown], cells.order, facts.colours)
    for name, word in OF_MODEL.items():
        if name in obs and obs[name].notna().any():
            yield _number(word, "carvae", obs[name])
    for axis in [axis for axis in cells.axes if axis != cells.main]:
        yield _category(axis, "carvae", obs[f"carvae_{axis}"], [*cells.axes[axis], "unknown"])
    yield from _of_samples(facts)
    if "clone_size" in obs and obs["clone_size"].notna().any():
        yield _integer("clone size", "clones", obs["clone_size"])
    yield _integer("counts", "quality", obs["carvae_n_counts"])
    if facts.expression is not None and facts.expression.mito_N is not None:
        yield _number("mitochondrial share", "quality", pd.Series(facts.expression.mito_N[shown]))
    for signature in cells.scores:
        yield _number(str(signature).replace("_", " "), "signatures", cells.scores[signature].iloc[shown])
    if facts.expression is not None:
        value = log_cp10k(facts.expression.counts[shown], facts.expression.total_N[shown]).tocsc()
        for e, gene in enumerate(facts.expression.genes):
            if facts.expression.measured_E[e]:
                yield _gene(gene, value[:, e].toarray().ravel())


def _of_samples(facts: Facts) -> Iterator[Column]:
    """Columns of the contract, and the author's labels."""
    cells, shown = facts.cells, facts.layout.shown_M
    for name in CONTRACT:
        column = cells.known(name)
        if column is not None and column.nunique() <= MOST_CATEGORIES:
            values = column.iloc[shown]
            yield _category(name.replace("_", " "), "of the sample", values, _sorted(values))
    author = cells.author(facts.config.label)
    if author is not None and cells.obs[author].nunique() <= MOST_CATEGORIES:
        values = cells.obs[author].iloc[shown]
        yield _category(f"author's label ({author})", "of the sample", values, _sorted(values))


def _sorted(values: pd.Series[Any]) -> list[str]:
    """Categories in their own order, else numbers by size and words by letter."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        there = set(values.dropna().astype(str))
        return [str(c) for c in values.cat.categories if str(c) in there]
    known = values.dropna().unique().tolist()
    return list(
        map(_text, sorted(known) if all(isinstance(v, (int, float)) for v in known) else sorted(known, key=str))
    )


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _category(
    name: str, group: str, values: pd.Series[Any], order: list[str], colours: dict[str, str] | None = None
) -> Column:
    text = [None if value is None or value != value else _text(value) for value in values.astype(object)]  # noqa: PLR0124
    place = {category: i for i, category in enumerate(order)}
    code = np.array([NO_CODE if t is None else place.setdefault(t, len(place)) for t in text], "<u2")
    look = colours or {category: style.colour for category, style in styles(list(place)).items()}
    shade = [GREY if category in NO_LABEL else look.get(category, GREY) for category in place]
    return Column(name, group, {"kind": "category", "categories": list(place), "colours": shade}, code.tobytes())


def _number(name: str, group: str, values: pd.Series[Any]) -> Column:
    """In 65,534 steps between the least and the greatest value; missing where there is none."""
    value = np.asarray(values, np.float64)
    code, low, high = _steps(value, WIDE)
    return Column(name, group, _spec(16, value, low, high), code.astype("<u2").tobytes())


def _gene(name: str, value: NDArray[np.float64]) -> Column:
    """In 254 steps from 0 to the greatest value: for colours."""
    high = max(float(value.max()), 1e-6)
    code = np.round(value / high * NARROW).astype(np.uint8)
    return Column(name, GENES, _spec(8, value, 0.0, high), code.tobytes())


def _integer(name: str, group: str, values: pd.Series[Any]) -> Column:
    """As it is; coloured by the logarithm of 1 + the value."""
    value = np.asarray(values, np.float64)
    code = np.where(np.isfinite(value), value, NO_INTEGER).astype("<i4")
    return Column(name, group, _spec(32, np.log10(1 + value), 0.0, 1.0), code.tobytes())


def _steps(value: NDArray[np.float64], most: int) -> tuple[NDArray[np.float64], float, float]:
    known = np.isfinite(value)
    low, high = (float(value[known].min()), float(value[known].max())) if known.any() else (0.0, 1.0)
    high = high if high > low else low + 1.0
    code = np.full(len(value), most + 1.0)
    code[known] = np.round((value[known] - low) / (high - low) * most)
    return code, low, high


def _spec(bits: int, shown: NDArray[np.float64], low: float, high: float) -> dict[str, Any]:
    """How the values are packed, and between what the colours run: without the highest of a thousand."""
    known = shown[np.isfinite(shown)]
    first, last = (float(known.min()), float(np.quantile(known, TOP))) if known.size else (0.0, 1.0)
    last = last if last > first else float(known.max(initial=first))
    ends = {"first": first, "last": last if last > first else first + 1.0}
    return {"kind": "number", "bits": bits, "low": low, "high": high, **ends, "none": bool(known.size < shown.size)}
