"""The attack on patients: a half where training leaves no trace, one where it does, and members told from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_witness import IDENTITY, STATES, cohort_of, split_of
from tiny import GENES, tiny_bundle

from carvae.labels.tree import LabelTree
from carvae.model.membership import Faced, face, membership
from carvae.model.trust import Trust
from carvae.model.witness import learn, witness

PATIENTS = tuple(f"P{p}" for p in range(8))


def faced_of(trace: float, folds: int = 8, seed: int = 0) -> list[Faced]:
    """Networks that find patients as hard as they are, and members ``trace`` easier."""
    hard = np.random.default_rng(seed).normal(size=len(PATIENTS))
    found = []
    for k in range(folds):
        member = np.arange(len(PATIENTS)) % folds != k
        loss = np.repeat(hard - trace * member, 3).astype(np.float32)
        loss[0] = np.nan  # a cell without a label
        n, name = loss.size, np.repeat(np.array(PATIENTS, object), 3)
        sure = np.exp(-np.nan_to_num(loss))
        found.append(Faced(name, np.repeat(member, 3), loss, sure, np.zeros((n, 3)), np.full(n, 500.0), np.ones(n)))
    return found


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    cohort = cohort_of(tmp_path)
    network = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network
    folds = [split_of(cohort, held) for held in (("P1", "P4"), ("P2", "P3"))]
    seen = [witness(network, cohort, fold, IDENTITY, np.random.default_rng(k)) for k, fold in enumerate(folds)]
    found = learn(seen, seen[0].reference, 0.1)
    assert found is not None
    return found


@pytest.mark.parametrize("folds", [2, 4, 8])
def test_patients_who_are_easy_by_themselves_are_no_trace(trust: Trust, folds: int) -> None:
    found = membership(faced_of(0.0, folds), trust, np.random.default_rng(0))["attacks"]
    for name in ("loss", "confidence", "novelty"):
        assert found[name]["auroc"] == pytest.approx(0.5)
        assert found[name]["low"] <= 0.5 <= found[name]["high"]
        assert found[name]["patients"] == len(PATIENTS)


def test_a_trace_is_found_the_more_of_it_the_better(trust: Trust) -> None:
    by = [membership(faced_of(trace), trust, np.random.default_rng(0))["attacks"]["loss"] for trace in (0.3, 1.0, 9.0)]
    aurocs = [attack["auroc"] for attack in by]
    assert 0.5 < aurocs[0] < aurocs[1] < aurocs[2] == 1
    assert by[1]["low"] < by[1]["auroc"] < by[1]["high"]


def test_without_others_there_is_no_attack(trust: Trust) -> None:
    assert membership([], trust, np.random.default_rng(0)) == {}
    alone = faced_of(1.0)[0]
    everyone = Faced(
        alone.patient_N, np.ones_like(alone.member_N), alone.loss_N, alone.confidence_N, alone.view_NT,
        alone.counts_N, alone.overlap_N,
    )  # fmt: skip
    assert membership([everyone], trust, np.random.default_rng(0)) == {}


def test_a_network_faces_members_and_others(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    network = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network
    fold = split_of(cohort, ("P2",))
    reference = witness(network, cohort, fold, IDENTITY, np.random.default_rng(0)).reference
    found = face(network, cohort, fold, reference, np.random.default_rng(1))
    assert set(found.patient_N[~found.member_N]) == {"P2"}
    assert set(found.patient_N[found.member_N]) == {"P1", "P3", "P4"}
    truth = cohort.true_leaf(cohort.tree.axes[0].name)  # type: ignore[union-attr]
    assert np.isnan(found.loss_N).sum() == (truth < 0).sum()  # all cells, since there are few
    said = network.predict(cohort.store.counts()).probability_NS["state"]
    known = truth >= 0
    np.testing.assert_allclose(found.loss_N[known], -np.log(said[known, truth[known]]), rtol=1e-4)
    np.testing.assert_allclose(found.confidence_N, said.max(1), rtol=1e-4)
    assert found.view_NT.shape == (len(truth), 3)


def test_genes_that_some_study_lacks_are_left_out_for_all(tmp_path: Path) -> None:
    """What is expected of them would come on top of their counts in the studies that measured them."""
    measured = np.ones((1, len(GENES)), np.bool_)
    measured[0, 8:] = False
    cohort = cohort_of(tmp_path, measured)
    network = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network
    network.head.completion.get_buffer("share_G").fill_(1 / len(GENES))
    network.head.get_buffer("inverse_depth").fill_(1.0)
    network.head.axes[0].get_buffer("gene_weight_GF").normal_()
    fold = split_of(cohort, ("P2",))
    reference = witness(network, cohort, fold, IDENTITY, np.random.default_rng(0)).reference
    found = face(network, cohort, fold, reference, np.random.default_rng(1))
    counts = cohort.store.counts().multiply(measured).tocsr()
    assert counts.sum() < cohort.store.counts().sum()
    said = network.predict(counts, present_G=measured[0]).probability_NS["state"]
    np.testing.assert_allclose(found.confidence_N, said.max(1), rtol=1e-4)
    np.testing.assert_allclose(found.counts_N, np.asarray(counts.sum(axis=1)).ravel())
