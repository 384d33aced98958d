"""A store's cells and labels as a model sees them (``carvae/labels/cohort.py`` and ``carvae/model/cohort.py``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import config_of, counts_of, obs_of, write_store

from carvae.config import Config
from carvae.data.loader import CellData
from carvae.data.split import PatientSplit
from carvae.errors import ConfigError, LabelError
from carvae.labels.cohort import CohortLabels, StudyLabels, label_cells
from carvae.labels.signatures import Signatures
from carvae.labels.tree import Mapping
from carvae.model.cohort import Cohort, balanced_weights
from carvae.model.heads import label_loss
from carvae.model.held_out import held_out_metrics
from carvae.model.network import Network, Prediction

LABELS = Path(__file__).parent.parent / "configs" / "labels"
PLAIN = StudyLabels(mapping=None, missing=(), labelled=True)
MARKED = StudyLabels(mapping=None, missing=("Unlabelled",), labelled=True)
SILENT = StudyLabels(mapping=None, missing=(), labelled=False)


def leaves(found: CohortLabels, axis: str = "state") -> list[str]:
    """The leaf of each cell, "" where its label is missing or allows several."""
    names = [*found.tree.names(axis), ""]
    return [names[i] for i in found.labels[axis].leaf]


def text(*values: str) -> pd.Series[str]:
    return pd.Series(list(values), dtype=object)


# labels/cohort.py


def test_a_flat_vocabulary_is_what_occurs_and_missing_labels_are_missing() -> None:
    found = label_cells(text("CTL", "Unlabelled", "TEM", "", "CTL"), text(*"aaaaa"), {"a": MARKED}, None)
    assert found is not None
    assert found.tree.names("state") == ("CTL", "TEM")
    assert leaves(found) == ["CTL", "", "TEM", "", "CTL"]
    assert not found.labels.weak


def test_cells_may_lie_in_any_order_of_studies() -> None:
    label, study = text("x", "y", "x", "z", "y", "x"), text("b", "a", "b", "a", "b", "a")
    found = label_cells(label, study, {"a": PLAIN, "b": PLAIN}, None)
    assert found is not None
    assert leaves(found) == label.tolist()


def test_a_value_that_means_missing_in_one_study_is_a_label_in_another() -> None:
    how = {"a": MARKED, "b": PLAIN}
    found = label_cells(text("x", "Unlabelled", "Unlabelled", "x"), text(*"aabb"), how, None)
    assert found is not None
    assert leaves(found) == ["x", "", "Unlabelled", "x"]


def test_studies_without_labels_keep_their_cells() -> None:
    found = label_cells(text("x", "y", "", ""), text(*"aabb"), {"a": PLAIN, "b": SILENT}, None)
    assert found is not None
    assert leaves(found) == ["x", "y", "", ""]
    assert label_cells(text("", ""), text(*"aa"), {"a": SILENT}, None) is None


def test_a_label_that_the_tree_does_not_know_is_refused_and_no_cell_is_dropped() -> None:
    """Peer fault: dropping cells whose label is outside the shared set. All studies' problems come at once."""
    carpall = StudyLabels(LABELS / "carpall.yaml", (), labelled=True)
    known = next(iter(Mapping.read(LABELS / "carpall.yaml").labels))
    label, study = text(known, "CD8 wrong", "CD8 wrong", "what", known), text(*"aaabb")
    with pytest.raises(LabelError) as caught:
        label_cells(label, study, {"a": carpall, "b": PLAIN}, LABELS / "tree.yaml")
    for part in ("study 'a'", "'CD8 wrong' of 2 cells", "study 'b'", "'what' of 1 cells"):
        assert part in str(caught.value)


def test_a_missing_label_that_no_cell_bears_is_misspelt() -> None:
    label, study = text("x", "Unlabelled", "y", "Unlabeled", "x", "y"), text(*"aaabbb")
    with pytest.raises(LabelError, match=r"study 'b': missing_labels names 'Unlabelled'.*the nearest is 'Unlabeled'"):
        label_cells(label, study, {"a": MARKED, "b": MARKED}, None)
    empty = StudyLabels(None, ("nan",), labelled=True)  # an empty cell may be named, whether or not there is one
    assert label_cells(text("x", "y", ""), text(*"aaa"), {"a": empty}, None) is not None


