"""Pictures of clones over time. Axes: T time points, S states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from carvae.data.tracking import ClonalCells, detection_limit
from carvae.plots.look import finish, legend_beside, new_axes, styles, with_count

BAR = 0.16
"""Width of a stacked bar, where time points are 1 apart."""
PANEL_HEIGHT, PANEL_WIDTH = 3.0, 5.2
UNKNOWN_COLOUR, MISSED = "0.75", "0.9"
SIZES = (("1 cell", 1, 1), ("2 to 5", 2, 5), ("6 to 20", 6, 20), ("21 to 100", 21, 100), ("more", 101, float("inf")))
"""Sizes of clones, as in the table of samples."""
SIZE_COLOURS = ("#C6C6C6", "#A6CEE3", "#56B4E9", "#0072B2", "#D55E00")


def colours(states: Sequence[str]) -> dict[str, str]:
    """A colour for each state, as in every other picture."""
    return {state: style.colour for state, style in styles(states).items()}


def draw_tracking(found: ClonalCells, patients: Sequence[str], top: int, order: Sequence[str] | None = None) -> Canvas:
    """`plot_tracking` for each patient, in one figure with one legend."""
    colour, columns = colours(order or found.states()), min(2, len(patients))
    rows = -(-len(patients) // columns)
    figure = Canvas(figsize=(PANEL_WIDTH * columns + 2.2, PANEL_HEIGHT * rows + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes, patient in zip(panels, patients, strict=False):
        plot_tracking(found, patient, top, order, axes)
    for axes in panels[len(patients) :]:
        axes.set_visible(False)
    _legend(figure, colour | {"may be missed": MISSED})
    return figure


def plot_tracking(
    found: ClonalCells, patient: str, top: int = 20, order: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the largest clones of a patient: share of the cells with a clone at each time point, coloured by state.

    In the grey a clone may be there and not be seen; a dotted line passes over time points at which one was not.

    Parameters
    ----------
    top
        Number of clones; those seen at several time points alone.
    order
        States in the order of colours; by default those found.
    """
    axes, colour = ax or new_axes(height=4.0), colours(order or found.states())
    cloned, times = found.cloned(patient)
    total = cloned["timepoint"].value_counts().reindex(times, fill_value=0)
    count = cloned.groupby(["clone", "timepoint"]).size().unstack(fill_value=0).reindex(columns=times, fill_value=0)
    share, limit = count / total[times], np.array([detection_limit(total[time]) for time in times])
    several = share[(count > 0).sum(axis=1) > 1]
    largest = count.loc[several.index].sum(axis=1).sort_values(ascending=False, kind="stable")
    chosen = several.loc[largest.index[:top]]
    x = np.arange(len(times))
    for clone, row in chosen.iterrows():
        y, at = row.to_numpy(), np.flatnonzero(row.to_numpy() > 0)
        for start, end in pairwise(at):
            style = "-" if end == start + 1 else ":"
            axes.plot(x[[start, end]], y[[start, end]], color="0.6", linewidth=1, linestyle=style, zorder=1)
        cells = cloned[cloned["clone"] == clone]
        state = [cells.loc[cells["timepoint"] == time, "state"].dropna().mode() for time in times]
        shade = [colour[s.iloc[0]] if len(s) else UNKNOWN_COLOUR for s in state]
        axes.scatter(x[at], y[at], c=[shade[i] for i in at], s=34, zorder=3, edgecolors="white", linewidths=0.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.set_minor_locator(NullLocator())
    floor = axes.get_ylim()[0]
    axes.fill_between(x, floor, limit, color=MISSED, zorder=0, linewidth=0)
    axes.set_ylim(bottom=floor)
    axes.set_xticks(x, [f"{time}\n{total[time]:,}" for time in times], fontsize=8)
    axes.set_title(f"{patient}: {len(chosen)} of {len(several):,} clones seen more than once", loc="left", fontsize=10)
    axes.set_ylabel("share of cells with a clone", fontsize=8)
    return axes


def draw_flow(found: ClonalCells, transitions: pd.DataFrame, order: Sequence[str] | None = None) -> Canvas:
    """Left: states of all cells at each time point. Right: states of the clones seen at a time point and the next.

    A time point without receptors is on the left alone.
    """
    patients, states = found.patients(), list(order or found.states())
    columns = 2 if len(transitions) else 1  # without a clone that was seen again there is no right side
    figure = Canvas(figsize=(6.25 * columns + 1.25 * (columns == 1), 2.1 * len(patients) + 0.6), layout="constrained")
    most = max(len(found.of(patient)[1]) for patient in patients)
    panels = figure.subplots(len(patients), columns, squeeze=False)
    for row, patient in zip(panels, patients, strict=True):
        plot_states_over_time(found, patient, states, row[0])
        for right in row[1:]:
            right.set_visible(len(found.cloned(patient)[1]) > 1)
            plot_clone_flow(found, transitions, patient, states, right)
        for axes in row:
            axes.set(xlim=(-0.6, max(most, 2) - 0.4))
    _legend(figure, colours(states))
    return figure


def plot_states_over_time(
    found: ClonalCells, patient: str, order: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the states of a patient's cells at each time point as stacked bars; numbers of cells below them."""
    axes, colour = ax or new_axes(height=3.0), colours(order or found.states())
    own, times = found.of(patient)
    known = own.dropna(subset=["state"])
    for x, time in enumerate(times):
        here = known[known["timepoint"] == time]["state"].value_counts(normalize=True)
        _stack(axes, x, here.reindex(list(colour), fill_value=0.0), 4 * BAR, colour)
    counts = known["timepoint"].value_counts().reindex(times, fill_value=0)
    axes.set_title(f"{patient}: all cells", loc="left", fontsize=9)
    axes.set_xticks(range(len(times)), [f"{time}\n{counts[time]:,}" for time in times], fontsize=7)
    return _as_shares(axes)


def _as_shares(axes: Axes) -> Axes:
    axes.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    axes.tick_params(axis="y", labelsize=7)
    return axes


def _stack(axes: Axes, x: float, share: pd.Series[float], width: float, colour: dict[str, str]) -> None:
    bottom = 0.0
    for state, height in share.items():
        axes.bar(x, height, width, bottom=bottom, color=colour[str(state)], linewidth=0)
        bottom += height


def plot_clone_flow(
    found: ClonalCells,
    transitions: pd.DataFrame,
    patient: str,
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw from which state to which a patient's clones went between each time point and the next.

    ``transitions`` is the table of `data.tracking.transitions`; every clone counts once.
    """
    axes, colour, times = ax or new_axes(height=3.0), colours(order or found.states()), found.cloned(patient)[1]
    table, labels, places = transitions, [], []
    for x, (start, end) in enumerate(pairwise(times)):
        none = not len(table)
        pair = table if none else table[(table["patient"] == patient) & (table["from"] == start) & (table["to"] == end)]
        places.append(x + 0.5)
        if none or not len(pair):
            labels.append(f"{start} to {end}\nnone")
            continue
        states = list(colour)
        weight = pair.pivot(index="state_from", columns="state_to", values="weight").reindex(
            index=states, columns=states
        )
        weight_SS = weight.fillna(0.0).to_numpy()
        n_clones = round(weight_SS.sum())
        labels.append(f"{start} to {end}\n{n_clones:,} clone{'' if n_clones == 1 else 's'}")
        weight_SS /= weight_SS.sum()
        ends = (x + BAR, x + 1 - BAR)
        for at, side in ((ends[0] - BAR / 2, 1), (ends[1] + BAR / 2, 0)):
            _stack(axes, at, pd.Series(weight_SS.sum(axis=side), index=states), BAR, colour)
        _ribbons(axes, weight_SS, ends, [colour[state] for state in states])
    if not axes.patches:
        said = "no clone was seen at a time point and the next"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", fontsize=8)
    axes.set_title(f"{patient}: clones seen at both time points", loc="left", fontsize=9)
    axes.set_xticks(places, labels, fontsize=7)
    return _as_shares(axes)


def _ribbons(axes: Axes, weight_SS: np.ndarray[Any, Any], ends: tuple[float, float], shade: Sequence[Any]) -> None:
    """From each earlier to each later state a band as high as the share of the clones that went this way."""
    t = np.linspace(0, 1, 30)
    x, smooth = ends[0] + (ends[1] - ends[0]) * t, t * t * (3 - 2 * t)
    left_S = np.append(0.0, weight_SS.sum(1).cumsum())[:-1]
    right_S = np.append(0.0, weight_SS.sum(0).cumsum())[:-1]
    for i, j in zip(*np.nonzero(weight_SS), strict=True):
        low = left_S[i] + (right_S[j] - left_S[i]) * smooth
        axes.fill_between(x, low, low + weight_SS[i, j], color=shade[i], alpha=0.45, linewidth=0)
        left_S[i] += weight_SS[i, j]
        right_S[j] += weight_SS[i, j]


def _legend(figure: Canvas, colour: dict[str, str]) -> None:
    handles = [Patch(color=shade, label=state) for state, shade in colour.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, title="state", title_fontsize=8)


def plot_clone_sizes(
    states: Sequence[str] | pd.Series[Any],
    sizes: pd.Series[Any],
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which share of each state's cells with a clone are in clones of which size.

    Parameters
    ----------
    states
        State of each cell with a clone.
    sizes
        Cells of its clone.
    order
        States from top to bottom; by default sorted. Those without cells are left out.
    """
    state_N, size_N = pd.Series(states).astype(str).to_numpy(), np.asarray(sizes, float)
    shown = [state for state in (order or sorted(set(state_N))) if (state_N == state).any()]
    ax = ax or new_axes(height=float(np.clip(1.6 + 0.34 * len(shown), 2.4, 14.0)))
    y, left = np.arange(len(shown)), np.zeros(len(shown))
    for colour, (name, least, most) in zip(SIZE_COLOURS, SIZES, strict=True):
        within = (size_N >= least) & (size_N <= most)
        share = np.array([float(within[state_N == state].mean()) for state in shown])
        ax.barh(y, share, left=left, height=0.8, color=colour, label=name, edgecolor="white", linewidth=0.4)
        left += share
    ax.set_yticks(y, [with_count(state, int((state_N == state).sum())) for state in shown])
    ax.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), xlabel="Share of the cells with a clone")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    legend_beside(ax, ax.containers)
    return finish(ax, "")
