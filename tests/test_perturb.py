"""``carvae perturb``: which counts a change touches, what it is compared with, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from test_respond import Cohort, cohort, respond
from trained import PROGRAMMES, World, carvae, sha256

from carvae.config import label_file
from carvae.errors import GeneError
from carvae.labels.signatures import Signatures
from carvae.model.intervention import NEIGHBOURS, Expression, Intervention, applied, control, intervention
from carvae.perturb import HYPOTHESIS

__all__ = ["cohort"]
SIGNATURES = Signatures.read(label_file("signatures"))
GENES = ("LAG3", "PDCD1", "TOX", "TCF7", "GZMB")


def counts(seed: int, n: int = 40, n_genes: int = 8) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.4, 3.0, (n, n_genes))).astype(np.int32))


@given(st.integers(0, 10**6), st.sets(st.integers(0, 7), max_size=4), st.floats(0, 1))
def test_only_the_genes_meant_move_and_in_the_direction_meant(seed: int, up: set[int], quantile: float) -> None:
    panel = counts(seed)
    total_N = np.asarray(panel.sum(axis=1)).ravel().astype(np.int64)
    before = panel.toarray()
    down = sorted(set(range(0, 8, 3)) - up)
    what = Intervention("x", "up", tuple(sorted(up)), tuple(down))
    expression = Expression.of(panel, total_N, quantile)
    found = applied(panel, total_N, what, expression)
    after = found.toarray()
    rest = sorted(set(range(8)) - up - set(down))
    assert (panel.toarray() == before).all()  # the caller's counts stay
    assert (after[:, rest] == before[:, rest]).all()
    assert not after[:, down].any()
    for g in sorted(up):
        least = np.maximum(np.rint(total_N / 1e4 * expression.level_G[g]), 1)
        assert (after[:, g] == np.maximum(before[:, g], least)).all()
    assert (found.data > 0).all()
    assert found.dtype == panel.dtype


def test_a_level_is_a_quantile_of_the_cells_that_have_the_gene() -> None:
    panel = sp.csr_matrix(np.array([[0, 1], [2, 1], [4, 1], [0, 1]]))
    found = Expression.of(panel, np.array([10_000] * 4), 1.0)
    assert found.level_G.tolist() == [4, 1]
    assert found.mean_G.tolist() == [1.5, 1]


def test_controls_are_other_genes_of_like_expression() -> None:
    mean_G = np.sort(np.random.default_rng(0).gamma(0.5, 2, 400))
    what = Intervention("x", "up", (10, 200), (390,))
    measured_G = np.ones(400, bool)
    measured_G[190:199] = False
    drawn = [control(what, Expression(mean_G, mean_G), measured_G, np.random.default_rng(seed)) for seed in range(30)]
    for own in drawn:
        assert not set(own.genes) & set(what.genes)
        assert len(set(own.genes)) == 3
        assert measured_G[list(own.genes)].all()
        assert (len(own.up), len(own.down)) == (2, 1)
        assert np.abs(np.array(own.genes) - np.array(what.genes)).max() <= NEIGHBOURS + 10
    assert len({own.genes for own in drawn}) > 20


def test_a_name_is_a_signature_or_genes_by_any_of_their_names() -> None:
    both = intervention("TIM-3+PD1", "down", ("PDCD1", "HAVCR2"), SIGNATURES)
    assert (both.up, both.down) == ((), (1, 0))
    signature = intervention("exhaustion", "up", GENES, SIGNATURES)
    assert set(signature.up) == {0, 1, 2}
    assert "HAVCR2" in signature.absent
    with pytest.raises(GeneError, match=r"perturb.up: 'TCF8' is neither a gene .* nearest is 'TCF7'"):
        intervention("TCF8", "up", GENES, SIGNATURES)
    with pytest.raises(GeneError, match="reads no gene of the signature 'regulatory'"):
        intervention("regulatory", "up", GENES, SIGNATURES)


@pytest.fixture(scope="module")
def perturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("perturbed") / "o"
    planted = "+".join(gene for gene in PROGRAMMES["regulatory"] if gene not in {"CTLA4"})
    settings = (f"perturb.up=[{planted}]", "perturb.down=[proliferation]", "perturb.controls=6", "predict.min_counts=5")
    answer = carvae("perturb", world.query_path, "--model", world.bundle, "--out", out, *settings)
    assert answer.code == 0, answer.err
    return out


def test_cells_given_a_programme_are_called_its_state_more_than_by_random_genes(perturbed: Path) -> None:
    table = pd.read_csv(perturbed / "states.csv")
    row = table[(table["direction"] == "up") & (table["state"] == "regulatory")].iloc[0]
    assert row["difference"] > 0.1
    assert row["difference"] > row["control_high"]
    assert row["beyond_controls"] in {True, "True"}
    assert row["low"] < row["difference"] < row["high"]
    assert (table["interval_over"] == "patients").all()
    assert (table["status"] == HYPOTHESIS).all()
    sums = table.groupby(["change", "direction", "axis"])[["before", "after"]].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-4)
    np.testing.assert_allclose(table["difference"], table["after"] - table["before"], atol=1e-9)


def test_states_are_means_over_patients_of_the_table_of_samples(perturbed: Path) -> None:
    states, samples = (pd.read_csv(perturbed / name) for name in ("states.csv", "samples.csv"))
    assert not (perturbed / "response.csv").exists()
    keys = ["change", "direction", "axis", "state"]
    per_patient = samples.groupby([*keys, "patient"])[["before", "after"]].mean()
    expected = per_patient.groupby(keys).mean()
    found = states.set_index(keys)
    np.testing.assert_allclose(found[["before", "after"]], expected.loc[found.index], atol=1e-9)
    assert (found["n_patients"] == per_patient.groupby(keys).size().iloc[0]).all()
    assert matplotlib.image.imread(perturbed / "perturb.png").std() > 0.01


def test_the_table_of_samples_says_patients_and_time_points(world: World, tmp_path: Path) -> None:
    names = sorted(world.query.obs["library_id"].astype(str).unique())
    sheet = pd.DataFrame({"sample": names, "patient": [f"{n // 2:03d}" for n in range(len(names))]})
    sheet["timepoint"] = ["product" if n % 2 else "D28" for n in range(len(names))]
    sheet.to_csv(tmp_path / "samples.csv", index=False)
    settings = (f"predict.sheet={tmp_path / 'samples.csv'}", "perturb.up=[exhaustion]", "perturb.controls=0")
    arguments = ("perturb", world.query_path, "--model", world.bundle, "--out", tmp_path / "o", "predict.min_counts=5")
    assert carvae(*arguments, *settings, "perturb.where.timepoint=product").code == 0
    samples = pd.read_csv(tmp_path / "o" / "samples.csv", dtype=str)
    asked = sheet[sheet["timepoint"] == "product"]
    assert set(zip(samples["sample"], samples["patient"], strict=True)) == set(
        zip(asked["sample"], asked["patient"], strict=True)
    )


def test_the_interval_of_one_patient_holds_its_difference(world: World, tmp_path: Path) -> None:
    """Its samples weigh alike, however many cells they have."""
    obs = world.query.obs
    patient = obs.groupby("subject", observed=True)["library_id"].nunique().idxmax()
    settings = (f"perturb.where.subject={patient}", "perturb.up=[exhaustion]", "perturb.controls=0")
    arguments = ("perturb", world.query_path, "--model", world.bundle, "--out", tmp_path / "o", "predict.min_counts=5")
    assert carvae(*arguments, *settings).code == 0
    table = pd.read_csv(tmp_path / "o" / "states.csv")
    assert (table["interval_over"] == "cells of one patient").all()
    assert ((table["low"] + table["high"]) / 2).to_numpy() == pytest.approx(table["difference"].to_numpy(), abs=1e-9)
    assert pd.read_csv(tmp_path / "o" / "samples.csv")["sample"].nunique() > 1


def test_a_model_of_outcomes_says_what_it_would_predict(cohort: Cohort, tmp_path: Path) -> None:
    assert respond(cohort.query, cohort.folder, tmp_path).code == 0
    settings = ("perturb.up=[exhaustion]", "perturb.controls=2", "perturb.max_cells=100000", "predict.min_counts=1")
    arguments = ("perturb", tmp_path / "query.h5ad", "--model", cohort.folder, "--out", tmp_path / "o")
    answer = carvae(*arguments, *settings)
    assert answer.code == 0, answer.err
    table = pd.read_csv(tmp_path / "o" / "response.csv")
    alone = pd.read_csv(tmp_path / "out.csv")
    assert table["patient"].tolist() == alone["patient"].tolist()
    # `respond` takes some cells of each sample, and cells that are unknown are not asked here
    assert np.corrcoef(table["before"], alone["probability CR"])[0, 1] > 0.9
    assert (table["low"] <= table["difference"]).all()
    assert (table["difference"] <= table["high"]).all()
    assert table["difference"].abs().max() > 0


def test_genes_that_were_not_measured_are_known_once_they_are_set(world: World, tmp_path: Path) -> None:
    """What is expected of them would stand beside what they are set to, so that setting to zero would do nothing."""
    gone = PROGRAMMES["effector/cytotoxic"]
    world.query[:, ~world.query.var_names.isin(gone)].write_h5ad(tmp_path / "poor.h5ad")
    settings = (f"perturb.down=[{'+'.join(gone)}]", "perturb.controls=1", "predict.min_counts=5")
    arguments = ("perturb", tmp_path / "poor.h5ad", "--model", world.bundle, "--out", tmp_path / "o")
    answer = carvae(*arguments, *settings)
    assert answer.code == 0, answer.err
    states = pd.read_csv(tmp_path / "o" / "states.csv").set_index("state")
    effector = states[states.index.str.contains("effector")]
    assert effector["difference"].min() < -0.001
    assert states["difference"].max() > 0.001


def test_the_same_seed_gives_the_same_tables(world: World, tmp_path: Path) -> None:
    settings = ("perturb.up=[TCF7]", "perturb.controls=2", "perturb.max_cells=60", "predict.min_counts=5")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ("perturb", world.query_path, "--model", world.bundle, "--out", tmp_path / name)
        assert carvae(*arguments, *settings, f"seed={seed}").code == 0
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("perturb.up=[LAG33]",), "perturb.up: 'LAG33' is neither a gene"),
        (("perturb.where.nowhere=x",), "has no column 'nowhere' for perturb.where"),
        (("perturb.where.true_state=x",), "no cell of the query has true_state=x"),
        (("predict.min_counts=100000",), "every cell of the query is unknown to the model"),
        (("train.lr=1",), "'train.lr=1' changes nothing here"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    world: World, tmp_path: Path, settings: tuple[str, ...], sentence: str
) -> None:
    arguments = ("perturb", world.query_path, "--model", world.bundle, "--out", tmp_path / "o")
    answer = carvae(*arguments, *settings)
    assert answer.code == 1
    assert sentence in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "o").exists()


def test_out_must_be_a_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    answer = carvae("perturb", world.query_path, "--model", world.bundle, "--out", tmp_path / "o")
    assert answer.code == 1
    assert "is a file" in answer.err
    assert (tmp_path / "o").read_text() == "mine"
