"""Results beside the cells: nothing of the user's is lost or changed, and all of it is written or none."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from tiny import counts_of, tiny_bundle

from carvae.data.readers import open_samples
from carvae.data.results import CellResults, add_results, check_output, samples_path, writing_results
from carvae.data.schema import query_samples
from carvae.errors import ConfigError, GeneError
from carvae.labels.tree import LabelTree
from carvae.predict import annotate, embed

BUNDLE = tiny_bundle(LabelTree.flat(["x", "y", "z"]))


def cells(n: int = 30, seed: int = 0, n_genes: int = 12) -> ad.AnnData:
    """A query with everything that a user may have in it."""
    counts = counts_of(n, n_genes, seed).astype(np.int32)
    adata = ad.AnnData(
        counts,
        obs=pd.DataFrame(
            {
                "who": pd.Categorical(["ann", "bob"] * (n // 2)),
                "age": np.arange(n) / 2,
                "note": [f"é {i}" for i in range(n)],
                "good": [True, False] * (n // 2),
            },
            index=[f"AAAC{i}-1" for i in range(n)],
        ),
        var=pd.DataFrame(
            {"gene_ids": [f"ENSG99{i:09d}" for i in range(n_genes)]}, index=[f"GENE{i}" for i in range(n_genes)]
        ),
        layers={"doubled": counts * 2},
        obsm={"X_pca": np.ones((n, 2))},
        uns={"title": "mine", "who_colors": np.array(["#fff", "#000"], dtype=object)},
    )
    adata.raw = adata.copy()
    adata.obsp["near"] = sp.identity(n, format="csr")
    return adata


NO_LATE = pd.DataFrame(index=range(30))
UNS = {
    "bundle_id": "abc",
    "states": {"state": np.array(["x", "y"], dtype=object)},
    "weak_labels": False,
    "columns": np.array(["carvae_state", "carvae_confidence"], dtype=object),
}


def results_of(n: int, state: str = "x", first: int = 0) -> CellResults:
    return CellResults(
        obs=pd.DataFrame(
            {"carvae_state": pd.Categorical([state] * n, categories=["x", "y"]), "carvae_confidence": np.ones(n)}
        ),
        latent=np.arange(2.0 * first, 2.0 * (first + n), dtype=np.float32).reshape(n, 2),
        probability={"carvae_probability": np.ones((n, 2), np.float32)},
    )


def stored(folder: Path, name: str = "q.h5ad", adata: ad.AnnData | None = None, zarr_format: int = 3) -> Path:
    path = folder / name
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=zarr_format):
        warnings.simplefilter("ignore")
        written = cells() if adata is None else adata
        written.write_h5ad(path) if path.suffix == ".h5ad" else written.write_zarr(path)
    return path


def write(
    query: Path, out: Path, state: str = "x", at_once: int = 7, fails: bool = False, late: pd.DataFrame = NO_LATE
) -> None:
    """Results in pieces, as a stream brings them."""
    sources = open_samples(query)
    sample = pd.Categorical(np.concatenate([query_samples(s.obs, s.name)[0] for s in sources]))
    n_cells = sum(s.n_cells for s in sources)
    with writing_results(query, sources, sample, out) as writer:
        for first in range(0, n_cells, at_once):
            writer.append(results_of(min(at_once, n_cells - first), state, first))
        if fails:
            raise OSError("disk full")
        writer.finish(sources, late, UNS)


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def assert_kept(out: ad.AnnData, before: ad.AnnData) -> None:
    """Everything of the query is in the output."""
    pd.testing.assert_frame_equal(out.obs[list(before.obs)], before.obs, check_dtype=False, check_categorical=False)
    pd.testing.assert_frame_equal(out.var, before.var)
    assert np.array_equal(out.X.toarray(), before.X.toarray())
    assert np.array_equal(out.layers["doubled"].toarray(), before.layers["doubled"].toarray())
    assert np.array_equal(out.raw.X.toarray(), before.raw.X.toarray())
    assert np.array_equal(out.obsm["X_pca"], before.obsm["X_pca"])
    assert (out.obsp["near"] != before.obsp["near"]).nnz == 0
    assert out.uns["title"] == "mine"
    assert out.uns["who_colors"].tolist() == ["#fff", "#000"]


def assert_results(out: ad.AnnData, state: str = "x") -> None:
    assert (out.obs["carvae_state"] == state).all()
    assert np.array_equal(out.obsm["X_carvae"], results_of(out.n_obs).latent)
    assert out.obsm["carvae_probability"].shape == (out.n_obs, 2)
    assert out.uns["carvae"]["bundle_id"] == "abc"
    assert out.uns["carvae"]["states"]["state"].tolist() == ["x", "y"]


# in memory


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    assert_kept(a, b)
    assert list(a.obs) == list(b.obs)
    assert set(a.obsm) == set(b.obsm)
    assert set(a.uns) == set(b.uns)
    assert a.X.dtype == b.X.dtype


@pytest.mark.parametrize("verb", [annotate, embed])
def test_the_callers_object_is_never_changed(verb: object) -> None:
    query, before = cells(), cells()
    assert callable(verb)
    out = verb(query, BUNDLE)
    same(query, before)
    assert_kept(out, before)
    assert out.obsm["X_carvae"].shape == (30, 2)
    out.obs.loc[:, "age"] = -1.0
    out.X[0, 0] = 99
    same(query, before)


def test_an_annotated_object_holds_what_the_design_promises() -> None:
    out = annotate(cells(), BUNDLE)
    assert set(out.obs["carvae_state"]) <= {"x", "y", "z", "unknown"}
    assert out.obsm["carvae_probability"].sum(1) == pytest.approx(1, abs=1e-5)
    assert {"carvae_confidence", "carvae_score_memory"} <= set(out.obs)
    assert {"bundle_id", "genes", "settings", "seed", "weak_labels"} <= set(out.uns["carvae"])


def test_annotating_again_replaces_what_carvae_wrote_and_nothing_else() -> None:
    once = annotate(cells(), BUNDLE)
    once.obs["carvae_reviewed"] = 1  # the user's own, whatever its name
    twice = annotate(once, BUNDLE)
    first = annotate(cells(), BUNDLE)
    assert set(twice.obs) == {*first.obs, "carvae_reviewed"}
    assert set(twice.obsm) == set(first.obsm)
    assert_kept(twice, cells())
    once.uns["carvae"]["columns"] = ["carvae_state", "carvae_reviewed"]  # as if an earlier run had written it
    assert "carvae_reviewed" not in annotate(once, BUNDLE).obs
    embedded = embed(once, BUNDLE)
    assert list(embedded.obs) == list(once.obs), "an embedding leaves the labels of an annotation"
    assert embedded.uns["carvae"]["bundle_id"] == embedded.uns["carvae_embedding"]["bundle_id"]


def test_a_query_with_one_barcode_twice_gets_its_results_in_order() -> None:
    query = cells()
    query.obs_names = ["same", *query.obs_names[1:-1], "same"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_results(query, results_of(30), NO_LATE, UNS)
    assert query.obs_names[0] == query.obs_names[-1] == "same"
    assert np.array_equal(query.obsm["X_carvae"], results_of(30).latent)
    assert query.obs["carvae_state"].notna().all()


def test_missing_genes_are_counted_and_too_many_refused() -> None:
    """Peer fault: zero-padding missing genes silently."""
    out = annotate(cells()[:, :9].copy(), BUNDLE)
    assert '"missing": ["GENE9", "GENE10", "GENE11"]' in out.uns["carvae"]["genes"]
    with pytest.raises(GeneError, match=r"only 25\.0% of the model's 12 genes"):
        annotate(cells()[:, :3].copy(), BUNDLE)


# on disk


@pytest.mark.parametrize(
    ("query", "out", "form"),
    [("q.h5ad", "o.h5ad", 3), ("q.zarr", "o.zarr", 2), ("q.zarr", "o.zarr", 3)],
)
def test_a_copy_of_the_query_keeps_all_of_it(tmp_path: Path, query: str, out: str, form: int) -> None:
    source = stored(tmp_path, query, zarr_format=form)
    before = {p: p.read_bytes() for p in [source, *source.rglob("*")] if p.is_file()}
    write(source, tmp_path / out)
    assert_kept(read(tmp_path / out), cells())
    assert_results(read(tmp_path / out))
    assert {p: p.read_bytes() for p in before} == before, "the query was changed"


@pytest.mark.parametrize(("query", "out"), [("q.h5ad", "o.zarr"), ("q.zarr", "o.h5ad")])
def test_another_format_gets_the_counts_and_the_results(tmp_path: Path, query: str, out: str) -> None:
    write(stored(tmp_path, query), tmp_path / out)
    found = read(tmp_path / out)
    assert_results(found)
    assert np.array_equal(found.X.toarray(), counts_of(30).toarray())
    pd.testing.assert_frame_equal(found.obs[list(cells().obs)], cells().obs, check_dtype=False, check_categorical=False)
    assert found.var["gene_ids"].tolist() == cells().var["gene_ids"].tolist()


def test_a_new_zarr_store_has_few_files(tmp_path: Path) -> None:
    """zarr gives a matrix that begins empty one file per count."""
    write(stored(tmp_path), tmp_path / "o.zarr")
    assert sum(p.is_file() for p in (tmp_path / "o.zarr").rglob("*")) < 100


def test_a_stale_summary_does_not_hide_the_results(tmp_path: Path) -> None:
    """anndata writes a summary of all members into a zarr store; readers would see the old members only."""
    for form in (2, 3):
        source = stored(tmp_path, f"q{form}.zarr", zarr_format=form)
        zarr.consolidate_metadata(source) if form == 2 else None
        write(source, tmp_path / f"o{form}.zarr")
        assert "carvae_state" in read(tmp_path / f"o{form}.zarr").obs
        assert "obs/carvae_state" in zarr.open_group(tmp_path / f"o{form}.zarr", mode="r")


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_writing_again_replaces_what_carvae_wrote(tmp_path: Path, ending: str) -> None:
    write(stored(tmp_path, f"q{ending}"), tmp_path / f"first{ending}")
    write(tmp_path / f"first{ending}", tmp_path / f"second{ending}", state="y")
    found = read(tmp_path / f"second{ending}")
    assert_results(found, "y")
    assert_kept(found, cells())
    assert [c for c in found.obs if c.startswith("carvae")] == ["carvae_state", "carvae_confidence"]


def test_a_table_has_one_row_per_cell(tmp_path: Path) -> None:
    source = stored(tmp_path)
    for name in ("o.csv", "o.csv.gz"):
        write(source, tmp_path / name)
        table = pd.read_csv(tmp_path / name, index_col="cell")
        assert table.index.tolist() == cells().obs_names.tolist()
        assert list(table) == ["sample", "carvae_state", "carvae_confidence", "X_carvae_1", "X_carvae_2"]
        assert table["X_carvae_2"].tolist() == results_of(30).latent[:, 1].tolist()
    assert (tmp_path / "o.csv.gz").read_bytes()[:2] == b"\x1f\x8b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three samples that share barcodes; they name genes in another order, and samples by another column or none."""
    folder = tmp_path / "samples"
    folder.mkdir()
    stored(folder, "s1.h5ad", cells(20))
    second = cells(10, seed=1)[:, ::-1].copy()
    second.obs["sample_id"] = pd.Categorical(["run7"] * 10)
    stored(folder, "s2.h5ad", second)
    third = cells(6, seed=2)[:, 1:].copy()
    del third.obs["who"]
    stored(folder, "s3.h5ad", third)
    return folder


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_a_folder_of_samples_becomes_one_output_with_their_names(folder: Path, ending: str) -> None:
    out = folder.parent / f"o{ending}"
    write(folder, out)
    found = read(out)
    assert_results(found)
    assert found.obs["sample"].tolist() == ["s1"] * 20 + ["run7"] * 10 + ["s3"] * 6
    assert found.obs_names.is_unique
    assert found.obs_names[0] == "AAAC0-1_s1"
    assert found.obs["who"].isna().tolist() == [False] * 30 + [True] * 6
    genes = [f"GENE{i}" for i in range(1, 12)]  # those that all samples have
    assert found.var_names.tolist() == genes
    expected = np.vstack([counts_of(n, seed=i).toarray()[:, 1:] for i, n in enumerate((20, 10, 6))])
    assert np.array_equal(found.X.toarray(), expected)


