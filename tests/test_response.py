"""Pairs, splits, baselines and guards of the prediction of outcomes, against scipy, scikit-learn and lifelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from patients import patients_of, with_cells
from scipy.stats import bootstrap, mannwhitneyu, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from carvae.data.patients import Patients
from carvae.errors import EvaluateError, LeakError
from carvae.response.allowed import Informative, confounding, informative, power, power_at
from carvae.response.choice import chosen
from carvae.response.guards import check_preparation, constants, shuffles_pass, suspicions
from carvae.response.methods import (
    Choice,
    Linear,
    Method,
    asked_in,
    baselines,
    choose,
    inner_folds,
    linear,
    majority,
    ridge_logistic,
)
from carvae.response.pairs import Outcomes, Tally, difference, interval, p_value, weights
from carvae.response.splits import Fold, by_patient, by_study, check_apart, checked, classes, inner

SEED = 5


def outcomes_of(level: list[float], study: list[str] | None = None, event: list[bool] | None = None) -> Outcomes:
    names = np.array([f"p{i}" for i in range(len(level))], dtype=object)
    studies = np.array(study or ["s"] * len(level), dtype=object)
    return Outcomes(names, studies, np.array(level, float), None if event is None else np.array(event))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=30))
def test_for_one_study_and_two_levels_it_is_the_auroc(rows: list[tuple[int, int]]) -> None:
    level, score = (np.array(column, float) for column in zip(*rows, strict=True))
    value = Tally.of(outcomes_of(level.tolist()), [score]).value
    if level.min() == level.max():
        assert np.isnan(value)
    else:
        assert value == pytest.approx(roc_auc_score(level, score))


def test_pairs_are_compared_within_study_and_fold_alone() -> None:
    rng = np.random.default_rng(SEED)
    level, score, study = rng.integers(0, 2, 40), rng.normal(size=40), np.repeat(["a", "b"], 20)
    score[study == "b"] += 100
    outcomes = outcomes_of(level.tolist(), study.tolist())
    u = n = 0.0
    for name in "ab":
        own = study == name
        pairs = level[own].sum() * (1 - level[own]).sum()
        u, n = u + roc_auc_score(level[own], score[own]) * pairs, n + pairs
    assert Tally.of(outcomes, [score]).value == pytest.approx(u / n)
    assert Tally.of(outcomes, [score], apart=True).value == pytest.approx(roc_auc_score(level, score))
    halves = [np.where(np.arange(40) % 2 == k, score, np.nan) for k in range(2)]
    seen = Tally.of(outcomes, halves).seen_PP
    assert not seen[0::2, 1::2].any()
    assert seen.sum() > 0


def test_for_times_it_is_harrells_c() -> None:
    rng = np.random.default_rng(SEED)
    time, event = rng.exponential(size=50), rng.random(50) < 0.6
    score = time + rng.normal(size=50)
    value = Tally.of(outcomes_of(time.tolist(), event=event.tolist()), [score]).value
    assert value == pytest.approx(concordance_index(time, score, event))


def test_levels_in_order_count_every_pair_that_differs() -> None:
    assert Tally.of(outcomes_of([0, 1, 2]), [np.array([1.0, 3.0, 2.0])]).value == pytest.approx(2 / 3)


def test_a_patients_samples_count_once() -> None:
    patients = patients_of(8, samples=3)
    outcomes = Outcomes.of(patients)
    score = outcomes.per_patient(patients, patients.x_RF[:, 0])
    frame = pd.Series(patients.x_RF[:, 0]).groupby(patients.patient_R).mean()
    assert score == pytest.approx(frame.to_numpy())
    missing = np.full(24, np.nan)
    assert np.isnan(outcomes.per_patient(patients, missing)).all()


def test_the_bootstrap_has_the_spread_of_scipys() -> None:
    rng = np.random.default_rng(SEED)
    worse, better = rng.normal(size=30), rng.normal(0.8, 1, 30)

    def auroc(a: Any, b: Any) -> float:
        return float((b[:, None] > a[None]).mean())

    scipys = bootstrap((worse, better), auroc, vectorized=False, n_resamples=1000, method="percentile", rng=rng)
    outcomes = outcomes_of([0.0] * 30 + [1.0] * 30)
    drawn = Tally.of(outcomes, [np.r_[worse, better]]).drawn(weights(outcomes, rng, 1000))
    assert drawn.std() == pytest.approx(scipys.standard_error, rel=0.1)
    assert drawn.mean() == pytest.approx(auroc(worse, better), abs=0.01)


def test_draws_keep_each_studys_classes() -> None:
    outcomes = outcomes_of([0, 1, 0, 1, 1, 0], list("aabbbb"))
    weight = weights(outcomes, np.random.default_rng(0), 50)
    for own in ([0], [1], [2, 5], [3, 4]):
        assert (weight[:, own].sum(1) == len(own)).all()


def test_the_interval_lies_around_the_figure_and_within_its_bounds() -> None:
    rng = np.random.default_rng(SEED)
    narrow, wide = (interval(0.9, np.clip(0.9 + rng.normal(0, sd, 2000), 0, 1)) for sd in (0.02, 0.08))
    for found in (narrow, wide):
        assert 0 < found["low"] < 0.9 < found["high"] < 1  # type: ignore[operator]
    assert narrow["low"] > wide["low"]  # type: ignore[operator]
    assert interval(float("nan"), np.full(2000, np.nan)) == {"value": None, "low": None, "high": None}
    assert interval(1.0, np.full(2000, 1.0))["low"] == 1.0


def test_the_difference_of_a_method_to_itself_is_nothing() -> None:
    outcomes = outcomes_of([0, 1] * 10)
    tally = Tally.of(outcomes, [np.arange(20.0)])
    assert difference(tally, tally, weights(outcomes, np.random.default_rng(0), 100)) == {
        "value": 0,
        "low": 0,
        "high": 0,
    }


def test_the_shuffles_of_a_score_give_the_p_value_of_mann_and_whitney() -> None:
    patients = patients_of(40, n_studies=1, effect=0.5, seed=2)
    score, outcomes = patients.x_RF[:, 0], Outcomes.of(patients)
    value = Tally.of(outcomes, [score]).value
    null = []
    for k in range(1500):
        shuffled = Outcomes.of(patients.shuffled(np.random.default_rng(k)))
        null.append(Tally.of(shuffled, [score]).value)
    exact = mannwhitneyu(score[outcomes.level == 1], score[outcomes.level == 0]).pvalue
    assert p_value(value, np.array(null), both_sides=True) == pytest.approx(exact, abs=0.03)
    assert p_value(2.0, np.array(null), both_sides=False) == pytest.approx(1 / 1501)


def test_folds_hold_out_every_patient_once_and_whole() -> None:
    patients = patients_of(23, n_studies=3, samples=2)
    folds = by_patient(patients, patients.known, 5, np.random.default_rng(0))
    held = np.concatenate([fold.held for fold in folds])
    assert sorted(held) == list(range(46))
    for fold in folds:
        assert not set(patients.patient_R[fold.train]) & set(patients.patient_R[fold.held])
    studies = by_study(patients, patients.known)
    assert [fold.name for fold in studies] == ["s0", "s1", "s2"]
    assert all(set(patients.study_R[f.held]) == {f.name} for f in studies)


def test_times_are_split_by_whether_an_event_was_seen() -> None:
    patients = patients_of(40, n_studies=2)
    event = np.arange(40) % 10 == 0  # four, none in the study of odd ones
    timed = replace(patients, outcome_R=np.arange(40) + 0.5, event_R=event)
    assert classes(timed, timed.known) == {0.0: 36, 1.0: 4}
    assert by_study(timed, timed.known) == []  # events in one study alone
    folds = by_patient(timed, timed.known, 4, np.random.default_rng(0))
    assert [int(event[fold.held].sum()) for fold in folds] == [1, 1, 1, 1]


def test_a_study_with_one_outcome_is_learned_from_and_not_asked() -> None:
    patients = patients_of(40, n_studies=4)
    patients.outcome_R[patients.study_R == "s2"] = 1.0
    folds = by_study(patients, patients.known)
    assert [fold.name for fold in folds] == ["s0", "s1", "s3"]
    assert all("s2" in patients.study_R[fold.train] for fold in folds)


def test_choices_are_made_by_study_where_three_can_be_held_out() -> None:
    patients = patients_of(48, n_studies=4)
    assert [f.name for f in inner(patients, patients.known, np.random.default_rng(0))] == ["s0", "s1", "s2", "s3"]
    two = patients_of(48, n_studies=2)
    assert [f.name for f in inner(two, two.known, np.random.default_rng(0))] == ["group 1", "group 2", "group 3"]


def test_a_patient_cell_or_clone_on_both_sides_fails_the_run() -> None:
    patients = with_cells(patients_of(12, samples=2))
    good = by_patient(patients, patients.known, 3, np.random.default_rng(0))
    check_apart(good, patients)
    with pytest.raises(LeakError, match="12 patients"):
        checked(Fold("f", np.arange(0, 24, 2), np.arange(1, 24, 2)), patients)
    with pytest.raises(LeakError, match="patient"):
        check_apart([Fold("f", np.arange(10), np.arange(9, 24))], patients)
    fold = good[0]
    cells = [bag.copy() for bag in patients.bags["latent"]]
    cells[fold.held[0]][0] = cells[fold.train[0]][0]
    with pytest.raises(LeakError, match="1 cell in 'latent' on both"):
        check_apart(good, replace(patients, bags={"latent": tuple(cells)}))
    assert patients.clones is not None
    clones = [*patients.clones]
    clones[fold.held[0]] = clones[fold.train[0]]
    with pytest.raises(LeakError, match="3 clones"):
        check_apart(good, replace(patients, clones=tuple(clones)))


def test_learning_from_an_unknown_outcome_fails_the_run() -> None:
    patients = patients_of(8)
    patients.outcome_R[0] = np.nan
    with pytest.raises(LeakError, match="without an outcome"):
        checked(Fold("f", np.arange(4), np.arange(4, 8)), patients)


@pytest.mark.parametrize(("n", "f", "penalty"), [(30, 4, 0.1), (50, 80, 0.05), (40, 10, 100.0)])
def test_the_regression_is_scikit_learns(n: int, f: int, penalty: float) -> None:
    rng = np.random.default_rng(SEED)
    x, above, weight = rng.normal(size=(n, f)), rng.random(n) < 0.4, rng.choice([0.5, 1.0], n)
    coefficient, intercept = ridge_logistic(x, above, weight, penalty)
    theirs = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(x, above, sample_weight=weight)
    assert coefficient == pytest.approx(theirs.coef_[0], abs=1e-6)
    assert intercept == pytest.approx(theirs.intercept_[0], abs=1e-6)


def test_one_class_alone_gives_an_intercept() -> None:
    coefficient, intercept = ridge_logistic(np.ones((4, 2)), np.ones(4, bool), np.ones(4), 1.0)
    assert not coefficient.any()
    assert intercept == pytest.approx(np.log(4.5 / 0.5))


def test_a_linear_model_learns_nothing_of_which_study_a_patient_is_of() -> None:
    patients = patients_of(60, n_studies=2)
    patients.outcome_R[:] = (np.arange(60) % 2 == 0) ^ (np.arange(60) % 10 == 0)  # nearly the study
    patients.x_RF[:, 0] = 5.0 * (patients.study_R == "s0")
    fitted = linear(["f0"])(patients, [5.0], 0)[0]
    assert isinstance(fitted, Linear)
    assert fitted.coefficient_CF == pytest.approx(0)


@pytest.mark.parametrize("missing", [False, True])
def test_baselines_find_an_effect_and_are_only_given_what_they_learn_from(missing: bool) -> None:
    patients = patients_of(80, effect=2.0)
    if missing:
        patients.x_RF[::7, 0] = np.nan
    fold, outcomes = by_study(patients, patients.known)[0], Outcomes.of(patients)
    method = Method("features", linear(patients.columns), (0.5,))
    fitted = method.fit(patients.take(fold.train), [0.5], 0)[0]
    score = outcomes.per_patient(patients, asked_in(fold, patients, fitted))
    assert Tally.of(outcomes, [score]).value > 0.8
    assert np.isnan(score[outcomes.study != fold.name]).all()
    assert 0 < np.nanmin(score) < np.nanmax(score) < 1


def test_ordinal_outcomes_and_times_have_baselines() -> None:
    patients = patients_of(90, effect=2.0)
    level = patients.outcome_R + (np.arange(90) % 3 == 0) * patients.outcome_R
    ordinal = replace(patients, outcome_R=level, levels=("a", "b", "c"))
    time = replace(patients, outcome_R=1 + patients.outcome_R, event_R=np.arange(90) % 5 > 0, levels=())
    for some in (ordinal, time):
        fitted = linear(some.columns)(some, [0.5], 0)[0]
        outcomes = Outcomes.of(some)
        assert Tally.of(outcomes, [outcomes.per_patient(some, fitted.score(some))]).value > 0.75
        constant = majority(some, [0.0], 0)[0].score(some)
        assert np.ptp(constant) == 0


def test_which_baselines_there_are_follows_from_the_columns() -> None:
    names = ("fraction a", "fraction CD8+", "mean score_x", "shannon", "pseudobulk A", "age")
    patients = replace(patients_of(8, n_features=6), columns=names)
    found = [method.name for method in baselines(patients)]
    assert found == ["majority", "composition", "signatures", "pseudobulk", "clonal", "features"]
    assert [m.name for m in baselines(replace(patients_of(8), columns=tuple("abcd")))] == ["majority", "features"]


def test_settings_are_chosen_among_the_training_patients() -> None:
    patients = patients_of(60, effect=1.5, n_features=12)
    folds = inner_folds(patients, 0)
    method = next(m for m in baselines(patients) if m.name == "features")
    choice = choose(method, patients, folds, 0)
    assert choice.setting in method.settings
    assert choice.inner > 0.6
    assert choose(Method("majority", majority), patients, folds, 0).inner == 0.5


def test_the_head_is_used_only_where_it_beats_the_best_baseline() -> None:
    def choice(name: str, inner: float) -> Choice:
        return Choice(Method(name, majority), 0.0, inner)

    found = {n: choice(n, v) for n, v in {"majority": 0.5, "composition": 0.6, "clonal": 0.7, "head": 0.7}.items()}
    assert chosen(found).method.name == "clonal"
    assert chosen(found | {"head": choice("head", 0.71)}).method.name == "head"
    assert chosen(found | {"attention_pca": choice("attention_pca", 0.9)}).method.name == "clonal"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.outcome_R.__setitem__(slice(6, None), 0.0), "too few patients"),
        (lambda p: p.outcome_R.__setitem__(slice(None), p.study_R == "s0"), "in each of s0, s1 all patients"),
        (
            lambda p: p.outcome_R.__setitem__(slice(None), (p.study_R == "s0") ^ (np.arange(60) == 3)),
            "study alone tells it in 98% of the patients",
        ),
    ],
)
def test_too_few_patients_and_an_outcome_nested_in_study_are_refused(change: Any, said: str) -> None:
    patients = patients_of(60)
    change(patients)
    with pytest.raises(EvaluateError, match=said):
        informative(patients)


def test_classes_are_counted_in_studies_that_can_be_compared() -> None:
    patients = patients_of(40, n_studies=2)
    patients.outcome_R[:] = np.where(patients.study_R == "s0", 1.0, (np.arange(40) % 10 < 2) * 1.0)
    with pytest.raises(EvaluateError, match="in studies that have more than one outcome"):
        informative(patients)
    assert informative(patients_of(40)).strata == ((10, 10), (10, 10))


def test_what_confounds_is_found_and_what_does_not_is_not() -> None:
    patients = patients_of(80, n_studies=4)
    rng = np.random.default_rng(0)
    patients.outcome_R[:] = rng.random(80) < np.where(np.isin(patients.study_R, ["s0", "s1"]), 0.1, 0.9)
    cells = patients.outcome_R * 2 + rng.normal(size=80)
    beside = {
        "n_cells": cells,
        "median_counts": rng.normal(size=80),
        "product": np.where(patients.study_R < "s2", "x", "y"),
    }
    rows = {row["what"]: row for row in confounding(replace(patients, beside=beside), rng)}
    assert set(rows) == {"study", "n_cells", "median_counts", "product"}
    assert all(rows[name]["p"] < 0.01 and rows[name]["auroc"] > 0.8 for name in ("study", "n_cells", "product"))
    assert rows["median_counts"]["p"] > 0.05


@pytest.mark.parametrize(("n", "least"), [(30, 0.75), (64, 0.68), (80, 0.66)])
def test_the_smallest_detectable_auroc_is_that_of_simulations(n: int, least: float) -> None:
    strata = ((n - round(0.45 * n), round(0.45 * n)),)
    found = power(Informative(("s",), (), strata), both_sides=False)
    assert found["smallest_detectable"] == pytest.approx(least, abs=0.01)
    assert found["patients_needed"]["0.70"] == pytest.approx(50, abs=3)


def test_power_agrees_with_simulation_within_studies() -> None:
    rng, strata, hits = np.random.default_rng(0), ((12, 8), (6, 10)), 0
    sd = np.sqrt(sum(n * m * (n + m + 1) / 12 for n, m in strata)) / sum(n * m for n, m in strata)
    for _ in range(2000):
        u = sum((rng.normal(0.8, 1, m)[:, None] > rng.normal(size=n)[None]).sum() for n, m in strata)
        hits += (u / sum(n * m for n, m in strata) - 0.5) / sd > norm.ppf(0.95)
    assert power_at(float(norm.cdf(0.8 / np.sqrt(2))), strata, both_sides=False) == pytest.approx(hits / 2000, abs=0.03)


def scaled(patients: Patients) -> Patients:
    return replace(patients, x_RF=(patients.x_RF - patients.x_RF.mean(0)) / patients.x_RF.std(0))


def test_a_preparation_that_sees_the_patients_asked_is_refused() -> None:
    patients = with_cells(patients_of(30))
    fold, rng = by_patient(patients, patients.known, 3, np.random.default_rng(0))[0], np.random.default_rng(0)
    check_preparation(lambda p: replace(p, x_RF=np.tanh(p.x_RF)), patients, fold, rng)
    with pytest.raises(LeakError, match="'f0' and 3 more"):
        check_preparation(scaled, patients, fold, rng)


def test_genes_chosen_outside_the_fold_inflate_the_score_and_are_refused() -> None:
    patients = patients_of(60, n_features=300, seed=4)

    def selected(some: Patients) -> Patients:
        strength = np.abs((some.x_RF - some.x_RF.mean(0)).T @ (some.outcome_R - some.outcome_R.mean()))
        kept = tuple(some.columns[f] for f in np.argsort(-strength)[:10])
        return replace(some, columns=kept, x_RF=some.of(kept))

    outcomes, fold_of = Outcomes.of(patients), by_study(patients, patients.known)

    def auroc(outside: bool) -> float:
        scores = []
        for fold in fold_of:
            prepared = selected(patients if outside else patients.take(fold.train))
            learn = prepared.take(fold.train) if outside else prepared
            fitted = linear(learn.columns)(learn, [0.5], 0)[0]
            scores.append(outcomes.per_patient(patients, asked_in(fold, patients, fitted)))
        return Tally.of(outcomes, scores).value

    assert auroc(outside=True) > 0.85
    assert auroc(outside=False) < 0.65
    with pytest.raises(LeakError, match="depends on the patients that are held out"):
        check_preparation(selected, patients, fold_of[0], np.random.default_rng(0))


def test_features_that_know_the_outcome_are_named() -> None:
    patients = patients_of(60, n_features=3)
    assert not suspicions(patients)
    patients.x_RF[:, 1] = -patients.outcome_R
    patients.x_RF[:, 2] = (patients.study_R == "s0") * 3.0
    assert [(doubt.what, "AUROC 1.00" in doubt.why) for doubt in suspicions(patients)] == [("f1", True), ("f2", False)]
    assert constants(patients) == ["f2"]
    assert [doubt.what for doubt in suspicions(patients, trusted=("f1",))] == ["f2"]


def test_features_chosen_by_the_outcome_are_suspected_as_a_whole() -> None:
    patients = patients_of(60, n_features=2000, seed=1)
    strength = np.abs((patients.x_RF - patients.x_RF.mean(0)).T @ (patients.outcome_R - 0.5))
    kept = tuple(patients.columns[f] for f in np.argsort(-strength)[:20])
    chosen_by_it = replace(patients, columns=kept, x_RF=patients.of(kept))
    assert [doubt.what for doubt in suspicions(chosen_by_it)] == ["the features as a whole"]


def test_the_shuffles_must_be_many_and_centred() -> None:
    rng = np.random.default_rng(0)
    assert shuffles_pass(rng.normal(0.5, 0.05, 200))
    assert not shuffles_pass(rng.normal(0.5, 0.05, 199))
    assert not shuffles_pass(rng.normal(0.6, 0.05, 200))
