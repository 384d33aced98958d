"""Clones of a patient from one time point to another: which stay, grow, shrink or come, and how their states change.

A clone that is not seen is not lost: every figure stands beside the least frequency that would have been seen.

Axes: C clones, T time points, S states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.composition import fraction_interval

Floats = NDArray[np.float64]
SURE = 0.95
"""Probability with which a clone at the detection limit is seen."""
LEAST_CELLS = 2
"""Cells over both time points without which a clone's change is not listed: one cell tells of no change."""
TIME, CLONE, STATE = "timepoint", "clone", "state"


@dataclass(frozen=True, slots=True)
class ClonalCells:
    """Cells of patients with their time point, and clone and state where known."""

    cells: pd.DataFrame
    """``patient``, ``sample``, ``timepoint``, ``state`` and ``clone``, text; the last two missing where not known."""
    order: tuple[str, ...]
    """Time points from first to last."""

    def patients(self) -> list[str]:
        """Sorted."""
        return sorted(self.cells["patient"].unique())

    def states(self) -> list[str]:
        """Sorted."""
        return sorted(self.cells[STATE].dropna().unique())

    def of(self, patient: str) -> tuple[pd.DataFrame, list[str]]:
        """Cells and time points of a patient."""
        own = self.cells[self.cells["patient"] == patient]
        there = set(own[TIME])
        return own, [time for time in self.order if time in there]

    def cloned(self, patient: str) -> tuple[pd.DataFrame, list[str]]:
        """A patient's cells with a clone, and the time points that have such cells: receptors are not always there."""
        own, times = self.of(patient)
        cells = own[own[CLONE].notna()]
        there = set(cells[TIME])
        return cells, [time for time in times if time in there]

    def pairs(self) -> Iterator[tuple[str, pd.DataFrame, str, str]]:
        """Patient, cells with a clone, and two of its time points with clones: each with the next, the first with all.

        A time point without receptors is passed over, and ends no comparison.
        """
        for patient in self.patients():
            cells, times = self.cloned(patient)
            for start, end in [*pairwise(times), *((times[0], time) for time in times[2:])]:
                yield patient, cells[cells[TIME].isin([start, end])], start, end


def detection_limit(n_cells: int) -> float:
    """Least frequency of a clone that is seen with probability `SURE` among so many cells."""
    return float(1.0 - (1.0 - SURE) ** (1.0 / n_cells)) if n_cells else 1.0


def tracked(found: ClonalCells) -> pd.DataFrame:
    """One row per clone seen at two or more time points: sizes, and states first and last.

    A state is the commonest among the clone's cells at that time (the first of the alphabet of several), with its share
    of them.
    """
    rows = []
    for patient in found.patients():
        cloned, times = found.cloned(patient)
        total = cloned[TIME].value_counts()
        several = cloned.groupby(CLONE)[TIME].nunique()
        for clone, cells in cloned[cloned[CLONE].isin(several.index[several > 1])].groupby(CLONE):
            seen = [time for time in times if (cells[TIME] == time).any()]
            row: dict[str, Any] = {"patient": patient, CLONE: clone, "n_cells": len(cells)}
            row |= {"n_timepoints": len(seen), "timepoints": " ".join(seen)}
            for which, time in (("first", seen[0]), ("last", seen[-1])):
                there = cells[cells[TIME] == time]
                row |= {f"{which}_timepoint": time, f"{which}_n": len(there)}
                row[f"{which}_fraction"] = len(there) / total[time]
                row |= _commonest(there[STATE], which)
            row["state_changed"] = _changed(row["first_state"], row["last_state"])
            rows.append(row)
    columns = "patient clone n_cells n_timepoints timepoints".split()
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    return table.sort_values(["patient", "n_cells", "clone"], ascending=[True, False, True], ignore_index=True)


def _changed(first: str, last: str) -> str:
    return "" if not first or not last else "yes" if first != last else "no"


def _commonest(state: pd.Series[str], which: str) -> dict[str, Any]:
    counts = state.value_counts()
    if not len(counts):
        return {f"{which}_state": "", f"{which}_state_share": np.nan, f"{which}_states": ""}
    counts = counts.sort_index().sort_values(ascending=False, kind="stable")
    words = ", ".join(f"{name} {n}" for name, n in counts.items())
    share = counts.iloc[0] / counts.sum()
    return {f"{which}_state": counts.index[0], f"{which}_state_share": share, f"{which}_states": words}


