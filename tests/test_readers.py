from __future__ import annotations

import gzip
import os
import shutil
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carvae.data.readers import CountsSource, open_samples, open_source
from carvae.errors import CountsError, ReadError

REAL = Path("/work/shared/data") if Path("/work/shared/data").exists() else Path("../shared/data")
FORMATS = ("memory", "h5ad", "zarr2", "zarr3")


def counts_of(n_cells: int = 30, n_genes: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.6, 2.0, (n_cells, n_genes)) * rng.uniform(0.5, 2.0, (n_cells, 1)))
    dense[:, :12] += 1
    dense[:, 0] = 1
    return dense.astype(np.int32)


def toy(values: object = None, **obs: object) -> ad.AnnData:
    values = sp.csr_matrix(counts_of()) if values is None else values
    n_cells, n_genes = values.shape  # type: ignore[attr-defined]
    return ad.AnnData(
        values,
        obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame(
            {"gene_ids": [f"ENSG{i:011d}" for i in range(n_genes)]}, index=[f"G{i}" for i in range(n_genes)]
        ),
    )


def cp10k(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def write(adata: ad.AnnData, path: Path, form: str, **options: object) -> Path | ad.AnnData:
    if form == "memory":
        return adata
    path.mkdir(exist_ok=True)
    target = path / f"toy.{'h5ad' if form == 'h5ad' else 'zarr'}"
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=3 if form == "zarr3" else 2):
        warnings.simplefilter("ignore")
        if form == "h5ad":
            adata.write_h5ad(target, **options)
        else:
            adata.write_zarr(target, **options)
    return target


def h5ad(path: Path, adata: ad.AnnData | None = None) -> Path:
    target = write(toy() if adata is None else adata, path, "h5ad")
    assert isinstance(target, Path)
    return target


def read(source: CountsSource, size: int = 7) -> np.ndarray:
    return sp.vstack(list(source.chunks(size))).toarray()


def refused(path: object, kind: type[Exception] = ReadError) -> str:
    """The message, which must be one paragraph and not a library's traceback."""
    with pytest.raises(kind) as caught:
        open_source(path)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_each_format_and_layout_gives_the_same_counts(tmp_path: Path, form: str, layout: type) -> None:
    source = open_source(write(toy(layout(counts_of()), day=np.arange(30)), tmp_path, form))
    np.testing.assert_array_equal(read(source), counts_of())
    np.testing.assert_array_equal(read(source, 100), counts_of())  # a second pass is the same
    assert (source.n_cells, source.where, source.n_empty, source.notes) == (30, "X", 0, ())
    assert source.genes[:2] == ["G0", "G1"]
    assert source.gene_ids is not None
    assert source.gene_ids[1] == "ENSG00000000001"
    assert list(source.obs.index) == [f"c{i}" for i in range(30)]
    assert list(source.obs["day"]) == list(range(30))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), n_cells=st.integers(1, 40), n_genes=st.integers(1, 30), size=st.integers(1, 50),
    dtype=st.sampled_from(["i1", "u2", "i4", "u8", "f4", "f8"]),
    layout=st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix]),
    form=st.sampled_from(FORMATS),
)  # fmt: skip
def test_chunks_put_together_are_the_matrix(
    tmp_path: Path, seed: int, n_cells: int, n_genes: int, size: int, dtype: str, layout: type, form: str
) -> None:
    truth = np.random.default_rng(seed).poisson(0.4, (n_cells, n_genes))
    truth[0, 0] = 1
    shutil.rmtree(tmp_path / "toy.zarr", ignore_errors=True)
    source = open_source(write(toy(layout(truth.astype(dtype))), tmp_path, form))
    np.testing.assert_array_equal(read(source, size), truth)
    assert source.n_empty == int((truth.sum(axis=1) == 0).sum())


