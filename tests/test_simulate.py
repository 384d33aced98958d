from __future__ import annotations

import dataclasses
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, silhouette_score
from sklearn.preprocessing import StandardScaler

from carvae.data.genes import GeneTable
from carvae.data.simulate import (
    LINEAGE,
    OLD_SYMBOLS,
    STUDIES,
    UNLABELLED,
    SimulationSettings,
    background_genes,
    simulate_studies,
    write_studies,
)
from carvae.errors import LabelError

# A few well-known markers per state; the demo passes the packaged signatures.
PROGRAMMES = {
    "naive-like": "CCR7 SELL LEF1 TCF7 IL7R KLF2 LRRN3 MAL ACTN1 CD27".split(),
    "central memory": "CCR7 IL7R CD28 CD27 GPR183 LTB ANXA1 FAS CXCR3 AQP3".split(),
    "effector memory": "GZMK CXCR3 CCR5 CST7 GZMA CCL5 EOMES KLRB1 IL7R CD44".split(),
    "effector/cytotoxic": "GZMB PRF1 GNLY NKG7 GZMH IFNG FGFBP2 CX3CR1 TBX21 KLRG1".split(),
    "progenitor exhausted": "TCF7 CXCR5 SLAMF6 PDCD1 TOX ID3 XCL1 TIGIT IL7R GZMK".split(),
    "terminally exhausted": "HAVCR2 ENTPD1 LAG3 PDCD1 CTLA4 TOX LAYN CXCL13 TNFRSF9 TIGIT".split(),
    "regulatory": "FOXP3 IL2RA CTLA4 IKZF2 CCR4 TNFRSF4 TNFRSF18 BATF CCR8 RTKN2".split(),
}


@pytest.fixture(scope="module")
def studies() -> list[ad.AnnData]:
    return simulate_studies(np.random.default_rng(0), PROGRAMMES)


def counts(study: ad.AnnData) -> pd.DataFrame:
    """Counts under today's symbols."""
    matrix = study.layers["counts"] if "counts" in study.layers else study.X
    genes = GeneTable.default().resolve(list(study.var_names)).symbols
    return pd.DataFrame(matrix.toarray(), index=study.obs_names, columns=genes)


def log_shared(studies: list[ad.AnnData]) -> list[pd.DataFrame]:
    tables = [counts(study) for study in studies]
    genes = sorted(set.intersection(*(set(t.columns) for t in tables)))
    return [np.log1p(1e4 * t[genes].div(t.sum(axis=1), axis=0)) for t in tables]


def batch_silhouette(studies: list[ad.AnnData]) -> float:
    """How far the studies lie apart in the space of 20 principal components."""
    study = np.repeat(np.arange(len(studies)), [s.n_obs for s in studies])
    return float(silhouette_score(PCA(20, random_state=0).fit_transform(np.vstack(log_shared(studies))), study))


def test_studies_have_the_promised_size_and_genes(studies: list[ad.AnnData]) -> None:
    assert [s.n_obs for s in studies] == [500] * 4
    assert all(1000 <= s.n_vars <= 1500 and s.var_names.is_unique and s.obs_names.is_unique for s in studies)
    gene_sets = [set(counts(s).columns) - {d.transgene} for s, d in zip(studies, STUDIES, strict=True)]
    everything = set.union(*gene_sets)
    assert 1200 <= len(everything) <= 1500
    assert everything.issuperset(g for genes in PROGRAMMES.values() for g in genes)
    assert all(0.85 < len(genes) / len(everything) < 0.95 for genes in gene_sets)


def test_background_lists_each_symbol_once() -> None:
    genes = background_genes()
    assert len(genes) == len(set(genes)) > 1000
    assert {"RPL3", "MT-CO1", "HLA-A", "LCK", "TMSB4X"} <= set(genes)
    assert not any(g in genes for g in LINEAGE["CD4"])


