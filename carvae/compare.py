"""``carvae compare``: two runs, lots or time points side by side, and a gate that a release must pass.

Axes: U units (patients or samples), S states.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from carvae import __version__
from carvae.data.atomic import refuse_file, replacing_file
from carvae.data.contrast import (
    Basis,
    Contrast,
    Distance,
    Estimate,
    composition_distance,
    mean_of,
    one_more,
    over_cells,
    paired,
    welch,
)
from carvae.data.sides import Side, apart, depths_of, figures, first_axis, is_share, read_side
from carvae.data.spreadsheet import write_table
from carvae.errors import SchemaError
from carvae.gate import Check, judged
from carvae.plots.comparison import draw
from carvae.section_compare import CompareConfig, Gate

log = logging.getLogger(__name__)

TABLE, CHECKS, METRICS, PLOT = "compare.csv", "gate.csv", "metrics.json", "compare.png"
SAYS: dict[Basis, str] = {
    "cells": "one {unit} a side: intervals are over the cells counted, and say nothing of other {unit}s",
    "units": "{n_a} and {n_b} {unit}s: intervals are over {unit}s (Welch)",
    "pairs": "{n_pairs} {unit}s on both sides, each compared with itself: the interval of the difference is over them",
    "one against several": "one {unit} against {n_several}: the interval holds zero where it may be one more of them",
}


@dataclass(frozen=True, slots=True)
class Compared:
    """What came of a comparison."""

    out: Path
    table: pd.DataFrame
    distance: Distance
    checks: tuple[Check, ...]
    """Of the gate; empty without one."""

    @property
    def passed(self) -> bool:
        """Whether every limit of the gate is kept."""
        return all(check.passed for check in self.checks)


def run(a: Path, b: Path, out: Path, config: CompareConfig, gate: Path | None = None, seed: int = 0) -> Compared:
    """Compare two annotated files, tables of samples or folders of those; write the folder ``out``.

    ``compare.csv``
        One row per figure: both sides and their difference with 95% intervals, and what these are over.
    ``gate.csv``
        One row per limit and sample, where there is a gate.
    ``metrics.json``
        All of it for programs.
    ``compare.png``
        The figures between 0 and 1, side by side.

    Raises
    ------
    CarvaeError
        A side or the gate cannot be used; nothing is written then.
    """
    refuse_file(out, "compare")
    rules = None if gate is None else Gate.read(gate)
    sides = tuple(
        read_side(path, where, f"compare.{name}", config.unit)
        for name, path, where in (("a", a, config.a), ("b", b, config.b))
    )
    first, second, done = apart(*_named(sides[0], sides[1]))
    unit = _unit(first, second, config)
    basis, notes = _basis(first, second, config, unit)
    notes += done
    table = contrasts(first, second, basis)
    states = first_axis((first, second), list(table["figure"][table["group"] == "composition"]))
    distance = _distance(first, second, states, basis, np.random.default_rng((seed, 61)))
    checks = () if rules is None else judged(rules, first, second, table)
    compared = Compared(out, table, distance, checks)
    _write(compared, (first, second), notes, unit)
    _say(compared, notes)
    return compared


def _named(a: Side, b: Side) -> tuple[Side, Side]:
    """The sides under names of their own."""
    if a.name != b.name:
        return a, b
    return Side(f"{a.name} (A)", a.table, a.unit_R), Side(f"{b.name} (B)", b.table, b.unit_R)


def _unit(a: Side, b: Side, config: CompareConfig) -> str:
    """``patient`` or ``sample``; where one side names patients and the other does not, that is told."""
    named = [bool((side.unit_R == side.table["sample"].to_numpy(object)).all()) for side in (a, b)]
    if config.unit == "sample" or all(named):
        return "sample"
    by = ["patient" in side.table and bool(side.table["patient"].notna().all()) for side in (a, b)]
    if not all(by):
        raise SchemaError(
            f"{(a if by[0] else b).name} names patients and {(b if by[0] else a).name} does not; name them with "
            "predict.sheet when annotating, or compare samples with compare.unit=sample"
        )
    return "patient"


def _basis(a: Side, b: Side, config: CompareConfig, unit: str) -> tuple[Basis, list[str]]:
    """What intervals are over, and what is to be known of it."""
    common = sorted(set(a.units) & set(b.units))
    n_a, n_b = len(a.units), len(b.units)
    basis: Basis
    if n_a == 1 and n_b == 1:
        basis = "cells"
    elif config.paired and len(common) > 1:
        basis = "pairs"
    else:
        basis = "one against several" if 1 in {n_a, n_b} else "units"
    said = SAYS[basis].format(unit=unit, n_a=n_a, n_b=n_b, n_pairs=len(common), n_several=max(n_a, n_b))
    notes = [said]
    if basis == "pairs" and (left := n_a + n_b - 2 * len(common)):
        notes.append(f"{left} {unit}s are on one side alone: they count in its mean, and not in the difference")
    if basis in {"units", "one against several"} and common:
        notes.append(f"{', '.join(common)} on both sides {'is' if len(common) == 1 else 'are'} taken as independent")
    models = {str(m) for side in (a, b) if "model" in side.table for m in side.table["model"].dropna()}
    if len(models) > 1:
        notes.append(f"labelled by different models ({', '.join(sorted(models))}): states may not mean the same")
    return basis, notes


def contrasts(a: Side, b: Side, basis: Basis) -> pd.DataFrame:
    """One row per figure; q is p after Benjamini and Hochberg (1995) over the figures that have one.

    Where clonal figures at equal depth were drawn at different depths, plain ones have no difference.
    """
    rows, uneven = [], len(depths_of(a, b)) > 1
    for figure, group in figures(a, b).items():
        found = contrast(a, b, figure, basis)
        if uneven and group == "clones" and figure != "clone_cells":
            found = Contrast(found.a, found.b, Estimate(np.nan), np.nan, "none")
        if is_share(figure, group):
            of_a, of_b = found.a.within(0, 1), found.b.within(0, 1)
            found = replace(found, a=of_a, b=of_b, difference=found.difference.within(-1, 1))
        row: dict[str, Any] = {"group": group, "figure": figure, "n_a": len(a.units), "n_b": len(b.units)}
        for name, estimate in (("a", found.a), ("b", found.b), ("difference", found.difference)):
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        rows.append(row | {"p": found.p, "interval_over": found.basis})
    table = pd.DataFrame(rows)
    known = table["p"].notna()
    q = pd.Series(np.nan, index=table.index)
    if known.any():
        q[known] = false_discovery_control(table.loc[known, "p"])
    table.insert(list(table.columns).index("p") + 1, "q", q)
    return table


def contrast(a: Side, b: Side, figure: str, basis: Basis) -> Contrast:
    """One figure of both sides, and their difference."""
    a_U, b_U = a.values(figure), b.values(figure)
    of_a, of_b = _side(a, figure), _side(b, figure)
    p = np.nan
    if basis == "cells":
        parts = [np.concatenate(pair) for pair in zip(a.rows(figure), b.rows(figure), strict=True)]
        weight = np.concatenate([-a.weights(figure), b.weights(figure)])
        difference = _together(parts, weight) if _has_both(a_U, b_U) else Estimate(np.nan)
    elif basis == "pairs":
        in_a, in_b = (dict(zip(side.units, values, strict=True)) for side, values in ((a, a_U), (b, b_U)))
        difference, p = paired(np.array([in_b[unit] - in_a[unit] for unit in in_a if unit in in_b]))
    elif basis == "units":
        difference, p = welch(a_U, b_U)
    elif len(b_U) == 1:
        difference, p = one_more(float(b_U[0]), a_U)
    else:
        found, p = one_more(float(a_U[0]), b_U)
        difference = Estimate(-found.value, -found.high, -found.low)
    return Contrast(of_a, of_b, difference, p, "none" if np.isnan(difference.low) else basis)


def _has_both(a_U: np.ndarray[Any, Any], b_U: np.ndarray[Any, Any]) -> bool:
    return not (np.isnan(a_U).all() or np.isnan(b_U).all())


def _side(side: Side, figure: str) -> Estimate:
    """Mean over units; of a single one the interval over its cells."""
    value_U = side.values(figure)
    if len(value_U) > 1 or np.isnan(value_U).all():
        return mean_of(value_U)
    return _together(list(side.rows(figure)), side.weights(figure))


def _together(parts: list[np.ndarray[Any, Any]], weight: np.ndarray[Any, Any]) -> Estimate:
    """Rows that bear weight, put together."""
    own = weight != 0
    value, low, high = (part[own] for part in parts)
    return over_cells(value, low, high, weight[own])


def _distance(a: Side, b: Side, states: list[str], basis: Basis, rng: np.random.Generator) -> Distance:
    a_US, b_US = (np.stack([side.values(state) for state in states], axis=1) for side in (a, b))
    cells = tuple(float(side.table["n_cells_used"].sum()) for side in (a, b))
    if basis == "pairs":
        common = [unit for unit in a.units if unit in set(b.units)]
        a_US, b_US = (x[[side.units.index(u) for u in common]] for side, x in ((a, a_US), (b, b_US)))
        known = ~np.isnan(a_US).any(1) & ~np.isnan(b_US).any(1)
        a_US, b_US = a_US[known], b_US[known]
    else:
        a_US, b_US = (x[~np.isnan(x).any(1)] for x in (a_US, b_US))
    if not (len(a_US) and len(b_US)):
        raise SchemaError("one side has no cell whose state is known, so there is nothing to compare")
    return composition_distance(a_US, b_US, (cells[0], cells[1]), basis, rng)


def _write(compared: Compared, sides: tuple[Side, Side], notes: list[str], unit: str) -> None:
    out, table = compared.out, compared.table
    metrics: dict[str, Any] = {"carvae_version": __version__, "unit": unit, "notes": notes}
    for name, side in zip("ab", sides, strict=True):
        cells = {column: int(side.table[column].sum()) for column in ("n_cells", "n_cells_used")}
        metrics[name] = {"name": side.name, "samples": side.table["sample"].tolist(), "units": side.units} | cells
    metrics["composition"] = asdict(compared.distance)
    metrics["figures"] = table.to_dict("records")
    if compared.checks:
        metrics["gate"] = {"passed": compared.passed, "checks": [asdict(check) for check in compared.checks]}
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = {name: stack.enter_context(replacing_file(out / name)) for name in (TABLE, METRICS, PLOT)}
        write_table(table, place[TABLE])
        if compared.checks:
            write_table(
                pd.DataFrame([asdict(check) for check in compared.checks]),
                stack.enter_context(replacing_file(out / CHECKS)),
            )
        place[METRICS].write_text(json.dumps(_without_nan(metrics), indent=1, allow_nan=False), encoding="utf-8")
        draw(table, (sides[0].name, sides[1].name), notes[0], place[PLOT])
    if not compared.checks:
        (out / CHECKS).unlink(missing_ok=True)  # of an earlier run


def _without_nan(value: Any) -> Any:
    """The same with None for what is not a number."""
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _say(compared: Compared, notes: list[str]) -> None:
    for note in notes:
        log.info("%s", note)
    distance = compared.distance
    chance = "" if np.isnan(distance.p) else f" ({distance.by_chance:.3f} by chance, p {distance.p:.2g})"
    log.info("composition: total variation distance %.3f%s", distance.found, chance)
    for check in compared.checks:
        if not check.passed:
            log.warning("the gate fails: %s", check.reason)
    if compared.checks and compared.passed:
        log.info("the gate passes: %d limits are kept", len(compared.checks))
    log.info("wrote %s", compared.out)
