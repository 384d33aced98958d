"""The parts of an evaluation: poorer cells, folds, confounding, figures, answers on disk."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from tiny import config_of, counts_of

from carvae.config import Config, EvaluateConfig
from carvae.data.gene_table import ResolvedGenes
from carvae.errors import EvaluateError
from carvae.evaluation import runs
from carvae.evaluation.answers import Answer, answer, key_of, load, points_of, save
from carvae.evaluation.baselines import GeneScaler, gene_logistic, majority, pca_knn
from carvae.evaluation.cells import WHOLE, Cells, Point, Source, thinned
from carvae.evaluation.confounding import identifiability, nesting
from carvae.evaluation.folds import Fold, checked, folds_of, untaught
from carvae.evaluation.results import label_figures
from carvae.evaluation.scores import (
    FIGURES,
    Pooled,
    Tally,
    differences,
    interval,
    method_figures,
    selective,
    weights,
)
from carvae.evaluation.task import Fitted, Said, Task
from carvae.model.metrics import expected_calibration_error

LEAVES = ("A", "B", "C")
N_GENES = 30


def cells_of(truth: list[int], patients: list[str], studies: list[str] | None = None) -> Cells:
    """Cells whose state shows in their counts, from one file."""
    truth_N = np.array(truth, np.int32)
    counts = counts_of(len(truth), N_GENES).toarray()
    for s in range(len(LEAVES)):
        counts[np.ix_(truth_N == s, range(3 * s + 1, 3 * s + 4))] += 30
    names = np.array([f"GENE{i}" for i in range(N_GENES)], dtype=object)
    resolved = ResolvedGenes(names, names, np.full(N_GENES, "symbol", dtype=object))
    source = Source("s", tuple(names), None, resolved, sp.csr_matrix(counts), 0)
    obs = pd.DataFrame({"study": studies or ["s"] * len(truth), "patient": patients})
    obs["sample"], obs["source"] = obs["patient"], "s"
    obs["label"] = [LEAVES[s] if s >= 0 else "" for s in truth]
    return Cells((source,), obs, truth_N, "state", LEAVES, tuple(names), names)


def four_patients() -> Cells:
    truth = [0, 1, 2] * 20 + [-1] * 4
    return cells_of(truth, [f"P{i // 16}" for i in range(64)])


def task_of(cells: Cells, folder: Path, **evaluate: Any) -> Task:
    config = config_of(evaluate=evaluate)
    fold = folds_of("patient", cells, config.evaluate)[0]
    return Task(cells, fold, config, 0, folder, cells.fingerprint)


# --- cells -----------------------------------------------------------------------------------------------------------


@given(st.floats(0.05, 0.95), st.integers(0, 3))
def test_thinned_counts_are_never_more_and_have_the_wanted_depth(share: float, seed: int) -> None:
    counts = counts_of(200, 40, seed)
    found = thinned(counts, Point("depth", share), np.random.default_rng(seed))
    assert (found > counts).nnz == 0
    assert abs(found.sum() / counts.sum() - share) < 0.05
    assert found.nnz == np.count_nonzero(found.toarray())


def test_thinning_to_umis_leaves_shallow_cells_alone() -> None:
    counts = sp.csr_matrix(np.array([[100] * 40, [1] * 40]))
    found = thinned(counts, Point("umi", 400), np.random.default_rng(0))
    assert abs(found[0].sum() - 400) < 80
    assert found[1].sum() == 40


def test_every_method_sees_the_same_poorer_cells() -> None:
    cells, rows = four_patients(), np.arange(10, 30)
    point = Point("depth", 0.3, 1)
    (_, counts), (_, again) = next(cells.seen(rows, point)), next(cells.seen(rows, point))
    assert (counts != again).nnz == 0
    assert (cells.adata(rows, point).X.toarray() == counts.toarray()).all()
    other = next(cells.seen(rows, Point("depth", 0.3, 2)))[1]
    assert (counts != other).nnz


def test_missing_genes_are_absent_for_baselines_and_zero_for_carvae() -> None:
    cells, rows, point = four_patients(), np.arange(20), Point("missing", 0.4)
    gone = cells.gone(point)
    assert len(gone) == 12
    seen = next(cells.seen(rows, point))[1].toarray()
    is_gone = np.array([gene in gone for gene in cells.shared])
    assert not seen[:, is_gone].any()
    assert seen[:, ~is_gone].any()
    assert set(cells.adata(rows, point).var_names) == set(cells.shared) - gone


def test_labels_of_asked_cells_are_hidden() -> None:
    cells = four_patients()
    assert set(cells.adata(np.arange(20)).obs["label"]) == {"Unlabelled"}
    assert set(cells.adata(np.arange(20), labels=True).obs["label"]) == set(LEAVES)


# --- folds -----------------------------------------------------------------------------------------------------------


def test_each_patient_is_held_out_once_and_never_trained_on() -> None:
    cells = four_patients()
    folds = folds_of("patient", cells, EvaluateConfig())
    assert [fold.name for fold in folds] == ["P0", "P1", "P2", "P3"]
    assert sorted(np.concatenate([fold.query for fold in folds])) == list(range(64))
    for fold in folds:
        assert set(cells.patient_N[fold.query]) == {fold.name}
        assert fold.name not in cells.patient_N[fold.train]


def test_a_patient_on_both_sides_fails_the_run(tmp_path: Path) -> None:
    cells = four_patients()
    leaking = Fold("patient", "P0", np.arange(8, 64), np.arange(16))
    with pytest.raises(EvaluateError, match="patient P0 on both sides"):
        checked(leaking, cells)
    config = config_of(output=str(tmp_path / "out"))
    with pytest.raises(EvaluateError, match="P0 on both sides of the split; nothing was scored"):
        runs.run(runs.Plan(config, cells, "x", [leaking], ("majority",)))
    assert not list(tmp_path.rglob("*.npz"))


def test_a_held_out_state_among_the_training_cells_fails_the_run() -> None:
    cells = four_patients()
    with pytest.raises(EvaluateError, match="learns from cells of the state"):
        checked(Fold("state", "A", np.arange(16, 64), np.arange(16), "A"), cells)


def test_held_out_states_are_gone_from_training_and_there_in_the_query() -> None:
    cells = four_patients()
    folds = folds_of("state", cells, EvaluateConfig())
    assert {fold.state for fold in folds} == set(LEAVES)
    for fold in folds:
        code = LEAVES.index(str(fold.state))
        assert (cells.truth_N[fold.train] != code).all()
        assert (cells.truth_N[fold.query] == code).sum() >= 5
        assert (cells.truth_N[fold.query] >= 0).all()


def test_the_study_that_is_labelled_worst_stands_first() -> None:
    cells = cells_of([0, 1] * 30, [f"P{i // 10}" for i in range(60)], ["a"] * 20 + ["b"] * 20 + ["c"] * 20)
    wrong_N = np.isin(np.arange(60), [*range(20, 34), 40, 41])  # most of study b, two cells of study c
    said_NS = np.eye(len(LEAVES), dtype=np.float32)[np.where(wrong_N, 1 - cells.truth_N, cells.truth_N)]
    rest = (np.zeros(60, np.float32), None, None, None, None, None, None, None, {}, 0.0)
    allowed = identifiability(cells, ())
    found = label_figures({"carvae": {0: [Answer(np.arange(60), said_NS, *rest)]}}, cells, allowed, Config())
    per_study = found["methods"]["carvae"]["per_study"]
    assert list(per_study) == ["b", "c", "a"]
    assert [round(study["accuracy"], 2) for study in per_study.values()] == [0.3, 0.9, 1.0]


def test_reference_trains_on_the_named_studies_alone() -> None:
    cells = cells_of([0, 1] * 20, ["P1"] * 20 + ["P2"] * 20, ["x"] * 20 + ["y"] * 20)
    (fold,) = folds_of("reference", cells, EvaluateConfig(reference=("y",)))
    assert (fold.name, fold.train[0], fold.query[-1]) == ("x", 20, 19)


@pytest.mark.parametrize(
    ("design", "cells", "config", "says"),
    [
        ("patient", cells_of([0, 1, 2], ["P1"] * 3), {}, "at least two patients"),
        ("study", four_patients(), {}, "at least two studies"),
        ("state", cells_of([0, 1] * 9, ["P1"] * 18), {}, "one patient alone has labelled cells"),
        ("state", cells_of([0, 1] * 9 + [2] * 9, ["P1", "P1", "P2"] * 6 + ["P1"] * 9), {"hold_out": ("C",)}, "P1"),
        ("patient", four_patients(), {"hold_out": ("P9",)}, "'P9' is none of the patients"),
        ("patient", cells_of([-1] * 4, ["P1", "P2"] * 2), {}, "no cell bears a label"),
        ("reference", four_patients(), {}, "names no study"),
        ("reference", four_patients(), {"reference": ("s",)}, "none is left to label"),
        ("reference", four_patients(), {"reference": ("z",)}, "'z' is none of the studies"),
    ],
)
def test_what_cannot_be_held_out_is_said(design: str, cells: Cells, config: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluateError, match=says):
        folds_of(design, cells, EvaluateConfig(**config))


# --- confounding -----------------------------------------------------------------------------------------------------


def test_states_nested_in_batches_are_not_identifiable() -> None:
    found = identifiability(cells_of([0] * 30 + [1] * 30 + [2] * 30, ["P1"] * 30 + ["P2"] * 30 + ["P3"] * 30), ())
    assert found.scored == ()
    assert found.refused == LEAVES
    assert found.to_dict()["verdict"] == "not identifiable"
    assert found.nestings[0].best_guess == 1.0


def test_a_few_strays_are_no_bridge_between_nested_states() -> None:
    truth = [0] * 100 + [1] * 3 + [1] * 100 + [0] * 2
    assert identifiability(cells_of(truth, ["P1"] * 103 + ["P2"] * 102), ()).scored == ()


def test_small_batches_with_a_stray_each_are_nested_all_the_same() -> None:
    truth = ([0] * 19 + [1]) * 10 + ([1] * 19 + [0]) * 10
    found = identifiability(cells_of(truth, [f"P{i // 20}" for i in range(400)]), ())
    assert found.scored == ()
    assert found.nestings[0].told == pytest.approx(0.9)


def test_small_batches_of_all_states_are_no_nesting() -> None:
    truth = [0, 0, 1, 1, 2, 2, 2, 0] * 5
    assert identifiability(cells_of(truth, [f"P{i // 8}" for i in range(40)]), ()).scored == LEAVES


def test_states_that_meet_in_batches_are_identifiable_though_none_has_all() -> None:
    chain = cells_of([0, 1] * 20 + [1, 2] * 20, ["P1"] * 40 + ["P2"] * 40)
    assert identifiability(chain, ()).scored == LEAVES


def test_only_the_part_that_hangs_together_is_scored() -> None:
    found = identifiability(cells_of([0, 1] * 20 + [2] * 10, ["P1"] * 40 + ["P2"] * 10), ())
    assert found.scored == ("A", "B")
    assert found.refused == ("C",)
    assert "C" in found.sentence


def test_a_state_that_is_rare_everywhere_is_not_taken_for_nested() -> None:
    truth = ([0, 1] * 20 + [2]) * 3
    assert identifiability(cells_of(truth, [f"P{i // 41}" for i in range(123)]), ()).scored == LEAVES


def test_nesting_in_samples_within_a_patient_is_seen() -> None:
    cells = cells_of([0] * 20 + [1] * 20 + [0] * 20 + [1] * 20, ["P1"] * 40 + ["P2"] * 40)
    cells.obs["sample"] = [f"{p}-{s}" for p, s in zip(cells.obs["patient"], cells.truth_N, strict=True)]
    assert identifiability(cells, ("sample",)).scored == ()
    assert nesting(cells.truth_N, cells.obs["patient"].to_numpy(str), LEAVES, "patient").identifiable == ("A", "B")


# --- scores ----------------------------------------------------------------------------------------------------------


def pooled_of(n: int = 200, seed: int = 0, sure: float = 2.0) -> Pooled:
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=n)
    logits = rng.normal(size=(n, 3)) + sure * np.eye(3)[truth]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    patient = np.array([f"P{i % 5}" for i in range(n)], dtype=object)
    return Pooled(truth, probability, patient, probability, probability > 0.2, rng.random(n) < 0.1)


def test_figures_are_those_of_scikit_learn() -> None:
    pooled = pooled_of()
    found = method_figures([pooled], LEAVES, weights(5, np.random.default_rng(0)))
    guess = pooled.probability_NS.argmax(1)
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(pooled.truth_N, guess))
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(pooled.truth_N, guess, average="macro"))
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(pooled.truth_N, guess))
    assert found["ece"]["value"] == pytest.approx(expected_calibration_error(pooled.probability_NS, pooled.truth_N))
    assert found["set_coverage"]["value"] == pytest.approx(pooled.set_NS[np.arange(200), pooled.truth_N].mean())
    assert found["set_size"]["value"] == pytest.approx(pooled.set_NS.sum(1).mean())
    one = pooled.take(pooled.patient_N == "P3")
    expected = accuracy_score(one.truth_N, one.probability_NS.argmax(1))
    assert found["per_patient"]["P3"]["accuracy"] == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), min_size=5, max_size=5).filter(any))
def test_a_weight_is_as_good_as_so_many_copies_of_a_patient(times: list[int]) -> None:
    pooled = pooled_of(60)
    patients = [f"P{i}" for i in range(5)]
    copies = np.concatenate(
        [np.tile(np.flatnonzero(pooled.patient_N == p), t) for p, t in zip(patients, times, strict=True)]
    )
    again = Pooled(*(getattr(pooled, name)[copies.astype(int)] for name in Pooled.__slots__))
    one = np.ones((1, len(set(again.patient_N))))
    for name, (figure, _) in FIGURES.items():
        by_weight = figure(Tally.of(pooled, patients), np.array([times], float))
        by_copy = figure(Tally.of(again, sorted(set(again.patient_N))), one)
        assert by_weight == pytest.approx(by_copy), name


def test_intervals_hold_the_figure_and_few_patients_have_none() -> None:
    weight = weights(5, np.random.default_rng(0))
    found = method_figures([pooled_of()], LEAVES, weight)["accuracy"]
    assert found["low"] < found["value"] < found["high"]
    assert interval(np.array([0.5, 0.4, 0.6]), 2) == {"value": 0.5, "low": None, "high": None}


def test_paired_differences_are_taken_under_the_same_draws() -> None:
    pooled, weight = pooled_of(), weights(5, np.random.default_rng(0))
    same = differences([pooled], {"twin": [pooled]}, weight)["twin"]["accuracy"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    worse = dataclasses.replace(pooled, probability_NS=np.roll(pooled.probability_NS, 1, axis=1))
    assert differences([pooled], {"worse": [worse]}, weight)["worse"]["macro_f1"]["low"] > 0


def test_selective_accuracy_ends_at_accuracy_and_does_not_hang_on_the_order_of_equals() -> None:
    pooled = pooled_of(sure=1.0)
    curve = selective([pooled])
    assert curve["1"] == pytest.approx(pooled.right_N.mean())
    assert curve["0.2"] > curve["1"]
    flat = dataclasses.replace(pooled, probability_NS=np.tile([0.5, 0.3, 0.2], (200, 1)))
    assert set(np.round(list(selective([flat]).values()), 9)) == {round(float(flat.right_N.mean()), 9)}


def test_figures_of_seeds_are_their_mean() -> None:
    weight = weights(5, np.random.default_rng(0))
    parts = [dataclasses.replace(pooled_of(seed=0), probability_NS=pooled_of(seed=s).probability_NS) for s in (0, 1)]
    found = method_figures(parts, LEAVES, weight)["accuracy"]
    assert found["value"] == pytest.approx(np.mean(found["seeds"]))
    assert found["seeds"][0] != found["seeds"][1]


def test_names_that_differ_have_folders_that_differ() -> None:
    rows = np.arange(2)
    files = [Fold("patient", name, rows, rows).file for name in ("P 1", "P_1", "P/1", "患者1", "患者2", "P01")]
    assert len(set(files)) == len(files)
    assert files[-1] == "P01"
    assert not any("/" in file for file in files)


# --- methods and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [gene_logistic, pca_knn])
def test_baselines_learn_what_shows_in_the_counts(method: Any, tmp_path: Path) -> None:
    task = task_of(four_patients(), tmp_path)
    fitted = method(task)
    said = fitted.says(task.fold.query, WHOLE)
    truth = task.cells.truth_N[task.fold.query]
    assert (said.probability_NS.argmax(1) == truth)[truth >= 0].mean() > 0.9
    assert said.probability_NS.sum(1) == pytest.approx(1)


def test_majority_says_the_commonest_state_with_its_share(tmp_path: Path) -> None:
    cells = cells_of([0] * 12 + [1] * 4 + [2] * 16, ["P1"] * 16 + ["P0"] * 16)
    said = majority(task_of(cells, tmp_path)).says(np.arange(16, 18), WHOLE)
    assert said.probability_NS[0] == pytest.approx([0.75, 0.25, 0.0])


def test_a_gene_that_was_not_measured_counts_as_average() -> None:
    cells = four_patients()
    train = cells.adata(np.arange(40))
    scaler = GeneScaler.fit(train, np.ones(N_GENES, np.bool_))
    point = Point("missing", 0.5)
    found = scaler.transform(cells.adata(np.arange(40, 50), point))
    gone = np.array([gene in cells.gone(point) for gene in scaler.genes])
    assert not found[:, gone].any()
    assert np.abs(found[:, ~gone]).max() > 0


def test_an_answer_is_read_back_for_its_own_question_alone(tmp_path: Path) -> None:
    task = task_of(four_patients(), tmp_path, depths=(0.5,), umis=(), missing=(0.3,))
    found = answer(task, "knn", pca_knn)
    assert found.sweep_PLS is not None
    assert found.sweep_PLS.shape == (len(points_of(task.config.evaluate)), 16, 3)
    key = key_of(task, "knn")
    save(found, tmp_path / "a.npz", key)
    again = load(tmp_path / "a.npz", key)
    assert again is not None
    for name in Answer.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    other = [
        dataclasses.replace(task, seed=1),
        dataclasses.replace(task, fingerprint="another"),
        dataclasses.replace(task, fold=folds_of("patient", task.cells, task.config.evaluate)[1]),
        dataclasses.replace(task, config=Config()),
    ]
    keys = [key_of(changed, "knn") for changed in other]
    assert len({key, *keys, key_of(task, "majority")}) == len(keys) + 2
    assert all(load(tmp_path / "a.npz", wrong) is None for wrong in keys)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    assert load(tmp_path / "a.npz", key) is None


def test_carvae_is_asked_anew_when_its_settings_change_and_not_when_a_file_moved(tmp_path: Path) -> None:
    task = task_of(four_patients(), tmp_path)
    slower = dataclasses.replace(task, config=config_of(train={"lr": 1e-3}))
    moved = dataclasses.replace(
        task, config=Config.parse({"ingest": {"studies": {"s": {"path": "elsewhere.h5ad", "label": "label"}}}})
    )
    assert key_of(task, "carvae") == key_of(moved, "carvae") != key_of(slower, "carvae")
    assert key_of(task, "logistic") == key_of(slower, "logistic")


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def slow(task: Task) -> Fitted:
        asked.append(task.fold.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        probability = np.full((1, 3), 1 / 3, np.float32)
        return Fitted(lambda rows, point: Said(np.repeat(probability, rows.size, 0), np.zeros(rows.size, np.float32)))

    monkeypatch.setitem(runs.ALL, "slow", slow)
    cells = four_patients()
    config = config_of(output=str(tmp_path / "out"), evaluate={"depths": (), "umis": (), "missing": ()})
    plan = runs.Plan(config, cells, "x", folds_of("patient", cells, config.evaluate), ("slow",))
    with pytest.raises(KeyboardInterrupt):
        runs.run(plan)
    runs.run(plan)
    assert asked == ["P0", "P1", "P2", "P2", "P3"]
    assert len(runs.collect(plan)["slow"][0]) == 4


def test_processes_are_fewer_where_memory_does_not_suffice() -> None:
    assert runs.processes_for(3, int(1e15)) == 1
    assert runs.processes_for(1, 0) == 1


def test_states_that_a_fold_was_never_taught_are_counted() -> None:
    cells = cells_of([0, 1, 0, 1, 0, 2, 2, -1], ["P1"] * 4 + ["P2"] * 4, ["s"] * 4 + ["t"] * 4)
    rows = np.arange(8)
    folds = [Fold("study", "t", rows[:4], rows[4:]), Fold("study", "s", rows[4:], rows[:4])]
    assert untaught(cells, folds) == {"B": 2, "C": 2}
    assert untaught(cells, [Fold("study", "t", rows[:4], rows[4:5])]) == {}


def _worker(pipe: Connection) -> None:
    runs._start(None)  # type: ignore[arg-type]
    pipe.send("at work")
    threading.Event().wait()


def _parent(pipe: Connection) -> None:
    multiprocessing.get_context("fork").Process(target=_worker, args=(pipe,)).start()
    pipe.close()
    threading.Event().wait()


def test_workers_end_when_their_parent_is_killed() -> None:
    mine, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=_parent, args=(theirs,))
    parent.start()
    theirs.close()
    assert mine.recv() == "at work"
    parent.kill()
    assert mine.poll(60)
    with pytest.raises(EOFError):  # the worker held the other end
        mine.recv()