def test_counts_lie_where_the_design_says_and_are_whole_numbers(studies: list[ad.AnnData]) -> None:
    for study, design in zip(studies, STUDIES, strict=True):
        assert (design.counts == "X") == (not study.layers)
        matrix = counts(study).to_numpy()
        assert (matrix >= 0).all()
        assert np.issubdtype(matrix.dtype, np.integer)
        if study.layers:
            normalised = np.log1p(1e4 * matrix / matrix.sum(axis=1, keepdims=True))
            np.testing.assert_allclose(study.X.toarray(), normalised, rtol=1e-5)


def test_depth_follows_the_design(studies: list[ad.AnnData]) -> None:
    for study, design in zip(studies, STUDIES, strict=True):
        assert np.median(counts(study).sum(axis=1)) == pytest.approx(design.depth, rel=0.25)


def test_obs_has_the_studys_own_names_and_the_truth(studies: list[ad.AnnData]) -> None:
    patients: list[str] = []
    for study, design in zip(studies, STUDIES, strict=True):
        assert set(design.columns.values()) <= set(study.obs)
        assert set(study.obs["true_state"]) == set(PROGRAMMES)
        assert set(study.obs["true_lineage"]) == {"CD4", "CD8"}
        assert 0.05 < study.obs["true_cycling"].mean() < 0.4
        own = study.obs[design.columns["patient"]]
        assert own.nunique() == design.n_patients
        assert study.obs[design.columns["sample"]].nunique() == design.n_patients * len(design.days)
        assert (study.obs.groupby(own, observed=True)[design.columns["response"]].nunique() == 1).all()
        patients += list(own.unique())
    assert len(patients) == len(set(patients))


def test_labels_are_in_each_studys_own_words(studies: list[ad.AnnData]) -> None:
    fine, coarse, plain, none = studies
    assert fine.obs["cell_type"].nunique() == len(PROGRAMMES)
    assert set(coarse.obs["annotation"]) == {"Memory-like", "Effector", "Dysfunctional", "Treg", "Cycling T"}
    assert (coarse.obs["annotation"].eq("Cycling T") == coarse.obs["true_cycling"]).all()
    labelled = plain.obs["state"] != UNLABELLED
    assert 0.05 < 1 - labelled.mean() < 0.2
    assert (plain.obs["state"].astype(str) == plain.obs["true_state"].astype(str))[labelled].all()
    assert STUDIES[3].label is None
    assert not any(word in set(none.obs[c].astype(str)) for c in none.obs if c != "true_state" for word in PROGRAMMES)


def test_genes_are_named_as_the_design_says_and_all_can_be_resolved(studies: list[ad.AnnData]) -> None:
    found = [GeneTable.default().resolve(list(s.var_names)) for s in studies]
    how = [pd.Series(f.how).value_counts().to_dict() for f in found]
    assert [h.pop("unknown") for h in how] == [1] * 4  # the transgene
    assert [list(f.symbols[f.how == "unknown"]) for f in found] == [[d.transgene] for d in STUDIES]
    assert set(how[0]) == set(how[3]) == {"symbol"}
    assert set(how[1]) == {"ensembl"}
    assert set(how[2]) == {"symbol", "alias"}
    assert how[2]["alias"] == len(set(OLD_SYMBOLS.values()) & set(studies[2].var_names)) > 15


def test_old_symbols_lead_back_to_the_current_ones() -> None:
    assert list(GeneTable.default().resolve(list(OLD_SYMBOLS.values())).symbols) == list(OLD_SYMBOLS)


def test_each_study_measures_its_own_transgene(studies: list[ad.AnnData]) -> None:
    for study, design in zip(studies, STUDIES, strict=True):
        assert (counts(study)[design.transgene] > 0).mean() > 0.2


def test_sex_and_receptor_genes_behave(studies: list[ad.AnnData]) -> None:
    table = counts(studies[0])
    by_patient = table.groupby(studies[0].obs["donor_id"].to_numpy()).sum()
    assert ((by_patient["XIST"] == 0) | (by_patient.reindex(columns=["DDX3Y"], fill_value=0)["DDX3Y"] == 0)).all()
    v_beta = table.loc[:, table.columns.str.match(r"TRBV\d")]
    assert ((v_beta > 0).sum(axis=1) <= 1).mean() > 0.8


