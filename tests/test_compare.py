"""Two sides, their honest unit, and the gate."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from trained import World, carvae

from carvae.config import packaged
from carvae.data.composition import fraction_interval
from carvae.data.on_disk import readable_by_others
from carvae.data.sides import first_axis, read_side
from carvae.section_compare import Gate

STATES = ("memory", "effector", "exhausted")


def table(path: Path, patients: int, seed: int = 0, shift: float = 0.0, **columns: Any) -> Path:
    """A table of samples as annotate writes it: one sample per patient unless columns say otherwise."""
    rng = np.random.default_rng(seed)
    share = np.array([0.4 + shift, 0.4 - shift, 0.2])
    n = 400
    count = np.array([rng.multinomial(n, rng.dirichlet(60 * share)) for _ in range(patients)])
    frame = pd.DataFrame({"sample": [f"s{seed}_{i}" for i in range(patients)]})
    frame["patient"] = [f"p{i}" for i in range(patients)]
    frame["n_cells"], frame["n_cells_used"], frame["mean_confidence"] = n + 20, n, rng.uniform(0.7, 0.8, patients)
    for i, state in enumerate(STATES):
        frame[f"fraction {state}"] = count[:, i] / n
        low, high = fraction_interval(count[:, i], np.full(patients, n), len(STATES))
        frame[f"low fraction {state}"], frame[f"high fraction {state}"] = low, high
    frame["fraction LAG3+"], frame["mean score_memory"] = rng.uniform(0.2, 0.3, patients), rng.uniform(size=patients)
    frame["model"] = "abc"
    for name, values in columns.items():
        frame[name.replace("__", " ")] = values
    frame.to_csv(path, index=False)
    return path


def compared(a: Path, b: Path, out: Path, *more: object) -> tuple[int, pd.DataFrame, dict[str, Any]]:
    answer = carvae("compare", a, b, "--out", out, *more)
    assert answer.code in {0, 4}, answer.err
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return answer.code, pd.read_csv(out / "compare.csv").set_index("figure"), metrics


def gate_of(path: Path, **gate: Any) -> Path:
    path.write_text(yaml.safe_dump(gate), encoding="utf-8")
    return path


def test_one_sample_a_side_speaks_for_its_cells(tmp_path: Path) -> None:
    a, b = table(tmp_path / "a.samples.csv", 1), table(tmp_path / "b.samples.csv", 1, seed=1, shift=0.2)
    _, found, metrics = compared(a, b, tmp_path / "out")
    first = pd.read_csv(a).iloc[0]
    row = found.loc["fraction memory"]
    assert (row["a"], row["a_low"], row["a_high"]) == pytest.approx(
        (first["fraction memory"], first["low fraction memory"], first["high fraction memory"])
    )
    assert row["difference"] == pytest.approx(row["b"] - row["a"])
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert (row["interval_over"], found.loc["mean score_memory", "interval_over"]) == ("cells", "none")
    assert np.isnan(found.loc["mean score_memory", "a_low"])
    ends = {"low__mean__score_memory": 0.1, "high__mean__score_memory": 0.9}
    for path in (a, b):  # as tables have it that say how far the mean may be off
        table(path, 1, seed=path == b, **ends, mean_confidence_low=0.69, mean_confidence_high=0.81)
    _, found, _ = compared(a, b, tmp_path / "out")
    for figure in ("mean score_memory", "mean_confidence"):
        assert found.loc[figure, "interval_over"] == "cells"
        assert found.loc[figure, "difference_low"] < found.loc[figure, "difference"]
    assert found.loc["fraction LAG3+", "interval_over"] == "cells"
    assert found["p"].isna().all()
    assert "say nothing of other patients" in metrics["notes"][0]
    assert found.loc["fraction_unknown", "a"] == pytest.approx(20 / 420)


def test_samples_of_one_patient_are_one_unit(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 3, patient="one")
    b = table(tmp_path / "b.samples.csv", 2, seed=1, patient="two")
    _, found, metrics = compared(a, b, tmp_path / "out")
    assert metrics["unit"] == "patient"
    assert found.loc["fraction memory", "n_a"] == 1
    assert found.loc["fraction memory", "interval_over"] == "cells"
    assert found.loc["fraction memory", "a"] == pytest.approx(pd.read_csv(a)["fraction memory"].mean())
    _, found, metrics = compared(a, b, tmp_path / "out", "compare.unit=sample")
    assert metrics["unit"] == "sample"
    assert found.loc["fraction memory", "n_a"] == 3
    assert found.loc["fraction memory", "interval_over"] == "units"


def test_the_same_patients_are_compared_with_themselves(tmp_path: Path) -> None:
    a, b = table(tmp_path / "a.samples.csv", 4), table(tmp_path / "b.samples.csv", 4, seed=1, shift=0.2)
    _, found, metrics = compared(a, b, tmp_path / "out")
    difference = pd.read_csv(b)["fraction memory"] - pd.read_csv(a)["fraction memory"]
    row = found.loc["fraction memory"]
    assert row["interval_over"] == "pairs"
    assert row["difference"] == pytest.approx(difference.mean())
    half = 3.182446 * difference.std() / 2  # Student's t of 3 degrees
    assert row["difference_high"] - row["difference"] == pytest.approx(half, rel=1e-5)
    assert 0 < metrics["composition"]["p"] <= 1
    assert (found["q"].dropna() >= found["p"].dropna()).all()
    _, apart, _ = compared(a, b, tmp_path / "out", "compare.paired=false")
    assert apart.loc["fraction memory", "interval_over"] == "units"


def test_sides_change_places(tmp_path: Path) -> None:
    for n_a, n_b in ((1, 1), (4, 4), (5, 3), (1, 5)):
        a = table(tmp_path / "a.samples.csv", n_a)
        b = table(tmp_path / "b.samples.csv", n_b, seed=1, shift=0.1)
        _, there, _ = compared(a, b, tmp_path / "out", "compare.paired=false")
        _, back, _ = compared(b, a, tmp_path / "out", "compare.paired=false")
        np.testing.assert_allclose(there["difference"], -back["difference"], atol=1e-12)
        np.testing.assert_allclose(there["difference_low"], -back["difference_high"], atol=1e-12)
        np.testing.assert_allclose(there["a_low"], back["b_low"], atol=1e-12)


def test_one_lot_against_a_history(tmp_path: Path) -> None:
    history = table(tmp_path / "history.samples.csv", 6)
    lot = table(tmp_path / "lot.samples.csv", 1, seed=1, shift=0.3, patient="new", fraction__memory=0.95)
    _, found, metrics = compared(history, lot, tmp_path / "out")
    row = found.loc["fraction memory"]
    assert row["interval_over"] == "one against several"
    assert row["difference_low"] > 0  # it is not one more of them
    assert row["p"] < 0.05
    assert metrics["composition"]["p"] == pytest.approx(1 / 7)


def test_a_lot_is_compared_with_the_others_of_its_file(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 5)
    _, found, metrics = compared(a, a, tmp_path / "out", "compare.b.sample=s0_2")
    assert metrics["a"]["samples"] == ["s0_0", "s0_1", "s0_3", "s0_4"]
    assert metrics["b"]["samples"] == ["s0_2"]
    others = pd.read_csv(a).drop(index=2)
    assert found.loc["fraction memory", "a"] == pytest.approx(others["fraction memory"].mean())
    assert any("left out there" in note for note in metrics["notes"])


def test_clones_at_other_depths_are_not_compared(tmp_path: Path) -> None:
    clones = {"clone_gini": 0.5, "clone_gini_at_depth": 0.4, "clone_gini_at_depth_low": 0.3}
    clones |= {"clone_gini_at_depth_high": 0.5}
    a = table(tmp_path / "a.samples.csv", 1, clone_depth=100, **clones)
    b = table(tmp_path / "b.samples.csv", 1, seed=1, clone_depth=100, **clones)
    _, found, _ = compared(a, b, tmp_path / "out")
    assert found.loc["clone_gini_at_depth", "interval_over"] == "cells"
    assert "clone_depth" not in found.index
    table(b, 1, seed=1, clone_depth=50, **clones)
    _, found, metrics = compared(a, b, tmp_path / "out")
    assert "clone_gini_at_depth" not in found.index
    assert found.loc["clone_gini", "interval_over"] == "none"
    assert found.loc["clone_gini", ["a", "b"]].tolist() == [0.5, 0.5]
    assert np.isnan(found.loc["clone_gini", "difference"]), "plain figures grow with the cells counted"
    assert any("(50, 100)" in note and "no difference is told" in note for note in metrics["notes"])


def test_a_figure_that_one_side_lacks_is_empty_and_another_state_is_refused(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 1, car_fraction=0.5, car_fraction_low=0.4, car_fraction_high=0.6)
    b = table(tmp_path / "b.samples.csv", 1, seed=1)
    _, found, _ = compared(a, b, tmp_path / "out")
    row = found.loc["car_fraction"]
    assert (row["a"], row["a_low"], row["a_high"]) == (0.5, 0.4, 0.6)
    assert row[["b", "difference", "difference_low"]].isna().all()
    other = pd.read_csv(b).rename(columns=lambda c: c.replace("memory", "naive"))
    other.to_csv(tmp_path / "c.samples.csv", index=False)
    answer = carvae("compare", a, tmp_path / "c.samples.csv", "--out", tmp_path / "no")
    assert answer.code == 1
    assert "label both by one model" in answer.err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("compare.a.batch=1",), "has no column 'batch', which compare.a names"),
        (("compare.b.sample=gone",), "no row with sample 'gone'"),
        (("compare.units=sample",), "compare.units is not a key; the nearest is 'unit'"),
        (("train.lr=1",), "changes nothing here"),
        (("--gate", "gone.yaml"), "the gate 'gone.yaml' does not exist"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    a = table(tmp_path / "a.samples.csv", 2)
    answer = carvae("compare", a, a, "--out", tmp_path / "out", *more)
    assert answer.code == 1
    assert words in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tables_of_samples_are_said(tmp_path: Path) -> None:
    good = table(tmp_path / "a.samples.csv", 2)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "y.h5ad").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("x.csv", "no column 'sample'"),
        ("y.h5ad", "no table of samples beside it (y.samples.csv)"),
        ("empty", "holds no table of samples"),
        ("gone", "does not exist"),
    ):
        answer = carvae("compare", good, tmp_path / name, "--out", tmp_path / "out")
        assert answer.code == 1
        assert words in answer.err


def test_a_folder_is_all_its_tables(tmp_path: Path) -> None:
    (tmp_path / "lots").mkdir()
    for i in range(3):
        table(tmp_path / "lots" / f"{i}.samples.csv", 1, seed=i, patient=f"p{i}")
    side = read_side(tmp_path / "lots", {}, "compare.a", "auto")
    assert len(side.units) == 3
    table(tmp_path / "lots" / "again.samples.csv", 1)
    answer = carvae("compare", tmp_path / "lots", tmp_path / "lots", "--out", tmp_path / "out")
    assert "has sample 's0_0' in two tables" in answer.err


def test_the_states_of_the_first_axis_come_to_one(tmp_path: Path) -> None:
    side = read_side(table(tmp_path / "a.samples.csv", 3), {}, "compare.a", "auto")
    columns = [f"fraction {state}" for state in STATES]
    assert first_axis((side, side), [*columns, "fraction memory", "fraction effector"]) == columns


def test_a_gate_passes_and_fails_by_its_limits(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 4)
    b = table(tmp_path / "b.samples.csv", 2, seed=1, patient=["x", "y"])
    limits = {"fraction_unknown": {"max": 0.1}, "mean_confidence": {"min": 0.5, "within": 0.2}}
    code, _, metrics = compared(a, b, tmp_path / "out", "--gate", gate_of(tmp_path / "g.yaml", limits=limits))
    assert code == 0
    assert metrics["gate"]["passed"]
    checks = pd.read_csv(tmp_path / "out" / "gate.csv")
    assert checks["passed"].all()
    assert len(checks) == 5  # two limits for each of two samples, and that the model is one
    limits["fraction_unknown"] = {"max": 0.04}
    code, _, metrics = compared(a, b, tmp_path / "out", "--gate", gate_of(tmp_path / "g.yaml", limits=limits))
    assert code == 4
    failed = [check for check in metrics["gate"]["checks"] if not check["passed"]]
    assert [check["sample"] for check in failed] == ["s1_0", "s1_1"]
    assert failed[0]["reason"] == "fraction_unknown of sample s1_0 is 0.0476, above 0.04"
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert compared(a, b, tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "gate.csv").exists()


def test_a_gate_may_judge_the_interval_the_mean_and_the_verdict(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 1)
    b = table(tmp_path / "b.samples.csv", 2, seed=1, patient=["x", "y"], verdict=["in range", "out of range"])
    value = pd.read_csv(b)["fraction exhausted"]
    limit = {"fraction exhausted": {"max": float(value.max()) + 1e-6}}
    assert compared(a, b, tmp_path / "o", "--gate", gate_of(tmp_path / "g.yaml", limits=limit))[0] == 0
    strict = gate_of(tmp_path / "g.yaml", limits=limit, judge="interval")
    assert compared(a, b, tmp_path / "o", "--gate", strict)[0] == 4
    middle = {"fraction exhausted": {"max": float(value.mean()) + 1e-6}}
    assert compared(a, b, tmp_path / "o", "--gate", gate_of(tmp_path / "g.yaml", limits=middle))[0] == 4
    mean = gate_of(tmp_path / "g.yaml", limits=middle, of="mean")
    assert compared(a, b, tmp_path / "o", "--gate", mean)[0] == 0
    code, _, metrics = compared(a, b, tmp_path / "o", "--gate", gate_of(tmp_path / "g.yaml", worst_verdict="with care"))
    assert code == 4
    assert [c["reason"] for c in metrics["gate"]["checks"] if not c["passed"]] == [
        "verdict of sample s1_1 is 'out of range'"
    ]
    none = carvae(
        "compare", a, b, "--out", tmp_path / "o", "--gate",
        gate_of(tmp_path / "g.yaml", judge="interval", limits={"mean score_memory": {"min": 0.1}}),
    )  # fmt: skip
    assert none.code == 1
    assert "judge: estimate" in none.err


def test_what_was_not_measured_is_not_kept_and_two_models_are_not_one(tmp_path: Path) -> None:
    a = table(tmp_path / "a.samples.csv", 1, car_fraction=0.5)
    b = table(tmp_path / "b.samples.csv", 1, seed=1, model="other")
    gate = gate_of(tmp_path / "g.yaml", limits={"car_fraction": {"min": 0.2}})
    code, _, metrics = compared(a, b, tmp_path / "o", "--gate", gate)
    assert code == 4
    reasons = [check["reason"] for check in metrics["gate"]["checks"]]
    assert reasons == ["car_fraction of sample s1_0 is not measured", "the sides were labelled by different models"]
    assert "different models" in metrics["notes"][-1]


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"limit": {}}, "limit is not a key; the nearest is 'limits'"),
        ({"limits": {"x": {"mni": 1}}}, "limits.x.mni is not a key; the nearest is 'min'"),
        ({"limits": {"x": {}}}, "a limit needs min, max or within"),
        ({"limits": {"x": {"min": 2, "max": 1}}}, "min 2 is above max 1"),
        ({"limits": {"fraction memry": {"min": 0}}}, "the nearest is 'fraction memory'"),
        ({"judge": "mean"}, "judge"),
        ({}, "the gate has no limits; name at least one figure or a worst_verdict"),
    ],
)
def test_a_wrong_gate_is_refused_before_anything_is_written(tmp_path: Path, gate: dict[str, Any], words: str) -> None:
    a = table(tmp_path / "a.samples.csv", 2)
    answer = carvae("compare", a, a, "--out", tmp_path / "out", "--gate", gate_of(tmp_path / "g.yaml", **gate))
    assert answer.code == 1
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_the_example_gate_is_valid() -> None:
    gate = Gate.read(packaged("gates/release.yaml"))
    assert gate.limits
    assert gate.worst_verdict == "with care"


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_a_file_that_was_filtered_since_has_no_table_any_more(world: World, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"A{ending}"
    assert carvae("annotate", world.query_path, "--model", world.bundle, "--out", out).code == 0
    assert carvae("compare", out, out, "--out", tmp_path / "same").code == 0
    annotated = (ad.read_h5ad if ending == ".h5ad" else ad.read_zarr)(out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    few = annotated[:50].copy()
    with readable_by_others(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr's summary
        few.write_h5ad(out) if ending == ".h5ad" else few.write_zarr(out)
    answer = carvae("compare", tmp_path / "A.samples.csv", out, "--out", tmp_path / "other")
    assert answer.code == 1
    assert f"A{ending} has 50 cells, and A.samples.csv beside it is of {annotated.n_obs:,}; annotate" in answer.err


def test_two_time_points_of_one_annotated_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "A.h5ad"
    assert carvae("annotate", world.query_path, "--model", world.bundle, "--out", out).code == 0
    samples = pd.read_csv(tmp_path / "A.samples.csv")
    assert samples["model"].nunique() == 1
    first, last = sorted(samples["timepoint"].unique())[:: len(samples["timepoint"].unique()) - 1]
    answer = carvae(
        "compare",
        out,
        out,
        f"compare.a.timepoint={first}",
        f"compare.b.timepoint={last}",
        "--out",
        tmp_path / "c",
        "--json",
    )
    assert answer.code == 0, answer.err
    metrics = json.loads(answer.out)
    assert metrics["unit"] == "patient"
    assert metrics["a"]["samples"] == samples["sample"][samples["timepoint"] == first].tolist()
    assert {row["group"] for row in metrics["figures"]} >= {"composition", "sureness", "CAR", "markers", "signatures"}
