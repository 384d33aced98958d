"""The whole job through the command line: several studies in, a bundle out, a study of new patients labelled."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from trained import STUDIES, World, carvae, sha256

import carvae as library
from carvae.config import PredictConfig
from carvae.data.genes import GeneTable
from carvae.data.store import CellStore

REAL_10X = Path(__file__).resolve().parents[2] / "shared" / "data" / "carpall_10x"
REAL_TRAINING = REAL_10X.parent / "carpall_cart.h5ad"
TOLERANCE = 2e-5  # sums in another order round otherwise


def states(table: pd.DataFrame) -> NDArray[np.object_]:
    return table["carvae_state"].astype(str).to_numpy(object)


def write_10x_folder(adata: AnnData, folder: Path) -> Path:
    """As Cell Ranger 3 writes it: genes in rows."""
    folder.mkdir(parents=True)
    matrix, names = sp.coo_matrix(adata.X).T.astype(np.int64), list(adata.var_names)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, matrix, field="integer")
    for name, lines in (
        ("features.tsv.gz", [f"{gene}\t{gene}\tGene Expression" for gene in names]),
        ("barcodes.tsv.gz", list(adata.obs_names)),
    ):
        with gzip.open(folder / name, "wt", encoding="utf-8") as text:
            text.write("\n".join(lines) + "\n")
    return folder


def write_zarr(adata: AnnData, path: Path) -> Path:
    with ad.settings.override(allow_write_nullable_strings=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's plans for its next version
        adata.write_zarr(path)
    return path


def write_h5ad(adata: AnnData, path: Path) -> Path:
    with ad.settings.override(allow_write_nullable_strings=False):
        adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def annotated(world: World, tmp_path_factory: pytest.TempPathFactory) -> AnnData:
    """The held-out study, annotated by the command line from .h5ad to .h5ad."""
    out = tmp_path_factory.mktemp("annotated") / "A.h5ad"
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", out)
    assert answer.code == 0, answer.err
    return ad.read_h5ad(out)


def test_labels_of_patients_never_seen_are_better_than_chance(world: World, annotated: AnnData) -> None:
    truth = annotated.obs["true_state"].astype(str).to_numpy(object)
    trained_on = {str(p) for name in STUDIES for p in world.studies[name].obs[STUDIES[name]["obs"]["patient"]]}
    assert not trained_on & set(annotated.obs["subject"].astype(str))
    commonest = max((truth == state).mean() for state in set(truth))
    found = states(annotated.obs)
    assert (found == truth).mean() > commonest + 0.2
    assert f1_score(truth, found, labels=sorted(set(truth)), average="macro", zero_division=0) > 0.4
    assert (annotated.obs["carvae_cycling"] == "cycling").mean() < 0.5
    # and where the model is surer it is right more often
    confidence = annotated.obs["carvae_confidence"].to_numpy()
    sure = confidence >= np.median(confidence)
    assert (found == truth)[sure].mean() > (found == truth)[~sure].mean()


def test_what_the_query_held_is_still_there(world: World, annotated: AnnData) -> None:
    original = world.query
    assert list(annotated.obs_names) == list(original.obs_names)
    assert list(annotated.var_names) == list(original.var_names)
    pd.testing.assert_frame_equal(annotated.obs[original.obs.columns], original.obs, check_categorical=False)
    assert (sp.csr_matrix(annotated.X) != original.X).nnz == 0
    assert annotated.uns["title"] == original.uns["title"]


def test_uns_says_where_every_column_comes_from(world: World, annotated: AnnData) -> None:
    uns = annotated.uns["carvae"]
    assert uns["bundle_id"] == library.load(world.bundle).bundle_id
    assert json.loads(uns["settings"])["min_overlap"] == PredictConfig().min_overlap
    receipt = json.loads(uns["genes"])
    assert receipt["matched"] + len(receipt["missing"]) == receipt["n_panel"]
    assert any(name.startswith("SEP15->") for name in receipt["aliased"])
    leaves = [str(leaf) for leaf in uns["states"]["state"]]
    assert set(states(annotated.obs)) <= {*leaves, "unknown"}
    probability = annotated.obsm["carvae_probability"]
    assert probability.shape == (annotated.n_obs, len(leaves))
    np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-5)
    assert [leaves[i] for i in probability.argmax(axis=1)] == list(states(annotated.obs))
    np.testing.assert_array_equal(probability.max(axis=1), annotated.obs["carvae_confidence"])


@pytest.mark.parametrize(
    ("writer", "name"),
    [(write_10x_folder, "tenx"), (write_zarr, "query.zarr"), (write_h5ad, "again.h5ad")],
    ids=["10x folder", "zarr", "h5ad"],
)
@pytest.mark.parametrize("ending", [".h5ad", ".zarr", ".csv", ".csv.gz"])
def test_every_format_in_gives_the_same_answer_in_every_format_out(
    world: World,
    annotated: AnnData,
    tmp_path: Path,
    writer: Callable[[AnnData, Path], Path],
    name: str,
    ending: str,
) -> None:
    query, out = writer(world.query, tmp_path / name), tmp_path / f"out{ending}"
    before = sha256(query)
    answer = carvae("annotate", query, "--model", world.bundle, "--out", out)
    assert (answer.code, answer.err) == (0, "")
    assert sha256(query) == before
    if ending.startswith(".csv"):
        table = pd.read_csv(out, index_col="cell")
        latent = table[[c for c in map(str, table) if c.startswith("X_carvae_")]].to_numpy()
    else:
        result = ad.read_h5ad(out) if ending == ".h5ad" else ad.read_zarr(out)
        table, latent = result.obs, result.obsm["X_carvae"]
        assert (sp.csr_matrix(result.X) != world.query.X).nnz == 0
    assert list(table.index) == list(annotated.obs_names)
    assert list(states(table)) == list(states(annotated.obs))
    np.testing.assert_allclose(latent, annotated.obsm["X_carvae"], atol=TOLERANCE)
    scores = [c for c in map(str, annotated.obs) if c.startswith("carvae_score_")]
    assert scores
    np.testing.assert_allclose(table[scores], annotated.obs[scores], atol=1e-6)
    assert (tmp_path / "out.samples.csv").exists()
    beside = set() if ending.startswith(".csv") else {"out.cells.csv.gz"}
    assert {p.name for p in tmp_path.iterdir()} == {name, out.name, "out.samples.csv"} | beside


def test_a_folder_of_samples_is_one_query(world: World, annotated: AnnData, tmp_path: Path) -> None:
    sample = world.query.obs["library_id"].astype(str).to_numpy()
    for name in sorted(set(sample)):
        write_10x_folder(world.query[sample == name], tmp_path / "samples" / name)
    answer = carvae("annotate", tmp_path / "samples", "--model", world.bundle, "--out", tmp_path / "A.csv")
    assert answer.code == 0, answer.err
    table = pd.read_csv(tmp_path / "A.csv", index_col="cell")
    assert set(table["sample"]) == set(sample)
    expected = dict(zip(annotated.obs_names, states(annotated.obs), strict=True))
    assert [expected[cell] for cell in table.index] == list(states(table))
    samples = pd.read_csv(tmp_path / "A.samples.csv")
    assert list(samples["sample"]) == sorted(set(sample))
    assert list(samples["n_cells"]) == [int((sample == name).sum()) for name in samples["sample"]]


def test_the_table_of_samples_holds_what_the_cells_say(world: World, annotated: AnnData, tmp_path: Path) -> None:
    out = tmp_path / "A.csv"
    # the study's own column for samples is `library_id`, one of the customary names
    assert carvae("annotate", world.query_path, "--model", world.bundle, "--out", out).code == 0
    table = pd.read_csv(tmp_path / "A.samples.csv").set_index("sample")
    assert set(table.index) == set(world.query.obs["library_id"].astype(str))
    symbols = GeneTable.default().resolve(list(world.query.var_names), None).symbols
    for sample, row in table.iterrows():
        cells = (annotated.obs["library_id"] == sample).to_numpy()
        here = annotated.obs[cells]
        assert row["n_cells"] == row["n_cells_used"] == len(here)
        for state in annotated.uns["carvae"]["states"]["state"]:
            assert row[f"fraction {state}"] == pytest.approx((here["carvae_state"] == state).mean())
        for gene in ("LAG3", "PDCD1", "HAVCR2"):
            if gene in symbols:
                detected = np.asarray(world.query.X[cells][:, symbols == gene].sum(axis=1)).ravel() > 0
                assert row[f"fraction {gene}+"] == pytest.approx(detected.mean())
        for score in [c for c in map(str, here) if c.startswith("carvae_score_")]:
            mean = row[f"mean {score.removeprefix('carvae_')}"]
            assert mean == pytest.approx(here[score].mean(), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("ending", [".h5ad", ".csv"])
def test_embed_gives_the_embedding_of_annotate_and_no_labels(
    world: World, annotated: AnnData, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"E{ending}"
    answer = carvae("embed", world.query_path, "--model", world.bundle, "--out", out)
    assert answer.code == 0, answer.err
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    if ending == ".h5ad":
        result = ad.read_h5ad(out)
        latent, columns = result.obsm["X_carvae"], result.obs.columns
    else:
        table = pd.read_csv(out, index_col="cell")
        latent, columns = table.drop(columns="sample").to_numpy(np.float32), table.columns
    np.testing.assert_array_equal(latent, annotated.obsm["X_carvae"])
    assert not [c for c in columns if c.startswith("carvae_")]


def varied(query: AnnData, how: str) -> AnnData:
    rng = np.random.default_rng(1)
    if how == "gene order":
        return query[:, rng.permutation(query.n_vars)].copy()
    if how == "cell order":
        return query[rng.permutation(query.n_obs)].copy()
    if how == "half of the cells":
        return query[::2].copy()
    other = query.copy()
    change: Callable[[sp.csr_matrix], object] = {
        "dense": lambda x: x.toarray(),
        "csc": lambda x: x.tocsc(),
        "csr_array": sp.csr_array,
        "int64": lambda x: x.astype(np.int64),
        "uint16": lambda x: x.astype(np.uint16),
        "float64": lambda x: x.astype(np.float64),
        "float32 dense": lambda x: x.toarray().astype(np.float32),
    }[how]
    other.X = change(sp.csr_matrix(query.X))
    return other


@pytest.mark.parametrize(
    "how",
    [
        *("gene order", "cell order", "half of the cells"),
        *("dense", "csc", "csr_array", "int64", "uint16", "float64", "float32 dense"),
    ],
)
def test_the_answer_does_not_depend_on_how_the_counts_are_held(world: World, annotated: AnnData, how: str) -> None:
    result = library.annotate(varied(world.query, how), world.bundle)
    expected = annotated[result.obs_names]
    np.testing.assert_allclose(result.obsm["X_carvae"], expected.obsm["X_carvae"], atol=TOLERANCE)
    np.testing.assert_allclose(result.obsm["carvae_probability"], expected.obsm["carvae_probability"], atol=TOLERANCE)
    assert list(states(result.obs)) == list(states(expected.obs))
    for score in [c for c in map(str, expected.obs) if c.startswith("carvae_score_")]:
        np.testing.assert_allclose(result.obs[score], expected.obs[score], atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 160])
def test_the_answer_does_not_depend_on_the_chunk_size(world: World, annotated: AnnData, size: int) -> None:
    result = library.annotate(world.query, world.bundle, PredictConfig(chunk_size=size))
    np.testing.assert_allclose(result.obsm["X_carvae"], annotated.obsm["X_carvae"], atol=TOLERANCE)
    assert list(states(result.obs)) == list(states(annotated.obs))
    for score in [c for c in map(str, annotated.obs) if c.startswith("carvae_score_")]:
        np.testing.assert_allclose(result.obs[score], annotated.obs[score], atol=1e-6)


def test_python_says_what_the_command_line_says(world: World, annotated: AnnData) -> None:
    bundle = library.load(world.bundle)
    mine = world.query.copy()
    before = mine.copy()
    result = library.annotate(mine, bundle)
    assert result is not mine
    pd.testing.assert_frame_equal(mine.obs, before.obs)
    assert not mine.obsm
    added = [c for c in map(str, annotated.obs) if c.startswith("carvae_")]
    pd.testing.assert_frame_equal(result.obs[added], annotated.obs[added], check_categorical=False, check_dtype=False)
    np.testing.assert_array_equal(result.obsm["X_carvae"], annotated.obsm["X_carvae"])
    np.testing.assert_array_equal(library.embed(mine, world.bundle).obsm["X_carvae"], annotated.obsm["X_carvae"])
    np.testing.assert_array_equal(bundle.get_latent_representation(mine), annotated.obsm["X_carvae"])
    predicted = bundle.predict(mine)
    assert list(predicted) == list(states(annotated.obs))
    assert list(predicted.index) == list(mine.obs_names)
    soft = bundle.predict(mine, soft=True)
    np.testing.assert_array_equal(soft.to_numpy(), annotated.obsm["carvae_probability"])
    assert list(soft.columns) == [str(s) for s in annotated.uns["carvae"]["states"]["state"]]
    cycling = bundle.predict(mine, axis="cycling")
    assert list(cycling) == list(annotated.obs["carvae_cycling"].astype(str))
    assert not mine.obsm


def test_a_bundle_saved_again_is_the_same_model(world: World, annotated: AnnData, tmp_path: Path) -> None:
    bundle = library.load(world.bundle)
    again = library.load(bundle.save(tmp_path / "copy"))
    assert again.bundle_id == bundle.bundle_id
    assert sha256(tmp_path / "copy") == sha256(world.bundle)
    np.testing.assert_array_equal(again.get_latent_representation(world.query), annotated.obsm["X_carvae"])


def test_train_in_python_uses_the_store_that_is_there(world: World) -> None:
    config = library.Config.read(world.config)
    store = library.ingest(config)
    assert store == world.folder / "model.work" / "store.zarr"
    before = sha256(store)
    answer = carvae("ingest", world.config)
    assert answer.code == 0, answer.err
    assert sha256(store) == before
    assert CellStore(store).n_cells == sum(world.studies[name].n_obs for name in STUDIES)


def test_no_name_of_a_patient_sample_or_path_is_in_the_bundle(world: World) -> None:
    content = b"".join(p.read_bytes() for p in world.bundle.iterdir())
    for name in STUDIES:
        obs, columns = world.studies[name].obs, STUDIES[name]["obs"]
        for column in ("patient", "sample"):
            for value in obs[columns[column]].astype(str).unique():
                assert value.encode() not in content
        assert name.encode() not in content
    assert str(world.folder).encode() not in content


@pytest.mark.skipif(not REAL_10X.is_dir(), reason=f"the real 10x folders are not here: {REAL_10X}")
def test_a_real_10x_folder_is_annotated(world: World, tmp_path: Path) -> None:
    folder = min(REAL_10X.iterdir(), key=lambda p: sum(f.stat().st_size for f in p.iterdir()))
    out = tmp_path / "A.csv"
    # the simulated panel holds a tenth of the genes of a real model; the real matrix has all of them
    answer = carvae("annotate", folder, "--model", world.bundle, "--out", out, "predict.min_overlap=0.4")
    assert answer.code == 0, answer.err
    table = pd.read_csv(out, index_col="cell")
    assert len(table) > 100
    assert table["carvae_state"].ne("unknown").mean() > 0.9
    assert np.isfinite(table[[c for c in map(str, table) if c.startswith("X_carvae_")]].to_numpy()).all()
    samples = pd.read_csv(tmp_path / "A.samples.csv")
    assert list(samples["sample"]) == [folder.name]
    assert list(samples["n_cells"]) == [len(table)]
