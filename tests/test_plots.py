from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text

from carvae.data.markers import PREDICTED, Grouping, marker_table
from carvae.data.palette import EIGHT_COLOURS, GREY
from carvae.data.tracking import ClonalCells, transitions
from carvae.plots.cells import plot_composition, plot_signatures_by_state, plot_umap
from carvae.plots.clones import (
    colours,
    draw_flow,
    plot_clone_flow,
    plot_clone_sizes,
    plot_states_over_time,
    plot_tracking,
)
from carvae.plots.evidence import coexpression, draw_signatures, plot_coexpression
from carvae.plots.look import WIDTH_PX, save, styles
from carvae.plots.markers import draw_markers
from carvae.plots.samples import Limits, draw_shares, plot_limits, plot_violins
from carvae.plots.sureness import plot_confidence, plot_set_sizes, plot_unknown
from carvae.plots.training import plot_confusion, plot_loss

STATES = [
    "naive-like", "stem-like memory", "central memory", "effector memory", "effector/cytotoxic", "progenitor exhausted",
    "terminally exhausted", "regulatory", "gamma-delta effector/cytotoxic", "double negative long-lived",
    "interferon-responsive effector", "mucosal-associated invariant",
]  # fmt: skip
N = 400


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def texts(ax: Axes) -> Iterator[Text]:
    """Every text of the figure that is drawn and not empty."""
    canvas = ax.get_figure(root=True)
    assert canvas is not None
    unseen = {  # ticks beyond the limits exist but are not drawn
        id(label)
        for axes in canvas.axes
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not min(limits) <= tick.get_loc() <= max(limits)
    }
    return (t for t in canvas.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in unseen)


def drawn(ax: Axes) -> Canvas:
    """The figure, laid out at the resolution at which it is saved."""
    canvas = ax.get_figure(root=True)
    assert canvas is not None
    canvas.set_dpi(WIDTH_PX / canvas.get_figwidth())
    canvas.draw_without_rendering()
    return canvas


def all_plots(rng: np.random.Generator) -> dict[str, Axes]:
    truth = rng.choice(STATES, N)
    predicted = np.where(rng.random(N) < 0.8, truth, rng.choice([*STATES, "unknown"], N))
    table = pd.DataFrame(rng.integers(0, 50, (9, 12)), index=[f"study_P{i}_day 14" for i in range(9)], columns=STATES)
    scores = pd.DataFrame(rng.random((N, 8)), columns=[f"exhaustion, list of study {i} (2017)" for i in range(8)])
    history = pd.DataFrame({"epoch": range(5), "train_loss": range(9, 4, -1), "validation_loss": range(10, 5, -1)})
    return {
        "umap": plot_umap(rng.normal(size=(N, 2)), predicted, "Cells " * 30, order=STATES),
        "umap of many": plot_umap(rng.normal(size=(N, 2)), [f"sample_{i % 30}_of_the_study" for i in range(N)], "x"),
        "confusion": plot_confusion(truth, predicted, STATES, title="Predicted against true state of cells " * 5),
        "composition": plot_composition(table, order=STATES, n_cells=table.sum(axis=1)),
        "loss": plot_loss(history.assign(macro_f1=0.5)),
        "signatures": plot_signatures_by_state(scores, predicted, order=STATES),
    }


def test_nothing_is_clipped_and_labels_do_not_overlap(rng: np.random.Generator) -> None:
    for name, ax in all_plots(rng).items():
        canvas = drawn(ax)
        for text in texts(ax):
            box = text.get_window_extent()
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= canvas.bbox.x1 and box.y1 <= canvas.bbox.y1
            assert inside, f"{name}: {text.get_text()!r} is clipped at {box}"
        legend = ax.get_legend()
        labels = [*ax.get_yticklabels(), *(legend.get_texts() if legend else [])]
        boxes = [t.get_window_extent() for t in labels if t.get_text()]
        overlapping = [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes[:i]) if a.overlaps(b)]
        assert not overlapping, f"{name}: {overlapping}"
        if legend is not None:
            inner = ax.get_window_extent()
            assert all(not inner.overlaps(t.get_window_extent()) for t in legend.get_texts()), f"{name}: legend on data"


