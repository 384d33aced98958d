"""Clones over time, on cells counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from carvae.data.composition import fraction_interval
from carvae.data.tracking import (
    ClonalCells,
    changes,
    coverage,
    detection_limit,
    flow,
    morisita_horn,
    persistence,
    sharing,
    tracked,
    transitions,
)


def cells(*rows: tuple[str, str, str | None, str | None, int]) -> ClonalCells:
    """From (patient, time point, state, clone, how many)."""
    table = [row[:4] for row in rows for _ in range(row[4])]
    frame = pd.DataFrame(table, columns=["patient", "timepoint", "state", "clone"], dtype=object)
    frame["sample"] = frame["patient"] + frame["timepoint"]
    return ClonalCells(frame, ("D0", "D7", "M3"))


FOUND = cells(
    ("p", "D0", "memory", "big", 10),
    ("p", "D0", "effector", "big", 5),
    ("p", "D0", "memory", "shrinks", 32),
    ("p", "D0", "memory", "once", 1),
    ("p", "D0", "memory", None, 52),
    ("p", "D0", None, "mute", 2),
    ("p", "D7", "effector", "big", 60),
    ("p", "D7", "exhausted", "big", 20),
    ("p", "D7", "effector", "shrinks", 1),
    ("p", "D7", "effector", "comes", 19),
    ("p", "M3", "exhausted", "big", 50),
    ("p", "M3", "memory", "later", 1),
    ("q", "D0", "memory", "big", 9),
)


def test_clones_seen_twice_are_in_one_table_with_their_states() -> None:
    table = tracked(FOUND).set_index("clone")
    assert list(table.index) == ["big", "shrinks"], "the largest first; q has one time point"
    big = table.loc["big"]
    assert (big["n_cells"], big["timepoints"], big["n_timepoints"]) == (145, "D0 D7 M3", 3)
    assert (big["first_state"], big["last_state"], big["state_changed"]) == ("memory", "exhausted", "yes")
    assert big["first_states"] == "memory 10, effector 5"
    assert big["first_state_share"] == pytest.approx(2 / 3)
    assert big["first_fraction"] == pytest.approx(15 / 50)
    assert big["last_fraction"] == pytest.approx(50 / 51)
    assert list(tracked(cells(("p", "D0", "x", "a", 3))).columns[:2]) == ["patient", "clone"], "empty, and says of what"


def test_changes_are_those_of_fishers_test() -> None:
    table = changes(FOUND, 0.05)
    first = table[(table["from"] == "D0") & (table["to"] == "D7")].set_index("clone")
    assert first["call"].to_dict() == {"big": "expanding", "shrinks": "contracting", "comes": "new", "mute": "not seen"}
    assert first.loc["big", "p"] == pytest.approx(fisher_exact([[15, 35], [80, 20]]).pvalue)
    assert first.loc["comes", ["state_from", "state_to"]].tolist() == ["", "effector"]
    assert first.loc["comes", "limit_from"] == pytest.approx(detection_limit(50))
    assert (first["q"] >= first["p"] - 1e-12).all()
    assert {*zip(table["from"], table["to"], strict=True)} == {("D0", "D7"), ("D7", "M3"), ("D0", "M3")}
    few = changes(cells(("p", "D0", "x", "a", 20), ("p", "D7", "x", "a", 20), ("p", "D7", "x", "b", 2)), 0.05)
    assert few.set_index("clone")["call"].to_dict() == {"a": "stable", "b": "new or missed"}


def test_a_clone_at_the_limit_is_seen_with_the_probability_that_is_said() -> None:
    for n in (1, 20, 500):
        assert 1 - (1 - detection_limit(n)) ** n == pytest.approx(0.95)
    assert detection_limit(0) == 1


def test_persistence_says_what_was_to_be_expected() -> None:
    row = persistence(FOUND).iloc[0]
    assert (row["clones_from"], row["clones_to"], row["seen_again"]) == (4, 3, 2)
    assert row["cells_from_seen_again"] == pytest.approx(47 / 50)
    assert row["cells_to_seen_before"] == pytest.approx(81 / 100)
    share = np.array([15, 32, 1, 2]) / 50 * (1 - 1 / 50)
    assert row["expected_seen_again"] == pytest.approx((1 - (1 - share) ** 100).sum())
    assert row["note"].startswith("a clone below 2.95% of the cells at D7 may have been missed there")


def test_expected_persistence_holds_where_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    pool = rng.dirichlet(np.full(3000, 0.2))
    both = [np.bincount(rng.choice(3000, 400, p=pool), minlength=3000) for _ in range(2)]
    rows = [("p", time, "x", f"c{i}", int(n)) for time, count in zip(("D0", "D7"), both, strict=True)
            for i, n in enumerate(count) if n]  # fmt: skip
    row = persistence(cells(*rows)).iloc[0]
    assert row["expected_seen_again"] == pytest.approx(row["seen_again"], rel=0.15)
    seen = pool[both[0] > 0].sum()
    assert coverage(both[0]) == pytest.approx(seen, abs=0.06)


def test_sharing_between_states() -> None:
    rows = [("a", "x", 6), ("b", "x", 3), ("b", "y", 3), ("c", "z", 1)]
    found = cells(*(("p", "D0", *row) for row in rows))
    table = sharing(found).set_index(["state", "other_state"])
    assert table.loc[("a", "b"), "shared"] == 1
    assert table.loc[("a", "b"), "jaccard"] == pytest.approx(1 / 2)
    assert table.loc[("a", "b"), "morisita_horn"] == pytest.approx(2 * 0.5 / (1 + 0.5))
    assert table.loc[("a", "c"), "morisita_horn"] == 0
    assert morisita_horn(np.array([2.0, 4]), np.array([1.0, 2])) == pytest.approx(1)


def test_transitions_weigh_every_clone_alike() -> None:
    table = transitions(FOUND)
    first = table[(table["from"] == "D0") & (table["to"] == "D7")].set_index(["state_from", "state_to"])
    assert first["weight"].sum() == pytest.approx(2), "two clones"
    assert first.loc[("memory", "effector"), "weight"] == pytest.approx(2 / 3 * 3 / 4 + 1)
    assert first.loc[("memory", "effector"), "clones"] == 2
    assert first.loc[("effector", "exhausted"), "probability"] == pytest.approx(1 / 4)
    assert first.loc[("memory", "exhausted"), "expected"] == pytest.approx((1 / 4 + 0) / 2)
    assert (first.groupby(level=0)["probability"].sum().round(9) == 1).all()
    assert (first["low"] <= first["probability"]).all()
    assert (first["probability"] <= first["high"]).all()


def test_flow_is_the_composition_with_intervals() -> None:
    table = flow(FOUND).set_index(["patient", "timepoint", "state"])
    assert table.loc[("p", "D0", "memory"), "n_cells"] == 95
    assert table.loc[("p", "D0", "memory"), "fraction"] == pytest.approx(95 / 100)
    assert table.groupby(level=[0, 1])["fraction"].sum().round(9).eq(1).all()


@given(st.integers(2, 12), st.integers(0, 200), st.data())
def test_intervals_hold_the_fraction_and_narrow_with_cells(n_states: int, total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = fraction_interval(np.array([count, 10.0 * count]), np.array([total, 10.0 * total]), n_states)
    if not total:
        assert np.isnan([low, high]).all()
        return
    if 0 < count < total:
        assert low[0] <= count / total <= high[0]
        assert high[1] - low[1] < high[0] - low[0]
    assert 0 <= low.min() <= high.max() <= 1


def test_intervals_cover_as_they_say() -> None:
    """Of 4,000 samples of a composition with rare and common states, 93 in 100 or more intervals hold the truth."""
    rng, truth = np.random.default_rng(0), np.array([0.02, 0.08, 0.2, 0.7])
    count = rng.multinomial(150, truth, 4000).astype(float)
    low, high = fraction_interval(count, np.full_like(count, 150), 4)
    covered = ((low <= truth) & (truth <= high)).mean(axis=0)
    assert (covered > 0.92).all(), covered
    assert (covered < 0.99).all(), covered


def test_one_time_point_has_nothing_to_follow() -> None:
    found = cells(("p", "D0", "x", "a", 3), ("q", "M3", None, None, 2))
    assert not len(tracked(found))
    assert not len(changes(found, 0.05))
    assert not len(persistence(found))
    assert not len(transitions(found))
    assert len(flow(found)) == 2


def test_a_time_point_without_receptors_ends_no_comparison() -> None:
    found = cells(
        ("p", "product", "memory", None, 50),  # no receptors were read of the product and at month 3
        ("p", "D7", "memory", "big", 20),
        ("p", "M3", "memory", None, 30),
        ("p", "M6", "exhausted", "big", 30),
        ("p", "M9", "exhausted", "big", 10),
    )
    found = ClonalCells(found.cells, ("product", "D7", "M3", "M6", "M9"))
    pairs = [(start, end) for _, _, start, end in found.pairs()]
    assert pairs == [("D7", "M6"), ("M6", "M9"), ("D7", "M9")], "the first is the first with clones"
    changed = changes(found, 0.05)
    assert list(zip(changed["from"], changed["to"], changed["n_from"], changed["n_to"], strict=True)) == [
        ("D7", "M6", 20, 30),
        ("M6", "M9", 30, 10),
        ("D7", "M9", 20, 10),
    ]
    assert set(zip(transitions(found)["from"], transitions(found)["to"], strict=True)) == set(pairs)
