"""The state head and its loss: labels as sets of leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from carvae.config import ModelConfig
from carvae.errors import LabelError
from carvae.labels.tree import LabelTree
from carvae.model.heads import StateHead, label_loss

CONFIG = ModelConfig(n_latent=3, n_hidden=4)
TREE = LabelTree.from_dict(
    {
        "name": "two axes",
        "axes": [
            {"name": "type", "nodes": [{"name": "T cell"}, {"name": "B cell"}]},  # names that torch cannot give modules
            {"name": "a.b", "nodes": [{"name": "x", "nodes": [{"name": "x1"}, {"name": "x2"}]}, {"name": "y"}]},
        ],
    }
)


def head_of(tree: LabelTree, own: float = 0.1, config: ModelConfig = CONFIG) -> StateHead:
    torch.manual_seed(0)
    return StateHead({axis.name: torch.from_numpy(axis.parts(own)) for axis in tree.axes}, 5, config)


def naive_loss(probability: np.ndarray, code: list[int], allowed: np.ndarray, weight: list[float]) -> float:
    total, n = 0.0, 0
    for p, c, w in zip(probability, code, weight, strict=True):
        if c >= 0:
            total += -w * math.log(sum(p[s] for s in range(len(p)) if allowed[c, s]))
            n += 1
    return total / n if n else 0.0


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], np.ndarray, list[float]]:
    n, leaves, sets = draw(st.integers(1, 6)), draw(st.integers(2, 5)), draw(st.integers(1, 4))
    logits = draw(hnp.arrays(np.float64, (n, leaves), elements=st.floats(-8, 8)))
    allowed = draw(hnp.arrays(np.bool_, (sets, leaves)))
    allowed[:, 0] |= ~allowed.any(1)
    code = draw(st.lists(st.integers(-1, sets - 1), min_size=n, max_size=n))
    weight = draw(st.lists(st.floats(0, 3), min_size=n, max_size=n))
    return torch.log_softmax(torch.from_numpy(logits), 1), code, allowed, weight


@given(problems())
def test_label_loss_is_that_of_a_naive_loop(problem: tuple[torch.Tensor, list[int], np.ndarray, list[float]]) -> None:
    log_probability, code, allowed, weight = problem
    loss = label_loss(log_probability, torch.tensor(code), torch.from_numpy(allowed), torch.tensor(weight).double())
    expected = naive_loss(log_probability.exp().numpy(), code, allowed, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(problems())
def test_a_label_that_allows_every_leaf_costs_nothing(
    problem: tuple[torch.Tensor, list[int], np.ndarray, list[float]],
) -> None:
    log_probability, code, allowed, weight = problem
    everything = torch.ones(allowed.shape, dtype=torch.bool)
    loss = label_loss(log_probability, torch.tensor(code), everything, torch.tensor(weight).double())
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_missing_labels_add_nothing_to_loss_or_gradient() -> None:
    """Peer fault: dropping cells whose label is outside the shared set. Here they stay, and teach nothing."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.eye(4, dtype=torch.bool)
    code, weight = torch.tensor([2, -1, 0, -1, -1]), torch.tensor([1.0, 9, 2, 9, 9]).double()
    loss = label_loss(torch.log_softmax(logits, 1), code, allowed, weight)
    loss.backward()  # type: ignore[no-untyped-call]
    known = code >= 0
    alone = label_loss(torch.log_softmax(logits[known], 1), code[known], allowed, weight[known])
    assert loss.item() == pytest.approx(alone.item())
    assert logits.grad is not None
    assert torch.all(logits.grad[~known] == 0)
    assert torch.all(logits.grad[known].abs().sum(1) > 0)