def test_png_is_1200_pixels_wide_and_the_same_each_time(rng: np.random.Generator, tmp_path: Path) -> None:
    categories = rng.choice(STATES, N)
    first, second = (
        save(plot_umap(np.ones((N, 2)), categories, "Cells"), tmp_path / f"{name}.png") for name in ("a", "b")
    )
    assert struct.unpack(">I", first.read_bytes()[16:20]) == (1200,)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_pyplot_is_never_touched() -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot and pyplot.get_fignums()  # of other tests
    assert plot_loss(pd.DataFrame({"step": [1], "train_loss": [1.0]})).get_xlabel() == "Step"
    assert (pyplot and pyplot.get_fignums()) == before


def test_plots_draw_into_the_axes_they_are_given(rng: np.random.Generator) -> None:
    axes = Canvas(layout="constrained").subplots(1, 5)
    frame = pd.DataFrame(rng.random((4, 2)), columns=["a", "b"])
    history = pd.DataFrame({"epoch": [0, 1], "train_loss": [2.0, 1.0], "validation_loss": [2.0, 1.5]})
    assert plot_umap(frame.to_numpy(), list("xyxy"), "t", ax=axes[0]) is axes[0]
    assert plot_confusion(list("xyxy"), list("xxyy"), ax=axes[1]) is axes[1]
    assert plot_composition(frame, ax=axes[2]) is axes[2]
    assert plot_loss(history, ax=axes[3]) is axes[3]
    assert plot_signatures_by_state(frame, list("xyxy"), ax=axes[4]) is axes[4]


@given(st.lists(st.sampled_from([*STATES, "unknown", "s1", "s2", "s3"]), min_size=1, unique=True))
def test_every_category_looks_different_and_unknown_is_grey(categories: list[str]) -> None:
    chosen = styles(categories)
    assert list(chosen) == categories
    assert len({(s.colour, s.marker) for s in chosen.values()}) == len(categories)
    assert len({(s.colour, s.hatch) for s in chosen.values()}) == len(categories)
    assert all((s.colour == GREY) == (c == "unknown") for c, s in chosen.items())


def test_umap_counts_cells_and_keeps_colours_by_order() -> None:
    xy = np.arange(8.0).reshape(4, 2)
    ax = plot_umap(xy, pd.Series(["b", None, "b", "c"], dtype=object), "t", order=["a", "b", "c"])
    legend = ax.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["a (0)", "b (2)", "c (1)", "unlabelled (1)"]
    (dots,) = ax.collections
    colour = {
        tuple(p): to_hex(c).upper() for p, c in zip(dots.get_offsets().tolist(), dots.get_facecolors(), strict=True)
    }
    style = styles(["a", "b", "c"])
    assert [colour[tuple(p)] for p in xy.tolist()] == [style["b"].colour, GREY, style["b"].colour, style["c"].colour]
    assert colour[tuple(dots.get_offsets().tolist()[0])] == GREY  # drawn first, below the others


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcu")), min_size=1, max_size=60))
def test_confusion_rows_are_shares_of_the_truth(pairs: list[tuple[str, str]]) -> None:
    truth, predicted = zip(*pairs, strict=True)
    ax = plot_confusion(truth, predicted, ["c", "a", "b"])
    shares = np.asarray(ax.images[0].get_array())
    columns = ["c", "a", "b", *(["u"] if "u" in predicted else [])]
    assert shares.shape == (3, len(columns))
    assert [t.get_text() for t in ax.get_xticklabels()] == columns
    for row, name in zip(shares, ["c", "a", "b"], strict=True):
        called = [p for t, p in pairs if t == name]
        expected = [called.count(c) / max(len(called), 1) for c in columns]
        np.testing.assert_allclose(row, expected)
    printed = {t.get_position(): t.get_text() for t in ax.texts}
    assert sum(int(t.split("\n")[1]) for t in printed.values() if t) == len(pairs)


def test_composition_scales_counts_and_keeps_order() -> None:
    table = pd.DataFrame({"x": [1, 0], "y": [3, 0], "unknown": [4, 0]}, index=["s1", "empty"])
    ax = plot_composition(table, order=["y", "x"], n_cells=table.sum(axis=1))
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert widths == [[0.375, 0.0], [0.125, 0.0], [0.5, 0.0]]
    assert [bar[0].get_x() for bar in ax.containers] == [0.0, 0.375, 0.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["s1 (8)", "empty (0)"]
    np.testing.assert_array_equal(table["x"], [1, 0])


def test_loss_bridges_the_gaps_of_a_logger_and_adds_macro_f1() -> None:
    gap = np.nan
    history = pd.DataFrame(
        {
            "epoch": [0, 0, 1, 1],
            "train_loss": [5, gap, 4, gap],
            "validation_loss": [gap, 6, gap, 5],
            "macro_f1": [gap, 0.2, gap, 0.4],
        }
    )
    ax = plot_loss(history)
    right = next(a for a in ax.get_figure().axes if a is not ax)  # type: ignore[union-attr]
    assert [list(line.get_ydata()) for line in (*ax.lines, *right.lines)] == [[5, 4], [6, 5], [0.2, 0.4]]
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1], [0, 1]]
    legend = ax.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 3


