"""Figures of a run and the page that shows them.

Each ``plot_*`` draws into the Axes that it is given, or into a new figure of its own, and returns the Axes. Nothing
touches pyplot, so no window, backend or global state is involved. Colours stay apart for colour-blind readers; give
``order`` (or ``labels``) the same list everywhere and a state has one colour in every figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from carvae.data.atomic import replacing_file
from carvae.errors import ReadError

WIDTH_PX = 1200
WIDTH_INCHES = 8.0

# Okabe & Ito 2008 (jfly.uni-koeln.de/color), with a softer black.
EIGHT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#333333")
# M. Krzywinski's 12 colours for deuteranopia, protanopia and tritanopia (mk.bcgsc.ca/colorblind).
TWELVE_COLOURS = (
    "#9F0162", "#009F81", "#FF5AAF", "#00FCCF", "#8400CD", "#008DF9",
    "#00C2F9", "#FFB2FD", "#A40122", "#E20134", "#FF6E3A", "#FFC33B",
)  # fmt: skip
NO_LABEL = ("unknown", "Unlabelled", "unlabelled", "missing", "other studies")
GREY = "#B5B5B5"
MARKERS = ("o", "^", "s", "D")
HATCHES = ("", "///", "...", "xxx")
LEGEND_ROWS = 28
FEW_ROWS = 16
LABEL_WIDTH = 24
TITLE_WIDTH = 60
FEW_POINTS = 60
DARK = 0.55


@dataclass(frozen=True, slots=True)
class Style:
    """How one category looks: colours first, then shapes and hatches where colours run out."""

    colour: str
    marker: str = "o"
    hatch: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture of the page."""

    file: str
    """Name of the PNG, relative to the page."""
    title: str
    shows: str
    """What the reader sees in it, in a sentence or two."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page; index and columns are shown."""

    title: str
    frame: pd.DataFrame
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Number:
    """A figure at the top of the page, with what it means."""

    value: str
    name: str
    meaning: str = ""


