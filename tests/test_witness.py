"""What held-out patients teach: cells seen whole and poorer, nothing learned from training cells, kept in a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import GENES, config_of, counts_of, obs_of, tiny_bundle, write_store

from carvae.data.split import PatientSplit
from carvae.errors import BundleError
from carvae.labels.axis import RESERVED
from carvae.labels.tree import LabelTree
from carvae.model.bundle import load
from carvae.model.cohort import Cohort
from carvae.model.network import Network
from carvae.model.trust import JOIN, UNSURE, Trust, set_columns
from carvae.model.witness import DEPTHS, OVERLAPS, Witness, learn, measure, usual_shares, witness

IDENTITY = ("GENE0", "GENE1")
STATES = ("x", "y")


def cohort_of(folder: Path, measured: np.ndarray | None = None, held_out_counts: int | None = None) -> Cohort:
    """Four patients; ``held_out_counts`` replaces every count of the first."""
    obs = obs_of({"P1": 60, "P2": 50, "P3": 40, "P4": 30})
    obs["label"] = np.where(np.arange(len(obs)) % 5 == 0, "", np.array(STATES)[np.arange(len(obs)) % 2])
    config = config_of()
    counts = counts_of(len(obs))
    if held_out_counts is not None:
        counts.data[: counts.indptr[60]] = held_out_counts
    return Cohort.assemble(write_store(folder / "store.zarr", counts, obs, measured=measured), config)


def split_of(cohort: Cohort, held: tuple[str, ...]) -> PatientSplit:
    out = cohort.obs["patient"].astype(str).isin(held).to_numpy()
    return PatientSplit(np.flatnonzero(~out), np.flatnonzero(out), held)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return cohort_of(tmp_path)


@pytest.fixture
def network() -> Network:
    return tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4}).network


@pytest.fixture
def seen(cohort: Cohort, network: Network) -> list[Witness]:
    folds = [split_of(cohort, held) for held in (("P1", "P4"), ("P2", "P3"))]
    return [witness(network, cohort, fold, IDENTITY, np.random.default_rng(k)) for k, fold in enumerate(folds)]


@pytest.fixture
def trust(seen: list[Witness]) -> Trust:
    found = learn(seen, seen[0].reference, 0.1)
    assert found is not None
    return found


def test_every_held_out_cell_is_seen_whole_and_the_labelled_ones_at_every_depth_and_overlap(
    cohort: Cohort, seen: list[Witness]
) -> None:
    cells, labelled = seen[0].cells, int(cohort.labelled_N[np.r_[:60, 150:180]].sum())
    assert cells.whole_N.sum() == 90
    assert len(cells.counts_N) == 90 + labelled * (len(DEPTHS) * len(OVERLAPS) - 1)
    assert set(cells.patient_N) == {"P1", "P4"}
    assert cells.known_N[~cells.whole_N].all()
    whole = np.asarray(cohort.store.counts().sum(axis=1)).ravel()[np.r_[:60, 150:180]]
    np.testing.assert_array_equal(cells.counts_N[cells.whole_N], whole)
    assert cells.counts_N[~cells.whole_N].mean() < whole.mean() / 2


def test_the_reference_is_of_training_cells_alone(cohort: Cohort, network: Network, tmp_path: Path) -> None:
    fold = split_of(cohort, ("P1",))
    before = witness(network, cohort, fold, IDENTITY, np.random.default_rng(0)).reference
    changed = cohort_of(tmp_path / "changed", held_out_counts=9)
    after = witness(network, changed, fold, IDENTITY, np.random.default_rng(0)).reference
    np.testing.assert_array_equal(before.mean_LH, after.mean_LH)
    np.testing.assert_array_equal(before.share_G, after.share_G)
    assert before.identity_G.tolist() == [1, 1] + [0] * 10
    assert len(before.sample_MK) == 3


def test_learned_on_some_it_holds_for_cells_like_them(seen: list[Witness], trust: Trust) -> None:
    known = seen[0].cells.take(np.flatnonzero(seen[0].cells.known_N))
    novelty = trust.scale.novelty(known.view_NT, trust.bins.of(known.counts_N, known.overlap_N))
    assert (novelty > 0.9).mean() == pytest.approx(0.1, abs=0.06)
    found = measure(seen, 0.1)
    assert found["patients"] == 4
    assert found["state"]["whole"]["n_cells"] == sum(int((w.cells.known_N & w.cells.whole_N).sum()) for w in seen)
    assert 0.8 < found["state"]["poorer"]["coverage"] <= 1
    assert 1 <= found["state"]["poorer"]["set_size"] <= 2
    assert 0 <= found["unknown_rate"]["whole"] < 0.4


def test_one_patient_can_teach_but_not_be_measured(cohort: Cohort, network: Network) -> None:
    alone = [witness(network, cohort, split_of(cohort, ("P1",)), IDENTITY, np.random.default_rng(0))]
    assert learn(alone, alone[0].reference, 0.05) is not None
    assert measure(alone, 0.05) == {}


def test_without_labelled_cells_nothing_is_learned(cohort: Cohort, network: Network) -> None:
    cohort.obs["label"] = cohort.obs["label"].astype(str)
    unlabelled = np.flatnonzero(~cohort.labelled_N)
    fold = PatientSplit(np.flatnonzero(cohort.labelled_N), unlabelled, ())
    assert learn([witness(network, cohort, fold, IDENTITY, np.random.default_rng(0))], None, 0.05) is None  # type: ignore[arg-type]


def test_genes_that_a_study_did_not_measure_are_absent_for_its_cells(tmp_path: Path, network: Network) -> None:
    measured = np.ones((1, 12), np.bool_)
    measured[0, 5:] = False
    poor, rich = (tmp_path / name for name in ("poor", "rich"))
    poor.mkdir(), rich.mkdir()
    found = [
        witness(network, cohort, split_of(cohort, ("P1",)), IDENTITY, np.random.default_rng(0)).cells.view_NT
        for cohort in (cohort_of(poor, measured), cohort_of(rich))
    ]
    assert not np.allclose(found[0], found[1])


def test_a_bundle_keeps_what_was_learned(tmp_path: Path, trust: Trust) -> None:
    made = tiny_bundle(LabelTree.flat(list(STATES)), n_categories={"study": 1, "sample": 4})
    made.trust = trust
    found = load(made.save(tmp_path / "model"))
    assert found.trust is not None
    counts, present = counts_of(9, seed=3), np.ones(12, np.bool_)
    said, expected = (b.trust.judge(b.network, counts, present) for b in (found, made) if b.trust)
    np.testing.assert_array_equal(said.novelty_N, expected.novelty_N)
    np.testing.assert_array_equal(said.probability_NS["state"], expected.probability_NS["state"])
    assert found.trust.describe() == trust.describe()


@pytest.mark.parametrize("name", ["reference.share_G", "scale.whole_BQ", "calibration.0.threshold_BSC", "bins.edge_VD"])
def test_arrays_that_do_not_fit_the_model_are_refused(trust: Trust, name: str) -> None:
    config = tiny_bundle(None).config
    tree = LabelTree.flat(list(STATES))
    arrays = trust.tensors()
    assert Trust.read(trust.describe(), arrays).checked(len(GENES), config, tree)
    bent = arrays | {f"trust.{name}": arrays[f"trust.{name}"][..., :-1]}
    with pytest.raises(BundleError, match="does not fit the model"):
        Trust.read(trust.describe(), bent).checked(len(GENES), config, tree)
    with pytest.raises(BundleError, match="the weights hold no"):
        Trust.read(trust.describe(), {k: v for k, v in arrays.items() if k != f"trust.{name}"})


def test_sets_hold_the_best_state_and_unknown_cells_have_none(trust: Trust, network: Network) -> None:
    judged = trust.judge(network, counts_of(20, seed=4), np.ones(12, np.bool_))
    known = np.arange(20) % 4 > 0
    columns = set_columns(trust, LabelTree.flat(list(STATES)), judged, known, 0.9)
    assert set(columns) == {"carvae_set", "carvae_state_sure"}
    best = np.array(STATES)[judged.probability_NS["state"].argmax(1)]
    for text, sure, state, is_known in zip(
        columns["carvae_set"], columns["carvae_state_sure"], best, known, strict=True
    ):
        assert (text == RESERVED) == (not is_known)
        if is_known:
            assert text.split(JOIN)[0] == state
            assert sure in {state, UNSURE}


def test_undecided_leaves_roll_up_to_their_parent() -> None:
    exhausted = {"name": "exhausted", "nodes": [{"name": "progenitor"}, {"name": "terminal"}]}
    tree = LabelTree.from_dict({"name": "t", "axes": [{"name": "state", "nodes": [exhausted, {"name": "naive"}]}]})
    axis = tree.axes[0]
    assert axis.deepest_sure(np.array([[0.5, 0.45, 0.05], [0.95, 0.03, 0.02], [0.4, 0.2, 0.4]]), 0.9) == [
        "exhausted",
        "progenitor",
        None,
    ]


def test_usual_shares_are_quantiles_over_samples_of_known_cells(seen: list[Witness], trust: Trust) -> None:
    leaves = {"state": STATES}
    assert usual_shares(seen, trust, leaves) == {}, "four samples are too few"
    found = usual_shares([*seen, *seen], trust, leaves)["state"]
    assert found["samples"] == 8
    shares = []
    for w in seen:
        for rows, _ in w.samples:
            own = w.cells.take(rows)
            novelty = trust.scale.novelty(own.view_NT, trust.bins.of(own.counts_N, own.overlap_N))
            shares.append((own.log_probability["state"][novelty <= 1 - trust.unknown_rate].argmax(1) == 0).mean())
    expected = np.quantile([*shares, *shares], [0.05, 0.5, 0.95])
    np.testing.assert_allclose([found["states"]["x"][end] for end in ("low", "middle", "high")], expected)
    middle = sum(found["states"][name]["middle"] for name in STATES)
    assert middle == pytest.approx(1.0)
