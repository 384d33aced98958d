"""Pictures of an evaluation: reliability, confusion, selective accuracy, sweeps, methods side by side, novelty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from carvae.data.palette import DARK_GREY, EIGHT_COLOURS, GREY, TWELVE_COLOURS
from carvae.evaluation.results import OWN

NAMES = ("methods", "reliability", "confusion", "selective", "sweeps", "integration", "novelty")
DESIGNS = ("patient", "study", "state", "reference")
FILES = tuple(f"{design}_{name}.png" for design in DESIGNS for name in NAMES)
BLUE, ORANGE, GREEN, PINK, SKY, RED, _, _ = EIGHT_COLOURS
COLOURS = (RED, DARK_GREY, BLUE, SKY, GREEN, PINK, ORANGE, TWELVE_COLOURS[0])
"""Of the methods; the first is carvae's."""
MARKS = ("o", "s", "^", "v", "D", "P", "X", "*")
DARK = 0.55
SWEEP_NAMES = {
    "depth": "share of the reads kept",
    "umi": "UMIs per cell",
    "missing": "share of the genes missing",
}


def draw(metrics: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write all figures to a folder; returns file name -> what it shows."""
    drawn = {}
    for design, found in metrics["designs"].items():
        for name, (plot, shows) in PLOTS.items():
            figure = plot(found)
            if figure is not None:
                file = f"{design}_{name}.png"
                figure.savefig(folder / file, dpi=130)
                drawn[file] = shows
    return drawn


def best_of(found: dict[str, Any]) -> str:
    """carvae, or the most accurate method where it was not among them."""
    methods = found["methods"]
    return OWN if OWN in methods else max(methods, key=lambda name: float(methods[name]["accuracy"]["value"]))


def _looks(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    names = sorted(found["methods"], key=lambda name: name != OWN)
    start = 0 if OWN in names else 1
    return {n: (COLOURS[(i + start) % len(COLOURS)], MARKS[(i + start) % len(MARKS)]) for i, n in enumerate(names)}


def _methods(found: dict[str, Any]) -> Figure | None:
    """Every method's accuracy and macro-F1 with intervals."""
    methods = found["methods"]
    if "accuracy" not in next(iter(methods.values())):
        return None
    order = sorted(methods, key=lambda name: float(methods[name]["macro_f1"]["value"]))
    figure = Figure(figsize=(9, 1.4 + 0.35 * len(order)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for ax, key, title in zip(
        panels, ("macro_f1", "accuracy", "ece"), ("macro-F1", "accuracy", "calibration error"), strict=True
    ):
        for y, name in enumerate(order):
            value = methods[name][key]
            colour = COLOURS[0] if name == OWN else DARK_GREY
            if value["low"] is not None:
                ax.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=1.5)
            ax.plot(value["value"], y, "o", color=colour, markersize=5)
        ax.set(title=title, xlim=(0, 1))
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    panels[0].set_yticks(range(len(order)), order)
    figure.supxlabel("dot: all held-out cells; line: 95% interval over patients", fontsize="medium")
    return figure


def _reliability(found: dict[str, Any]) -> Figure | None:
    methods, name = found["methods"], best_of(found) if _scored(found) else ""
    if not name or not methods[name]["reliability"]:
        return None
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="as confident as right")
    for when, colour, mark in (("before", DARK_GREY, "s--"), ("after", COLOURS[0], "o-")):
        rows = [row for row in methods[name]["reliability"] if row["calibration"] == when]
        if rows:
            key = "ece" if when == "after" else "ece_before"
            label = f"{when} calibration (error {methods[name][key]['value']:.3f})"
            ax.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], mark, color=colour, label=label)
            if when == "after":
                below.bar([r["confidence"] for r in rows], [r["n_cells"] for r in rows], width=0.03, color=colour)
    ax.set(ylabel="share that is right", ylim=(0, 1.02), xlim=(0, 1.02), title=f"{name} on held-out cells")
    below.set(xlabel="confidence", ylabel="cells")
    ax.legend(loc="upper left", fontsize="small")
    return figure


def _confusion(found: dict[str, Any]) -> Figure | None:
    if not _scored(found):
        return None
    name = best_of(found)
    spec = found["methods"][name]["confusion"]
    count, leaves = np.array(spec["rows"]), np.array(spec["leaves"], dtype=object)
    rows, columns = count.sum(1) > 0, (count.sum(0) > 0) | (count.sum(1) > 0)
    share = count[rows][:, columns] / count[rows].sum(1, keepdims=True)
    size = 3.2 + 0.5 * share.shape[1]
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(share):
        if value >= 0.005:  # noqa: PLR2004 - what rounds to 0.00 stays blank
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > DARK else "k")
    ax.set_xticks(range(int(columns.sum())), leaves[columns].tolist(), rotation=45, ha="right", rotation_mode="anchor")
    named = [f"{leaf} ({n:,.0f})" for leaf, n in zip(leaves[rows], count[rows].sum(1), strict=True)]
    ax.set_yticks(range(int(rows.sum())), named)
    ax.set(xlabel=f"called by {name}", ylabel="author's label (cells)")
    figure.colorbar(image, ax=ax, label="share of the author's cells", shrink=0.8)
    return figure