def styles(categories: Sequence[str]) -> dict[str, Style]:
    """Return one style per category, in order; categories that mean "no label" are grey and take no colour."""
    named = [c for c in dict.fromkeys(categories) if c not in NO_LABEL]
    colours = EIGHT_COLOURS if len(named) <= len(EIGHT_COLOURS) else TWELVE_COLOURS
    chosen = {}
    for i, category in enumerate(named):
        turn = (i // len(colours)) % len(MARKERS)
        chosen[category] = Style(colours[i % len(colours)], MARKERS[turn], HATCHES[turn])
    return {c: chosen.get(c, Style(GREY)) for c in dict.fromkeys(categories)}


def plot_umap(
    coordinates: NDArray[np.floating[Any]],
    categories: Sequence[str] | pd.Series,
    title: str,
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw cells in two dimensions, coloured by category, with the number of cells of each in the legend.

    Parameters
    ----------
    coordinates
        [n_cells, 2].
    categories
        One per cell; a missing value counts as ``unlabelled``.
    title
        Heading of the Axes.
    order
        Categories in the order of legend and colours; by default sorted.
    ax
        Axes to draw into; a new figure by default.
    """
    ax = ax or _new_axes(height=5.6)
    category = pd.Series(categories).astype(object).fillna("unlabelled").astype(str).to_numpy()
    shown = _ordered(category, order)
    style = styles(shown)
    point = float(np.clip(6e4 / max(len(category), 1), 2.0, 22.0))
    # Unlabelled cells below the others; those in random order, so that no category hides another by its name.
    above = np.array([style[c].colour != GREY for c in category])
    shuffled = np.argsort(above + np.random.default_rng(0).random(len(category)))
    colour = np.array([style[c].colour for c in category], dtype=object)
    marker = np.array([style[c].marker for c in category], dtype=object)
    for shape in dict.fromkeys(marker.tolist()):
        cells = shuffled[marker[shuffled] == shape]
        x, y = coordinates[cells, 0], coordinates[cells, 1]
        ax.scatter(x, y, s=point, c=list(colour[cells]), marker=shape, linewidths=0, alpha=0.85, rasterized=True)
    handles = [
        Line2D([], [], linestyle="", marker=style[c].marker, color=style[c].colour, markersize=7, label=_name(c, n))
        for c, n in ((c, int((category == c).sum())) for c in shown)
    ]
    _legend_beside(ax, handles)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    return _finish(ax, title)


def plot_confusion(
    truth: Sequence[str] | pd.Series,
    predicted: Sequence[str] | pd.Series,
    labels: Sequence[str] | None = None,
    title: str = "Predicted against true state",
    ax: Axes | None = None,
) -> Axes:
    """Draw the confusion matrix: the share of each true label's cells in every prediction, and the cell counts.

    ``labels`` orders rows and columns; labels outside it (such as ``unknown``) follow where they occur.
    Every row with cells sums to 100%.
    """
    true, called = pd.Series(truth).astype(str).to_numpy(), pd.Series(predicted).astype(str).to_numpy()
    listed = list(labels) if labels is not None else sorted({*true, *called} - set(NO_LABEL))
    rows, columns = (listed + sorted(set(found) - set(listed)) for found in (true, called))
    counts = pd.crosstab(pd.Categorical(true, rows), pd.Categorical(called, columns), dropna=False).to_numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax = ax or _new_axes(height=float(np.clip(1.9 + 0.55 * len(rows), 4.0, 12.0)))
    cells = zip(share.flat, counts.flat, strict=True)
    texts = np.array([f"{part:.0%}\n{n:,}" if n else "" for part, n in cells]).reshape(counts.shape)
    names = [_name(row, int(n)) for row, n in zip(rows, counts.sum(axis=1), strict=True)]
    _heat_map(ax, share, texts, (names, columns), "Share of the true label's cells", (0.0, 1.0))
    ax.set(xlabel="Predicted", ylabel="True (cells)")
    return _finish(ax, title)


def plot_composition(
    table: pd.DataFrame,
    title: str = "States per sample",
    order: Sequence[str] | None = None,
    n_cells: pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one stacked bar per sample: the share of its cells in every state.

    Parameters
    ----------
    table
        Samples x states, as cell counts or shares; each row is scaled to 100%.
    title
        Heading of the Axes.
    order
        States in the order of bars, legend and colours; by default the table's columns.
    n_cells
        Cells per sample (index as in ``table``), written beside the sample's name.
    ax
        Axes to draw into; a new figure by default.
    """
    shown = [str(c) for c in table.columns] if order is None else _ordered(np.array(table.columns, dtype=str), order)
    values = table.set_axis(table.columns.astype(str), axis=1).reindex(columns=shown, fill_value=0.0).to_numpy(float)
    total = values.sum(axis=1, keepdims=True)
    share = values / np.where(total > 0, total, 1.0)
    ax = ax or _new_axes(height=float(np.clip(1.6 + 0.3 * len(table), 3.2, 40.0)))
    position, left = np.arange(len(table)), np.zeros(len(table))
    for (state, style), width in zip(styles(shown).items(), share.T, strict=True):
        look: dict[str, Any] = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.6}
        ax.barh(position, width, left=left, height=0.8, label=_wrapped(state), **look)
        left += width
    names = [str(s) if n_cells is None else f"{s} ({int(n_cells.loc[s]):,})" for s in table.index]
    ax.set_yticks(position, [_wrapped(name, 34) for name in names])
    ax.set(xlim=(0, 1), ylim=(len(table) - 0.4, -0.6), xlabel="Share of cells")
    ax.set_ylabel("Sample" if n_cells is None else "Sample (cells)")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    _legend_beside(ax, ax.containers)
    return _finish(ax, title)


def plot_loss(history: pd.DataFrame, title: str = "Training", ax: Axes | None = None) -> Axes:
    """Draw training and validation loss over epochs (or steps), and macro-F1 on an axis of its own where present.

    ``history`` has ``epoch`` or ``step``, ``train_loss`` and ``validation_loss``, and may have ``macro_f1``; gaps
    (NaN) are bridged, as loggers write one row per event.
    """
    ax = ax or _new_axes(height=4.4)
    time = "epoch" if "epoch" in history else "step"
    lines = _line(ax, history, time, "train_loss", ("training loss", EIGHT_COLOURS[0], "-"))
    lines += _line(ax, history, time, "validation_loss", ("held-out loss", EIGHT_COLOURS[5], "--"))
    ax.set(xlabel=time.capitalize(), ylabel="Loss (nats per cell)")
    if "macro_f1" in history and history["macro_f1"].notna().any():
        right = ax.twinx()
        lines += _line(right, history, time, "macro_f1", ("held-out macro-F1", EIGHT_COLOURS[2], ":"))
        right.set(ylim=(0, 1.02), ylabel="Macro-F1")
        right.spines["top"].set_visible(False)
    if time == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return _finish(ax, title, pad=30)


def plot_signatures_by_state(
    scores: pd.DataFrame,
    states: Sequence[str] | pd.Series,
    title: str = "Mean signature score per predicted state",
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean score of every signature in every state; colour compares states within one signature.

    Parameters
    ----------
    scores
        Cells x signatures; a signature without any score is left out.
    states
        State of each cell.
    title
        Heading of the Axes.
    order
        States from top to bottom; by default sorted. States without cells are left out.
    ax
        Axes to draw into; a new figure by default.
    """
    state = pd.Series(states).astype(str).to_numpy()
    shown = [s for s in _ordered(state, order) if (state == s).any()]
    scores = scores.dropna(axis="columns", how="all")
    means = scores.groupby(state).mean().loc[shown].to_numpy()
    relative = (means - means.mean(axis=0)) / np.where(means.std(axis=0) > 0, means.std(axis=0), 1.0)
    ax = ax or _new_axes(height=float(np.clip(2.2 + 0.42 * len(shown), 3.6, 14.0)))
    names = [_name(s, int((state == s).sum())) for s in shown]
    texts = np.array([[f"{value:.2f}" for value in row] for row in means])
    bound = max(float(np.nanmax(np.abs(relative), initial=0.0)), 1e-6)
    columns = [str(c) for c in scores.columns]
    _heat_map(ax, relative, texts, (names, columns), "Below or above the mean of states (s.d.)", (-bound, bound))
    ax.set(ylabel="Predicted state (cells)")
    return _finish(ax, title)


def save(ax: Axes, path: Path) -> Path:
    """Write the Axes' figure as a PNG that is 1,200 pixels wide and return its path."""
    canvas = _canvas(ax)
    with replacing_file(path) as scratch:
        # No software version in the file: the same figure gives the same bytes.
        canvas.savefig(scratch, dpi=WIDTH_PX / canvas.get_figwidth(), facecolor="white", metadata={"Software": None})
    return path


def write_index(
    folder: Path,
    title: str,
    figures: Sequence[Figure],
    tables: Sequence[Table] = (),
    numbers: Sequence[Number] = (),
    introduction: str = "",
) -> Path:
    """Write ``folder/index.html`` with numbers, figures and tables, and return its path.

    The page needs no network and no other file than the PNGs beside it, follows the reader's light or dark setting,
    and reads well without styles. Every value is escaped.

    Raises
    ------
    ReadError
        A figure's file is not in ``folder``.
    """
    missing = [figure.file for figure in figures if not (folder / figure.file).is_file()]
    if missing:
        raise ReadError(f"{folder} lacks {', '.join(missing)}; save the figures there before writing the page")
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["link"] = lambda file: quote(Path(file).as_posix())
    environment.filters["cell"] = _cell
    page = environment.get_template("demo.html").render(
        title=title, introduction=introduction, figures=figures, tables=tables, numbers=numbers
    )
    with replacing_file(folder / "index.html") as scratch:
        scratch.write_text(page, encoding="utf-8")
    return folder / "index.html"


def _new_axes(height: float) -> Axes:
    # Constrained layout makes room for legends and long labels, so that nothing is clipped.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Canvas(figsize=(WIDTH_INCHES, height), layout=layout).add_subplot()


def _canvas(ax: Axes) -> Canvas:
    canvas = ax.get_figure(root=True)
    assert canvas is not None, "these Axes were removed from their figure"
    return canvas


def _finish(ax: Axes, title: str, pad: float = 8) -> Axes:
    ax.set_title(textwrap.fill(title, TITLE_WIDTH), loc="left", fontsize=11, fontweight="bold", pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _ordered(found: NDArray[Any], order: Sequence[str] | None) -> list[str]:
    """The categories of ``order`` in its order, then those found beyond it; "no label" comes last."""
    present = sorted(set(found.tolist()))
    return sorted(dict.fromkeys([*(order or ()), *present]), key=lambda category: category in NO_LABEL)


def _wrapped(name: str, width: int = LABEL_WIDTH) -> str:
    return textwrap.fill(name, width, max_lines=3, placeholder=" …", break_on_hyphens=False)


def _name(category: str, n_cells: int) -> str:
    return _wrapped(f"{category} ({n_cells:,})", LABEL_WIDTH + 4)


def _legend_beside(ax: Axes, handles: Sequence[Artist | Container]) -> None:
    columns, size = -(-len(handles) // LEGEND_ROWS), 9 if len(handles) <= FEW_ROWS else 8
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns, fontsize=size, frameon=False
    )


def _heat_map(
    ax: Axes,
    values: NDArray[np.floating[Any]],
    texts: NDArray[np.str_],
    names: tuple[list[str], list[str]],
    legend: str,
    limits: tuple[float, float],
) -> None:
    """Draw values as tiles with a text on each, dark on light tiles and light on dark ones."""
    lowest, highest = limits
    image = ax.imshow(values, cmap="Blues" if lowest == 0 else "PuOr_r", vmin=lowest, vmax=highest, aspect="auto")
    size = float(np.clip(76 / max(values.shape[1], 1), 5.5, 9.0))
    for (row, column), text in np.ndenumerate(texts):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < DARK
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    # Slanted names stay on one line each: wrapped ones would run into their neighbours.
    rows, columns = names[0], [textwrap.shorten(name, 36, placeholder=" …") for name in names[1]]
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    ax.tick_params(length=0)
    bar = _canvas(ax).colorbar(image, ax=ax, shrink=0.8, label=legend)
    bar.outline.set_visible(False)


def _line(ax: Axes, history: pd.DataFrame, time: str, column: str, style: tuple[str, str, str]) -> list[Line2D]:
    if column not in history:
        return []
    name, colour, dash = style
    known = history[[time, column]].dropna()
    marker = "o" if len(known) <= FEW_POINTS else None
    lines: list[Line2D] = ax.plot(
        known[time], known[column], color=colour, linestyle=dash, linewidth=2, marker=marker, markersize=4, label=name
    )
    return lines


def _cell(value: object) -> str:
    """A table value as text: at most three decimals, nothing for a missing value."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.3f}" if isinstance(value, (float, np.floating)) else str(value)
