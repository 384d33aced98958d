"""Cases C: queries that are not what the model expects. The answer is right, `unknown` or refused, never quietly wrong.

Metamorphic: what does not change the biology does not change the labels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from small import Says, Small
from test_bad_input import assert_refused, write

import carvae as library
from carvae.config import PredictConfig
from carvae.data.genes import GeneTable

Floats = np.ndarray
TOLERANCE = 2e-5  # sums in another order round otherwise


@pytest.fixture(scope="module")
def clean(small: Small) -> AnnData:
    return library.annotate(small.query, small.model)


def states(adata: AnnData) -> list[str]:
    return adata.obs["carvae_state"].astype(str).tolist()


def with_counts(query: AnnData, counts: object) -> AnnData:
    other = query.copy()
    other.X = sp.csr_matrix(counts)
    return other


def assert_same(found: AnnData, clean: AnnData) -> None:
    expected = clean[found.obs_names]
    np.testing.assert_allclose(found.obsm["X_carvae"], expected.obsm["X_carvae"], atol=TOLERANCE)
    assert states(found) == states(expected)
    np.testing.assert_allclose(found.obs["carvae_novelty"], expected.obs["carvae_novelty"], atol=1e-3)


# What must not change anything.


def other_cells(query: AnnData) -> AnnData:
    return query[np.random.default_rng(0).permutation(query.n_obs)].copy()


def other_genes(query: AnnData) -> AnnData:
    return query[:, np.random.default_rng(0).permutation(query.n_vars)].copy()


def more_genes(query: AnnData) -> AnnData:
    none = AnnData(sp.csr_matrix((query.n_obs, 500), dtype=np.int32), obs=query.obs[[]])
    none.var_names = [f"LINC9{i:04d}" for i in range(500)]
    return ad.concat([query, none], axis=1, merge="first")


def with_labels_of_its_own(query: AnnData) -> AnnData:
    other = query.copy()
    other.obs["state"] = other.obs["cell_type"] = other.obs["label"] = "gdT"
    other.obs["study"] = "a study that nobody knows"
    return other


def without_columns(query: AnnData) -> AnnData:
    return AnnData(query.X, obs=query.obs[[]], var=query.var)


def mostly_ensembl(query: AnnData) -> AnnData:
    table, other = GeneTable.default(), query.copy()
    id_of = {symbol: gene_id for gene_id, symbol in table.by_id.items()}
    symbols = table.resolve(list(query.var_names), None).symbols
    names = [f"{id_of[s]}.12" if s in id_of else str(name) for s, name in zip(symbols, query.var_names, strict=True)]
    other.var_names = [*map(str, query.var_names[:4]), *names[4:]]
    return other


SAME = [
    pytest.param(other_genes, marks=pytest.mark.case("C01", "C03", "C04")),
    pytest.param(other_cells, marks=pytest.mark.case("C28")),
    more_genes,
    pytest.param(with_labels_of_its_own, marks=pytest.mark.case("C11", "C12", "C15", "C16")),
    pytest.param(without_columns, marks=pytest.mark.case("C13", "C14")),
    pytest.param(mostly_ensembl, marks=pytest.mark.case("C06", "C07", "C09")),
    pytest.param(lambda query: query[:1].copy(), id="one cell", marks=pytest.mark.case("C24")),
]


@pytest.mark.parametrize("changed", SAME)
def test_what_says_nothing_of_the_cells_changes_nothing(
    small: Small, clean: AnnData, changed: Callable[[AnnData], AnnData], says: Says
) -> None:
    query = changed(small.query)
    before = query.copy()
    found = library.annotate(query, small.model)
    assert_same(found, clean)
    pd.testing.assert_frame_equal(query.obs, before.obs)
    right = (clean.obs["carvae_state"].astype(str) == clean.obs["true_state"].astype(str)).mean()
    says(f"labels of all {found.n_obs} cells unchanged (accuracy of the clean query {right:.2f})")


@pytest.mark.case("C29")
@pytest.mark.parametrize("size", [1, 7, 60])
def test_neither_company_nor_chunk_changes_a_cell(small: Small, clean: AnnData, size: int, says: Says) -> None:
    assert_same(library.annotate(small.query, small.model, PredictConfig(chunk_size=size)), clean)
    halves = [library.annotate(small.query[part].copy(), small.model) for part in (slice(0, 25), slice(25, None))]
    for half in halves:
        assert_same(half, clean)
    says("labels and coordinates (to 2e-5) do not depend on chunk size or on which cells are asked together")


@pytest.mark.case("C26")
def test_a_query_of_one_state_is_not_pulled_to_the_mix_of_the_training(
    small: Small, clean: AnnData, says: Says
) -> None:
    one = small.query.obs["true_state"].astype(str).mode()[0]
    part = small.query[small.query.obs["true_state"].astype(str) == one].copy()
    assert_same(library.annotate(part, small.model), clean)
    says(f"{part.n_obs} cells of {one} alone are labelled as among all others")


def test_threads_do_not_change_labels(small: Small, clean: AnnData) -> None:
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_same(library.annotate(small.query, small.model), clean)
    finally:
        torch.set_num_threads(before)


@pytest.mark.case("C27", "D12")
def test_the_callers_object_and_generators_stay_as_they_were(small: Small, says: Says) -> None:
    query = small.query.copy()
    before = query.copy()
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state()  # noqa: NPY002 - the global one is meant
    library.annotate(query, small.model)
    library.embed(query, small.model)
    library.load(small.model).predict(query)
    assert random.getstate() == state[0]
    assert np.random.get_state()[2] == state[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])
    pd.testing.assert_frame_equal(query.obs, before.obs)
    assert (query.X != before.X).nnz == 0
    assert not [*query.uns, *query.obsm, *query.layers]
    says("obs, uns, obsm, layers, X and the generators of Python, numpy and torch are as before")


# What must be unknown.


def noise(query: AnnData) -> AnnData:
    return with_counts(query, np.random.default_rng(0).poisson(3, query.shape))


def shuffled_within(query: AnnData) -> AnnData:
    rng, x = np.random.default_rng(0), query.X.toarray()
    return with_counts(query, np.stack([rng.permutation(row) for row in x]))


def empty(query: AnnData) -> AnnData:
    return with_counts(query, np.zeros(query.shape, np.int32) + np.eye(*query.shape, dtype=np.int32))


@pytest.mark.parametrize(
    ("changed", "share"),
    [
        pytest.param(noise, 1.0, marks=pytest.mark.case("C21")),
        pytest.param(shuffled_within, 1.0, marks=pytest.mark.case("C22")),
        pytest.param(empty, 1.0, marks=pytest.mark.case("C20")),
    ],
)
def test_cells_that_are_none_are_unknown(
    small: Small, clean: AnnData, changed: Callable[[AnnData], AnnData], share: float, says: Says
) -> None:
    found = np.array(states(library.annotate(changed(small.query), small.model)))
    falsely = np.mean(np.array(states(clean)) == "unknown")
    says(f"{np.mean(found == 'unknown'):.0%} of {len(found)} cells unknown; of the clean query {falsely:.0%}")
    assert np.mean(found == "unknown") >= share
    assert falsely <= 0.2


@pytest.mark.case("C25")
def test_shallow_cells_are_less_sure(small: Small, says: Says) -> None:
    rng, truth, told = np.random.default_rng(0), small.query.obs["true_state"].astype(str).to_numpy(), []
    sure = []
    for depth in (1.0, 0.3, 0.1, 0.03):
        counts = rng.binomial(small.query.X.toarray().astype(int), depth)
        found = library.annotate(with_counts(small.query, counts), small.model)
        named = np.array(states(found)) != "unknown"
        right = (np.array(states(found)) == truth)[named].mean() if named.any() else np.nan
        confidence = found.obs["carvae_confidence"].to_numpy()[named].mean() if named.any() else 0.0
        sure.append(confidence)
        told.append(f"{depth:.0%}: accuracy {right:.2f}, confidence {confidence:.2f}, unknown {1 - named.mean():.0%}")
        assert not named.any() or confidence <= right + 0.2, told
    assert sure == sorted(sure, reverse=True), told
    says("; ".join(told))


# What must be refused.


@pytest.mark.case("C02")
def test_other_genes(small: Small, tmp_path: Path, says: Says) -> None:
    other = small.query.copy()
    other.var_names = [f"LINC9{i:04d}" for i in range(other.n_vars)]
    answer = small.annotate(write(other, tmp_path / "Q.h5ad"), tmp_path / "A.csv")
    assert_refused(answer, "genes")
    assert [p.name for p in tmp_path.iterdir()] == ["Q.h5ad"]
    says(answer.err)


@pytest.mark.case("C08")
def test_mouse_case(small: Small, tmp_path: Path, says: Says) -> None:
    other = small.query.copy()
    other.var_names = [str(name).capitalize() for name in other.var_names]
    answer = small.annotate(write(other, tmp_path / "Q.h5ad"), tmp_path / "A.csv")
    assert_refused(answer, "mouse genes", "orthologues")
    says(answer.err)


@pytest.mark.case("C05")
def test_missing_genes_make_less_sure_or_are_refused(small: Small, tmp_path: Path, says: Says) -> None:
    genes = np.array(GeneTable.default().resolve(list(small.query.var_names), None).symbols)
    panel = np.isin(genes, library.load(small.model).genes)
    truth, told = small.query.obs["true_state"].astype(str).to_numpy(), []
    for share in (0.05, 0.2, 0.5, 0.8, 0.95):
        keep = ~panel | (np.random.default_rng(1).random(len(genes)) >= share)
        part = small.query[:, keep].copy()
        if share > 0.5:
            answer = small.annotate(write(part, tmp_path / "Q.h5ad"), tmp_path / "A.csv")
            assert_refused(answer, "of the model's", "genes are in the query", "40.0%")
            told.append(f"{share:.0%}: refused")
            continue
        found = library.annotate(part, small.model)
        named = np.array(states(found)) != "unknown"
        right, sure = (np.array(states(found)) == truth)[named].mean(), found.obs["carvae_confidence"][named].mean()
        told.append(f"{share:.0%}: accuracy {right:.2f}, confidence {sure:.2f}, unknown {1 - named.mean():.0%}")
        assert sure <= right + 0.2, told
    says("; ".join(told))


def log1p(x: Floats) -> Floats:
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)).round(3)


def cpm(x: Floats) -> Floats:
    return 1e6 * x / x.sum(axis=1, keepdims=True)


def scaled(x: Floats) -> Floats:
    logs = np.log1p(x)
    return (logs - logs.mean(axis=0)) / (logs.std(axis=0) + 1)


def half(x: Floats) -> Floats:
    mixed = x.copy()
    mixed[: len(x) // 2] = log1p(x)[: len(x) // 2]
    return mixed


def one_value(value: float) -> Callable[[Floats], Floats]:
    def put(x: Floats) -> Floats:
        other = x.copy()
        other[-1, -1] = value
        return other

    return put


FAKE = {
    "log1p CP10k, rounded": log1p,
    "log2(1+x)": lambda x: np.log2(1 + x),
    "CPM": cpm,
    "CPM, rounded": lambda x: np.rint(cpm(x)),
    "CPM, rounded and cut to some genes": lambda x: np.rint(cpm(x)) * (np.arange(x.shape[1]) % 4 > 0),
    "one cell in four CP10k, rounded": lambda x: np.where(
        np.arange(len(x))[:, None] % 4 == 0, np.rint(cpm(x) / 100), x
    ),
    "cut to zero and one": lambda x: (x > 0).astype(np.float32),
    "Pearson residuals": lambda x: (x - x.mean(axis=0)) / np.sqrt(x.mean(axis=0) + x.mean(axis=0) ** 2 / 100 + 1),
    "scaled": scaled,
    "square root": np.sqrt,
    "TPM": lambda x: cpm(x / np.linspace(0.5, 5, x.shape[1])),
    "float16 beyond its exact range": lambda x: np.where(x > 0, x + 2050, 0).astype(np.float16),
    "times ten": lambda x: 10 * x,
    "ambient RNA taken off": lambda x: np.maximum(x - 0.02 * x.mean(axis=0), 0),
    "half of the cells log1p": half,
    "one NaN": one_value(np.nan),
    "one infinite": one_value(np.inf),
    "one negative": one_value(-1),
    "one of 1e9": one_value(1e9),
}


@pytest.mark.case("C17", "C18", "C19", "B06", "B08", "B09", "B10", "B11", "B26", "B31")
@pytest.mark.parametrize("recipe", FAKE)
def test_what_looks_like_counts_and_is_none(small: Small, tmp_path: Path, recipe: str, says: Says) -> None:
    other = small.query.copy()
    other.X = FAKE[recipe](small.query.X.toarray().astype(np.float32))
    answer = small.annotate(write(other, tmp_path / "Q.h5ad"), tmp_path / "A.h5ad")
    assert_refused(answer, "Q holds no raw counts", "provide raw counts in layers['counts']", "X ")
    assert [p.name for p in tmp_path.iterdir()] == ["Q.h5ad"]
    says(f"{recipe}: {answer.err.partition('several): ')[2]}")


def test_raw_counts_are_no_false_alarm(small: Small) -> None:
    for dtype in (np.float32, np.float64, np.int64, np.uint16):
        library.embed(with_counts(small.query, small.query.X.astype(dtype)), small.model)