@pytest.mark.parametrize("form", FORMATS)
def test_counts_are_found_where_they_are(tmp_path: Path, form: str) -> None:
    counts, logs = counts_of(), cp10k(counts_of()).astype(np.float32)
    scaled = (logs - logs.mean(axis=0)).astype(np.float32)
    everything = toy(sp.csr_matrix(counts))
    in_raw = toy(scaled[:, :25])
    in_raw.raw = everything
    source = open_source(write(in_raw, tmp_path, form))
    assert source.where == "raw"
    assert len(source.genes) == 40
    np.testing.assert_array_equal(read(source), counts)
    in_layer = toy(logs)
    in_layer.layers["a_norm"] = logs
    in_layer.layers["umi"] = counts
    source = open_source(write(in_layer, tmp_path / "second", form))
    assert source.where == "layers/umi"
    inverted = open_source(write(toy(logs), tmp_path / "third", form))
    assert inverted.where == "X (log1p CP10k inverted)"
    np.testing.assert_array_equal(read(inverted), counts)
    bad = toy(scaled)
    bad.raw = toy(logs * 1.01)
    message = refused(write(bad, tmp_path / "fourth", form), CountsError)
    assert "X holds negative values" in message
    assert "scaled/z-scored" in message
    assert "is not log1p of counts per 10,000" in message
    assert "layers['counts']" in message


def test_the_place_can_be_named(tmp_path: Path) -> None:
    adata = toy()
    adata.layers["spliced"] = sp.csr_matrix(counts_of(seed=1))
    path = h5ad(tmp_path, adata)
    np.testing.assert_array_equal(read(open_source(path, counts="layers/spliced")), counts_of(seed=1))
    with pytest.raises(CountsError, match="no matrix at 'raw'; it has X, layers/spliced"):
        open_source(path, counts="raw")


@pytest.mark.parametrize("form", FORMATS)
def test_places_are_tried_in_order_and_parts_of_the_counts_never_unasked(tmp_path: Path, form: str) -> None:
    adata = toy(-counts_of())
    adata.layers["spliced"] = adata.layers["matrix"] = adata.layers["a"] = counts_of()
    in_raw = adata.copy()
    in_raw.raw = toy()
    in_umi = in_raw.copy()
    in_umi.layers["umi"] = counts_of()
    for number, (case, where) in enumerate(((adata, "layers/a"), (in_raw, "raw"), (in_umi, "layers/umi"))):
        assert open_source(write(case, tmp_path / str(number), form)).where == where
    del adata.layers["a"]
    path = write(adata, tmp_path / "parts", form)
    assert "spliced" not in refused(path, CountsError)
    assert open_source(path, counts="layers/spliced").where == "layers/spliced"
    adata.X = None
    only = refused(write(adata, tmp_path / "only", form), CountsError)
    assert "has only layers/matrix, layers/spliced" in only


def test_raw_with_more_genes_than_x_is_said() -> None:
    adata = toy()[:, :30].copy()
    adata.raw = toy()
    source = open_source(adata)
    assert len(source.genes) == 30
    assert "`counts: raw` uses it" in source.notes[0]


def test_the_callers_object_is_not_changed() -> None:
    adata = toy(sp.csr_matrix(counts_of())[:, ::-1], batch=["b"] * 30)
    data, indices, obs = adata.X.data.copy(), adata.X.indices.copy(), adata.obs.copy()
    source = open_source(adata)
    source.obs["new"] = 1
    read(source)
    np.testing.assert_array_equal(adata.X.data, data)
    np.testing.assert_array_equal(adata.X.indices, indices)
    pd.testing.assert_frame_equal(adata.obs, obs)


def test_backed_objects_are_read_from_their_file(tmp_path: Path) -> None:
    backed = ad.read_h5ad(h5ad(tmp_path), backed="r")
    backed.obs["extra"] = 1
    source = open_source(backed)
    assert "extra" in source.obs
    np.testing.assert_array_equal(read(source), counts_of())
    assert "call .to_memory()" in refused(backed[:5])
    backed.file.close()


