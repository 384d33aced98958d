"""The gate of `carvae compare`: which limits the new samples keep, and which they do not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from carvae.data.sides import Side
from carvae.errors import ConfigError, nearest
from carvae.section_compare import Gate, Limit

VERDICTS = ("in range", "with care", "out of range")
MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and one sample."""

    figure: str
    sample: str
    """Or ``mean``."""
    value: float | str
    low: float
    high: float
    limit: str
    passed: bool
    reason: str
    """Why not; empty where it passed."""


def judged(gate: Gate, a: Side, b: Side, table: pd.DataFrame) -> tuple[Check, ...]:
    """Every limit of the gate against every sample of B, or its mean.

    A figure that was not measured fails: what is not known is not kept.

    Raises
    ------
    ConfigError
        The gate names a figure that is none, or asks for an interval where there is none.
    """
    by_figure = table.set_index("figure")
    checks = []
    for figure, limit in gate.limits.items():
        if figure not in by_figure.index:
            raise ConfigError(f"the gate names {figure!r}, which is no figure{nearest(figure, by_figure.index)}")
        reference = float(str(by_figure.loc[figure, "a"]))
        for sample, value, low, high in _values(gate, b, figure, by_figure):
            if gate.judge == "interval" and np.isnan(low) and not np.isnan(value):
                raise ConfigError(
                    f"the gate asks for the interval of {figure!r}, and there is none; with judge: estimate the value "
                    "itself is judged"
                )
            checks.append(_check(figure, sample, (value, low, high), limit, gate, (a.name, reference)))
    checks += _verdicts(gate, b)
    if not checks:
        raise ConfigError(
            "the gate has no limits; name at least one figure or a worst_verdict, as in configs/gates/release.yaml"
        )
    return (*checks, *_models(gate, a, b))


def _values(gate: Gate, b: Side, figure: str, table: pd.DataFrame) -> list[tuple[str, float, float, float]]:
    if gate.of == MEAN:
        value, low, high = (float(str(table.loc[figure, column])) for column in ("b", "b_low", "b_high"))
        return [(MEAN, value, low, high)]
    columns = [values.tolist() for values in b.rows(figure)]
    return list(zip(map(str, b.table["sample"]), *columns, strict=True))


def _check(
    figure: str,
    sample: str,
    found: tuple[float, float, float],
    limit: Limit,
    gate: Gate,
    reference: tuple[str, float],
) -> Check:
    value, low, high = found
    least, most = (low, high) if gate.judge == "interval" else (value, value)
    name, centre = reference
    faults, limits = [], []
    if limit.min is not None:
        limits.append(f"at least {limit.min:g}")
        faults += [f"below {limit.min:g}"] if not least >= limit.min else []
    if limit.max is not None:
        limits.append(f"at most {limit.max:g}")
        faults += [f"above {limit.max:g}"] if not most <= limit.max else []
    if limit.within is not None:
        limits.append(f"within {limit.within:g} of {name} ({centre:.3g})")
        far = not (abs(least - centre) <= limit.within and abs(most - centre) <= limit.within)
        faults += [f"further than {limit.within:g} from {name} ({centre:.3g})"] if far else []
    who = MEAN if sample == MEAN else f"sample {sample}"
    if np.isnan(value):
        faults = ["not measured"]
    said = f"{value:.3g}" if gate.judge == "estimate" else f"{value:.3g} [{low:.3g}, {high:.3g}]"
    reason = f"{figure} of {who} is {'' if np.isnan(value) else f'{said}, '}{' and '.join(faults)}" if faults else ""
    return Check(figure, sample, value, low, high, " and ".join(limits), not faults, reason)


def _verdicts(gate: Gate, b: Side) -> list[Check]:
    """The verdict of each sample of B; a model that gives none fails a gate that asks for one."""
    if gate.worst_verdict == VERDICTS[-1]:
        return []
    allowed = VERDICTS[: VERDICTS.index(gate.worst_verdict) + 1]
    said = b.table["verdict"] if "verdict" in b.table else pd.Series(["none"] * len(b.table))
    checks = []
    for sample, verdict in zip(b.table["sample"].astype(str), said.fillna("none").astype(str), strict=True):
        passed = verdict in allowed
        why = " (the model gives none; train with train.calibration_folds)" if verdict == "none" else ""
        reason = "" if passed else f"verdict of sample {sample} is {verdict!r}{why}"
        checks.append(
            Check("verdict", sample, verdict, np.nan, np.nan, f"{gate.worst_verdict} or better", passed, reason)
        )
    return checks


def _models(gate: Gate, a: Side, b: Side) -> list[Check]:
    """Whether both sides were labelled by one model, where their tables say it."""
    if not gate.same_model:
        return []
    models = sorted({str(m) for side in (a, b) if "model" in side.table for m in side.table["model"].dropna()})
    said = all("model" in side.table and side.table["model"].notna().all() for side in (a, b))
    passed = said and len(models) == 1
    reason = "" if passed else "the sides were labelled by different models" if said else "a side names no model"
    return [Check("model", MEAN, " ".join(models), np.nan, np.nan, "one and the same", passed, reason)]
