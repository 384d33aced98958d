"""Embedding and labelling: each claim about a cell is about that cell, and nothing else of the query is touched."""

from __future__ import annotations

import json
import os
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from trained import World, carvae, sha256

from carvae.config import PredictConfig, label_file
from carvae.data.counts import Checked
from carvae.data.genes import GeneTable
from carvae.data.readers import CountsSource
from carvae.errors import BundleError, ConfigError, CountsError, GeneError, ReadError
from carvae.labels.signatures import Signatures, score
from carvae.model.bundle import Bundle, load
from carvae.predict import annotate, embed, run


@pytest.fixture(scope="module")
def bundle(world: World) -> Bundle:
    return load(world.bundle)


@pytest.fixture(scope="module")
def annotated(world: World, bundle: Bundle) -> AnnData:
    return annotate(world.query, bundle)


def test_the_columns_are_those_of_the_contract(annotated: AnnData, world: World, bundle: Bundle) -> None:
    added = {c for c in annotated.obs if c not in world.query.obs}
    scores = {f"carvae_score_{name}" for name in bundle.signatures.names}
    assert {"carvae_state", "carvae_state_best", "carvae_confidence"} <= added
    assert scores <= added
    assert all(c.startswith("carvae_") for c in added)
    assert set(annotated.obsm) >= {"X_carvae", "carvae_probability"}
    assert annotated.obsm["X_carvae"].dtype == np.float32
    assert annotated.obsm["X_carvae"].shape == (annotated.n_obs, bundle.config.n_latent)
    assert "carvae" in annotated.uns


def test_scores_are_those_of_the_whole_matrix_not_of_the_panel(annotated: AnnData, world: World) -> None:
    symbols = [str(s) for s in GeneTable.default().resolve(list(world.query.var_names), None).symbols]
    expected = score(world.query.X, symbols, Signatures.read(label_file("signatures")))
    assert np.isfinite(expected["exhaustion"]).all()
    for name in expected:
        np.testing.assert_allclose(annotated.obs[f"carvae_score_{name}"], expected[name], atol=1e-6)


def test_scores_are_higher_where_their_state_was_planted(annotated: AnnData) -> None:
    exhausted = annotated.obs["true_state"] == "terminally exhausted"
    assert annotated.obs.loc[exhausted, "carvae_score_exhaustion"].mean() > 0.05 + (
        annotated.obs.loc[~exhausted, "carvae_score_exhaustion"].mean()
    )


def test_a_cell_is_judged_without_its_company(annotated: AnnData, world: World, bundle: Bundle) -> None:
    for cell in (0, 17, 159):
        alone = annotate(world.query[[cell]].copy(), bundle)
        np.testing.assert_allclose(alone.obsm["X_carvae"][0], annotated.obsm["X_carvae"][cell], atol=2e-5)
        assert alone.obs["carvae_state"].iloc[0] == annotated.obs["carvae_state"].iloc[cell]


def test_a_cell_with_too_few_counts_is_unknown_but_has_a_likeliest_state(world: World, bundle: Bundle) -> None:
    panel = set(bundle.genes)
    symbols = GeneTable.default().resolve(list(world.query.var_names), None).symbols
    inside = np.array([s in panel for s in symbols])
    counts = world.query.X.toarray()
    total = counts[:, inside].sum(axis=1)
    least = int(np.sort(total)[10])
    result = annotate(world.query, bundle, PredictConfig(min_counts=least))
    shallow = total < least
    assert 0 < shallow.sum() <= 10
    assert list(result.obs["carvae_state"].astype(str) == "unknown") == list(shallow)
    assert (result.obs["carvae_confidence"].to_numpy()[shallow] == 0).all()
    assert "unknown" not in set(result.obs["carvae_state_best"].astype(str))
    np.testing.assert_array_equal(result.obs["carvae_n_counts"], counts.sum(axis=1))


def test_strange_cells_are_unknown_and_keep_their_likeliest_state(world: World, sure: Bundle) -> None:
    assert sure.trust is not None
    obs = annotate(world.query, sure).obs
    strange = (obs["carvae_novelty"] > 1 - sure.trust.unknown_rate).to_numpy()
    assert list(obs["carvae_state"].astype(str) == "unknown") == list(strange)
    assert "unknown" not in set(obs["carvae_state_best"].astype(str))
    assert strange.mean() < 0.5  # another study, the same states


