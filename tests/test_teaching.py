"""Which calibration folds teach how sure labels are: those with labels of one axis on both sides, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import config_of, counts_of, obs_of, tiny_bundle, write_store

from carvae.data.split import PatientSplit
from carvae.labels.tree import AxisLabels, EncodedLabels, LabelTree
from carvae.model.card import write_card
from carvae.model.cohort import Cohort
from carvae.model.teaching import MIN_TAUGHT, taught, teaching_folds, uncalibrated
from carvae.model.witness import learn, measure, usual_shares, witness

SIZE = 2 * MIN_TAUGHT
STATES = ("x", "y")
PATIENTS = ("P1", "P2", "P3", "P4")


def obs(study: tuple[str, ...] = ("s",) * 4) -> pd.DataFrame:
    return pd.DataFrame({"patient": np.repeat(PATIENTS, SIZE), "study": np.repeat(study, SIZE)})


def axis(name: str, *labelled: str, weak: tuple[str, ...] = (), only: int = SIZE, coarse: bool = False) -> AxisLabels:
    """Labels of the first ``only`` cells of some patients, in turn of two states; ``weak`` ones are of signatures."""
    patient, place = np.repeat(PATIENTS, SIZE), np.tile(np.arange(SIZE), 4)
    bears = np.isin(patient, [*labelled, *weak]) & (place < only)
    allowed = np.array([[True, True, False], [False, True, True]]) if coarse else np.eye(2, dtype=np.bool_)
    code = np.where(bears, place % 2, -1).astype(np.int32)
    return AxisLabels(name, code, allowed, np.isin(patient, weak) & bears)


def held(folds: list[PatientSplit]) -> set[tuple[str, ...]]:
    return {fold.validation_patients for fold in folds}


@pytest.mark.parametrize("n_folds", [2, 3, 4, 10])
def test_labels_of_one_patient_teach_nothing_of_confidence(n_folds: int) -> None:
    labels = EncodedLabels((axis("state", "P2"),))
    assert teaching_folds(obs(), labels, n_folds) == []
    said = uncalibrated(labels, [])
    assert "how sure labels of state are cannot be learned" in said
    assert "labels of at least two patients" in said


def test_a_network_without_labels_is_not_trained() -> None:
    """One patient's few labels teach no network, but two patients' together do."""
    labels = EncodedLabels((axis("state", "P1", "P2", "P3"),))
    labels.axes[0].code[SIZE : 3 * SIZE][np.tile(np.arange(SIZE), 2) >= MIN_TAUGHT // 2] = -1
    assert held(teaching_folds(obs(), labels, 2)) == {("P1",), ("P2", "P3", "P4")}
    labels.axes[0].code[2 * SIZE :] = -1  # of the second ten labels are left
    assert teaching_folds(obs(), labels, 2) == []


def test_two_labelled_patients_are_held_out_apart_however_many_weak_labels_others_have() -> None:
    """By all labels the two would both go to one group, and no network would see an author's label and meet others."""
    labels = EncodedLabels((axis("state", "P1", "P2", weak=("P3", "P4"), only=MIN_TAUGHT),))
    labels.axes[0].code[2 * SIZE :] = 0
    labels.axes[0].weak[2 * SIZE :] = True
    folds = teaching_folds(obs(), labels, 2)
    assert len(folds) == 2
    for fold in folds:
        assert {"P1", "P2"} & set(fold.validation_patients) != {"P1", "P2"}
        assert taught(labels, fold.train) == ("state",)
    assert not uncalibrated(labels, folds)


def test_both_labelled_patients_in_one_group_teach_nothing() -> None:
    labels = EncodedLabels((axis("state", "P1", "P2"),))
    rows = np.arange(4 * SIZE)
    together = [PatientSplit(rows[2 * SIZE :], rows[: 2 * SIZE], ("P1", "P2"))]
    together.append(PatientSplit(rows[: 2 * SIZE], rows[2 * SIZE :], ("P3", "P4")))
    assert [taught(labels, fold.train) for fold in together] == [(), ("state",)]
    assert uncalibrated(labels, together)


def test_studies_are_held_out_where_several_have_labels_and_patients_where_one_has() -> None:
    studies = ("a", "a", "b", "b")
    both = EncodedLabels((axis("state", "P1", "P2", "P3"),))
    assert held(teaching_folds(obs(studies), both, 3)) == {("a",), ("b",)}
    one = EncodedLabels((axis("state", "P1", "P2"),))
    assert {"P1", "P2"} <= {name for fold in teaching_folds(obs(studies), one, 4) for name in fold.validation_patients}
    apart = EncodedLabels((axis("state", "P1", "P2"), axis("phase", "P3", "P4")))  # no study tests the other
    folds = teaching_folds(obs(studies), apart, 4)
    assert held(folds) == {(name,) for name in PATIENTS}
    assert not uncalibrated(apart, folds)