def test_signatures_show_the_mean_per_state_and_survive_a_flat_one() -> None:
    scores = pd.DataFrame({"up": [1.0, 3.0, 0.0], "flat": [0.5, 0.5, 0.5]})
    ax = plot_signatures_by_state(scores, ["b", "b", "a"], order=["b", "a", "nobody"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b (2)", "a (1)"]
    assert [t.get_text() for t in ax.texts] == ["2.00", "0.50", "0.00", "0.50"]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[1, 0], [-1, 0]])


def test_signatures_without_scores_are_left_out() -> None:
    scores = pd.DataFrame({"up": [1.0, 3.0, 0.0], "unscored": [np.nan] * 3})
    ax = plot_signatures_by_state(scores, ["b", "b", "a"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["up"]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[-1], [1]])


@pytest.fixture
def clonal(rng: np.random.Generator) -> ClonalCells:
    """Two patients and two time points; clone k1 goes from memory to effector in all its cells, k2 stays memory."""
    rows = [("p1", t, s, c) for t, s, c, n in (
        ("D0", "memory", "k1", 6), ("D28", "effector", "k1", 9), ("D0", "memory", "k2", 3), ("D28", "memory", "k2", 1),
        ("D0", None, None, 4),
    ) for _ in range(n)]  # fmt: skip
    rows += [("p2", "D0", "effector", "k3")] * 5
    cells = pd.DataFrame(rows, columns=["patient", "timepoint", "state", "clone"]).assign(sample="s")
    return ClonalCells(cells.astype(object).where(cells.notna(), None), ("D0", "D28"))


def test_clone_plots_draw_shares_into_the_axes_they_are_given(clonal: ClonalCells) -> None:
    axes, order = Canvas().subplots(1, 3), ["effector", "memory"]
    table = transitions(clonal)
    assert plot_tracking(clonal, "p1", 5, order, axes[0]) is axes[0]
    assert plot_states_over_time(clonal, "p1", order, axes[1]) is axes[1]
    assert plot_clone_flow(clonal, table, "p1", order, axes[2]) is axes[2]
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[6 / 9, 9 / 10], [3 / 9, 1 / 10]]
    heights = [[round(bar.get_height(), 3) for bar in bars] for bars in axes[1].containers]
    assert heights == [[0.0], [1.0], [0.9], [0.1]]
    assert [t.get_text() for t in axes[2].get_xticklabels()] == ["D0 to D28\n2 clones"]
    shade = colours(order)
    assert [to_hex(bars[0].get_facecolor()).upper() for bars in axes[1].containers] == [*shade.values()] * 2


def test_a_patient_of_one_time_point_has_no_flow_of_clones(clonal: ClonalCells) -> None:
    figure = draw_flow(clonal, transitions(clonal))
    assert [ax.get_visible() for ax in figure.axes] == [True, True, True, False]


def report_plots(rng: np.random.Generator) -> dict[str, Axes | Canvas]:
    """The pictures of the report, with long names and awkward values."""
    samples = [f"sample_{i}_of_the_study" for i in range(5)]
    shares = pd.DataFrame(rng.dirichlet(np.ones(7), 5), index=samples, columns=STATES[:7])
    usual = pd.DataFrame({"low": 0.0, "middle": 0.1, "high": 0.4}, index=STATES[:7])
    group = pd.Series(rng.choice(STATES[:6], N))
    detected = {name: rng.random(N) < 0.3 for name in ("LAG3", "PD-1", "TIM-3")}
    scores = pd.DataFrame(rng.random((N, 4)), columns=["exhaustion", "memory_stem", "flat", "empty"]).assign(flat=0.5)
    scores["empty"] = np.nan
    colour = {name: style.colour for name, style in styles(STATES).items()}
    values = pd.Series([0.1, 0.4, np.nan, 0.9, 0.2], index=samples)
    unknown = pd.DataFrame({"few counts": [0.1, 0, 0, 0.2, 0], "strange": [0, 0.5, 0, 0, 0.1]}, index=samples)
    return {
        "limits": plot_limits(values, "cells unknown", Limits(0.3, 0.5)),
        "violins": plot_violins(rng.lognormal(8, 1, N), group, "counts per cell", log=True),
        "shares": draw_shares(shares, 0.5 * shares, 1.2 * shares, usual, colour),
        "confidence": plot_confidence(rng.random(N), rng.random(N) < 0.2),
        "sets": plot_set_sizes(pd.Series(rng.integers(1, 6, N))),
        "unknown": plot_unknown(unknown),
        "coexpression": plot_coexpression(coexpression(detected, group, STATES)),
        "signatures": draw_signatures(scores, group, STATES, colour),
        "clone sizes": plot_clone_sizes(group, pd.Series(rng.zipf(1.6, N).clip(max=500)), STATES),
    }