def test_a_stated_coverage_adds_sets_that_grow_with_it(world: World, sure: Bundle) -> None:
    plain, small, large = (annotate(world.query, sure, PredictConfig(coverage=c)).obs for c in (None, 0.6, 0.97))
    unknown = (plain["carvae_state"].astype(str) == "unknown").to_numpy()
    assert "carvae_set" not in plain
    for obs in (small, large):
        assert list(obs["carvae_set"] == "unknown") == list(unknown)
        assert list(obs["carvae_state"].astype(str)) == list(plain["carvae_state"].astype(str))
    pairs = zip(small["carvae_set"][~unknown], large["carvae_set"][~unknown], strict=True)
    assert all(set(few.split(" | ")) <= set(many.split(" | ")) for few, many in pairs)
    assert sure.tree is not None
    assert set(small["carvae_state_sure"]) <= {*sure.tree["state"].nodes, "unknown", "unsure"}


def test_the_option_coverage_is_the_setting(world: World, sure: Bundle, tmp_path: Path) -> None:
    model, tables = sure.save(tmp_path / "model"), []
    for words in (("--coverage", "0.8"), ("predict.coverage=0.8",)):
        out = tmp_path / f"{len(tables)}.csv"
        answer = carvae("annotate", world.query_path, "--model", model, "--out", out, *words)
        assert answer.code == 0, answer.err
        tables.append(out.read_bytes())
    assert tables[0] == tables[1]
    assert b"carvae_set" in tables[0]
    answer = carvae("annotate", world.query_path, "--model", model, "--out", out, "--coverage", "1.5")
    assert (answer.code, answer.err.count("predict.coverage: input should be less than 1")) == (1, 1)


def test_sets_need_a_model_that_learned_them(world: World, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"train.calibration_folds"):
        annotate(world.query, bundle, PredictConfig(coverage=0.9))


def test_confidence_that_nobody_measured_is_told(
    world: World, bundle: Bundle, sure: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "carvae")
    for model, wanted in ((bundle, 1), (sure, 0)):
        caplog.clear()
        annotate(world.query, model)
        assert sum("confidence is not calibrated" in record.getMessage() for record in caplog.records) == wanted
    caplog.clear()
    embed(world.query, bundle)
    assert not any("calibrated" in record.getMessage() for record in caplog.records)


def test_sets_need_labels_of_authors_however_well_novelty_is_known(world: World, sure: Bundle) -> None:
    """As of a model whose held-out cells had weak labels alone: nothing would be added, and nothing said."""
    assert sure.trust is not None
    weak = replace(sure, trust=replace(sure.trust, calibration={}))
    with pytest.raises(BundleError, match="not calibrated"):
        annotate(world.query, weak, PredictConfig(coverage=0.9))
    assert "carvae_novelty" in annotate(world.query, weak).obs


def test_each_sample_has_a_verdict_that_its_cells_bear_out(world: World, sure: Bundle, tmp_path: Path) -> None:
    path = sure.save(tmp_path / "model")
    run(world.query_path, path, tmp_path / "A.csv", PredictConfig(), label=True)
    cells = pd.read_csv(tmp_path / "A.csv", index_col="cell")
    samples = pd.read_csv(tmp_path / "A.samples.csv").set_index("sample")
    for name, row in samples.iterrows():
        here = cells[cells["sample"].astype(str) == str(name)]
        assert row["fraction_unknown"] == pytest.approx((here["carvae_state"] == "unknown").mean())
        assert row["mean_novelty"] == pytest.approx(here["carvae_novelty"].mean(), abs=1e-5)
        assert row["verdict"] in {"in range", "with care", "out of range"}
        assert (row["verdict"] == "in range") == pd.isna(row["verdict_reason"])


