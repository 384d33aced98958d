from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.schema import REQUIRED, Harmonised, check_studies, harmonise, inspect_obs, query_obs, query_samples
from carvae.errors import SchemaError


def table(**columns: object) -> pd.DataFrame:
    base = {"sample": ["s1", "s1", "s2"], "patient": ["p1", "p1", "p2"], **columns}
    base = {name: values for name, values in base.items() if values is not None}
    return pd.DataFrame(base, index=["a", "b", "c"])


def test_contract_columns_come_out_typed_and_the_input_is_untouched() -> None:
    obs = table(day=["0", "28", None], n_genes=[1, 2, 3], assay=pd.Categorical(["v2", "v3", "v2"], ["v1", "v2", "v3"]))
    before = obs.copy(deep=True)
    out = harmonise(obs, "A", {"timepoint_days": "day"}, {"tissue": "blood"})
    pd.testing.assert_frame_equal(obs, before)
    assert list(out.index) == ["a", "b", "c"]
    assert list(out.columns) == ["study", "sample", "patient", "timepoint_days", "tissue", "assay"]
    np.testing.assert_array_equal(out["timepoint_days"], [0.0, 28.0, np.nan])
    assert list(out["study"]) == ["A"] * 3
    assert list(out["tissue"]) == ["blood"] * 3
    assert list(out["assay"].cat.categories) == ["v2", "v3"]  # no category that no cell has


@pytest.mark.parametrize(("column", "source"), [("patient", "donor_id"), ("sample", "orig.ident"), ("sample", "Batch")])
def test_one_customary_name_is_taken_and_said(column: str, source: str) -> None:
    obs = table().rename(columns={column: source})
    found = inspect_obs(obs, "A", {}, {})
    assert not found.problems
    assert f"{column} is taken from obs[{source!r}]" in found.notes[0]
    assert list(found.obs[column]) == list(obs[source])


def test_the_contract_name_wins_over_customary_names() -> None:
    found = inspect_obs(table(sample_id=["x", "y", "z"], batch=["1", "2", "3"]), "A", {}, {})
    assert list(found.obs["sample"]) == ["s1", "s1", "s2"]
    assert found.notes == ()


def test_two_customary_names_are_never_guessed_between() -> None:
    obs = table(sample=None, library_id=["l", "l", "m"], batch=["1", "2", "2"])
    with pytest.raises(SchemaError, match=r"'sample': could be any of library_id, batch .*obs: \{sample: library_id\}"):
        harmonise(obs, "A", {}, {})
    query = inspect_obs(obs, "file", {}, {}, require=())
    assert not query.problems
    assert set(query.obs["sample"]) == {"file"}
    assert "could be any of" in query.notes[0]


def test_na_is_the_name_of_a_sample_and_no_name_of_a_patient() -> None:
    obs = table(sample=["NA", "none", None], patient=["p", "NA", "p"])
    found = inspect_obs(obs, "A", {}, {}, require=())
    assert list(found.obs["sample"].astype(object).fillna("missing")) == ["NA", "none", "missing"]
    assert list(found.obs["patient"].astype(object).fillna("missing")) == ["p", "missing", "p"]
    assert [note for note in found.notes if "holds 'NA', 'none' (2), taken as a name of a sample" in note]
    samples, _ = query_samples(obs, "A")
    assert list(samples) == ["NA", "none", "unknown sample"]
    with pytest.raises(SchemaError, match="column 'sample': has missing values"):
        harmonise(obs, "A", {}, {})


def test_all_problems_come_at_once_with_study_column_count_and_remedy() -> None:
    obs = table(patient=["p1", None, "unknown"], day=["0", "D28", "x"], response=["CR", "NR", "CR"])
    with pytest.raises(SchemaError) as caught:
        harmonise(obs, "A", {"timepoint_days": "day", "tissu": "t", "tissue": "organ"}, {"sampel": "x"})
    message = str(caught.value)
    assert "(5 problems)" in message
    assert "study 'A', column 'patient': has missing values (2); fill them" in message
    assert "column 'timepoint_days': is not a number: 'D28', 'x' (2)" in message
    assert "column 'tissue': `obs:` maps it to 'organ', which is missing (3)" in message
    assert "did you mean 'tissue'?" in message
    assert "did you mean 'sample'?" in message


def test_missing_required_columns_are_each_named() -> None:
    with pytest.raises(SchemaError) as caught:
        harmonise(pd.DataFrame(index=["a"]), " ", {}, {})
    for name in REQUIRED:
        assert f"column {name!r}: is missing (1)" in str(caught.value)