def _selective(found: dict[str, Any]) -> Figure | None:
    if not _scored(found):
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    for name, (colour, mark) in _looks(found).items():
        curve = found["methods"][name]["selective_accuracy"]
        x, y = [float(c) for c in curve], [1 - a for a in curve.values()]
        ax.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=2 if name == OWN else 1, label=name)
    ax.axvline(0.8, color=GREY, linestyle=":", linewidth=1)
    ax.set(
        xlabel="coverage: share of the cells labelled, the surest first", ylabel="risk: share of these that is wrong"
    )
    ax.set(xlim=(0, 1.02), ylim=(0, None))
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _sweeps(found: dict[str, Any]) -> Figure | None:
    if not _scored(found):
        return None
    swept = {name: m for name, m in found["methods"].items() if m["sweeps"]}
    kinds = [k for k in SWEEP_NAMES if any(row["kind"] == k for m in swept.values() for row in m["sweeps"])]
    if not kinds:
        return None
    figure = Figure(figsize=(3.2 * len(kinds) + 1.6, 5.6), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex="col", sharey="row")
    for column, kind in enumerate(kinds):
        for row, key in enumerate(("macro_f1", "ece")):
            for name, (colour, mark) in _looks(found).items():
                if name in swept:
                    _line(panels[row, column], swept[name], kind, key, (name, colour, mark))
        panels[1, column].set_xlabel(SWEEP_NAMES[kind])
        if kind == "umi":
            panels[1, column].set_xlim(left=0)
    for panel, what in zip(panels[:, 0], ("macro-F1", "calibration error"), strict=True):
        panel.set_ylabel(what)
        panel.set_ylim(bottom=0)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def _line(ax: Axes, method: dict[str, Any], kind: str, key: str, look: tuple[str, str, str]) -> None:
    name, colour, mark = look
    points = [(row["value"], row[key]) for row in method["sweeps"] if row["kind"] == kind]
    if kind != "umi":
        points.append((1.0 if kind == "depth" else 0.0, method[key]["value"]))
    points.sort()
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=2 if name == OWN else 1, label=name)


def _integration(found: dict[str, Any]) -> Figure | None:
    rows = found.get("integration") or []
    if not rows:
        return None
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    ax = figure.subplots()
    looks = _looks(found)
    for row in rows:
        colour, mark = looks[row["method"]]
        name = f"{row['method']} (PCA)" if row["method"] == "knn" else row["method"]
        ax.plot(row["batch"], row["conserved"], mark, color=colour, markersize=9, label=name)
    ax.set(xlabel="mixing of batches (scib-metrics)", ylabel="conserved: macro-F1 of a held-out vote")
    ax.axis((0, 1, 0, 1.02))  # else small differences look great
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _novelty(found: dict[str, Any]) -> Figure | None:
    methods = found["methods"]
    if "mean_auroc" not in next(iter(methods.values())):
        return None
    states = list(next(iter(methods.values()))["states"])
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(states)), layout="constrained")
    ax = figure.subplots()
    for name, (colour, mark) in _looks(found).items():
        values = [methods[name]["states"][state]["auroc"] for state in states]
        label = f"{name} (mean {methods[name]['mean_auroc']['value']:.2f})"
        ax.plot(values, range(len(states)), mark, color=colour, markersize=6, label=label)
    ax.axvline(0.5, color=GREY, linestyle=":")
    ax.set_yticks(range(len(states)), states)
    ax.set(xlabel="AUROC of novelty, the state held out", xlim=(0, 1.02))
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _scored(found: dict[str, Any]) -> bool:
    return "accuracy" in next(iter(found["methods"].values()))


PLOTS: dict[str, tuple[Callable[[dict[str, Any]], Figure | None], str]] = {
    "methods": (_methods, "every method in the same folds, with intervals over patients"),
    "reliability": (_reliability, "confidence against the share that is right, before and after calibration"),
    "confusion": (_confusion, "author's labels against those called, rows sum to 1"),
    "selective": (_selective, "risk against coverage: errors among the surest cells"),
    "sweeps": (_sweeps, "the same held-out cells with fewer counts, and with fewer genes"),
    "integration": (_integration, "mixing of batches beside what the space keeps of the states"),
    "novelty": (_novelty, "how well cells of a state that nobody learned are told from the others"),
}