def test_what_is_taken_as_a_label_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="carvae"):
        label_cells(text("x", "Unlabelled", "Doublet", "", "x"), text(*"aaaaa"), {"a": MARKED}, None)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "study 'a': labels Doublet (1), x (2); 2 cells without a label"),
        ("WARNING", "'Doublet' is taken as a cell state; if it means 'not labelled', name it in missing_labels"),
    ]


def test_author_labels_through_the_tree_keep_every_cell() -> None:
    labels = list(Mapping.read(LABELS / "carpall.yaml").labels)
    carpall = StudyLabels(LABELS / "carpall.yaml", ("Unlabelled",), labelled=True)
    study = text(*"a" * (len(labels) + 1))
    found = label_cells(text(*labels, "Unlabelled"), study, {"a": carpall}, LABELS / "tree.yaml")
    assert found is not None
    assert found.labels.n_cells == len(labels) + 1
    assert all(axis.code[-1] == -1 for axis in found.labels.axes)
    for axis in found.tree.axes:  # no phantom classes: each leaf is allowed by some label
        assert found.labels[axis.name].allowed.any(0).all()


def test_a_mapping_without_a_tree_and_a_single_label_are_refused() -> None:
    mapped = StudyLabels(LABELS / "carpall.yaml", (), labelled=True)
    with pytest.raises(LabelError, match=r"labels.tree is 'flat'; set labels.tree=tree"):
        label_cells(text("x", "y"), text(*"aa"), {"a": mapped}, None)
    with pytest.raises(LabelError, match="nothing but 'x'"):
        label_cells(text("x", "x"), text(*"aa"), {"a": PLAIN}, None)


def weak_inputs(n: int = 120) -> tuple[pd.DataFrame, Signatures, pd.Series[str]]:
    signatures = Signatures.read(LABELS / "signatures.yaml")
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(rng.random((n, len(signatures.names))), columns=list(signatures.names))
    return scores, signatures, pd.Series(["s"] * n)


def test_weak_labels_fill_studies_without_labels_only_and_are_marked() -> None:
    scores, signatures, sample = weak_inputs()
    names = ["regulatory", "naive-like", ""] * 20 + [""] * 60
    how = {"a": PLAIN, "b": SILENT}
    found = label_cells(
        text(*names), text(*"a" * 60, *"b" * 60), how, LABELS / "tree.yaml", (scores, signatures, sample)
    )
    assert found is not None
    state = found.labels["state"]
    assert found.labels.weak
    assert not state.weak[:60].any(), "an author's label was called weak"
    assert (state.code[2:60:3] == -1).all(), "a cell that its author left unlabelled got a weak label"
    assert (state.code[60:] >= 0).any()
    assert np.array_equal(state.weak[60:], state.code[60:] >= 0)
    assert [leaf for leaf in leaves(found)[:60] if leaf] == ["regulatory", "naive-like"] * 20


# model/cohort.py


@given(
    hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(-1, 4)), st.floats(0, 1), st.integers(0, 3), st.data()
)
def test_balanced_weights_are_those_of_a_naive_loop(
    code: np.ndarray, balance: float, seed: int, data: st.DataObject
) -> None:
    """Weight count ** -balance over the training cells, mean 1 there."""
    train = np.random.default_rng(seed).permutation(len(code))[: data.draw(st.integers(1, len(code)))]
    count = Counter(int(code[i]) for i in train if code[i] >= 0)
    if not count:
        assert not balanced_weights(code, train, balance).any()
        return
    raw = {c: max(count[c], 1) ** -balance for c in range(-1, 5)}
    mean = np.mean([raw[int(code[i])] for i in train if code[i] >= 0])
    expected = [raw[int(c)] / mean if c >= 0 else 0 for c in code]
    assert balanced_weights(code, train, balance) == pytest.approx(expected)