def test_results_of_an_earlier_run_are_replaced_and_nothing_else(world: World, bundle: Bundle) -> None:
    mine = world.query.copy()
    mine.obs["carvae_score_long_gone"] = 1.0
    mine.uns["carvae"] = {"columns": ["carvae_score_long_gone"]}  # what an earlier run says it wrote
    mine.obs["carvae_reviewed"] = 1.0
    mine.obs["mine"] = np.arange(mine.n_obs)
    mine.obsm["X_pca"] = np.ones((mine.n_obs, 2))
    mine.layers["other"] = mine.X.copy()
    once = annotate(mine, bundle)
    twice = annotate(once, bundle)
    assert "carvae_score_long_gone" not in once.obs
    assert "carvae_reviewed" in once.obs
    assert "X_pca" in once.obsm
    assert list(once.obs["mine"]) == list(range(mine.n_obs))
    pd.testing.assert_frame_equal(once.obs, twice.obs, check_like=True)
    np.testing.assert_array_equal(once.obsm["X_carvae"], twice.obsm["X_carvae"])
    assert "carvae_score_long_gone" in mine.obs  # the caller's own object is as it was
    assert list(embed(once, bundle).obs) == list(once.obs)


@pytest.mark.parametrize("mine", ["text", {"columns": 3}, np.arange(3)])
def test_something_else_of_the_users_by_the_name_of_the_results_does_no_harm(
    world: World, bundle: Bundle, tmp_path: Path, mine: object
) -> None:
    query = world.query[:40].copy()
    query.uns["carvae"] = mine
    assert annotate(query, bundle).uns["carvae"]["bundle_id"] == bundle.bundle_id
    assert query.uns["carvae"] is mine
    query.write_h5ad(tmp_path / "q.h5ad")
    answer = carvae("annotate", tmp_path / "q.h5ad", "--model", world.bundle, "--out", tmp_path / "A.h5ad")
    assert answer.code == 0, answer.err
    assert ad.read_h5ad(tmp_path / "A.h5ad").uns["carvae"]["bundle_id"] == bundle.bundle_id
    answer = carvae("report", tmp_path / "q.h5ad", "--out", tmp_path / "q.html")
    assert answer.code == 1
    assert "q.h5ad holds no labels of carvae; run `carvae annotate" in answer.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_before_it_is_read(world: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "q.h5ad")
    for verb in ("annotate", "check"):
        out = () if verb == "check" else ("--out", tmp_path / "A.h5ad")
        answer = carvae(verb, tmp_path / "q.h5ad", "--model", world.bundle, *out)
        assert answer.code == 1
        assert "q.h5ad is a pipe or a device, not a file; write it to a file and give that" in answer.err
    (tmp_path / "q.h5ad").unlink()
    os.mkfifo(tmp_path / "sheet.csv")
    sheet = f"predict.sheet={tmp_path / 'sheet.csv'}"
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", tmp_path / "A.h5ad", sheet)
    assert answer.code == 1
    assert "sheet.csv is a pipe or a device" in answer.err


def test_what_is_no_anndata_is_told_by_its_type(bundle: Bundle) -> None:
    for wrong, kind in (("q.h5ad", "str"), (None, "NoneType"), (pd.DataFrame(), "DataFrame")):
        with pytest.raises(ReadError, match=f"take an AnnData, not a {kind}; read the file"):
            annotate(wrong, bundle)  # type: ignore[arg-type]


def test_a_backed_query_is_answered_and_its_file_is_not_written(
    annotated: AnnData, world: World, bundle: Bundle
) -> None:
    before = sha256(world.query_path)
    backed = ad.read_h5ad(world.query_path, backed="r")
    try:
        result = annotate(backed, bundle)
    finally:
        backed.file.close()
    assert not result.isbacked
    np.testing.assert_array_equal(result.obsm["X_carvae"], annotated.obsm["X_carvae"])
    assert sha256(world.query_path) == before


def test_the_gene_receipt_is_exact(annotated: AnnData, world: World, bundle: Bundle) -> None:
    receipt = json.loads(annotated.uns["carvae"]["genes"])
    symbols = {str(s) for s in GeneTable.default().resolve(list(world.query.var_names), None).symbols}
    assert receipt["missing"] == [g for g in bundle.genes if g not in symbols]
    assert receipt["matched"] == len(set(bundle.genes) & symbols)


