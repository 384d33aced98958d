"""Pictures of a training run: the losses, and the confusion of states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from carvae.data.palette import EIGHT_COLOURS
from carvae.plots.look import NO_LABEL, finish, heat_map, new_axes, with_count

FEW_POINTS = 60


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
    ax = ax or new_axes(height=float(np.clip(1.9 + 0.55 * len(rows), 4.0, 12.0)))
    cells = zip(share.flat, counts.flat, strict=True)
    texts = np.array([f"{part:.0%}\n{n:,}" if n else "" for part, n in cells]).reshape(counts.shape)
    names = [with_count(row, int(n)) for row, n in zip(rows, counts.sum(axis=1), strict=True)]
    heat_map(ax, share, texts, (names, columns), "Share of the true label's cells", (0.0, 1.0))
    ax.set(xlabel="Predicted", ylabel="True (cells)")
    return finish(ax, title)


def plot_loss(history: pd.DataFrame, title: str = "Training", ax: Axes | None = None) -> Axes:
    """Draw training and validation loss over epochs (or steps), and macro-F1 on an axis of its own where present.

    ``history`` has ``epoch`` or ``step``, ``train_loss`` and ``validation_loss``, and may have ``macro_f1``; gaps
    (NaN) are bridged, as loggers write one row per event.
    """
    ax = ax or new_axes(height=4.4)
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
    return finish(ax, title, pad=30)


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