def test_ensembl_index_with_symbols_beside_it_as_cellxgene_writes() -> None:
    adata = toy()
    adata.var = pd.DataFrame({"feature_name": adata.var_names}, index=adata.var["gene_ids"].to_numpy())
    source = open_source(adata)
    assert source.genes[3] == "G3"
    assert source.gene_ids is not None
    assert source.gene_ids[3] == "ENSG00000000003"


def test_empty_cells_keep_their_place_and_are_counted() -> None:
    counts = counts_of()
    counts[[2, 5]] = 0
    source = open_source(toy(sp.csr_matrix(counts)))
    assert source.n_empty == 2
    assert "2 cells have no counts at all" in source.notes
    np.testing.assert_array_equal(read(source), counts)


def test_cells_given_twice_are_refused_but_barcodes_of_two_samples_are_told_apart() -> None:
    copied = toy(sp.csr_matrix(np.vstack([counts_of(), counts_of()])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied.obs_names = [f"c{i}" for i in range(30)] * 2
        assert "30 cells twice" in refused(copied, CountsError)
        two = toy(sp.csr_matrix(np.vstack([counts_of(), counts_of(seed=1)])))
        two.obs_names = [f"c{i}" for i in range(30)] * 2
        source = open_source(two)
    assert source.obs.index.is_unique
    assert list(source.obs.index[[0, 30]]) == ["c0", "c0-1"]
    assert list(source.obs["barcode"].iloc[[0, 30]]) == ["c0", "c0"]
    assert "30 barcodes occurred before" in source.notes[0]


def test_no_cells_or_no_genes(tmp_path: Path) -> None:
    assert "no cells" in refused(toy(sp.csr_matrix((0, 5), dtype=np.int32)))
    assert "no genes" in refused(toy(sp.csr_matrix((5, 0), dtype=np.int32)))
    assert "no cells" in refused(h5ad(tmp_path, toy(sp.csr_matrix((0, 5), dtype=np.int32))))


def test_broken_files_give_one_sentence(tmp_path: Path) -> None:
    path = h5ad(tmp_path)
    cut, page, empty, text = (tmp_path / f"{name}.h5ad" for name in ("cut", "page", "empty", "text"))
    whole = path.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * 0.6)])
    page.write_text("<!DOCTYPE html><html>404</html>")
    empty.touch()
    text.write_text("gene,c1,c2\nA,1,2\n")
    assert "is cut short; download or copy it again" in refused(cut)
    assert "is a web page" in refused(page)
    assert "is empty" in refused(empty)
    assert "is neither HDF5" in refused(text)
    assert "does not exist" in refused(tmp_path / "none.h5ad")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = [1]
    assert "neither .h5ad nor a 10x matrix (it holds numbers)" in refused(tmp_path / "other.h5")


def test_a_flipped_bit_in_packed_values_is_one_sentence(tmp_path: Path) -> None:
    path = write(toy(), tmp_path, "h5ad", compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())  # type: ignore[union-attr]
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)  # type: ignore[union-attr]
    assert "cannot be read" in refused(path)


def hostile(path: Path, change: object) -> str:
    target = h5ad(path)
    with h5py.File(target, "r+") as file:
        change(file)  # type: ignore[operator]
    return refused(target)


def put(file: h5py.File, key: str, values: np.ndarray) -> None:
    del file[key]
    file[key] = values


