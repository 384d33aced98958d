"""Tables of patients: what is read, and what is refused before anything is fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from patients import patients_of, with_cells

from carvae.data.patients import Patients, check_patients, read_patients
from carvae.data.patients import patients_of as from_frame
from carvae.errors import ReadError, SchemaError
from carvae.section_respond import RespondConfig

FRAME = pd.DataFrame(
    {
        "patient": ["a", "b", "c"],
        "outcome": ["CR", "PD", "PR"],
        "fraction naive": [0.1, 0.25, 0.33],
        "n_cells": [100, 200, 150],
        "pfs_months": [12.0, 1.0, 3.0],
        "product": ["x", "y", "x"],
    }
)
LEVELS = (("PD", "SD"), ("PR",), ("CR",))


def read(frame: pd.DataFrame, **settings: Any) -> Patients:
    return from_frame(frame, RespondConfig.model_validate({"levels": LEVELS} | settings))


def test_words_of_the_outcome_become_levels_and_names_decide_what_is_a_feature() -> None:
    found = read(FRAME)
    assert found.outcome_R.tolist() == [2, 0, 1]
    assert found.kind == "ordinal"
    assert found.levels == ("PD/SD", "PR", "CR")
    assert found.columns == ("fraction naive",)
    assert found.set_aside == ("pfs_months",)
    assert set(found.beside) == {"n_cells", "product"}
    assert set(found.study_R) == {"all"}


def test_a_missing_outcome_is_kept_and_not_known() -> None:
    found = read(FRAME.assign(outcome=["CR", None, "not evaluable"]), missing=["not evaluable"])
    assert np.isnan(found.outcome_R).tolist() == [False, True, True]
    assert found.names.tolist() == ["a"]
    assert found.sample_R.size == 3


def test_a_time_to_an_event() -> None:
    frame = FRAME.assign(months=[12.0, 1.0, np.nan], seen=[0, 1, 1])
    found = read(frame, columns={"outcome": "months", "event": "seen"})
    assert found.kind == "time"
    assert found.event_R is not None
    assert found.event_R[:2].tolist() == [False, True]
    assert "seen" not in found.columns


@pytest.mark.parametrize(
    ("changed", "settings", "said"),
    [
        ({"outcome": ["CR", "PD", "MRD"]}, {}, "does not say what 'MRD' is"),
        ({}, {"columns": {"outcome": "response"}}, "'response', which is not there"),
        ({}, {"features": ["pfs_months"]}, "known after it only"),
        ({}, {"features": ["product"]}, "not a column of numbers"),
        ({"fraction naive": [0.1, np.inf, 0]}, {}, "infinite"),
        ({"patient": ["a", None, "c"]}, {}, "1 rows have no patient"),
        ({"patient": ["a", "a", "c"]}, {}, "patient 'a' has the outcomes CR and PD"),
        ({"patient": ["a", "a", "c"], "outcome": ["CR", None, "PD"]}, {}, "CR and missing"),
        ({"patient": ["P 01", "p01", "c"]}, {}, "'P 01' and 'p01' look like one patient"),
        ({"patient": ["a", "a", "c"], "outcome": "CR", "study": ["x", "y", "x"]}, {}, "in several studies"),
        ({"months": [1, 0, 2], "seen": 1}, {"columns": {"outcome": "months", "event": "seen"}}, "positive number"),
        ({"months": [1, 3, 2], "seen": 4}, {"columns": {"outcome": "months", "event": "seen"}}, "0 (censored)"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    changed: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SchemaError, match=said.replace("(", r"\(").replace(")", r"\)")):
        read(FRAME.assign(**changed), **settings)


def test_a_name_that_deceives_can_be_trusted() -> None:
    assert "pfs_months" in read(FRAME, trusted=["pfs_months"]).columns


def test_a_clinical_table_is_joined_by_sample_or_patient(tmp_path: Path) -> None:
    FRAME.drop(columns="outcome").assign(patient=[1, 2, 3]).to_csv(tmp_path / "samples.csv", index=False)
    pd.DataFrame({"patient": [3, 1], "outcome": ["CR", "SD"]}).to_csv(tmp_path / "clinical.csv", index=False)
    settings = {"table": tmp_path / "samples.csv", "clinical": tmp_path / "clinical.csv", "levels": LEVELS}
    found = read_patients(RespondConfig.model_validate(settings))
    assert dict(zip(found.patient_R, found.outcome_R, strict=True)) == pytest.approx(
        {"1": 0.0, "2": np.nan, "3": 2.0}, nan_ok=True
    )


def test_a_clinical_table_of_other_names_is_told_and_not_taken_for_missing_outcomes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features, clinical = tmp_path / "features.csv", tmp_path / "clinical.csv"
    FRAME.drop(columns="outcome").to_csv(features, index=False)
    config = RespondConfig(table=features, clinical=clinical, levels=LEVELS)
    clinical.write_text("patient,outcome\nPT-a,CR\nPT-b,PD\n")
    with pytest.raises(SchemaError, match=r"no patient of .*features.csv is in .*: there they look like 'PT-a', here "):
        read_patients(config)
    clinical.write_text("Patient,outcome\na,CR\n")
    with pytest.raises(SchemaError, match=r"in common; .*clinical.csv has Patient, outcome: call the column alike"):
        read_patients(config)
    clinical.write_text("patient,outcome\na,CR\nb,PD\n")
    assert np.isnan(read_patients(config).outcome_R).tolist() == [False, False, True]
    assert "1 of 3 rows of" in caplog.text


def test_rows_where_a_column_has_another_value_are_left_out(tmp_path: Path) -> None:
    FRAME.assign(day=[7, 7, 30]).to_csv(tmp_path / "t.csv", index=False)
    settings = {"table": tmp_path / "t.csv", "levels": LEVELS, "where": {"day": "7"}}
    found = read_patients(RespondConfig.model_validate(settings))
    assert found.patient_R.tolist() == ["a", "b"]
    assert "day" not in found.columns
    with pytest.raises(SchemaError, match="no row"):
        read_patients(RespondConfig.model_validate(settings | {"where": {"day": "8"}}))


@pytest.mark.parametrize("name", ["nowhere.csv", "."])
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReadError, match=r"respond.table=.* does not exist|cannot be read"):
        read_patients(RespondConfig(table=tmp_path / name))


def test_copies_of_rows_cells_and_clones_are_refused() -> None:
    patients = with_cells(patients_of(6))
    check_patients(patients)
    rows = patients.x_RF.copy()
    rows[1] = rows[0] * (1 + 1e-10)
    with pytest.raises(SchemaError, match="'P01' has the same features as patient 'P00'"):
        check_patients(replace(patients, x_RF=rows))
    cells = [bag.copy() for bag in patients.bags["latent"]]
    cells[4][3] = cells[2][9]
    with pytest.raises(SchemaError, match=r"'P04' shares cells .* with patient 'P02'"):
        check_patients(replace(patients, bags={"latent": tuple(cells)}))
    assert patients.clones is not None
    clones = (*patients.clones[:5], frozenset({"P000"}))
    with pytest.raises(SchemaError, match=r"'P05' shares clones .* with patient 'P00'"):
        check_patients(replace(patients, clones=clones))


def test_patients_of_whom_nothing_was_measured_are_no_copies_of_each_other() -> None:
    patients = patients_of(12)
    rows = patients.x_RF.copy()
    rows[[3, 5, 8]] = np.nan
    check_patients(replace(patients, x_RF=rows))
    rows[1] = rows[0]
    with pytest.raises(SchemaError, match="'P01' has the same features as patient 'P00'"):
        check_patients(replace(patients, x_RF=rows))


def test_an_outcome_that_is_found_by_its_name_is_not_said_to_be_set_aside() -> None:
    frame = FRAME.drop(columns="outcome").assign(response=[1.0, 0.0, np.nan])
    found = read(frame, levels=[["0"], ["1"]])
    assert found.outcome_R.tolist()[:2] == [1, 0]
    assert (found.columns, found.set_aside) == (("fraction naive",), ("pfs_months",))


def test_a_shuffle_deals_outcomes_within_study_and_keeps_patients_whole() -> None:
    patients = patients_of(20, samples=2, seed=3)
    patients.outcome_R[patients.study_R == "s1"] = 1.0
    shuffled = patients.shuffled(np.random.default_rng(0))
    for study in ("s0", "s1"):
        own = patients.study_R == study
        assert sorted(shuffled.outcome_R[own]) == sorted(patients.outcome_R[own])
    assert (shuffled.outcome_R != patients.outcome_R).any()
    assert pd.Series(shuffled.outcome_R).groupby(patients.patient_R).nunique().max() == 1