def test_fully_balanced_classes_weigh_alike_in_the_loss() -> None:
    """Peer fault: a callback that silently drops label resampling. Here the weight is part of each cell's loss."""
    code = np.repeat([0, 1], [90, 10])
    weight = balanced_weights(code, np.arange(100), 1.0)
    assert weight[:90].sum() == pytest.approx(weight[90:].sum())
    log_probability = torch.log_softmax(torch.zeros(100, 2), 1)
    eye = torch.eye(2, dtype=torch.bool)
    per_class = [
        label_loss(log_probability, torch.from_numpy(np.where(code == c, c, -1)), eye, torch.from_numpy(weight)).item()
        * (code == c).sum()
        for c in (0, 1)
    ]
    assert per_class[0] == pytest.approx(per_class[1])


def assembled(folder: Path, obs: pd.DataFrame, config: Config | None = None, **store: object) -> Cohort:
    return Cohort.assemble(write_store(folder / "s", counts_of(len(obs)), obs, **store), config or config_of())  # type: ignore[arg-type]


@pytest.fixture
def obs() -> pd.DataFrame:
    table = obs_of({"a": 6, "b": 4, "c": 5})
    return table.assign(label=["x", "y", "x", "", "x", "y", "y", "x", "z", "", "x", "y", "z", "x", ""])


def test_a_cohort_has_the_cells_of_its_store(tmp_path: Path, obs: pd.DataFrame) -> None:
    cohort = assembled(tmp_path, obs)
    assert np.array_equal(cohort.store.counts().toarray(), counts_of(15).toarray())
    assert cohort.n_categories == {"study": 1, "sample": 3}
    assert cohort.covariate_NC[:, 1].tolist() == [0] * 6 + [1] * 4 + [2] * 5
    assert cohort.tree is not None
    assert cohort.tree.names("state") == ("x", "y", "z")
    assert cohort.labelled_N.tolist() == (obs["label"] != "").tolist()
    names = np.array(["x", "y", "z", ""])
    assert names[cohort.true_leaf("state")].tolist() == obs["label"].tolist()
    assert not cohort.weak


def test_unused_categories_make_no_classes_and_no_batches(tmp_path: Path, obs: pd.DataFrame) -> None:
    """Peer fault: phantom classes from unused categories."""
    ghosts = obs.assign(
        label=pd.Categorical(obs["label"], categories=["ghost", "", "x", "y", "z"]),
        sample=pd.Categorical(obs["sample"], categories=["ghost-d0", "a-d0", "b-d0", "c-d0"]),
    )
    cohort = assembled(tmp_path, ghosts)
    assert cohort.tree is not None
    assert cohort.tree.names("state") == ("x", "y", "z")
    assert cohort.n_categories == {"study": 1, "sample": 3}


def test_categories_that_training_never_sees_are_unknown(tmp_path: Path, obs: pd.DataFrame) -> None:
    cohort = assembled(tmp_path, obs)
    data = cohort.data(np.flatnonzero(obs["patient"] != "b"), config_of())
    assert data.covariate_NC[:, 1].tolist() == [0] * 6 + [-1] * 4 + [2] * 5
    assert cohort.covariate_NC.min() == 0, "the cohort itself was changed"


def test_weights_are_taken_from_the_training_cells_alone(tmp_path: Path, obs: pd.DataFrame) -> None:
    cohort = assembled(tmp_path, obs)
    train, config = np.flatnonzero(obs["patient"] == "a"), config_of(train={"class_balance": 1.0})
    data = cohort.data(train, config)
    count = {"x": 3, "y": 2, "z": 1}  # of patient a; z is unseen there
    mean = np.mean([1 / count[label] for label in obs["label"][train] if label])
    expected = [1 / count[label] / mean if label else 0 for label in obs["label"]]
    assert data.weight_NA[:, 0].numpy() == pytest.approx(expected, rel=1e-6)
    assert data.code_NA[:, 0].tolist() == [{"": -1, "x": 0, "y": 1, "z": 2}[label] for label in obs["label"]]


