"""Signature scores against a naive loop, their independence of company, and weak labels by the declared rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import rankdata

from carvae.errors import LabelError
from carvae.labels.signatures import AxisRule, Signature, Signatures, Vote, coverage, score, weak_labels
from carvae.labels.tree import LabelTree

LABELS = Path(__file__).parent.parent / "configs" / "labels"
PACKAGED = Signatures.read(LABELS / "signatures.yaml")
TREE = LabelTree.read(LABELS / "tree.yaml")
GENES = [f"G{i}" for i in range(60)]
PAIR = Signatures(
    (Signature("up", tuple(GENES[:8])), Signature("both", tuple(GENES[10:16]), down=tuple(GENES[20:24]))), max_rank=25
)


def simulate(seed: int, n_cells: int = 30, n_genes: int = 60) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.5, 2.0, size=(n_cells, n_genes))).astype(np.int32))


def ucell(cell: NDArray[np.integer], present: list[int], max_rank: int) -> float:
    """UCell of one gene set in one cell, as Andreatta and Carmona 2021 define it."""
    ranks = rankdata(-cell, method="average")
    # pyucell ranks the expressed genes alone, which gives them the same ranks; the others have max_rank.
    capped = [r if r <= max_rank and cell[g] > 0 else max_rank for g, r in zip(present, ranks[present], strict=True)]
    n = len(present)
    u = sum(capped) - n * (n + 1) / 2
    return 1 - u / (n * max_rank - n * (n + 1) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_scores_match_a_naive_loop(seed: int) -> None:
    counts = simulate(seed)
    scores = score(counts, GENES, PAIR)
    dense = counts.toarray()
    for i, cell in enumerate(dense):
        assert scores["up"][i] == pytest.approx(ucell(cell, list(range(8)), 25), abs=1e-5)
        both = ucell(cell, list(range(10, 16)), 25) - ucell(cell, list(range(20, 24)), 25)
        assert scores["both"][i] == pytest.approx(max(both, 0.0), abs=1e-5)
    assert scores["up"].std() > 0.05


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.permutations(range(12)))
def test_a_score_does_not_depend_on_company(seed: int, order: list[int]) -> None:
    counts = simulate(seed, n_cells=12)
    together = score(counts, GENES, PAIR).to_numpy()
    np.testing.assert_array_equal(score(counts[order], GENES, PAIR).to_numpy(), together[order])
    np.testing.assert_array_equal(score(counts[:1], GENES, PAIR).to_numpy(), together[:1])


def test_the_callers_counts_stay_as_they_are() -> None:
    counts = simulate(1)
    before = counts.copy()
    counts.data.flags.writeable = False
    score(counts, GENES, PAIR)
    assert (counts != before).nnz == 0
    assert counts.dtype == before.dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32])
def test_every_count_type_and_container_scores_alike(dtype: type) -> None:
    counts = simulate(2)
    want = score(counts, GENES, PAIR)
    pd.testing.assert_frame_equal(score(sp.csr_array(counts.astype(dtype)), GENES, PAIR), want)
    pd.testing.assert_frame_equal(score(counts.astype(dtype).tocsc(), GENES, PAIR), want)


def test_columns_of_one_gene_are_summed() -> None:
    counts = simulate(3)
    first, second = counts.copy().tolil(), sp.lil_matrix(counts.shape, dtype=np.int32)
    first[:, 4], second[:, 4] = 0, counts[:, 4]
    doubled = sp.hstack([first, second[:, 4]]).tocsr()
    pd.testing.assert_frame_equal(score(doubled, [*GENES, "G4"], PAIR), score(counts, GENES, PAIR))


def test_a_signature_without_its_genes_is_nan_and_listed() -> None:
    counts = simulate(4)
    names = [name if i >= 5 else f"other{i}" for i, name in enumerate(GENES)]  # 5 of the 8 genes of "up" are gone
    scores = score(counts, names, PAIR)
    assert scores["up"].isna().all()
    assert scores["both"].notna().all()
    up, both = coverage(names, PAIR)
    assert (up.scored, up.present, up.missing) == (False, ("G5", "G6", "G7"), ("G0", "G1", "G2", "G3", "G4"))
    assert both.scored
    assert score(counts, [f"x{i}" for i in range(60)], PAIR).isna().all(axis=None)


def test_absent_genes_are_left_out_not_counted_as_zero() -> None:
    counts = simulate(6)
    names = ["absent", *GENES[1:]]
    present = list(range(1, 8))
    want = [ucell(cell, present, 25) for cell in counts.toarray()]
    np.testing.assert_allclose(score(counts, names, PAIR)["up"], want, atol=1e-5)


def test_ranks_end_with_the_genes_that_there_are() -> None:
    counts = simulate(8)
    want = score(counts, GENES, replace(PAIR, max_rank=len(GENES)))
    pd.testing.assert_frame_equal(score(counts, GENES, replace(PAIR, max_rank=1500)), want)


def test_a_signature_of_low_genes_alone_is_not_scored() -> None:
    only_down = [name for name in GENES if name not in PAIR["both"].genes]
    eager = replace(PAIR, min_present=0.1)
    assert not coverage(only_down, eager)[1].scored


def test_a_cell_without_counts_has_no_score() -> None:
    counts = sp.vstack([simulate(7, n_cells=2), sp.csr_matrix((1, 60), dtype=np.int32)]).tocsr()
    assert score(counts, GENES, PAIR).isna().all(axis=1).tolist() == [False, False, True]


def test_names_that_do_not_fit_the_columns_are_refused() -> None:
    with pytest.raises(LabelError, match="60 columns and 59 gene names"):
        score(simulate(0), GENES[:-1], PAIR)


def test_packaged_signatures_name_their_sources_and_fit_the_tree() -> None:
    assert {"exhaustion", "memory_stem", "effector_cytotoxic", "proliferation", "activation", "regulatory"} <= set(
        PACKAGED.names
    )
    assert {"LAG3", "PDCD1", "HAVCR2"} <= set(PACKAGED["exhaustion"].genes)
    for item in PACKAGED.items:
        assert all(source.citation and source.doi.startswith("10.") for source in item.sources), item.name
    for rule in PACKAGED.rules:
        assert {vote.node for vote in rule.votes} <= set(TREE[rule.axis].nodes)


def test_signatures_survive_json() -> None:
    assert Signatures.from_dict(json.loads(json.dumps(PACKAGED.to_dict(), sort_keys=True))) == PACKAGED


def rule_scores(n: int = 100) -> pd.DataFrame:
    """Scores of n quiet cells; the first cells are planted by the tests."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.uniform(0.0, 0.05, size=(n, len(PACKAGED.names))), columns=list(PACKAGED.names))
    frame["proliferation"] = 0.0
    return frame


