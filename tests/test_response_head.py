"""The attention head: its formula, what it finds, what it must not see, and how it is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lifelines import CoxPHFitter
from patients import patients_of, with_cells
from safetensors.torch import load, save

from carvae.data.patients import Patients
from carvae.data.simulate_cohorts import EFFECTS, EXPRESSION, LATENT, CohortDesign, simulate_cohort
from carvae.errors import BundleError, RespondError
from carvae.model.response import Head, HeadSettings, _cox_loss, fit_head
from carvae.response.heads import Components, heads
from carvae.response.methods import asked_in, baselines
from carvae.response.pairs import Outcomes, Tally
from carvae.response.splits import by_study

QUICK = HeadSettings(n_members=2, n_cells=24, n_steps=40)


@pytest.fixture(scope="module")
def cohort() -> Patients:
    """Responders have more of a rare state; two studies."""
    design = CohortDesign(n_patients=60, n_studies=2, n_cells=80, n_genes=24, rare_shares=(0.005, 0.08))
    return simulate_cohort(design, np.random.default_rng(0))


@pytest.fixture(scope="module")
def head(cohort: Patients) -> Head:
    return fit_head(cohort, QUICK, 0)


def auroc(patients: Patients, score: np.ndarray) -> float:
    outcomes = Outcomes.of(patients)
    return Tally.of(outcomes, [outcomes.per_patient(patients, score)]).value


def test_it_finds_a_rare_state_in_another_study_where_composition_cannot(cohort: Patients) -> None:
    outcomes = Outcomes.of(cohort)
    found = {}
    for method in [*heads(cohort, QUICK), *baselines(cohort)]:
        if method.name in {"head", "composition"}:
            scores = []
            for fold in by_study(cohort, cohort.known):
                fitted = method.fit(cohort.take(fold.train), [0.5], 0)[0]
                scores.append(outcomes.per_patient(cohort, asked_in(fold, cohort, fitted)))
            found[method.name] = Tally.of(outcomes, scores).value
    assert found["head"] > 0.75
    assert found["composition"] < 0.65


def test_attention_is_that_of_ilse_and_lies_on_the_rare_cells(cohort: Patients, head: Head) -> None:
    bag = cohort.bags[LATENT][int(np.argmax(cohort.outcome_R))]
    x = (torch.from_numpy(bag) - head.centre_D) / head.scale_D
    members = []
    for e in range(QUICK.n_members):
        v, u, w = (head.weights[name][e] for name in ("v_EDH", "u_EDH", "w_EH"))
        members.append(torch.softmax((torch.tanh(x @ v) * torch.sigmoid(x @ u)) @ w, 0))
    weight = head.attention(bag)
    assert weight == pytest.approx(torch.stack(members).mean(0).numpy(), abs=1e-6)
    assert weight.sum() == pytest.approx(1, abs=1e-5)


def test_the_order_of_cells_and_the_company_of_a_sample_do_not_matter(cohort: Patients, head: Head) -> None:
    rows = np.arange(10)
    some = cohort.take(rows)
    turned = replace(some, bags={LATENT: tuple(np.ascontiguousarray(bag[::-1]) for bag in some.bags[LATENT])})
    assert head.score(turned) == pytest.approx(head.score(some), abs=1e-6)
    assert head.score(cohort.take(rows[:1])) == pytest.approx(head.score(some)[:1], abs=1e-6)
    assert 0 < head.score(cohort).min() < head.score(cohort).max() < 1


def test_the_same_seed_gives_the_same_head(cohort: Patients, head: Head) -> None:
    again, other = fit_head(cohort, QUICK, 0), fit_head(cohort, QUICK, 1)
    assert all(torch.equal(again.weights[name], head.weights[name]) for name in head.weights)
    assert not torch.equal(other.weights["v_EDH"], head.weights["v_EDH"])


def test_it_is_kept_as_tensors_and_json(cohort: Patients, head: Head) -> None:
    kept = Head.read(head.describe(), load(save(head.tensors())))
    assert kept.score(cohort) == pytest.approx(head.score(cohort))
    with pytest.raises(BundleError, match="do not fit its description"):
        Head.read(head.describe() | {"columns": ["one"]}, head.tensors())


def test_samples_without_their_cells_are_one_sentence(cohort: Patients, head: Head) -> None:
    with pytest.raises(RespondError, match="without their cells in the space 'latent'"):
        head.score(replace(cohort, bags={}))


def test_without_the_study_nothing_belongs_to_a_study(cohort: Patients) -> None:
    one = replace(cohort, study_R=np.array(["s"] * 60, dtype=object))
    apart = [fit_head(p, replace(QUICK, with_study=False, with_features=False), 0) for p in (cohort, one)]
    assert apart[0].score(cohort) == pytest.approx(apart[1].score(cohort), abs=1e-6)
    assert fit_head(cohort, QUICK, 0).score(cohort) != pytest.approx(apart[0].score(cohort), abs=1e-6)


@pytest.mark.parametrize("kind", ["ordinal", "time"])
def test_ordinal_outcomes_and_times_are_learned(kind: str) -> None:
    patients = with_cells(patients_of(60, effect=2.0, samples=2))
    if kind == "ordinal":
        patients = replace(patients, outcome_R=patients.outcome_R * 2, levels=("PD", "PR", "CR"))
        patients.outcome_R[patients.patient_R < "P12"] = 1.0
    else:
        event = np.repeat(np.arange(60) % 4 > 0, 2)
        patients = replace(patients, outcome_R=1 + 5 * patients.outcome_R, event_R=event, levels=())
    score = fit_head(patients, QUICK, 0).score(patients)
    assert auroc(patients, score) > 0.8
    if kind == "ordinal":
        assert 0 <= score.min() < score.max() <= 2


def test_the_loss_of_times_is_coxs() -> None:
    patients = replace(patients_of(30, n_studies=2), event_R=np.arange(30) % 3 > 0, levels=())
    patients.outcome_R[:] = np.random.default_rng(0).exponential(size=30)
    frame = {"x": patients.x_RF[:, 0], "t": patients.outcome_R, "e": patients.event_R, "s": patients.study_R}
    import pandas as pd

    cox = CoxPHFitter().fit(pd.DataFrame(frame), "t", "e", strata=["s"])
    score = torch.from_numpy(-float(cox.params_["x"]) * patients.x_RF[:, 0]).float()
    weight = torch.full((30,), 1 / 30)
    assert patients.event_R is not None
    loss = float(_cox_loss(patients, weight)(score[None], torch.zeros(1, 0)))
    assert loss * patients.event_R.sum() == pytest.approx(-cox.log_likelihood_, rel=1e-4)


def test_components_are_those_of_the_training_patients(cohort: Patients) -> None:
    components = Components.of(cohort.bags[EXPRESSION])
    cells = np.concatenate(cohort.bags[EXPRESSION])
    assert components.axis_GD.T @ components.axis_GD == pytest.approx(np.eye(components.axis_GD.shape[1]), abs=1e-8)
    kept = ((cells - components.mean_G) @ components.axis_GD).var(0)
    assert (np.diff(kept) < 1e-1).all()


@pytest.mark.parametrize("effect", EFFECTS)
def test_simulated_cohorts_hold_what_they_say(effect: str) -> None:
    design = CohortDesign(effect=effect, n_patients=200, n_cells=60, n_genes=12)  # type: ignore[arg-type]
    patients = simulate_cohort(design, np.random.default_rng(1))
    rates = [patients.outcome_R[patients.study_R == s].mean() for s in sorted(set(patients.study_R))]
    assert bool(max(rates) - min(rates) > 0.5) is (effect == "study")
    found = {name: auroc(patients, patients.of([name])[:, 0]) for name in ("fraction S1", "shannon", "fraction S0")}
    assert (found["fraction S1"] > 0.57) is (effect == "composition")
    assert (found["shannon"] > 0.65) is (effect == "clones")
    assert abs(found["fraction S0"] - 0.5) < 0.12