def changes(found: ClonalCells, alpha: float) -> pd.DataFrame:
    """Each clone of `LEAST_CELLS` or more between two time points: cells, fractions, and what can be said of them.

    Fisher's exact test compares the clone's cells with all cells with a clone; false discovery rates are over the
    clones of a pair of time points (Benjamini and Hochberg). ``call`` is ``expanding``, ``contracting`` or ``stable``;
    ``new`` where a clone not seen before would have been at its later frequency, ``new or missed`` where not so surely;
    ``not seen`` where a clone of the earlier time point may have been missed at the later.
    """
    tables = []
    for patient, pair, start, end in found.pairs():
        count = pair.groupby([CLONE, TIME]).size().unstack(fill_value=0)[[start, end]]
        total = count.sum()
        count = count[count.sum(axis=1) >= LEAST_CELLS]
        if count.empty:
            continue
        a, b = count[start].to_numpy(), count[end].to_numpy()
        p_C = _fisher(a, b, int(total[start]), int(total[end]))
        table = pd.DataFrame(
            {
                "patient": patient,
                "from": start,
                "to": end,
                CLONE: count.index,
                "n_from": a,
                "n_to": b,
                "fraction_from": a / total[start],
                "fraction_to": b / total[end],
                "limit_from": detection_limit(int(total[start])),
                "limit_to": detection_limit(int(total[end])),
                "p": p_C,
                "q": _discovery_rate(p_C),
            }
        )
        table["call"] = [
            _call(n, m, up=f < g, sure=q < alpha)
            for n, m, f, g, q in zip(a, b, table["fraction_from"], table["fraction_to"], table["q"], strict=True)
        ]
        for which, time in (("from", start), ("to", end)):
            states = (
                pair[pair[TIME] == time].dropna(subset=[STATE]).groupby([CLONE, STATE]).size().reset_index(name="n")
            )
            top = states.sort_values(["n", STATE], ascending=[False, True]).drop_duplicates(CLONE).set_index(CLONE)
            table[f"state_{which}"] = top[STATE].reindex(table[CLONE]).fillna("").to_numpy()
        tables.append(table.sort_values(["q", "n_to", CLONE], ascending=[True, False, True]))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["patient", "from", "to", CLONE])


def _call(n_from: int, n_to: int, *, up: bool, sure: bool) -> str:
    if not n_from:
        return "new" if sure else "new or missed"
    if sure:
        return "expanding" if up else "contracting"
    return "stable" if n_to else "not seen"


def _fisher(a_C: NDArray[np.integer], b_C: NDArray[np.integer], total_a: int, total_b: int) -> Floats:
    from scipy.stats import fisher_exact

    pairs, place = np.unique(np.stack([a_C, b_C], axis=1), axis=0, return_inverse=True)
    p = [fisher_exact([[a, total_a - a], [b, total_b - b]]).pvalue for a, b in pairs.tolist()]
    return np.array(p, dtype=np.float64)[place.ravel()]


def _discovery_rate(p_C: Floats) -> Floats:
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.clip(p_C, 0.0, 1.0)), np.float64)


def persistence(found: ClonalCells) -> pd.DataFrame:
    """How many clones are seen again, beside how many would be were every clone as frequent as before.

    A clone's earlier frequency is its share of the cells times Good and Turing's estimate of the share that all clones
    seen have together (Good, Biometrika 40:237, 1953): most clones of one cell are rarer than that cell says.
    """
    rows = []
    for patient, pair, start, end in found.pairs():
        count = pair.groupby([CLONE, TIME]).size().unstack(fill_value=0)
        a, b = count[start].to_numpy(), count[end].to_numpy()
        share_C = a[a > 0] / a.sum() * coverage(a)
        rows.append(
            {
                "patient": patient,
                "from": start,
                "to": end,
                "cells_from": a.sum(),
                "cells_to": b.sum(),
                "clones_from": (a > 0).sum(),
                "clones_to": (b > 0).sum(),
                "seen_again": ((a > 0) & (b > 0)).sum(),
                "expected_seen_again": float((1.0 - (1.0 - share_C) ** b.sum()).sum()),
                "cells_from_seen_again": a[b > 0].sum() / a.sum(),
                "cells_to_seen_before": b[a > 0].sum() / b.sum(),
                "limit_from": detection_limit(int(a.sum())),
                "limit_to": detection_limit(int(b.sum())),
                "note": f"a clone below {detection_limit(int(b.sum())):.2%} of the cells at {end} may have been missed "
                "there: not seen is not lost",
            }
        )
    return pd.DataFrame(rows)


def coverage(count_C: NDArray[np.integer]) -> float:
    """Share of the patient's cells that are of the clones seen: one minus the share of clones of one cell."""
    return float(1.0 - (count_C == 1).sum() / count_C.sum())