def test_pictures_of_the_report_clip_nothing(rng: np.random.Generator) -> None:
    for name, plot in report_plots(rng).items():
        ax = plot if isinstance(plot, Axes) else plot.axes[0]
        canvas = drawn(ax)
        for text in texts(ax):
            if not (text.axes is None or text.axes.get_visible()):
                continue
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.bbox.x1 + 1 and box.y1 <= canvas.bbox.y1 + 1
            assert inside, f"{name}: {text.get_text()!r} is clipped at {box}"


def test_limits_tell_within_care_and_out_in_both_directions() -> None:
    def grades(values: list[float], limits: Limits) -> dict[tuple[float, ...], str]:
        ax = plot_limits(pd.Series(values, index=list("abc")), "t", limits)
        return {
            tuple(d.get_offsets()[:, 0]): to_hex(d.get_facecolors()[0]).upper()
            for d in ax.collections
            if len(d.get_offsets())
        }

    blue, orange, red = EIGHT_COLOURS[0], EIGHT_COLOURS[1], EIGHT_COLOURS[5]
    assert grades([0.1, 0.4, 0.9], Limits(0.3, 0.5)) == {(0.1,): blue, (0.4,): orange, (0.9,): red}
    assert grades([500.0, 120.0, 40.0], Limits(160.0, 60.0)) == {(500.0,): blue, (120.0,): orange, (40.0,): red}


def test_coexpression_counts_exactly_these_genes() -> None:
    detected = {"A": np.array([1, 1, 0, 0, 1], bool), "B": np.array([1, 0, 0, 1, 1], bool)}
    table = coexpression(detected, pd.Series(list("xxxyy")), ["y", "x", "nobody"])
    assert list(table.columns) == ["none", "A", "B", "A + B"]
    assert list(table.index) == [("y", 2), ("x", 3)]
    np.testing.assert_allclose(table.to_numpy(), [[0, 0, 0.5, 0.5], [1 / 3, 1 / 3, 0, 1 / 3]])


def test_clone_sizes_are_shares_of_the_cells_of_a_state() -> None:
    ax = plot_clone_sizes(pd.Series(list("aaab")), pd.Series([1, 5, 6, 500]), ["b", "a", "nobody"])
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    assert widths == {
        "1 cell": [0, 1 / 3],
        "2 to 5": [0, 1 / 3],
        "6 to 20": [0, 1 / 3],
        "21 to 100": [0, 0],
        "more": [1, 0],
    }


def test_markers_are_means_and_shares_of_each_group() -> None:
    counts = sp.csr_matrix(np.array([[2, 0], [0, 0], [4, 1]]))
    total = np.array([10, 10, 20])
    grouping = Grouping(PREDICTED, np.array(["a", "a", "b"], dtype=object), ["b", "a", "nobody"])
    table = marker_table(counts, total, np.array([True, False]), ("X", "Y"), [grouping]).set_index(["state", "gene"])
    assert table.loc[("a", "X"), "mean"] == pytest.approx(np.log1p(2e4 / 10) / 2)
    assert table.loc[("a", "X"), "share_expressing"] == 0.5
    assert table.loc[("b", "X"), "mean"] == pytest.approx(np.log1p(4e4 / 20))
    assert table.loc[("b", "Y"), ["mean", "share_expressing"]].isna().all(), "a gene that was not measured has none"
    figure = draw_markers(table.reset_index(), [("one", ("X",)), ("two", ("Y",))])
    assert "Y (absent)" in [label.get_text() for label in figure.axes[0].get_xticklabels()]
