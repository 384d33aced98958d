"""The gene panel: scanpy's choice, the policy, and the genes of the signatures."""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.config import IngestConfig
from carvae.data.gene_policy import POLICY_GROUPS
from carvae.data.genes import excluded_by_policy
from carvae.data.panel import Panel, choose_panel, highly_variable
from carvae.errors import GeneError

POLICED = ["FMC63-CAR", "TRBV20-1", "TRAJ33", "MT-CO1", "RPL3", "XIST", "MKI67"]
SIGNATURE = ["CCR7", "LAG3", "HAVCR2", "TRBV20-1", "NOT-MEASURED"]
PLAIN = [f"GENE{i:03d}" for i in range(200)]
UNIVERSE = np.array(sorted([*POLICED, "CCR7", "LAG3", "HAVCR2", *PLAIN]), dtype=object)
N = 300


def drawn(seed: int = 0, n: int = N) -> sp.csr_matrix:
    """Cells of two kinds; every fifth gene tells them apart, and so do the genes of the policy."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(2.0, 1.0, len(UNIVERSE))
    telling = np.isin(UNIVERSE, [*PLAIN[::5], *POLICED])
    kind = rng.integers(0, 2, (n, 1))
    fold = np.where(telling, np.where(kind == 1, 6.0, 0.3), 1.0)
    mean[np.isin(UNIVERSE, ["CCR7", "LAG3", "HAVCR2"])] = 0.4
    return sp.csr_matrix(rng.poisson(mean * fold).astype(np.int64))


def choose(
    batch: object = None, measured: np.ndarray | None = None, counts: sp.csr_matrix | None = None, **settings: object
) -> Panel:
    counts = drawn() if counts is None else counts
    batch = np.repeat(["a", "b"], [100, counts.shape[0] - 100]) if batch is None else batch
    measured = np.ones((2, len(UNIVERSE)), np.bool_) if measured is None else measured
    config = IngestConfig(**{"n_top_genes": 30} | settings)
    return choose_panel(counts, np.asarray(batch, dtype=object), UNIVERSE, measured, SIGNATURE, config)


@pytest.mark.parametrize("batches", [["a"] * N, ["a"] * 100 + ["b"] * 200])
def test_variable_genes_are_those_of_scanpy_called_directly(batches: list[str]) -> None:
    counts = drawn()
    between = np.isin(UNIVERSE, PLAIN[1::5])
    counts = sp.csr_matrix(counts.toarray() + np.outer(np.arange(N) >= 100, 25 * between))  # a batch effect
    chosen = choose(batches, counts=counts)
    kept = ~np.isin(UNIVERSE, ["FMC63-CAR", "TRBV20-1", "TRAJ33", "MT-CO1", "XIST"])
    adata = ad.AnnData(
        counts[:, kept].astype(np.float32),
        obs=pd.DataFrame({"batch": batches}, index=[str(i) for i in range(N)]),
        var=pd.DataFrame(index=UNIVERSE[kept].astype(str)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key = "batch" if len(set(batches)) > 1 else None
        sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=30, batch_key=key)
    variable = set(adata.var_names[adata.var["highly_variable"]])
    assert len(variable) == 30
    assert set(chosen.genes) == variable | {"CCR7", "LAG3", "HAVCR2"}
    assert chosen.n_variable == 30
    assert chosen.n_signature == len({"CCR7", "LAG3", "HAVCR2"} - variable)
    assert len(variable & set(PLAIN[::5])) >= 20, "the genes that were made to vary are not the variable ones"


@settings(max_examples=12)
@given(st.sets(st.sampled_from(POLICY_GROUPS)), st.integers(10, 400))
def test_no_gene_of_the_policy_is_in_the_panel_and_every_signature_gene_is(groups: set[str], n_top: int) -> None:
    chosen = choose(exclude_genes=tuple(sorted(groups)), n_top_genes=n_top)
    masks = excluded_by_policy(UNIVERSE, sorted(groups))
    policed = set(UNIVERSE[np.logical_or.reduce([*masks.values(), np.zeros(len(UNIVERSE), np.bool_)])])
    assert not policed & set(chosen.genes)
    assert {"CCR7", "LAG3", "HAVCR2"} <= set(chosen.genes)
    assert ("TRBV20-1" in chosen.genes) <= ("vdj" not in groups)
    assert "NOT-MEASURED" not in chosen.genes
    assert list(chosen.genes) == sorted(set(chosen.genes))
    assert len(chosen.genes) == chosen.n_variable + chosen.n_signature
    assert chosen.excluded == {name: int(mask.sum()) for name, mask in masks.items()}
    if n_top >= len(UNIVERSE):
        assert set(chosen.genes) == set(UNIVERSE) - policed


def test_transgenes_and_receptor_genes_stay_out_though_they_vary_most() -> None:
    """They name the study and the clone; by their variance alone they would be in."""
    policed = set(POLICED) - {"RPL3", "MKI67"}
    assert len(policed & set(choose(exclude_genes=(), n_top_genes=60).genes)) >= 4
    assert not policed & set(choose(n_top_genes=60).genes)


def test_a_gene_of_too_few_studies_is_no_variable_gene_but_a_signature_gene_is_from_any() -> None:
    measured = np.ones((3, len(UNIVERSE)), np.bool_)
    rare = np.isin(UNIVERSE, [*PLAIN[::5], "LAG3"])
    measured[1:, rare] = False
    nowhere = UNIVERSE == "HAVCR2"
    measured[:, nowhere] = False
    chosen = choose(measured=measured, min_study_share=0.5)
    assert not set(PLAIN[::5]) & set(chosen.genes)
    assert "LAG3" in chosen.genes
    assert "HAVCR2" not in chosen.genes
    assert set(PLAIN[::5]) & set(choose(measured=measured, min_study_share=0.3).genes)


def test_a_batch_of_few_cells_does_not_stop_the_choice() -> None:
    """The loess of seurat_v3 fails on a handful of cells; such a batch is ranked with the largest."""
    small = choose(["tiny"] * 3 + ["a"] * 140 + ["b"] * 157)
    assert small.genes == choose(["b"] * 3 + ["a"] * 140 + ["b"] * 157).genes
    assert choose([f"batch{i}" for i in range(N)]).n_variable == 30


def test_the_choice_is_the_same_each_time_and_leaves_its_input_alone() -> None:
    counts = drawn()
    before = counts.copy()
    assert choose(counts=counts) == choose(counts=counts)
    assert (counts != before).nnz == 0
    assert counts.dtype == before.dtype


def test_studies_without_common_genes_are_refused() -> None:
    with pytest.raises(GeneError, match=r"only 0 detected genes are measured by 50% of the studies; .*min_study_share"):
        choose(measured=np.zeros((2, len(UNIVERSE)), np.bool_))
    with pytest.raises(GeneError, match="only 0 detected genes"):
        choose(counts=sp.csr_matrix((N, len(UNIVERSE)), dtype=np.int64))


def test_the_users_own_vector_features_stay_out_in_any_case() -> None:
    assert "GENE005" in choose().genes
    own = choose(transgenes=("gene005",))
    assert "GENE005" not in own.genes
    assert own.excluded["transgene"] == choose().excluded["transgene"] + 1


@pytest.mark.parametrize(("n_cells", "depth"), [(12, 3000.0), (40, 3000.0), (150, 60.0), (600, 30.0)])
def test_few_and_shallow_cells_have_variable_genes_too(n_cells: int, depth: float) -> None:
    rng = np.random.default_rng(n_cells)
    share_G = rng.lognormal(0, 2.5, 900)
    expected = np.outer(rng.gamma(4, 1 / 4, n_cells), share_G / share_G.sum() * depth)
    expected[: n_cells // 2, 5:10] += 4  # what varies beyond chance
    counts = sp.csr_matrix(rng.poisson(expected).astype(np.float32))
    chosen = highly_variable(ad.AnnData(counts), 100)
    assert chosen.dtype == bool
    assert chosen.sum() == 100
    assert chosen[5:10].sum() >= 4


def test_where_no_curve_is_found_genes_are_ranked_by_variance_over_mean(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_found(*_: Any, **__: Any) -> None:
        raise ValueError("b'There are other near singularities as well. 0.01561'")

    monkeypatch.setattr("scanpy.pp.highly_variable_genes", none_found)
    counts = np.random.default_rng(0).poisson(3, (50, 40)).astype(np.float32)
    counts[:25, 7:9] += 20
    assert np.flatnonzero(highly_variable(ad.AnnData(sp.csr_matrix(counts)), 2)).tolist() == [7, 8]
    assert "too few or too shallow for seurat_v3" in caplog.text