def test_a_folder_of_samples_as_a_table_names_them_too(folder: Path) -> None:
    write(folder, folder.parent / "o.csv")
    table = pd.read_csv(folder.parent / "o.csv")
    assert table["sample"].tolist() == ["s1"] * 20 + ["run7"] * 10 + ["s3"] * 6
    assert table["cell"].is_unique


def test_genes_of_one_name_stay_apart(tmp_path: Path) -> None:
    """10x references hold a few symbols twice; such columns are counts of two genes."""
    query = cells()
    query.var_names = ["TBCE", "TBCE", *query.var_names[2:]]
    query.raw = None
    source = stored(tmp_path, adata=query)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(source, tmp_path / "o.zarr")
    found = read(tmp_path / "o.zarr")
    assert found.var_names[:3].tolist() == ["TBCE", "TBCE-1", "GENE2"]
    assert found.var["gene_ids"].tolist() == query.var["gene_ids"].tolist()
    assert np.array_equal(found.X.toarray(), counts_of(30).toarray())


def encodings(path: Path) -> set[str]:
    """Encoding of every array and table in an .h5ad file."""
    found = set()
    with h5py.File(path) as file:
        file.visititems(lambda _, node: found.add(str(node.attrs.get("encoding-type"))))
    return found


def test_text_is_written_so_that_r_and_older_python_read_it(tmp_path: Path) -> None:
    """A query of a newer anndata has nullable strings; what carvae writes has none."""
    query = cells()
    for layer in ("note", "who"):
        query.obs[layer] = query.obs[layer].astype("string")
    query.obs["maybe"] = pd.array(["a", None] * 15, dtype="string")
    query.obs["kind"] = pd.Categorical(pd.array(["a", "b"] * 15, dtype="string"))
    query.obs.index = query.obs.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        source = stored(tmp_path, adata=query)
    assert "nullable-string-array" in encodings(source)
    for out in ("o.h5ad", "z.zarr"):
        write(source, tmp_path / out)
        obs = read(tmp_path / out).obs
        assert obs["maybe"].isna().tolist() == [False, True] * 15
        assert obs["note"].tolist() == cells().obs["note"].tolist()
        assert obs["kind"].tolist() == ["a", "b"] * 15
    with h5py.File(tmp_path / "o.h5ad") as file:
        kinds = {str(node.attrs.get("encoding-type")) for node in file["obs"].values()}
        kinds |= {
            str(node["categories"].attrs["encoding-type"]) for node in file["obs"].values() if "categories" in node
        }
    assert not {kind for kind in kinds if "nullable" in kind}