def test_an_axis_of_one_patient_is_named() -> None:
    labels = EncodedLabels((axis("state", *PATIENTS), axis("phase", "P3")))
    folds = teaching_folds(obs(), labels, 4)
    assert len(folds) == 4
    assert "how sure labels of phase are" in uncalibrated(labels, folds)
    assert taught(labels, folds[[f.validation_patients for f in folds].index(("P3",))].train) == ("state",)


@pytest.mark.parametrize("labels", [axis("state", weak=PATIENTS), axis("state", *PATIENTS, coarse=True)])
def test_weak_or_coarse_labels_alone_teach_novelty_and_no_confidence(labels: AxisLabels) -> None:
    folds = teaching_folds(obs(), EncodedLabels((labels,)), 4)
    assert len(folds) == 4
    said = uncalibrated(EncodedLabels((labels,)), folds)
    assert "no sets of states" in said
    assert "unknown" not in said


@given(st.lists(st.sets(st.sampled_from(PATIENTS)), min_size=1, max_size=2), st.integers(2, 5))
def test_folds_teach_exactly_where_two_patients_bear_labels_of_an_axis(labelled: list[set[str]], n_folds: int) -> None:
    labels = EncodedLabels(tuple(axis(f"a{i}", *names) for i, names in enumerate(labelled)))
    folds = teaching_folds(obs(), labels, n_folds)
    if len(labelled) == 1:
        assert bool(folds) == (len(labelled[0]) > 1)
    assert all(taught(labels, fold.train) for fold in folds)
    assert not folds or any(len(names) > 1 for names in labelled)


# -- what witnesses make of it


def cohort_of(folder: Path, labelled: tuple[str, ...]) -> Cohort:
    """Four patients, the cells of some of whom bear labels."""
    cells = obs_of(dict.fromkeys(PATIENTS, SIZE))
    cells["label"] = np.where(cells["patient"].isin(labelled), np.array(STATES)[np.arange(len(cells)) % 2], "")
    return Cohort.assemble(write_store(folder / "store.zarr", counts_of(len(cells)), cells), config_of())


def split_of(cohort: Cohort, *names: str) -> PatientSplit:
    out = cohort.obs["patient"].astype(str).isin(names).to_numpy()
    return PatientSplit(np.flatnonzero(~out), np.flatnonzero(out), names)


def test_a_network_that_saw_no_label_is_no_witness(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, ("P2",))
    network = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network
    rng = np.random.default_rng(0)
    seen = [witness(network, cohort, split_of(cohort, *names), (), rng) for names in (("P2",), ("P1", "P3", "P4"))]
    assert [w.axes for w in seen] == [(), ("state",)]
    assert not any(w.cells.known_N.any() for w in seen)
    assert (seen[0].cells.truth["state"] == -1).all()
    assert seen[0].cells.whole_N.all(), "cells that teach nothing are not looked at again with fewer counts"
    assert learn(seen, seen[1].reference, 0.05) is None
    assert measure(seen, 0.05) == {}


def test_a_witness_without_labels_changes_nothing_that_others_teach(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, ("P1", "P2", "P3"))
    blank = cohort_of(tmp_path / "blank", ("P1",))
    network = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network
    good = [
        witness(network, cohort, split_of(cohort, name), (), np.random.default_rng(i))
        for i, name in enumerate(("P2", "P3"))
    ]
    bad = witness(network, blank, split_of(blank, "P1"), (), np.random.default_rng(9))
    assert bad.axes == ()
    with_it, without = (learn(seen, good[0].reference, 0.1) for seen in ([*good, bad], good))
    assert with_it is not None
    assert without is not None
    for name, array in without.tensors().items():
        np.testing.assert_array_equal(with_it.tensors()[name], array, name)
    assert with_it.n_samples == without.n_samples == 2, "limits are of the labelled samples"
    leaves = {"state": STATES}
    assert usual_shares([*good * 3, bad], with_it, leaves) == usual_shares(good * 3, with_it, leaves)


def test_the_card_says_that_confidence_is_not_calibrated(tmp_path: Path) -> None:
    made = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4})
    card = write_card(made)
    assert "## How sure it is" in card
    assert "**Its confidence is not calibrated**" in card
    assert "softmax probability as trained" in card
    cohort = cohort_of(tmp_path, PATIENTS)
    seen = [
        witness(made.network, cohort, split_of(cohort, name), (), np.random.default_rng(i))
        for i, name in enumerate(PATIENTS)
    ]
    made.trust, made.metrics = learn(seen, seen[0].reference, 0.1), {"trust": measure(seen, 0.1)}
    card = write_card(made)
    assert "not calibrated" not in card
    assert "Each group of the 4 held-out patients" in card
    assert "not calibrated" not in write_card(tiny_bundle(None)), "a model without labels has no confidence"