def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = label_loss(torch.log_softmax(logits, 1), torch.full((3,), -1), torch.eye(4, dtype=torch.bool), torch.ones(3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.all(logits.grad == 0)


def test_a_coarse_label_raises_its_leaves_and_does_not_choose_between_them() -> None:
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[True, True, False]])
    label_loss(torch.log_softmax(logits, 1), torch.tensor([0]), allowed, torch.ones(1)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    a, b, c = (-logits.grad[0]).tolist()
    assert a == pytest.approx(b)
    assert a > 0 > c


def test_the_loss_stays_finite_where_a_model_is_sure_and_wrong() -> None:
    log_probability = torch.log_softmax(torch.tensor([[200.0, -200.0]]), 1).requires_grad_()
    loss = label_loss(log_probability, torch.tensor([1]), torch.tensor([[True, False], [False, True]]), torch.ones(1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(400)
    assert log_probability.grad is not None
    assert torch.isfinite(log_probability.grad).all()


@given(st.integers(1, 7), st.floats(0, 30))
def test_probabilities_sum_to_one_on_every_axis(n: int, scale: float) -> None:
    head = head_of(TREE).eval()
    for axis, log_probability in head.latent_view(torch.randn(n, 3) * scale).items():
        assert log_probability.shape == (n, len(TREE[axis].leaves))
        assert log_probability.exp().sum(1).detach().numpy() == pytest.approx(1, abs=1e-5)


def test_axes_may_bear_any_name_and_keep_their_order() -> None:
    assert list(head_of(TREE).latent_view(torch.zeros(1, 3))) == ["type", "a.b"]


def test_leaves_that_share_a_word_share_what_is_learned() -> None:
    """What tells CD8 from CD4 among the TEM tells them apart among the CTL, however few of these there are."""
    tree = LabelTree.flat(["CD4 CTL", "CD4 TEM", "CD8 CTL", "CD8 TEM"])
    assert tree.axes[0].leaves == ("CD4 CTL", "CD4 TEM", "CD8 CTL", "CD8 TEM")
    z = torch.randn(20, 3)
    shared = head_of(tree, own=0.0).latent_view(z)["state"].detach()
    assert (shared[:, 2] - shared[:, 0]).numpy() == pytest.approx((shared[:, 3] - shared[:, 1]).numpy(), abs=1e-5)
    free = head_of(tree, own=1.0).latent_view(z)["state"].detach()
    assert not torch.allclose(free[:, 2] - free[:, 0], free[:, 3] - free[:, 1], atol=0.1)


def test_dropout_of_the_head_is_off_when_predicting() -> None:
    head, z = head_of(TREE, config=ModelConfig(n_latent=3, n_hidden=4, head_dropout=0.5)), torch.randn(50, 3)
    assert not torch.equal(head.latent_view(z)["type"], head.latent_view(z)["type"])
    head.eval()
    assert torch.equal(head.latent_view(z)["type"], head.latent_view(z)["type"])


WORDS = st.lists(st.sampled_from(["CD4", "CD8", "TEM", "CTL", "a"]), min_size=1, max_size=3).map(" ".join)


@st.composite
def specs(draw: st.DrawFn, depth: int = 2) -> list[dict[str, object]]:
    nodes: list[dict[str, object]] = []
    for name in draw(st.lists(WORDS, min_size=2, max_size=4)):
        below = draw(specs(depth - 1)) if depth and draw(st.booleans()) else None
        nodes.append({"name": name} | ({"nodes": below} if below else {}))
    return nodes


def numbered(nodes: list[dict[str, object]], taken: set[str]) -> list[dict[str, object]]:
    """The same tree with every name once; a name that is taken gets more of its own words, never a new one."""
    out: list[dict[str, object]] = []
    for node in nodes:
        name = str(node["name"])
        while name in taken:
            name += " a"
        taken.add(name)
        below = node.get("nodes")
        out.append({"name": name} | ({"nodes": numbered(below, taken)} if isinstance(below, list) else {}))
    return out


@given(specs(), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_parts_tell_all_leaves_apart_even_without_own_parts(spec: list[dict[str, object]], own: float) -> None:
    try:
        tree = LabelTree.from_dict({"axes": [{"name": "state", "nodes": numbered(spec, set())}]})
    except LabelError:
        return
    parts = tree.axes[0].parts(own)
    assert np.isfinite(parts).all()
    assert len(np.unique(parts, axis=0)) == len(tree.axes[0].leaves) == len(parts)


def test_parts_are_words_and_nodes_above() -> None:
    axis = LabelTree.from_dict(
        {"axes": [{"name": "s", "nodes": [{"name": "m", "nodes": [{"name": "a b"}, {"name": "c"}]}, {"name": "d b"}]}]}
    ).axes[0]
    shared = {tuple(column) for column in axis.parts(0.0)[:, :-3].T.tolist()}
    assert shared == {(1, 1, 0), (1, 0, 1)}  # below m; with the word b
