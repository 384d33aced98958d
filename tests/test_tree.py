"""The label tree: reading with all faults named, sets of leaves, flat vocabularies, and what labels can teach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.errors import LabelError
from carvae.labels.tree import EncodedLabels, LabelTree, Mapping, concatenate, encode, encode_nodes, prune

LABELS = Path(__file__).parent.parent / "configs" / "labels"
TREE = LabelTree.read(LABELS / "tree.yaml")
CARPALL = Mapping.read(LABELS / "carpall.yaml")
VALUES = [*CARPALL.labels, "Unlabelled", None]


def allowed(labels: EncodedLabels, axis: str, cell: int) -> set[str] | None:
    """Names of the leaves that a cell's label allows; None where it is missing."""
    found = labels[axis]
    return None if found.code[cell] < 0 else set(np.array(TREE.names(axis))[found.allowed[found.code[cell]]])


def same(a: EncodedLabels, b: EncodedLabels) -> bool:
    return all(
        np.array_equal(x.code, y.code) and np.array_equal(x.allowed, y.allowed) and np.array_equal(x.weak, y.weak)
        for x, y in zip(a.axes, b.axes, strict=True)
    )


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_packaged_tree_has_the_axes_and_leaves_of_the_design() -> None:
    assert [axis.name for axis in TREE.axes] == ["lineage", "state", "cycling"]
    assert TREE.names("lineage") == ("CD4", "CD8", "double negative", "gamma-delta")
    assert TREE.names("state") == (
        "naive-like",
        "stem-like memory",
        "central memory",
        "effector memory",
        "effector/cytotoxic",
        "progenitor exhausted",
        "terminally exhausted",
        "regulatory",
    )
    assert TREE.names("cycling") == ("cycling", "not cycling")
    assert TREE["state"].nodes["exhausted"] == (5, 6)
    assert TREE["state"].parents["naive-like"] == "memory-like"
    assert all(axis.description and all(axis.descriptions.values()) for axis in TREE.axes)


def test_tree_survives_json_even_with_sorted_keys() -> None:
    assert LabelTree.from_dict(json.loads(json.dumps(TREE.to_dict(), sort_keys=True))) == TREE


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_roll_up_sums_leaves(seed: int, n_cells: int) -> None:
    axis = TREE["state"]
    probability_NS = np.random.default_rng(seed).dirichlet(np.ones(len(axis.leaves)), size=n_cells)
    node_ND = axis.roll_up(probability_NS)
    assert node_ND.shape == (n_cells, len(axis.nodes))
    top = [list(axis.nodes).index(node) for node in axis.children(None)]
    np.testing.assert_allclose(node_ND[:, top].sum(axis=1), 1.0)
    for column, (node, below) in enumerate(axis.nodes.items()):
        if children := axis.children(node):
            at = [list(axis.nodes).index(child) for child in children]
            np.testing.assert_allclose(node_ND[:, column], node_ND[:, at].sum(axis=1))
        else:
            np.testing.assert_array_equal(node_ND[:, column], probability_NS[:, below[0]])


def test_deepest_sure_node() -> None:
    probability_NS = np.zeros((5, 8))
    probability_NS[0, 7] = 0.9  # a sure leaf
    probability_NS[1, [5, 6]] = 0.45  # sure only of the inner node
    probability_NS[2] = 1 / 8  # sure of nothing
    probability_NS[3, [3, 4]] = 0.3, 0.5  # the leaf below the threshold, the inner node above it
    probability_NS[4, [5, 6]] = 0.8, 0.1  # leaf and inner node above the threshold
    want = ["regulatory", "exhausted", None, "effector", "progenitor exhausted"]
    assert TREE["state"].deepest_sure(probability_NS, 0.7) == want


def test_carpall_labels_allow_what_the_mapping_says() -> None:
    labels = encode(
        pd.Series(["CD8 gdT", "DN gdT", "CD8 Naive/TCM", "Proliferating CAR T", "Unlabelled", None]), TREE, CARPALL
    )
    assert allowed(labels, "lineage", 0) == {"CD8", "gamma-delta"}
    assert allowed(labels, "state", 0) is None
    assert allowed(labels, "lineage", 1) == {"gamma-delta"}
    assert allowed(labels, "state", 2) == {"naive-like", "stem-like memory", "central memory"}
    assert (allowed(labels, "lineage", 3), allowed(labels, "cycling", 3)) == (None, {"cycling"})
    assert all(allowed(labels, axis, cell) is None for axis in ("lineage", "state", "cycling") for cell in (4, 5))
    assert not labels.weak
    assert labels["lineage"].leaf.tolist() == [-1, 3, 1, -1, -1, -1]
    assert labels["lineage"].code.dtype == np.int32