def nodes_of(scores: pd.DataFrame, axis: str, sample: list[str] | None = None) -> list[str | None]:
    labels = weak_labels(scores, sample or ["s"] * len(scores), TREE, PACKAGED)[axis]
    names = [
        next(n for n, b in TREE[axis].nodes.items() if list(b) == np.flatnonzero(r).tolist()) for r in labels.allowed
    ]
    assert (labels.weak == (labels.code >= 0)).all()
    return [names[code] if code >= 0 else None for code in labels.code]


def test_a_clear_signature_gives_its_node() -> None:
    scores = rule_scores()
    for cell, name in enumerate(["exhaustion", "memory_stem", "effector_cytotoxic", "regulatory"]):
        scores.loc[cell, name] = 0.6
    found = nodes_of(scores, "state")
    assert found[:4] == ["exhausted", "memory-like", "effector", "regulatory"]
    assert set(found[4:]) == {None}  # high within the sample is not enough: the score itself is low
    assert weak_labels(scores, ["s"] * 100, TREE, PACKAGED)["lineage"].code.tolist() == [-1] * 100


def test_unclear_cells_stay_missing() -> None:
    scores = rule_scores()
    scores.loc[0, ["exhaustion", "effector_cytotoxic"]] = 0.6  # two states at once
    scores.loc[1, "exhaustion"] = 0.6
    scores.loc[1, "activation"] = 0.9  # activated, which no state stands for
    scores.loc[2, "exhaustion"] = 0.19  # below min_score
    scores.loc[3, "exhaustion"] = 0.6
    scores.loc[3, "regulatory"] = np.nan  # one competitor could not be scored
    scores.loc[4, "exhaustion"] = 0.6
    scores.loc[5:6, "effector_cytotoxic"] = 0.6  # as widely spread as exhaustion
    assert nodes_of(scores, "state")[:5] == [None, None, None, None, "exhausted"]


def test_cycling_is_said_from_the_score_alone() -> None:
    scores = rule_scores(60)
    scores.loc[0:2, "proliferation"] = [0.3, 0.05, np.nan]
    assert nodes_of(scores, "cycling")[:4] == ["cycling", None, None, "not cycling"]
    everyone = rule_scores(60).assign(proliferation=0.4)  # a sample in which every cell divides
    assert set(nodes_of(everyone, "cycling")) == {"cycling"}