def test_too_little_overlap_is_refused_and_the_bound_can_be_moved(world: World, bundle: Bundle) -> None:
    symbols = GeneTable.default().resolve(list(world.query.var_names), None).symbols
    known = np.flatnonzero(np.isin(symbols, list(bundle.genes)))
    few = world.query[:, known[: int(0.3 * len(bundle.genes))]].copy()
    for verb in (annotate, embed):
        with pytest.raises(GeneError, match=r"only 29.9% of the model's"):
            verb(few, bundle)
    assert "X_carvae" in embed(few, bundle, PredictConfig(min_overlap=0.2)).obsm
    with pytest.raises(GeneError):
        bundle.get_latent_representation(few)


def test_counts_that_are_none_are_refused_in_memory_too(world: World, bundle: Bundle) -> None:
    scaled = world.query.copy()
    scaled.X = scaled.X.toarray().astype(np.float32) - 0.5
    for call in (lambda: annotate(scaled, bundle), lambda: embed(scaled, bundle), lambda: bundle.predict(scaled)):
        with pytest.raises(CountsError, match="negative values"):
            call()


def test_log_normalised_x_with_counts_elsewhere_gives_the_answer_of_the_counts(
    annotated: AnnData, world: World, bundle: Bundle
) -> None:
    for place in ("layer", "raw"):
        mine = world.query.copy()
        if place == "layer":
            mine.layers["counts"] = mine.X.copy()
        else:
            mine.raw = mine.copy()
        mine.X = np.round(np.log1p(mine.X.toarray().astype(np.float32)), 2)
        np.testing.assert_array_equal(annotate(mine, bundle).obsm["X_carvae"], annotated.obsm["X_carvae"])


def test_a_model_without_labels_embeds_but_does_not_label(
    annotated: AnnData, world: World, bundle: Bundle, tmp_path: Path
) -> None:
    bare = load(world.bundle)
    bare.tree = None
    np.testing.assert_array_equal(embed(world.query, bare).obsm["X_carvae"], annotated.obsm["X_carvae"])
    with pytest.raises(BundleError, match="trained without labels"):
        annotate(world.query, bare)
    with pytest.raises(BundleError, match="without labels"):
        bare.predict(world.query)


def test_an_older_result_stays_when_the_new_one_fails(world: World, tmp_path: Path) -> None:
    out = tmp_path / "A.h5ad"
    run(world.query_path, world.bundle, out, PredictConfig(), label=True)
    before = {p.name: sha256(p) for p in tmp_path.iterdir()}
    with pytest.raises(GeneError):
        run(world.query_path, world.bundle, out, PredictConfig(min_overlap=1.0), label=True)
    assert {p.name: sha256(p) for p in tmp_path.iterdir()} == before
    run(world.query_path, world.bundle, out, PredictConfig(), label=False)
    assert "carvae_state" not in ad.read_h5ad(out).obs


def test_the_output_must_say_its_format(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="says no format"):
        run(world.query_path, world.bundle, tmp_path / "A.xlsx", PredictConfig(), label=True)
    assert list(tmp_path.iterdir()) == []


def test_no_chunk_of_counts_outlives_its_turn(world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a cell is its row of the result."""
    seen: list[weakref.ref[sp.csr_matrix]] = []
    original = CountsSource.blocks

    def blocks(self: CountsSource, size: int, cells: slice = slice(None)) -> Iterator[Checked]:
        for block in original(self, size, cells):
            assert block.counts.shape[0] <= 10
            seen.append(weakref.ref(block.counts))
            alive = sum(ref() is not None for ref in seen)
            assert alive <= 4  # one being read, one read, one in use and the one before
            yield block

    monkeypatch.setattr(CountsSource, "blocks", blocks)
    annotate(world.query, bundle, PredictConfig(chunk_size=10))
    assert len(seen) == 16


def test_memory_does_not_grow_by_the_counts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carvae.data.counts.BLOCK_CELLS", 160)
    peaks = []
    for copies in (4, 12):
        query = tmp_path / f"{copies}.h5ad"
        ad.concat([world.query] * copies, index_unique="-", merge="same").write_h5ad(query)
        tracemalloc.start()
        run(query, world.bundle, tmp_path / "A.csv", PredictConfig(chunk_size=160), label=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    counts = world.query.X.data.nbytes + world.query.X.indices.nbytes
    assert peaks[1] - peaks[0] < 8 * counts / 1.5  # of the eight copies more; names and results take 0.4 of that