@given(st.lists(st.sampled_from(VALUES), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_cells_keep_their_label_whatever_the_order_and_the_company(values: list[str | None], random: object) -> None:
    labels = encode(pd.Series(values, dtype=object), TREE, CARPALL)
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = encode(pd.Series([values[i] for i in order], dtype=object), TREE, CARPALL)
    assert same(shuffled, labels.take(np.array(order)))
    for cell, value in enumerate(values):
        for axis in TREE.axes:
            nodes = CARPALL.labels.get(value or "", {}).get(axis.name)
            want = None if nodes is None else {axis.leaves[i] for node in nodes for i in axis.nodes[node]}
            assert allowed(labels, axis.name, cell) == want
    half = len(values) // 2
    assert same(concatenate([labels.take(slice(0, half)), labels.take(slice(half, None))]), labels)


def test_unused_categories_and_spellings_of_missing_are_no_classes() -> None:
    column = pd.Series(
        pd.Categorical(["a", "b", None, "nan", "", "skip"], categories=["ghost", "b", "a", "nan", "", "skip"])
    )
    tree = LabelTree.flat(column, missing=["skip"])
    assert tree.names("state") == ("a", "b")
    labels = encode(column, tree, missing=["skip"])
    assert labels["state"].code.tolist() == [0, 1, -1, -1, -1, -1]
    assert labels["state"].allowed.tolist() == [[True, False], [False, True]]
    few = encode(column.iloc[:1], tree)
    assert few["state"].allowed.shape == (1, 2)  # b is a category of the column and does not occur


def test_flat_vocabulary_takes_numbers_as_labels() -> None:
    column = pd.Series([3, 1, 3])
    assert encode(column, LabelTree.flat(column))["state"].code.tolist() == [1, 0, 1]


def test_labels_without_mapping_are_nodes_of_any_axis() -> None:
    labels = encode(pd.Series(["exhausted", "CD4", "cycling"]), TREE)
    assert allowed(labels, "state", 0) == {"progenitor exhausted", "terminally exhausted"}
    assert (allowed(labels, "lineage", 1), allowed(labels, "state", 1)) == ({"CD4"}, None)
    assert allowed(labels, "cycling", 2) == {"cycling"}


def test_labels_that_are_nodes_allow_the_leaves_below_them() -> None:
    axis = TREE["state"]
    node = next(name for name in axis.nodes if len(axis.nodes[name]) > 1)
    found = encode_nodes(axis, [axis.leaves[0], node], np.array([1, -1, 0]), weak=True)
    assert [set(np.flatnonzero(found.allowed[code])) if code >= 0 else None for code in found.code] == [
        set(axis.nodes[node]),
        None,
        {0},
    ]
    assert found.weak.tolist() == [True, False, True]


def test_a_tree_without_axes_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="there is no axis; give at least one under `axes`"):
        LabelTree.read(write(tmp_path, "name: t\naxes: []\n"))


def test_a_label_that_allows_everything_says_nothing() -> None:
    mapping = Mapping("m", {"T": {"lineage": ("alpha-beta", "gamma-delta"), "cycling": ("cycling",)}})
    labels = encode(pd.Series(["T"]), TREE, mapping)
    assert labels["lineage"].code.tolist() == [-1]
    assert labels["lineage"].allowed.shape == (0, 4)


def test_fill_takes_weak_labels_only_where_labels_are_missing() -> None:
    strong = encode(pd.Series(["CD4 TEM", None]), TREE, CARPALL)
    other = encode(pd.Series(["regulatory", "regulatory"]), TREE)
    axes = tuple(type(x)(x.axis, x.code, x.allowed, x.code >= 0) for x in other.axes)
    filled = strong.fill(EncodedLabels(axes))
    assert [allowed(filled, "state", cell) for cell in (0, 1)] == [{"effector memory"}, {"regulatory"}]
    assert filled["state"].weak.tolist() == [False, True]
    assert filled.weak
    assert not filled.take(slice(0, 1)).weak


def test_every_unknown_label_is_named_with_its_count_and_the_nearest() -> None:
    with pytest.raises(LabelError) as error:
        encode(pd.Series(["CD8 TEm"] * 3 + ["Mystery"] * 2 + ["DN TEM"]), TREE, CARPALL)
    text = str(error.value)
    assert "'CD8 TEm' of 3 cells is not known; the nearest is 'CD8 TEM'" in text
    assert "'Mystery' of 2 cells" in text
    assert "label 'DN TEM' of" not in text


def test_a_mapping_onto_what_the_tree_has_not_is_named_before_any_cell_is_read() -> None:
    mapping = Mapping("m", {"x": {"linage": ("CD4",)}, "y": {"state": ("exhaustd", "regulatory")}})
    with pytest.raises(LabelError) as error:
        encode(pd.Series([], dtype=object), TREE, mapping)
    assert "unknown axis 'linage'; the nearest is 'lineage'" in str(error.value)
    assert "'exhaustd', no node of axis 'state'; the nearest is 'exhausted'" in str(error.value)
    assert "2 problems" in str(error.value)


@pytest.mark.parametrize("labels", [["T", "T"], ["T", "none"], []])
def test_one_label_is_refused_with_its_meaning(labels: list[str]) -> None:
    with pytest.raises(LabelError, match="at least two kinds"):
        LabelTree.flat(labels, missing=["none"])


def test_a_label_called_unknown_is_refused() -> None:
    with pytest.raises(LabelError, match=r"the flat vocabulary is not a valid label tree: .* list it as missing"):
        LabelTree.flat(["Unknown", "T", "B"])


def test_prune_keeps_what_carpall_can_teach() -> None:
    labels = encode(pd.Series(VALUES, dtype=object), TREE, CARPALL)
    tree, kept = prune(TREE, labels)
    assert tree.names("lineage") == TREE.names("lineage")
    # Exhausted and regulatory never occur; the three leaves of Naive/TCM only together.
    assert tree.names("state") == ("memory-like", "effector memory", "effector/cytotoxic")
    assert kept["state"].allowed.tolist() == np.eye(3, dtype=bool).tolist()
    assert ((kept["state"].code < 0) == (labels["state"].code < 0)).all()


def test_prune_drops_axes_on_which_one_answer_is_always_right() -> None:
    labels = encode(pd.Series(["CD8 TEM", "CD8 gdT", "CD8 Naive/TCM", "Proliferating CAR T"]), TREE, CARPALL)
    tree, kept = prune(TREE, labels)
    assert [axis.name for axis in tree.axes] == ["state", "cycling"]  # every lineage label allows CD8
    assert [x.axis for x in kept.axes] == ["state", "cycling"]
    with pytest.raises(LabelError, match="nothing but 'CD8'"):
        prune(TREE, encode(pd.Series(["CD8", None]), TREE))


@given(st.lists(st.sampled_from(VALUES), min_size=1, max_size=12))
def test_pruned_trees_have_no_phantom_leaf_and_lose_no_label(values: list[str | None]) -> None:
    labels = encode(pd.Series(values, dtype=object), TREE, CARPALL)
    try:
        tree, kept = prune(TREE, labels)
    except LabelError:
        assert not any(x.contrasted for x in labels.axes)
        return
    for axis, found in zip(tree.axes, kept.axes, strict=True):
        assert found.allowed.shape[1] == len(axis.leaves) > 1
        assert found.allowed.any(axis=0).all()
        assert found.contrasted
        assert LabelTree.from_dict(tree.to_dict()) == tree
        for cell in np.flatnonzero(found.code >= 0).tolist():
            names = [axis.leaves[i] for i in np.flatnonzero(found.allowed[found.code[cell]])]
            old = TREE[axis.name]
            assert (allowed(labels, axis.name, cell) or set()) <= {
                old.leaves[i] for name in names for i in old.nodes[name]
            }


def test_every_fault_of_a_tree_file_is_named(tmp_path: Path) -> None:
    text = """
name: t
colour: red
axes:
  - {name: a, nodes: [{name: x}, {name: x}, {nme: y}]}
  - {name: a, nodes: [{name: p}, {name: q, nodes: [{name: r}]}]}
  - {name: b, nodes: [{name: p}, {name: unknown}]}
  - {name: c, nodes: 5}
  - just text
"""
    file = write(tmp_path, text)
    with pytest.raises(LabelError) as error:
        LabelTree.read(file)
    for part in (
        str(file),
        "unknown key 'colour'",
        "'x' occurs more than once",
        "unknown key 'nme'; the nearest is 'name'",
        "a node of 'a' has no name",
        "more than one axis 'a'",
        "'q' has one node, 'r', where at least two",
        "node 'p' is in more than one axis",
        "is called 'unknown'",
        "`nodes` of axis 'c' must be a list, found '5'",
        "axes holds 'just text'",
    ):
        assert part in str(error.value), part


def test_every_fault_of_a_mapping_file_is_named(tmp_path: Path) -> None:
    text = "missing: [a]\nlabels:\n  a: {state: effector}\n  b: effector\n  c: {}\n  d: {state: }\nlables: 3\n"
    with pytest.raises(LabelError) as error:
        Mapping.read(write(tmp_path, text))
    for part in ("'a' is both mapped and missing", "'b' must have", "'c' must have", "'d' names no node", "'lables'"):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("axes: [", "label mapping .* cannot be read as YAML"),
        ("- a\n- b", "found a list"),
        ("", "found a NoneType"),
        ("labels:\n  T: {state: effector}\n  T: {state: exhausted}\n", "'T' occurs 2 times in the block at line 2"),
        ("name: m", "at least one label"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_in_a_sentence(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(LabelError, match=part):
        Mapping.read(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="does not exist"):
        LabelTree.read(tmp_path / "none.yaml")


def test_labels_in_yaml_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path, "missing: [null, 0]\nlabels:\n  1: {state: effector}\n  no: {state: exhausted}\n")
    mapping = Mapping.read(path)
    assert (list(mapping.labels), mapping.missing) == (["1", "no"], ("null", "0"))


def test_asking_for_an_axis_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(LabelError, match="nearest is 'lineage'"):
        TREE.names("linage")