def test_a_query_needs_nothing() -> None:
    found = inspect_obs(pd.DataFrame(index=["a", "b"]), "lot7", {}, {}, require=())
    assert not found.problems
    assert list(found.obs["sample"]) == ["lot7", "lot7"]
    assert "patient" not in found.obs
    broken = inspect_obs(table(clone_size=[1, 2.5, -1]), "lot7", {}, {}, require=())
    assert not broken.problems
    assert "clone_size" not in broken.obs
    assert "is not a whole number: '2.5', '-1'" in broken.notes[0]


def test_levels_that_contradict_each_other() -> None:
    response = table(response=["CR", "NR", "CR"])
    with pytest.raises(SchemaError, match=r"1 patient\(s\) have more than one response, for example 'p1': 'CR', 'NR'"):
        harmonise(response, "A", {}, {})
    with pytest.raises(SchemaError, match=r"1 sample\(s\) have more than one patient, for example 's1'"):
        harmonise(table(patient=["p1", "p2", "p2"]), "A", {}, {})
    assert list(harmonise(table(response=["CR", "", "NR"]), "A", {}, {})["response"].isna()) == [False, True, False]


def test_numbers_that_name_patients_are_the_same_text_with_and_without_decimals() -> None:
    assert list(harmonise(table(patient=[1.0, 1.0, 2.0]), "A", {}, {})["patient"]) == ["1", "1", "2"]
    assert list(harmonise(table(patient=[1, 1, 2]), "A", {}, {})["patient"]) == ["1", "1", "2"]


def test_study_column_is_used_only_when_mapped_or_no_name_is_given() -> None:
    obs = table(study=["x", "x", "y"])
    assert set(harmonise(obs, "A", {}, {})["study"]) == {"A"}
    assert "map `study: study`" in inspect_obs(obs, "A", {}, {}).notes[0]
    assert list(harmonise(obs, "A", {"study": "study"}, {})["study"]) == ["x", "x", "y"]
    assert list(harmonise(obs, "", {}, {})["study"]) == ["x", "x", "y"]


def test_a_name_under_both_sections_is_refused() -> None:
    with pytest.raises(SchemaError, match="both under `obs:` and under `constants:`"):
        harmonise(table(), "A", {"patient": "patient"}, {"patient": "p"})


def studies(**patients: list[str]) -> list[Harmonised]:
    return [
        inspect_obs(
            pd.DataFrame({"sample": [f"{name}-{p}" for p in people], "patient": people}, index=list("abc")),
            name,
            {},
            {},
        )
        for name, people in patients.items()
    ]


def test_patients_belong_to_one_study() -> None:
    check_studies(studies(A=["p1", "p2", "p3"], B=["q1", "q2", "q3"]))
    with pytest.raises(SchemaError) as caught:
        check_studies(studies(A=["p1", "p1", "p3"], B=["p1", "q2", "p3"], C=["r", "r", "r"]))
    assert "study 'A + B', column 'patient': 2 patient(s) occur in 2 studies, for example 'p1' (5)" in str(caught.value)


def test_problems_of_all_studies_come_together() -> None:
    broken = inspect_obs(table(patient=None), "D", {}, {})
    twice = studies(A=["p1", "p2", "p3"]) + studies(A=["q1", "q2", "q3"])
    with pytest.raises(SchemaError) as caught:
        check_studies([broken, *twice])
    assert "study 'D', column 'patient': is missing (3)" in str(caught.value)
    assert "study 'A', column 'study': the name is used twice (2)" in str(caught.value)


@given(st.lists(st.one_of(st.none(), st.text(max_size=4), st.integers(-5, 5), st.floats(width=16)), min_size=1))
def test_any_patient_column_is_either_complete_or_refused(values: list[object]) -> None:
    obs = pd.DataFrame({"patient": pd.Series(values, dtype=object), "sample": [str(i) for i in range(len(values))]})
    found = inspect_obs(obs, "A", {}, {})
    missing = int(found.obs["patient"].isna().sum()) if "patient" in found.obs else len(values)
    assert sum(problem.count for problem in found.problems) == missing


def test_cells_without_a_sample_and_names_with_other_spaces_are_told() -> None:
    obs = pd.DataFrame({"sample": ["a", " a", np.nan, "b"], "patient": ["p", "p", "p", "q "]}, index=list("wxyz"))
    table, notes = query_obs(obs, "q", {})
    assert table["sample"].tolist() == ["a", "a", "unknown sample", "b"]
    assert any(
        "obs['sample'] writes 'a' with other spaces around it too, which is taken as one sample" in n for n in notes
    )
    assert any("1 cells have no sample; together they are taken as 'unknown sample'" in note for note in notes)
    assert not any("patient" in note for note in notes)