def test_z_scores_are_taken_within_the_sample() -> None:
    scores = rule_scores(120)
    scores.loc[:59, "exhaustion"] += 0.5  # in sample a everybody scores high: no cell stands out
    scores.loc[60, "exhaustion"] = 0.5
    sample = ["a"] * 60 + ["b"] * 60
    found = nodes_of(scores, "state", sample)
    assert found[60] == "exhausted"
    separate = nodes_of(scores.iloc[60:].reset_index(drop=True), "state")
    assert found[60:] == separate


def test_a_high_score_that_is_common_in_the_sample_is_not_enough() -> None:
    scores = pd.DataFrame(0.0, index=range(101), columns=list(PACKAGED.names))
    scores["exhaustion"] = np.linspace(0.3, 0.6, 101)
    z = (scores["exhaustion"] - scores["exhaustion"].mean()) / scores["exhaustion"].std(ddof=0)
    assert nodes_of(scores, "state") == ["exhausted" if value >= 1.0 else None for value in z]


def test_a_small_sample_gets_no_label_that_needs_a_z_score() -> None:
    scores = rule_scores(60)
    scores.loc[[0, 59], "exhaustion"] = 0.6
    sample = ["big"] * 55 + ["small"] * 5
    found = nodes_of(scores, "state", sample)
    assert (found[0], found[59]) == ("exhausted", None)
    assert nodes_of(scores, "cycling", sample)[59] == "not cycling"


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_permuting_cells_permutes_weak_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = pd.DataFrame(rng.uniform(0, 0.8, size=(150, len(PACKAGED.names))), columns=list(PACKAGED.names))
    sample, order = rng.choice(["a", "b"], size=150), rng.permutation(150)
    labels = weak_labels(scores, sample.tolist(), TREE, PACKAGED)
    moved = weak_labels(scores.iloc[order], sample[order].tolist(), TREE, PACKAGED)
    for a, b in zip(labels.take(order).axes, moved.axes, strict=True):
        np.testing.assert_array_equal(a.code, b.code)
        np.testing.assert_array_equal(a.allowed, b.allowed)


def test_weak_labels_name_every_node_that_the_tree_has_not() -> None:
    rule = AxisRule(
        "state", (Vote("up", "exhaustd", None, 0.1), Vote("both", "efector", None, 0.1)), (), 0.0, None, 0.0
    )
    bad = replace(PAIR, rules=(rule, replace(rule, axis="stat")))
    with pytest.raises(LabelError) as error:
        weak_labels(pd.DataFrame({"up": [0.1], "both": [0.1]}), ["s"], TREE, bad)
    for part in ("'exhaustd'; the nearest is 'exhausted'", "'efector'; the nearest is 'effector'", "no axis 'stat'"):
        assert part in str(error.value)
    with pytest.raises(LabelError, match="no `weak_labels`"):
        weak_labels(pd.DataFrame({"up": [0.1], "both": [0.1]}), ["s"], TREE, PAIR)


def test_every_fault_of_a_signature_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        """
max_rank: zero
min_present: 2
signatures:
  - {name: a, genes: [X, X], sources: [{citation: c}]}
  - {name: a, genes: [], sources: [{citation: c, url: u}]}
  - {name: b, genes: [Y]}
weak_labels:
  axes:
    - {axis: state, votes: [{signature: c, node: n, min_score: high}], abstain: [b, b], treshold: 1}
    - {axis: cycling}
""",
        encoding="utf-8",
    )
    with pytest.raises(LabelError) as error:
        Signatures.read(path)
    for part in (
        "`max_rank` must be a number, at least 1; found 'zero'",
        "`min_present` must be a number, at least 0 and at most 1; found '2'",
        "'a' holds gene 'X' more than once",
        "more than one signature 'a'",
        "'a' has no genes",
        "unknown key 'url'",
        "'b' has no source",
        "unknown signature 'c'",
        "counts signature 'b' more than once",
        "`min_score` must be a number",
        "unknown key 'treshold'",
        "'cycling' has no votes",
    ):
        assert part in str(error.value), part


def test_asking_for_a_signature_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(LabelError, match="nearest is 'exhaustion'"):
        PACKAGED["exhausted"]
    assert {"LAG3", "MKI67"} <= set(PACKAGED.genes)