def test_hostile_hdf5_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"\1\0\0\0" * 5000)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.ones(5000, np.int32)

    def external(file: h5py.File) -> None:
        n_values = file["X/data"].shape
        del file["X/data"]
        file["X"].create_dataset("data", n_values, "i4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])

    def virtual(file: h5py.File) -> None:
        n_values = file["X/data"].shape
        del file["X/data"]
        layout = h5py.VirtualLayout(n_values, "i4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (5000,))[: n_values[0]]
        file["X"].create_virtual_dataset("data", layout)

    def link(file: h5py.File) -> None:
        del file["X/data"]
        file["X/data"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "data")

    def obs_link(file: h5py.File) -> None:
        file["obs/leak"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "data")

    assert "another file" in hostile(tmp_path, external)
    assert "another file" in hostile(tmp_path, virtual)
    assert "another file" in hostile(tmp_path, link)
    assert "another file" in hostile(tmp_path, obs_link)


def test_broken_structure_on_disk_is_refused(tmp_path: Path) -> None:
    def far(file: h5py.File) -> None:
        file["X/indices"][3] = 10**6

    def negative(file: h5py.File) -> None:
        file["X/indices"][3] = -1

    def shuffled(file: h5py.File) -> None:
        file["X/indptr"][4] = file["X/indptr"][9]

    def shorter_obs(file: h5py.File) -> None:
        put(file, "obs/_index", file["obs/_index"][:-3])

    def huge_dense(file: h5py.File) -> None:
        del file["X"]
        file.create_dataset("X", (30, 10**10), "f4", chunks=(30, 1000), compression="gzip")

    def huge_sparse(file: h5py.File) -> None:
        del file["X/data"]
        file["X"].create_dataset("data", (10**13,), "i4", chunks=(1000,))

    def endless(file: h5py.File) -> None:
        file["obs/self"] = file["obs"]

    def unknown(file: h5py.File) -> None:
        file["obs"].attrs["encoding-version"] = "9.0"

    assert "update anndata" in hostile(tmp_path, unknown)
    assert "gene indices outside 0 to 39" in hostile(tmp_path, far)
    assert "gene indices outside 0 to 39" in hostile(tmp_path, negative)
    assert "indptr does not rise" in hostile(tmp_path, shuffled)
    assert "27 cells" in hostile(tmp_path, shorter_obs)
    assert "is incomplete" in hostile(tmp_path, huge_dense)
    assert "is incomplete" in hostile(tmp_path, huge_sparse)
    assert "nested without end" in hostile(tmp_path, endless)


def test_a_loop_in_what_carvae_does_not_read_does_no_harm(tmp_path: Path) -> None:
    path = h5ad(tmp_path)
    with h5py.File(path, "r+") as file:
        file["uns/self"] = file["uns"]
    np.testing.assert_array_equal(read(open_source(path)), counts_of())


@pytest.mark.parametrize("form", ["zarr2", "zarr3"])
@pytest.mark.parametrize("key", ["X/data", "X/indices", "X/indptr", "obs/_index", "var/_index"])
def test_a_missing_piece_of_a_zarr_store_is_never_read_as_zeros(tmp_path: Path, form: str, key: str) -> None:
    path = write(toy(sp.csr_matrix(counts_of(300, 200)), one=pd.Categorical(["same"] * 300)), tmp_path, form)
    assert open_source(path).n_cells == 300  # codes of one category are all zero: their piece is absent, rightly
    pieces = [p for p in sorted((path / key).rglob("*")) if p.is_file() and p.name not in  # type: ignore[operator]
              ("zarr.json", ".zarray", ".zattrs")]  # fmt: skip
    assert pieces
    pieces[len(pieces) // 2].unlink()
    assert refused(path)


def test_a_missing_piece_among_several(tmp_path: Path) -> None:
    path = write(toy(sp.csr_matrix(counts_of(300, 200))), tmp_path, "zarr3")
    assert isinstance(path, Path)
    root = zarr.open_group(path, mode="r+")
    for part in ("data", "indices"):
        values = root[f"X/{part}"][:]
        attrs = dict(root[f"X/{part}"].attrs)
        array = root["X"].create_array(part, data=values, chunks=(500,), shards=(2000,), overwrite=True)
        array.attrs.update(attrs)
    np.testing.assert_array_equal(read(open_source(path)), counts_of(300, 200))
    for part, seen in (("data", "1 of its stored pieces are missing"), ("indices", "reads as zeros")):
        broken = tmp_path / f"{part}.zarr"
        shutil.copytree(path, broken)
        (broken / "X" / part / "c" / "1").unlink()
        message = refused(broken)
        assert "missing" in message
        if part == "indices":
            assert seen in message
    dense = write(toy(counts_of(3000, 200)), tmp_path / "dense", "zarr3")
    next(p for p in (dense / "X" / "c").rglob("*") if p.is_file()).unlink()  # type: ignore[operator]
    assert "write the matrix sparse" in refused(dense)


def test_pickled_values_in_a_zarr_store_are_not_run(tmp_path: Path) -> None:
    path = write(toy(), tmp_path, "zarr2")
    meta = path / "X" / "data" / ".zarray"  # type: ignore[operator]
    meta.write_text(meta.read_text().replace('"filters": null', '"filters": [{"id": "pickle"}]'))
    assert '"pickle"' in meta.read_text()
    assert refused(path)


def tenx_h5(path: Path, version: int = 3, kinds: list[str] | None = None, seed: int = 0) -> Path:
    counts = sp.csr_matrix(counts_of(seed=seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices.astype(np.int64), counts.indptr
        group["shape"] = np.array([40, 30], np.int32)
        group["barcodes"] = np.array([f"B{i}-1" for i in range(30)], "S")
        names, ids = np.array([f"G{i}" for i in range(40)], "S"), np.array([f"ENSG{i}" for i in range(40)], "S")
        if version == 3:
            group["features/name"], group["features/id"] = names, ids
            group["features/feature_type"] = np.array(kinds or ["Gene Expression"] * 40, "S")
        else:
            group["gene_names"], group["genes"] = names, ids
    return path


def tenx_mtx(
    folder: Path, version: int = 3, packed: bool = True, prefix: str = "", kinds: int = 0, seed: int = 0
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scipy.io.mmwrite(folder / f"{prefix}matrix.mtx", sp.coo_matrix(counts_of(seed=seed).T), field="integer")
    rows = [[f"ENSG{i}", f"G{i}"] + (["Antibody Capture" if i < kinds else "Gene Expression"] if version == 3 else [])
            for i in range(40)]  # fmt: skip
    genes = "features" if version == 3 else "genes"
    (folder / f"{prefix}{genes}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / f"{prefix}barcodes.tsv").write_text("".join(f"B{i}-1\n" for i in range(30)))
    if packed:
        for name in ("matrix.mtx", f"{genes}.tsv", "barcodes.tsv"):
            plain = folder / (prefix + name)
            with gzip.open(f"{plain}.gz", "wb") as file:
                file.write(plain.read_bytes())
            plain.unlink()
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_10x_h5(tmp_path: Path, version: int) -> None:
    source = open_source(tenx_h5(tmp_path / "lot7.h5", version))
    np.testing.assert_array_equal(read(source), counts_of())
    assert (source.name, source.where) == ("lot7", "matrix")
    assert source.gene_ids == [f"ENSG{i}" for i in range(40)]
    assert list(source.obs["sample"].unique()) == ["lot7"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_10x_mtx(tmp_path: Path, version: int, packed: bool) -> None:
    source = open_source(tenx_mtx(tmp_path / "lot7" / "filtered_feature_bc_matrix", version, packed))
    np.testing.assert_array_equal(read(source), counts_of())
    assert source.name == "lot7"
    assert source.genes[5] == "G5"


def test_only_gene_expression_is_kept(tmp_path: Path) -> None:
    kinds = ["Antibody Capture"] * 3 + ["Gene Expression"] * 37
    for source in (
        open_source(tenx_h5(tmp_path / "a.h5", kinds=kinds)),
        open_source(tenx_mtx(tmp_path / "mtx", kinds=3)),
    ):
        np.testing.assert_array_equal(read(source), counts_of()[:, 3:])
        assert source.genes[0] == "G3"
        assert "3 features of Antibody Capture are left out" in source.notes
    assert "no 'Gene Expression' features" in refused(tenx_h5(tmp_path / "b.h5", kinds=["CRISPR"] * 40))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("column", ["feature_types", "feature_type", "modality"])
@pytest.mark.parametrize("in_raw", [False, True])
def test_only_gene_expression_of_an_anndata_is_kept(tmp_path: Path, form: str, column: str, in_raw: bool) -> None:
    adata = toy(sp.csc_matrix(counts_of()))
    adata.var[column] = pd.Categorical(["Antibody Capture"] * 3 + ["Gene Expression"] * 37)
    if in_raw:
        whole, adata = adata, toy(-counts_of()[:, :5])
        adata.raw = whole
    source = open_source(write(adata, tmp_path, form))
    for _ in range(2):
        np.testing.assert_array_equal(read(source), counts_of()[:, 3:])
    assert source.genes[0] == "G3"
    assert source.gene_ids is not None
    assert (len(source.gene_ids), source.gene_ids[0]) == (37, "ENSG00000000003")
    assert source.notes[0] == "3 features of Antibody Capture are left out"


def test_an_anndata_without_gene_expression_is_refused_but_biotypes_are_not_feature_types() -> None:
    adata = toy()
    adata.var["feature_type"] = ["protein_coding"] * 20 + ["lncRNA"] * 20  # as CELLxGENE writes
    assert len(open_source(adata).genes) == 40
    adata.var["feature_type"] = "Antibody Capture"
    assert "no 'Gene Expression' features" in refused(adata)


def test_broken_10x_folders_give_one_sentence(tmp_path: Path) -> None:
    cut = tenx_mtx(tmp_path / "cut") / "matrix.mtx.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert "is cut short" in refused(cut.parent)
    plain = tenx_mtx(tmp_path / "plain", packed=False) / "matrix.mtx"
    plain.write_text(plain.read_text()[: plain.stat().st_size // 2])
    assert "matrix" in refused(plain.parent)
    fewer = tenx_mtx(tmp_path / "fewer", packed=False)
    (fewer / "barcodes.tsv").write_text("".join(f"B{i}-1\n" for i in range(29)))
    assert "barcodes.tsv has 29 lines but matrix.mtx needs 30" in refused(fewer)
    (fewer / "barcodes.tsv").unlink()
    assert "lacks features.tsv or barcodes.tsv" in refused(fewer)
    bomb = tenx_mtx(tmp_path / "bomb", packed=False)
    lines = (bomb / "matrix.mtx").read_text().splitlines()
    size = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    lines[size] = "40 30 999999999999"
    (bomb / "matrix.mtx").write_text("\n".join(lines))
    assert "more than it can hold" in refused(bomb)


def test_a_folder_of_samples_of_several_formats(tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    tenx_mtx(root / "P1" / "outs" / "filtered_feature_bc_matrix")
    tenx_h5(root / "P1" / "outs" / "filtered_feature_bc_matrix.h5")
    tenx_h5(root / "P1" / "outs" / "raw_feature_bc_matrix.h5")
    (root / "P1" / "outs" / "molecule_info.h5").touch()
    tenx_h5(root / "P2" / "day28.h5", seed=1)
    tenx_mtx(root / "geo", prefix="GSM1_P3_", seed=2)
    tenx_mtx(root / "geo", prefix="GSM2_P4_", seed=3)
    (root / "own").mkdir()
    h5ad(root / "own", toy(donor=["x"] * 30, sample_id=["mine"] * 30))
    write(toy(sp.csr_matrix(counts_of(seed=4))), root, "zarr3")
    seeds = {"P1": 0, "P2_day28": 1, "geo_GSM1_P3": 2, "geo_GSM2_P4": 3, "own_toy": 0, "toy": 4}
    sources = open_samples(root)
    assert sorted(s.name for s in sources) == sorted(seeds)
    for source in sources:
        np.testing.assert_array_equal(read(source), counts_of(seed=seeds[source.name]))
        if source.name == "own_toy":
            assert "sample" not in source.obs  # it names its samples itself
        else:
            assert set(source.obs["sample"]) == {source.name}
    assert "open it with open_samples" in refused(root)


def test_the_same_cells_in_two_files_are_refused(tmp_path: Path) -> None:
    h5ad(tmp_path / "a")
    h5ad(tmp_path / "c", toy(sp.csr_matrix(counts_of(seed=1))))  # the same barcodes of another sample
    assert len(open_samples(tmp_path)) == 2
    h5ad(tmp_path / "b", toy()[:7].copy())
    with pytest.raises(ReadError) as caught:
        open_samples(tmp_path)
    assert "a_toy and b_toy share 7 cells" in str(caught.value)
    assert "c_" not in str(caught.value).removeprefix(str(tmp_path))


def test_cell_ranger_multi_gives_the_filtered_cells_of_each_sample(tmp_path: Path) -> None:
    outs = tmp_path / "outs"
    for seed, sample in enumerate(("S1", "S2")):
        count = outs / "per_sample_outs" / sample / "count"
        tenx_h5(count / "sample_filtered_feature_bc_matrix.h5", seed=seed)
        tenx_mtx(count / "sample_filtered_feature_bc_matrix", seed=seed)
        tenx_h5(count / "sample_raw_feature_bc_matrix.h5", seed=seed)
        tenx_mtx(count / "sample_raw_feature_bc_matrix", seed=seed)
        (count / "sample_molecule_info.h5").touch()
    tenx_h5(outs / "multi" / "count" / "raw_feature_bc_matrix.h5")
    assert [s.name for s in open_samples(outs)] == ["S1", "S2"]
    for path in (outs / "per_sample_outs" / "S1", count.parents[1] / "S1" / "count"):
        assert [s.name for s in open_samples(path)] == ["S1"]
    assert open_source(count / "sample_filtered_feature_bc_matrix.h5").name == "S2"


def test_a_single_file_is_a_list_of_one(tmp_path: Path) -> None:
    assert [s.name for s in open_samples(h5ad(tmp_path))] == ["toy"]
    assert [s.n_cells for s in open_samples(toy())] == [30]
    assert [s.name for s in open_samples(tenx_mtx(tmp_path / "P1"))] == ["P1"]


def test_all_broken_samples_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.h5ad").write_text("<html>")
    with pytest.raises(ReadError) as caught:
        open_samples(tmp_path)
    assert "a.h5ad is a web page" in str(caught.value)
    assert "b.h5ad is a web page" in str(caught.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(ReadError, match=r"holds no \.h5ad"):
        open_samples(tmp_path / "none")


def test_a_file_that_changes_after_it_was_verified_is_noticed(tmp_path: Path) -> None:
    path = h5ad(tmp_path)
    source = open_source(path)
    with h5py.File(path, "r+") as file:
        put(file, "X/data", np.full(file["X/data"].shape, 0.5, np.float32))
    with pytest.raises(CountsError, match="fractional"):
        list(source.chunks())


def test_no_file_stays_open(tmp_path: Path) -> None:
    source = open_source(h5ad(tmp_path))
    next(iter(source.chunks(3)))
    list(source.chunks(3))
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [name for name in held if str(tmp_path) in name]


@pytest.mark.skipif(not REAL.exists(), reason="the real data of ../shared/data are not on this machine")
def test_real_10x_samples_are_part_of_the_real_study() -> None:
    study = open_source(REAL / "carpall_cart.h5ad")
    cells = {name: i for i, name in enumerate(study.obs.index)}
    genes = {gene: i for i, gene in enumerate(study.gene_ids or [])}
    counts = sp.vstack(list(study.chunks()))
    for name in ("CAR-T11388812", "CAR-T11141510"):
        (source,) = open_samples(REAL / "carpall_10x" / name)
        assert source.name == name
        here = [
            (i, cells[f"{source.name}_{cell}"])
            for i, cell in enumerate(source.obs.index)
            if f"{source.name}_{cell}" in cells
        ]
        assert here
        columns = [(i, genes[gene]) for i, gene in enumerate(source.gene_ids or []) if gene in genes]
        ours = sp.vstack(list(source.chunks()))[[i for i, _ in here]][:, [i for i, _ in columns]]
        assert (ours != counts[[i for _, i in here]][:, [i for _, i in columns]]).nnz == 0
