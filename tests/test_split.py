"""Splits by patient, never by cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.split import PatientSplit, patient_folds, split_patients


def split(
    sizes: dict[str, int], share: float, labelled: set[str] | None = None, seed: int = 0
) -> tuple[pd.Series[str], PatientSplit]:
    """The patient of each cell, in random order, and the split."""
    patient = pd.Series(np.random.default_rng(9).permutation(np.repeat(list(sizes), list(sizes.values()))))
    known = patient.isin(sizes if labelled is None else labelled).to_numpy()
    return patient, split_patients(patient, known, share, np.random.default_rng(seed))


SIZES = st.dictionaries(st.sampled_from("ABCDEFGHIJ"), st.integers(1, 40), min_size=1)


@given(SIZES, st.floats(0, 1), st.integers(0, 5))
def test_no_patient_is_on_both_sides_and_no_cell_is_lost(sizes: dict[str, int], share: float, seed: int) -> None:
    """Peer fault: cells of one patient on both sides of a split."""
    patient, found = split(sizes, share, seed=seed)
    train, held = set(patient[found.train]), set(patient[found.validation])
    assert not train & held
    assert sorted([*found.train, *found.validation]) == list(range(len(patient)))
    assert held == set(found.validation_patients)
    assert train
    assert bool(held) == (share > 0 and len(sizes) > 1)


@given(SIZES, st.floats(0, 1), st.integers(0, 5))
def test_the_split_is_a_function_of_patients_and_seed(sizes: dict[str, int], share: float, seed: int) -> None:
    _, a = split(sizes, share, seed=seed)
    _, b = split(sizes, share, seed=seed)
    assert np.array_equal(a.train, b.train)
    assert a.validation_patients == b.validation_patients


def test_of_patients_of_very_different_size_the_set_nearest_to_the_share_is_held_out() -> None:
    sizes = {"big": 900, "a": 10, "b": 10, "c": 100, "d": 80}
    _, found = split(sizes, 0.2)
    assert found.validation_patients == ("c",)  # one of five patients; the nearest to 220 cells that is one patient
    even = {f"p{i:02d}": 50 for i in range(40)}
    _, found = split(even, 0.15)
    assert len(found.validation_patients) == 6
    assert found.validation.size == 300


def test_the_share_is_one_of_labelled_cells() -> None:
    sizes = {"a": 10, "b": 200, "c": 10, "d": 10, "e": 10}
    _, found = split(sizes, 0.3, labelled={"a", "c", "d", "e"})
    assert set(found.validation_patients) <= {"a", "b", "c", "d", "e"}
    held = set(found.validation_patients) & {"a", "c", "d", "e"}
    assert len(held) == 1  # 0.3 of four labelled patients


def test_a_patient_without_labels_is_not_held_out_alone() -> None:
    """There would be nothing to score: the unlabelled patient is nearest to 15% of the labelled cells, with none."""
    for seed in range(20):
        _, found = split({"a": 100, "b": 100, "none": 100}, 0.15, labelled={"a", "b"}, seed=seed)
        assert found.validation_patients in {("a",), ("b",)}


def test_the_only_labelled_patient_stays_in_training() -> None:
    for seed in range(20):
        _, found = split({"a": 100, "x": 50, "y": 50}, 0.3, labelled={"a"}, seed=seed)
        assert found.validation_patients in {("x",), ("y",)}


def test_one_patient_or_no_share_holds_nothing_out() -> None:
    for sizes, share in (({"a": 5}, 0.5), ({"a": 5, "b": 5}, 0.0)):
        _, found = split(sizes, share)
        assert found.train.size == sum(sizes.values())
        assert found.validation.size == 0
        assert found.validation_patients == ()


def test_patients_named_by_numbers_or_categories_are_split_alike() -> None:
    patient = pd.Series(np.repeat([1, 2, 3], 10))
    labelled = np.ones(30, np.bool_)
    named: list[Any] = [patient.astype(str), patient, patient.astype(str).astype("category")]
    first, *others = [split_patients(p, labelled, 0.3, np.random.default_rng(0)) for p in named]
    for other in others:
        assert np.array_equal(first.validation, other.validation)
        assert first.validation_patients == other.validation_patients


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(2, 6))
def test_folds_hold_every_cell_out_once_and_no_patient_is_on_both_sides(sizes: list[int], n_folds: int) -> None:
    patient = pd.Series(np.repeat([f"p{i}" for i in range(len(sizes))], sizes))
    folds = patient_folds(patient, np.ones(len(patient), np.bool_), n_folds)
    assert len(folds) == min(n_folds, len(sizes))
    np.testing.assert_array_equal(np.sort(np.concatenate([f.validation for f in folds])), np.arange(len(patient)))
    for fold in folds:
        assert fold.train.size
        assert not set(patient[fold.train]) & set(patient[fold.validation])
        assert set(patient[fold.validation]) == set(fold.validation_patients)
        assert fold.train.size + fold.validation.size == len(patient)


def test_folds_are_of_like_size_in_labelled_cells() -> None:
    sizes = {"a": 100, "b": 90, "c": 60, "d": 50, "e": 300, "unlabelled": 1000}
    patient = pd.Series(np.repeat(list(sizes), list(sizes.values())))
    folds = patient_folds(patient, (patient != "unlabelled").to_numpy(), 2)
    labelled = [int((patient[f.validation] != "unlabelled").sum()) for f in folds]
    assert labelled == [300, 300]


def test_without_any_label_cells_count() -> None:
    sizes = {"a": 30, "b": 30, "c": 20, "d": 20, "e": 100}
    patient, none = pd.Series(np.repeat(list(sizes), list(sizes.values()))), np.zeros(200, np.bool_)
    folds = patient_folds(patient, none, 2)
    assert [f.validation_patients for f in folds] == [("e",), ("a", "b", "c", "d")]
    held = [split_patients(patient, none, 0.2, np.random.default_rng(seed)).validation_patients for seed in range(9)]
    assert set(held) <= {("a",), ("b",)}  # of single patients those nearest to 40 cells


def test_patients_of_the_same_size_are_grouped_by_name_whatever_the_order_of_cells() -> None:
    patient = pd.Series(np.repeat(["d", "b", "a", "c"], 10), index=np.arange(100, 140))
    folds = patient_folds(patient, np.ones(40, np.bool_), 2)
    assert [f.validation_patients for f in folds] == [("a", "c"), ("b", "d")]
    assert folds[0].validation.tolist() == [*range(20, 40)]