def test_states_are_learnable_across_studies_but_not_trivial(studies: list[ad.AnnData]) -> None:
    tables = log_shared(studies)
    scores = []
    for held_out in range(len(studies)):
        train = [i for i in range(len(studies)) if i != held_out]
        scaled = [StandardScaler().fit_transform(t) for t in tables]
        truth = [s.obs["true_state"].astype(str).to_numpy() for s in studies]
        model = LogisticRegression(C=0.01, max_iter=300)
        model.fit(np.vstack([scaled[i] for i in train]), np.concatenate([truth[i] for i in train]))
        scores.append(f1_score(truth[held_out], model.predict(scaled[held_out]), average="macro"))
    assert min(scores) > 0.7, scores
    assert max(scores) < 0.98, scores


def test_batch_effects_are_visible(studies: list[ad.AnnData]) -> None:
    without = dataclasses.replace(SimulationSettings(), batch_effect=0.0)
    calm = simulate_studies(np.random.default_rng(0), PROGRAMMES, without)
    assert batch_silhouette(studies) > 0.25
    assert batch_silhouette(studies) > 2 * batch_silhouette(calm)


def test_planted_genes_are_up_in_their_state(studies: list[ad.AnnData]) -> None:
    (deep, *_), (study, *_) = log_shared(studies), studies
    state = study.obs["true_state"].to_numpy()
    for name, genes in PROGRAMMES.items():
        measured = deep[[g for g in genes if g in deep]].mean(axis=1)
        assert measured.groupby(state).mean().idxmax() == name


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_same_seed_same_studies_and_another_seed_others(seed: int) -> None:
    small = SimulationSettings(studies=STUDIES[:2], n_cells=60)
    first, again, other = (
        simulate_studies(np.random.default_rng(s), PROGRAMMES, small) for s in (seed, seed, seed + 1)
    )
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.obs, two.obs)
        assert list(one.var_names) == list(two.var_names)
        assert (one.X != two.X).nnz == 0
    assert list(first[0].var_names) != list(other[0].var_names)


def test_a_study_does_not_depend_on_the_ones_beside_it() -> None:
    both = simulate_studies(np.random.default_rng(1), PROGRAMMES, SimulationSettings(n_cells=40, studies=STUDIES[:2]))
    alone = simulate_studies(np.random.default_rng(1), PROGRAMMES, SimulationSettings(n_cells=40, studies=STUDIES[:1]))
    assert (both[0].X != alone[0].X).nnz == 0


def test_a_state_of_its_own_name_is_planted_too() -> None:
    programmes = {**PROGRAMMES, "my state": ["CXCL8", "IL6", "IL1B"]}
    study, *_ = simulate_studies(np.random.default_rng(2), programmes, SimulationSettings(n_cells=200))
    assert "my state" in set(study.obs["cell_type"])


@pytest.mark.parametrize("programmes", [{}, {"naive-like": []}])
def test_programmes_without_genes_are_refused(programmes: dict[str, list[str]]) -> None:
    with pytest.raises(LabelError, match="at least one symbol"):
        simulate_studies(np.random.default_rng(0), programmes)


def test_written_studies_read_back_equal_and_leave_nothing_else(studies: list[ad.AnnData], tmp_path: Path) -> None:
    paths = write_studies(studies, tmp_path / "new" / "folder")
    assert [p.name for p in paths] == [f"{d.name}.h5ad" for d in STUDIES]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    for study, path in zip(studies, paths, strict=True):
        back = ad.read_h5ad(path)
        pd.testing.assert_frame_equal(back.obs, study.obs, check_index_type=False, check_categorical=False)
        assert sparse.issparse(back.X)
        assert (back.X != study.X).nnz == 0
        assert back.uns["title"] == study.uns["title"]