def test_a_file_without_places_for_results_gets_them(tmp_path: Path) -> None:
    source = stored(tmp_path)
    with h5py.File(source, "a") as file:
        del file["obsm"], file["uns"]
    write(source, tmp_path / "o.h5ad")
    assert_results(read(tmp_path / "o.h5ad"))


@pytest.mark.parametrize("ending", [".h5ad", ".zarr", ".csv"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_nothing_but_what_was_there(tmp_path: Path, ending: str, existed: bool) -> None:
    source = stored(tmp_path, "q.h5ad")
    out = tmp_path / f"o{ending}"
    if existed:
        write(source, out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="disk full"):
        write(source, out, "y", fails=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("ending", [".h5ad", ".zarr", ".csv"])
def test_it_does_not_matter_in_which_pieces_results_come(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(tmp_path, "q.zarr" if ending == ".zarr" else "q.h5ad")
    write(source, tmp_path / f"whole{ending}", at_once=30)
    monkeypatch.setattr("carvae.data.on_disk.ROWS_AT_ONCE", 8)
    for at_once in (1, 8, 20):
        write(source, tmp_path / f"pieces{ending}", at_once=at_once)
        if ending == ".csv":
            assert (tmp_path / "pieces.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
            continue
        whole, pieces = read(tmp_path / f"whole{ending}"), read(tmp_path / f"pieces{ending}")
        pd.testing.assert_frame_equal(whole.obs, pieces.obs)
        assert_results(pieces)


def test_too_few_results_are_a_fault_and_leave_nothing(tmp_path: Path) -> None:
    source = stored(tmp_path)
    sources = open_samples(source)

    def all_but_one() -> None:
        with writing_results(source, sources, pd.Categorical(["s"] * 30), tmp_path / "o.h5ad") as writer:
            writer.append(results_of(29))
            writer.finish(sources, NO_LATE, UNS)

    with pytest.raises(AssertionError, match="29 of 30 cells came"):
        all_but_one()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.h5ad"]


def test_the_table_of_samples_is_named_after_the_output(tmp_path: Path) -> None:
    for name in ("a.b.h5ad", "a.b.zarr", "a.b.csv", "a.b.csv.gz"):
        assert samples_path(tmp_path / name).name == "a.b.samples.csv"


def test_outputs_that_would_do_harm_are_refused(tmp_path: Path, folder: Path) -> None:
    source = stored(tmp_path)
    (tmp_path / "link.h5ad").symlink_to(source)
    (tmp_path / "folder.csv").mkdir()
    store = tmp_path / "s.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("{}")
    for query, out, message in (
        (source, source, "is the query itself"),
        (source, tmp_path / "link.h5ad", "is the query itself"),
        (source, folder / ".." / "q.h5ad", "is the query itself"),
        (source, tmp_path / "o.txt", "says no format"),
        (source, tmp_path / "o", "says no format"),
        (folder, folder / "o.h5ad", "lies in the query and would be taken for a part of it"),
        (store, store / "o.csv", "lies in the query and would be taken for a part of it"),
        (source, tmp_path / "folder.csv", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output(query, out)
    check_output(folder, folder.parent / "o.h5ad")
    check_output(folder, folder / "o.csv")