def sharing(found: ClonalCells) -> pd.DataFrame:
    """Clones that two states of a time point have in common: number, Jaccard index, and Morisita-Horn overlap.

    Morisita-Horn compares frequencies (Horn, Am Nat 100:419, 1966): 1 where two states hold the same clones in the same
    proportions, 0 where they share none.
    """
    rows = []
    for patient in found.patients():
        own, times = found.of(patient)
        known = own.dropna(subset=[CLONE, STATE])
        for time in times:
            count = known[known[TIME] == time].groupby([CLONE, STATE]).size().unstack(fill_value=0)
            for one, other in combinations(sorted(count.columns), 2):
                x_C, y_C = count[one].to_numpy(np.float64), count[other].to_numpy(np.float64)
                both, any_ = int(((x_C > 0) & (y_C > 0)).sum()), int(((x_C > 0) | (y_C > 0)).sum())
                rows.append(
                    {
                        "patient": patient,
                        TIME: time,
                        "state": one,
                        "other_state": other,
                        "clones": int((x_C > 0).sum()),
                        "other_clones": int((y_C > 0).sum()),
                        "shared": both,
                        "jaccard": both / any_,
                        "morisita_horn": morisita_horn(x_C, y_C),
                    }
                )
    return pd.DataFrame(rows)


def morisita_horn(x_C: Floats, y_C: Floats) -> float:
    """Overlap of two sets of clone sizes, 0 to 1."""
    x, y = x_C / x_C.sum(), y_C / y_C.sum()
    return float(2.0 * (x * y).sum() / ((x**2).sum() + (y**2).sum()))


def transitions(found: ClonalCells) -> pd.DataFrame:
    """From which state to which the clones seen at both time points went; every clone weighs one.

    ``weight`` is the sum over clones of the share of its cells in ``state_from`` times that in ``state_to`` later;
    ``probability`` is over all later states, with a 95% interval as of `fraction_interval`; ``expected`` is what it
    would be if a clone's later state had nothing to do with its earlier one. A clone is followed, not a cell: that one
    state gave rise to the other is likely where ``probability`` exceeds ``expected``, and shown by nothing here.
    """
    states, tables = found.states(), []
    for patient, pair, start, end in found.pairs():
        known = pair.dropna(subset=[STATE])
        share = {time: _state_shares(known[known[TIME] == time], states) for time in (start, end)}
        both = share[start].index.intersection(share[end].index)
        if not len(both):
            continue
        a_CS, b_CS = share[start].loc[both].to_numpy(), share[end].loc[both].to_numpy()
        weight_SS, n_SS = a_CS.T @ b_CS, (a_CS > 0).T.astype(float) @ (b_CS > 0)
        row_S = weight_SS.sum(1, keepdims=True)
        low, high = fraction_interval(weight_SS, np.broadcast_to(row_S, weight_SS.shape), len(states))
        expected_S = b_CS.mean(0)
        for i, j in zip(*np.nonzero(row_S * expected_S > 0), strict=True):
            tables.append(
                {
                    "patient": patient,
                    "from": start,
                    "to": end,
                    "state_from": states[i],
                    "state_to": states[j],
                    "clones": int(n_SS[i, j]),
                    "weight": weight_SS[i, j],
                    "probability": weight_SS[i, j] / row_S[i, 0],
                    "low": low[i, j],
                    "high": high[i, j],
                    "expected": expected_S[j],
                }
            )
    return pd.DataFrame(tables)


def _state_shares(cells: pd.DataFrame, states: list[str]) -> pd.DataFrame:
    """Share of each clone's cells in each state."""
    count = cells.groupby([CLONE, STATE]).size().unstack(fill_value=0).reindex(columns=states, fill_value=0)
    return count.div(count.sum(axis=1), axis=0)


def flow(found: ClonalCells) -> pd.DataFrame:
    """Composition over states at each time point of each patient, with 95% intervals."""
    states, tables = found.states(), []
    for patient in found.patients():
        own, times = found.of(patient)
        for time in times:
            seen = own.loc[own[TIME] == time, STATE].value_counts().reindex(states, fill_value=0)
            count_S = np.asarray(seen, np.float64)
            low, high = fraction_interval(count_S, np.full(len(states), count_S.sum()), len(states))
            values: Mapping[str, Any] = {
                "n_cells": count_S.astype(np.int64),
                "fraction": count_S / max(count_S.sum(), 1),
            }
            table = pd.DataFrame({"patient": patient, TIME: time, STATE: states, **values, "low": low, "high": high})
            tables.append(table)
    return pd.concat(tables, ignore_index=True)