def test_genes_that_a_study_did_not_measure_are_masked_not_zero(tmp_path: Path) -> None:
    """Peer fault: zero-padding missing genes silently."""
    both = pd.concat([obs_of({"a": 3}, "one", "x"), obs_of({"b": 3}, "two", "y")]).assign(label=[*"xyxyxy"])
    measured = np.ones((2, 12), np.bool_)
    measured[1, 4:] = False
    config = Config.parse({"ingest": {"studies": {n: {"path": "p", "label": "label"} for n in ("one", "two")}}})
    cohort = assembled(tmp_path, both, config, measured=measured)
    data: CellData = cohort.data(np.arange(6), config)
    assert data.unmeasured_SG is not None
    assert data.unmeasured_SG[data.study_N].tolist() == [[False] * 12] * 3 + [[False] * 4 + [True] * 8] * 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [("xxxyyy", "each study bears one label and no two the same"), ("xwxyzy", None), ("xyxyyy", "")],
)
def test_labels_that_are_the_studies_by_other_words_are_refused(
    tmp_path: Path, labels: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Where labels are only nested it is a warning; where one is in both studies, nothing."""
    both = pd.concat([obs_of({"a": 3}, "one"), obs_of({"b": 3}, "two")]).assign(label=[*labels])
    config = Config.parse({"ingest": {"studies": {n: {"path": "p", "label": "label"} for n in ("one", "two")}}})
    if said:
        with pytest.raises(LabelError, match=said):
            assembled(tmp_path, both, config)
    else:
        assembled(tmp_path, both, config)
        assert ("no label occurs in two studies" in caplog.text) is (said is None)


def test_labels_that_are_the_patients_by_other_words_are_refused(tmp_path: Path) -> None:
    """As where the column of donors is given for that of states."""
    config = Config.parse({"ingest": {"studies": {"s": {"path": "p", "label": "label"}}}})
    table = obs_of({"a": 4, "b": 4, "c": 4}).assign(label=[*"xxxxyyyyzzzz"])
    with pytest.raises(LabelError, match="each patient bears one label and no two the same"):
        assembled(tmp_path / "one", table, config)
    assembled(tmp_path / "two", table.assign(label=[*"xxxxyyyyzzzy"]), config)


def test_without_labels_there_is_a_cohort_without_axes(tmp_path: Path) -> None:
    config = Config.parse({"ingest": {"studies": {"s": {"path": "p"}}}})
    cohort = assembled(tmp_path, obs_of({"a": 4, "b": 4}), config)
    assert cohort.tree is None
    assert not cohort.labelled_N.any()
    assert cohort.allowed() == {}
    assert cohort.data(np.arange(8), config).code_NA.shape == (8, 0)


def test_weak_labels_weigh_less_and_are_never_evaluated(tmp_path: Path) -> None:
    scores, _, _ = weak_inputs()
    table = pd.concat([obs_of({"a": 60}, "one"), obs_of({"b": 60}, "two")], ignore_index=True)
    table["label"] = ["regulatory", "naive-like"] * 30 + [""] * 60
    table = table.assign(**{f"score_{name}": scores[name] for name in scores})
    studies = {"one": {"path": "p", "label": "label"}, "two": {"path": "p"}}
    sections = {"labels": {"tree": "tree", "weak": True}, "train": {"class_balance": 0.0, "weak_weight": 0.25}}
    config = Config.parse({"ingest": {"studies": studies}} | sections)
    cohort = assembled(tmp_path, table, config)
    assert cohort.weak
    assert (cohort.true_leaf("state")[:60] >= 0).all()
    assert (cohort.true_leaf("state")[60:] == -1).all(), "a weak label would be scored as truth"
    assert cohort.tree is not None
    axis = [a.name for a in cohort.tree.axes].index("state")
    data = cohort.data(np.arange(120), config)
    weak = data.code_NA[60:, axis] >= 0
    assert weak.any()
    assert data.weight_NA[60:, axis][weak].tolist() == pytest.approx([0.25] * int(weak.sum()))
    assert data.weight_NA[:60, axis].tolist() == pytest.approx([1.0] * 60)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"covariates": ["sample", "assay"]}}, "names 'assay', which the studies do not have"),
        ({"model": {"covariates": ["tissue"]}}, "names 'tissue', which no cell has a value of"),
        ({"labels": {"weak": True}}, "labels.weak needs a label tree"),
    ],
)
def test_settings_that_do_not_fit_the_store_are_refused(
    tmp_path: Path, obs: pd.DataFrame, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        assembled(tmp_path, obs.assign(tissue=pd.Series([None] * len(obs), dtype=object)), config_of(**sections))


# model/held_out.py


class Oracle(Network):
    """Right on the cells it knows by their counts, wrong on all others."""

    def __init__(self, known: dict[bytes, int], n_leaves: int) -> None:
        torch.nn.Module.__init__(self)
        self.known, self.n_leaves = known, n_leaves

    def predict(self, counts: sp.csr_matrix, *, present_G: np.ndarray | None = None) -> Prediction:
        leaf = [self.known.get(row.astype(np.float32).tobytes(), 0) for row in counts.toarray()]
        return Prediction(
            np.zeros((len(leaf), 2), np.float32), {"state": np.eye(self.n_leaves, dtype=np.float32)[leaf]}
        )


def test_held_out_scores_are_of_held_out_patients_alone(tmp_path: Path) -> None:
    """Peer fault: accuracy on training cells. A model that knows these by heart and no other scores as it deserves."""
    table = obs_of({"a": 30, "b": 30}).assign(label=["x", "y", "z"] * 20)
    cohort = assembled(tmp_path, table)
    rows = cohort.store.counts().toarray()
    rows_of = {"train": np.arange(30), "validation": np.arange(30, 60)}
    split = PatientSplit(rows_of["train"], rows_of["validation"], ("b",))
    truth = cohort.true_leaf("state")
    for learned, accuracy in (("train", 1 / 3), ("validation", 1.0)):
        known = {rows[i].tobytes(): int(truth[i]) for i in rows_of[learned]}
        metrics = held_out_metrics(Oracle(known, 3), cohort, split, seed=0)
        assert metrics["held_out"]["state"]["accuracy"] == pytest.approx(accuracy)
        assert metrics["held_out"]["state"]["n_cells"] == 30
        assert metrics["held_out_patients"] == 1
    loss = metrics["macro_f1_by_missing_genes"]
    assert loss["0"] == 1.0
    assert loss["0.6"] < 0.7, "genes were not taken away"


def test_held_out_scores_know_what_each_study_measured(tmp_path: Path) -> None:
    """They are of what `carvae annotate` would say: genes that a study lacks are expected, not taken for zeros."""
    table = pd.concat([obs_of({"a": 30}), obs_of({"b": 30}, study="t")]).assign(label=["x", "y", "z"] * 20)
    measured = np.ones((2, 12), np.bool_)
    measured[1, :5] = False
    seen: list[tuple[float, list[bool]]] = []

    class Noting(Oracle):
        def predict(self, counts: sp.csr_matrix, *, present_G: np.ndarray | None = None) -> Prediction:
            assert present_G is not None
            seen.append((float(counts.toarray()[:, ~present_G].sum()), present_G.tolist()))
            return super().predict(counts, present_G=present_G)

    counts = counts_of(60)
    counts = sp.csr_matrix(counts.multiply(measured[np.repeat([0, 1], 30)]))
    store = write_store(tmp_path / "store.zarr", counts, table, measured=measured)
    studies = {name: {"path": "nowhere.h5ad", "label": "label"} for name in "st"}
    cohort = Cohort.assemble(store, Config.parse({"ingest": {"studies": studies}}))
    split = PatientSplit(np.arange(30), np.arange(30, 60), ("b",))
    assert held_out_metrics(Noting({}, 3), cohort, split, seed=0)["held_out"]["state"]["n_cells"] == 30
    assert seen[0] == (0.0, measured[1].tolist())
    assert not any(absent for absent, _ in seen)
    assert not any(any(present[:5]) for _, present in seen)


def test_without_held_out_patients_nothing_is_scored(tmp_path: Path, obs: pd.DataFrame) -> None:
    cohort = assembled(tmp_path, obs)
    nobody = PatientSplit(np.arange(15), np.arange(0), ())
    assert held_out_metrics(Oracle({}, 3), cohort, nobody, seed=0) == {}
    unlabelled = PatientSplit(np.arange(3), np.array([3, 9, 14]), ("q",))
    assert held_out_metrics(Oracle({}, 3), cohort, unlabelled, seed=0) == {}
