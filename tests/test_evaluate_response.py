"""``carvae evaluate`` of the design ``response``, from a table to its folder, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from patients import patients_of, with_cells
from trained import carvae, write_config

from carvae.errors import LeakError
from carvae.evaluation.response import INCONCLUSIVE, OTHER_WAY, PREDICTS, Run, designs_of, evaluate, scores_of, verdict
from carvae.evaluation.response_figures import calibration, decision_curve
from carvae.evaluation.response_report import why_inconclusive
from carvae.response.choice import CHOSEN
from carvae.response.methods import Method, baselines, linear
from carvae.section_respond import RespondConfig

ROOTS = Path(__file__).resolve().parents[2:4]
DATA = next((r / "shared" / "data" for r in ROOTS if (r / "shared" / "data").exists()), ROOTS[0] / "shared" / "data")
FILES = {"metrics.json", "table.csv", "card.md", "response_methods.png", "response_null.png"}


def table(effect: float, n: int = 48, **columns: Any) -> pd.DataFrame:
    patients = patients_of(n, effect=effect, seed=7)
    frame = pd.DataFrame(patients.x_RF, columns=list(patients.columns))
    frame = frame.assign(patient=patients.patient_R, study=patients.study_R, outcome=patients.outcome_R.astype(int))
    return frame.assign(**columns)


def run(folder: Path, frame: pd.DataFrame, **respond: Any) -> Any:
    frame.to_csv(folder / "table.csv", index=False)
    settings = {"table": str(folder / "table.csv"), "permutations": 20, "repeats": 1} | respond
    config = {"output": str(folder / "out"), "evaluate": {"designs": ["response"]}, "respond": settings}
    return carvae("evaluate", write_config(folder / "c.yaml", config))


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return found


def test_an_effect_is_found_in_studies_held_out_and_written_down(tmp_path: Path) -> None:
    answer = run(tmp_path, table(0.8, n=60, pfs_months=1.0))
    assert answer.code == 0, answer.err
    assert {path.name for path in (tmp_path / "out").iterdir()} > FILES
    metrics = metrics_of(tmp_path)
    headline = metrics["headline"]
    assert headline["design"] == "study"
    assert headline["verdict"] == PREDICTS
    assert 0.5 < headline["auroc"]["low"] < headline["auroc"]["value"] < headline["auroc"]["high"]
    assert headline["p"] == pytest.approx(1 / 21)
    assert set(metrics["designs"]) == {"study", "patient"}
    assert set(metrics["designs"]["study"]["methods"]) == {"carvae", "majority", "features"}
    assert metrics["set_aside"] == ["pfs_months"]
    assert "P00" not in (tmp_path / "out" / "metrics.json").read_text()
    assert "predicts" in (tmp_path / "out" / "card.md").read_text()


def test_where_nothing_predicts_it_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, table(0.0), score="f1").code == 0
    found = metrics_of(tmp_path)["headline"]
    assert found["verdict"] == INCONCLUSIVE
    assert found["sides"] == 2
    assert len(found["null"]) == 2000
    assert found["auroc"]["low"] < 0.5 < found["auroc"]["high"]


@pytest.mark.parametrize(
    ("frame", "respond", "said"),
    [
        (table(0.0, n=12), {}, "too few patients: 6 0, 6 1"),
        (table(0.0).assign(study=lambda f: "s" + f["outcome"].astype(str)), {}, "nested in study"),
        (table(0.0), {"methods": ["feature"]}, "the nearest is 'features'|'features'"),
        (table(0.0), {"table": None}, "respond.table names no file"),
        (table(0.0).assign(copy=lambda f: f["outcome"] * 2.0), {}, "above 0.85.*copy orders patients"),
        (table(9.0), {"trusted": ["f0"]}, "above 0.85.*20 shuffles were made of the 200"),
    ],
)
def test_what_allows_no_honest_figure_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, frame: pd.DataFrame, respond: dict[str, Any], said: str
) -> None:
    import re

    answer = run(tmp_path, frame, **respond)
    assert answer.code == 1
    assert re.search(said, answer.err.splitlines()[-1]), answer.err
    assert not (tmp_path / "out").exists()


def test_a_strong_effect_passes_when_the_checks_do(tmp_path: Path) -> None:
    assert run(tmp_path, table(9.0, n=36), trusted=["f0"], permutations=200, methods=["features"]).code == 0
    checks = metrics_of(tmp_path)["leak_checks"]
    assert checks["shuffles_pass"]
    assert abs(checks["mean_of_shuffles"] - 0.5) < 0.05


def test_it_is_evaluated_alone(tmp_path: Path) -> None:
    config = {"output": str(tmp_path / "out"), "evaluate": {"designs": ["patient", "response"]}}
    answer = carvae("evaluate", write_config(tmp_path / "c.yaml", config))
    assert answer.code == 1
    assert "'response' is evaluated alone" in answer.err


def test_a_leak_that_only_the_protocol_can_see_fails_the_run() -> None:
    patients = with_cells(patients_of(40))
    bags = [bag.copy() for bag in patients.bags["latent"]]
    bags[1][0] = bags[0][0]  # of another study
    config = RespondConfig(permutations=0, repeats=1)
    leaky = Run(replace(patients, bags={"latent": tuple(bags)}), tuple(baselines(patients)), config, 0)
    with pytest.raises(LeakError, match="cell in 'latent'"):
        evaluate(leaky)


def test_the_patients_asked_change_nothing_of_what_is_learned() -> None:
    patients = patients_of(40, effect=1.0)
    run_ = Run(patients, tuple(baselines(patients)), RespondConfig(repeats=1), 0)
    fold = designs_of(run_)["study"][0][0]
    other = patients.x_RF.copy()
    other[fold.held[1:]] *= 50
    level = patients.outcome_R.copy()
    level[fold.held] = 1 - level[fold.held]
    changed = replace(run_, patients=replace(patients, x_RF=other, outcome_R=level))
    first = patients.patient_R[fold.held[0]]
    place = int(np.flatnonzero(patients.names == first)[0])
    scores = [scores_of(r, [[fold]]).by_method[CHOSEN][0][place] for r in (run_, changed)]
    assert scores[0] == scores[1]


def test_shuffled_outcomes_score_a_half_and_seen_ones_would_not() -> None:
    def memory(learn: Any, settings: Any, seed: int) -> Any:
        return [linear(learn.columns)(learn, [50.0], seed)[0] for _ in settings]

    values = []
    for k in range(30):
        patients = patients_of(40, n_features=10, seed=k)
        run_ = Run(patients, (Method("m", memory),), RespondConfig(repeats=1), k)
        scores = scores_of(run_, designs_of(run_)["patient"])
        from carvae.response.pairs import Outcomes, Tally

        values.append(Tally.of(Outcomes.of(patients), scores.by_method["m"]).value)
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("low", "high", "p", "both", "said"),
    [
        (0.55, 0.8, 0.01, False, PREDICTS),
        (0.45, 0.8, 0.01, False, INCONCLUSIVE),
        (0.55, 0.8, 0.06, False, INCONCLUSIVE),
        (0.2, 0.4, 0.01, True, OTHER_WAY),
        (0.2, 0.4, 0.01, False, INCONCLUSIVE),
        (None, None, 0.01, False, INCONCLUSIVE),
        (0.55, 0.8, None, False, INCONCLUSIVE),
    ],
)
def test_predicts_is_blocked_where_chance_is_not_excluded(
    low: float | None, high: float | None, p: float | None, both: bool, said: str
) -> None:
    assert verdict({"value": 0.6, "low": low, "high": high}, p, both_sides=both) == said


def test_what_has_more_than_two_levels_has_no_auroc(tmp_path: Path) -> None:
    frame = table(0.0, n=60, outcome=["SD", "PR", "CR", "CR", "PR"] * 12)
    answer = run(tmp_path, frame, levels=[["SD"], ["PR"], ["CR"]], permutations=1)
    assert answer.code == 0, answer.err
    card = (tmp_path / "out" / "card.md").read_text()
    assert "| method | concordance within study |" in card
    assert "AUROC" not in card
    assert list(pd.read_csv(tmp_path / "out" / "table.csv").columns[:3]) == ["design", "method", "concordance"]


@pytest.mark.parametrize(
    ("low", "high", "shuffles", "why"),
    [
        (0.4, 0.8, 200, "the interval holds 0.5"),
        (0.6, 0.8, 200, "shuffled outcomes do as well too often"),
        (0.6, 0.8, 19, "19 shuffles can show nothing; 20 are the least"),
        (0.6, 0.8, 0, "0 shuffles can show nothing"),
        (0.2, 0.4, 200, "the wrong way round"),
    ],
)
def test_why_nothing_can_be_said_is_the_true_reason(low: float, high: float, shuffles: int, why: str) -> None:
    assert why in why_inconclusive({"low": low, "high": high}, shuffles)
    if shuffles and "can show nothing" not in why:
        return
    best = 1 / (1 + shuffles)  # every shuffle does worse
    assert verdict({"low": low, "high": high}, best, both_sides=False) == INCONCLUSIVE


def test_calibration_of_true_probabilities_is_right_and_of_extreme_ones_is_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(2, 2, 4000)
    y = (rng.random(4000) < p).astype(float)
    good = calibration(p, y)
    assert good["slope"] == pytest.approx(1, abs=0.1)
    assert good["intercept"] == pytest.approx(0, abs=0.1)
    assert good["brier"] == pytest.approx(np.mean((p - y) ** 2))
    assert sum(b["n"] for b in good["bins"]) == 4000
    extreme = calibration(1 / (1 + np.exp(-3 * np.log(p / (1 - p)))), y)
    assert extreme["slope"] == pytest.approx(1 / 3, abs=0.05)
    assert calibration(np.clip(p + 0.2, 0, 1), y)["intercept"] < -0.5


def test_net_benefit_is_that_of_its_formula() -> None:
    p, y = np.array([0.9, 0.8, 0.3, 0.1, np.nan]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    rows = {row["threshold"]: row for row in decision_curve(p, y)}
    assert rows[0.5]["method"] == pytest.approx(1 / 4 - 1 / 4)
    assert rows[0.2]["method"] == pytest.approx(2 / 4 - 0.25 / 4)
    assert rows[0.2]["all"] == pytest.approx(0.5 - 0.25 * 0.5)


@pytest.mark.skipif(not DATA.exists(), reason=f"the public tables are not in {DATA}")
@pytest.mark.parametrize(
    ("respond", "auroc", "n", "p"),
    [
        (
            {
                "table": "deng2020_car_treg_fraction_by_patient.csv",
                "columns": {"patient": "sample", "outcome": "response"},
                "levels": [["CR"], ["PD"]],
                "score": "treg_frac",
            },
            *(0.641, 22, 0.29),
        ),
        (
            {
                "table": "fandrei2024_bcma_tcr_diversity_response.csv",
                "columns": {"outcome": "response_day30"},
                "where": {"timepoint": "Day 30", "lineage": "CD8"},
                "levels": [["SD/PD", "VGPR/PR"], ["CR"]],
                "score": "shannon",
            },
            *(0.644, 39, 0.14),
        ),
    ],
)
def test_two_known_figures_come_out_as_known_and_inconclusive(
    tmp_path: Path, respond: dict[str, Any], auroc: float, n: int, p: float
) -> None:
    respond["table"] = str(DATA / respond["table"])
    config = {"output": str(tmp_path / "out"), "evaluate": {"designs": ["response"]}, "respond": respond}
    answer = carvae("evaluate", write_config(tmp_path / "c.yaml", config))
    assert answer.code == 0, answer.err
    metrics = metrics_of(tmp_path)
    assert metrics["patients"] == n
    assert metrics["headline"]["auroc"]["value"] == pytest.approx(auroc, abs=5e-4)
    assert metrics["headline"]["p"] == pytest.approx(p, abs=0.03)
    assert metrics["headline"]["verdict"] == INCONCLUSIVE
    assert metrics["headline"]["auroc"]["low"] < 0.5 < metrics["headline"]["auroc"]["high"]
    if not metrics["confounding"]:
        assert "What else predicts" not in (tmp_path / "out" / "card.md").read_text()
