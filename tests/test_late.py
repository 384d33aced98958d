"""What annotate says of clones, the CAR and the order of cells, in memory and on disk, and in the table of samples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from test_clonotypes import barcode, contigs
from tiny import GENES, counts_of, tiny_bundle

from carvae import annotate
from carvae.config import PredictConfig
from carvae.data.diversity import INDICES
from carvae.errors import CarvaeError
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.model.cell_clones import Asked
from carvae.model.sample_table import shared
from carvae.predict import run
from carvae.section_patient import ClonesConfig

BUNDLE = tiny_bundle(LabelTree.flat(["x", "y", "z"]))
N = 120
CAR = "FMC63-28Z"
PAIRS = ("ASL", "AYE", "AQT", "ARG")
EASY = {"min_counts": 1}


def query(**obs: object) -> ad.AnnData:
    """Two samples of one patient and one of another, with the CAR among the genes."""
    rng = np.random.default_rng(0)
    car = sp.csr_matrix(rng.poisson(0.8, (N, 1)) * (np.arange(N) < N // 2)[:, None])
    counts = sp.hstack([counts_of(N, len(GENES)), car], format="csr").astype(np.int32)
    columns = {"sample": np.repeat(["a", "b", "c"], 40), "patient": np.repeat(["p", "p", "q"], 40)}
    columns |= {"timepoint": np.repeat(["product", "D28", "D28"], 40), "sorted": np.repeat(["CAR", "no"], 60)}
    columns |= {"protein": np.repeat([900.0, 5.0], 60) + rng.normal(0, 1, N)}
    names = [f"{sample}_{barcode(i % 40)}" for i, sample in enumerate(columns["sample"])]
    return ad.AnnData(counts, obs=pd.DataFrame(columns | obs, index=names), var=pd.DataFrame(index=[*GENES, CAR]))


@pytest.fixture(scope="module")
def receptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of contigs of samples a and b; a cell of four has none."""
    pytest.importorskip("scirpy", reason="needs scirpy (pip install 'carvae[tcr]')")
    folder = tmp_path_factory.mktemp("vdj")
    for sample in "ab":
        (folder / sample).mkdir()
        own = {barcode(i): [("TRA", PAIRS[i % 4]), ("TRB", PAIRS[i % 4])] for i in range(40) if i % 5}
        contigs(own).to_csv(folder / sample / "filtered_contig_annotations.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, receptors: Path) -> Path:
    """The query annotated with everything, in two formats."""
    folder = tmp_path_factory.mktemp("late")
    BUNDLE.save(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        query().write_h5ad(folder / "q.h5ad")
    for out in ("A.h5ad", "B.csv.gz"):
        asked = Asked(receptors, ClonesConfig(depth=20, min_cells=20), 1)
        run(folder / "q.h5ad", folder / "model", folder / out, PredictConfig(**EASY, root="x"), label=True, asked=asked)
    return folder


def test_clones_and_car_are_columns_of_cells(files: Path) -> None:
    cells = ad.read_h5ad(files / "A.h5ad")
    has = np.arange(N) % 40 % 5 > 0
    assert (cells.obs["clone_id"].notna().to_numpy() == (has & (cells.obs["sample"] != "c"))).all()
    assert cells.obs["clone_id"].nunique() == 4, "the same in both samples of the patient"
    size = cells.obs.groupby("clone_id", observed=True)["sample"].transform("size").fillna(0)
    assert (cells.obs["clone_size"] == size).all()
    p = cells.obs["carvae_car_probability"].to_numpy()
    count = np.asarray(cells[:, CAR].X.todense()).ravel()
    assert ((p >= 0) & (p <= 1)).all()
    assert p[count > 1].min() > p[count == 0].max()
    assert "carvae_pseudotime" in cells.obs
    uns = cells.uns["carvae"]
    assert {"clone_id", "clone_size", "carvae_car_probability", "carvae_pseudotime"} <= set(uns["columns"])
    report = json.loads(uns["clones"])
    assert (report["n_clones"], report["n_receptor"], report["n_cells"]) == (4, 64, N)


def test_a_table_of_cells_has_the_same_in_its_last_columns(files: Path) -> None:
    cells, table = ad.read_h5ad(files / "A.h5ad").obs, pd.read_csv(files / "B.csv.gz", index_col="cell")
    late = ["carvae_car_probability", "carvae_pseudotime", "clone_id", "clone_size"]
    assert list(table.columns[-4:]) == late
    assert list(table.index) == list(cells.index)
    for column in ("carvae_confidence", *late):
        expected = cells[column].astype(object) if column == "clone_id" else cells[column]
        pd.testing.assert_series_equal(
            table[column], expected, check_dtype=False, check_index_type=False, check_names=False, rtol=1e-5
        )
    tables = [(files / name).read_bytes() for name in ("A.samples.csv", "B.samples.csv")]
    assert tables[0] == tables[1]


def test_the_table_of_samples_says_of_each_what_is_known(files: Path) -> None:
    table = pd.read_csv(files / "A.samples.csv").set_index("sample")
    assert table.loc["a", ["patient", "timepoint"]].tolist() == ["p", "product"]
    assert list(table.columns[:4]) == ["patient", "timepoint", "n_cells", "n_cells_used"]
    for state in "xyz":
        low, high = table[f"low fraction {state}"], table[f"high fraction {state}"]
        assert (low < high).all()
        inside = table[f"fraction {state}"].between(low, high)
        assert (inside | table[f"fraction {state}"].isin([0, 1])).all()
    cells = ad.read_h5ad(files / "A.h5ad").obs
    used = cells[cells["carvae_state"] != "unknown"].groupby("sample", observed=True)["carvae_confidence"]
    half = stats.t.ppf(0.975, used.count() - 1) * used.sem()
    np.testing.assert_allclose(table["mean_confidence_low"], (used.mean() - half).clip(0), rtol=1e-3)
    np.testing.assert_allclose(table["mean_confidence_high"], (used.mean() + half).clip(upper=1), rtol=1e-3)
    assert table["clone_cells"].tolist() == [32, 32, 0]
    assert table["clone_n"].tolist()[:2] == [4, 4]
    assert table["clone_shannon"].iloc[0] == pytest.approx(np.log(4), abs=1e-3)
    assert (table["clone_depth"] == 20).all()
    for name in INDICES:
        assert f"clone_{name}_at_depth_low" in table
    assert table["clone_n_at_depth"].isna().tolist() == [False, False, True]
    assert (table["car_fraction"] > table["car_detected"]).all()
    assert (table["car_fraction_low"] <= table["car_fraction"]).all()
    assert (table["car_fraction"] <= table["car_fraction_high"]).all()
    assert "mean_pseudotime" in table
    assert "low fraction LAG3+" not in table


def test_in_memory_it_is_the_same_and_nothing_of_the_callers_changes(files: Path, receptors: Path) -> None:
    own, before = query(), query()
    found = annotate(own, BUNDLE, PredictConfig(**EASY, root="x"), clones=str(receptors), seed=1)
    pd.testing.assert_frame_equal(own.obs, before.obs)
    cells = ad.read_h5ad(files / "A.h5ad").obs
    for column in ("clone_size", "carvae_car_probability", "carvae_pseudotime"):
        np.testing.assert_allclose(found.obs[column], cells[column], rtol=1e-5)
    assert (found.obs["clone_id"].astype(str) == cells["clone_id"].astype(str)).all()


def test_a_second_run_keeps_the_clones_that_the_first_joined(files: Path, receptors: Path, tmp_path: Path) -> None:
    run(files / "A.h5ad", files / "model", tmp_path / "again.h5ad", PredictConfig(**EASY), label=True)
    first, again = (ad.read_h5ad(path) for path in (files / "A.h5ad", tmp_path / "again.h5ad"))
    assert (first.obs["clone_id"].astype(str) == again.obs["clone_id"].astype(str)).all()
    assert (first.obs["clone_size"] == again.obs["clone_size"]).all()
    assert "carvae_pseudotime" not in again.obs, "what an earlier run wrote is replaced"
    joined = annotate(again, BUNDLE, PredictConfig(**EASY), clones=receptors)
    assert list(joined.obs) == list(again.obs)


def test_the_querys_own_clones_are_used_and_never_replaced(receptors: Path) -> None:
    own = query(clone_id=np.where(np.arange(N) % 2, "one", ""), clone_size=7)
    found = annotate(own, BUNDLE, PredictConfig(**EASY))
    assert found.obs["clone_id"].tolist() == own.obs["clone_id"].tolist()
    assert (found.obs["clone_size"] == 7).all()
    with pytest.raises(CarvaeError, match=r"a column .clone_id. of its own, .*; leave out --clones"):
        annotate(own, BUNDLE, PredictConfig(**EASY), clones=receptors)
    named = annotate(query(clonotype=np.where(np.arange(N) % 2, "one", "")), BUNDLE, PredictConfig(**EASY))
    assert set(named.obs["clone_id"].dropna()) == {"p_one", "q_one"}
    assert named.obs["clone_size"].tolist()[:2] == [0, 40]


def test_receptors_that_the_query_holds_are_taken(files: Path, receptors: Path, tmp_path: Path) -> None:
    import scirpy

    own = query()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [scirpy.io.read_10x_vdj(receptors / s / "filtered_contig_annotations.csv") for s in "ab"]
        for sample, part in zip("ab", parts, strict=True):
            part.obs_names = [f"{sample}_{name}" for name in part.obs_names]
        found = ad.concat(parts).obsm["airr"]
        place = pd.Index([*parts[0].obs_names, *parts[1].obs_names]).get_indexer(own.obs_names)
        own.obsm["airr"] = found[np.maximum(place, 0)]
        own.write_h5ad(tmp_path / "q.h5ad")
        in_memory = annotate(own, BUNDLE, PredictConfig(**EASY))
        run(tmp_path / "q.h5ad", files / "model", tmp_path / "A.h5ad", PredictConfig(**EASY), label=True)
        on_disk = ad.read_h5ad(tmp_path / "A.h5ad")
    expected = ad.read_h5ad(files / "A.h5ad").obs["clone_id"].astype(str)
    has = place >= 0
    for result in (in_memory, on_disk):
        assert (result.obs["clone_id"].astype(str)[has] == expected[has]).all()


def test_contigs_beside_10x_matrices_are_taken_without_asking(
    tmp_path: Path, receptors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import h5py

    adata = query()
    for sample in "ab":
        part = adata[(adata.obs["sample"] == sample).to_numpy()]
        folder = tmp_path / "runs" / sample
        folder.mkdir(parents=True)
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            matrix = file.create_group("matrix")
            matrix["barcodes"] = np.array([name.split("_")[1] for name in part.obs_names], dtype="S")
            for key in ("data", "indices", "indptr"):
                matrix[key] = getattr(part.X, key)
            matrix["shape"] = part.shape[::-1]
            features = matrix.create_group("features")
            features["name"] = features["id"] = np.array(part.var_names, dtype="S")
            features["feature_type"] = np.array(["Gene Expression"] * part.n_vars, dtype="S")
        contig = f"{sample}/filtered_contig_annotations.csv"
        (tmp_path / "runs" / contig).write_bytes((receptors / contig).read_bytes())
    BUNDLE.save(tmp_path / "model")
    with caplog.at_level("INFO", "carvae"):
        run(tmp_path / "runs", tmp_path / "model", tmp_path / "out.csv", PredictConfig(**EASY), label=True)
    table = pd.read_csv(tmp_path / "out.csv")
    assert (table["clone_size"] > 0).sum() == 64
    assert "contigs are found with the query" in caplog.text
    assert "the query names no patient, so clones are told within each sample" in caplog.text
    (tmp_path / "runs" / "a" / "filtered_contig_annotations.csv").write_text("no table")
    with caplog.at_level("INFO", "carvae"):
        run(tmp_path / "runs", tmp_path / "model", tmp_path / "out.csv", PredictConfig(**EASY), label=True)
    assert "clones are left out" in caplog.text, "what was not asked for stops nothing"
    assert "clone_id" not in pd.read_csv(tmp_path / "out.csv")


def test_what_a_cell_was_sorted_for_is_used(caplog: pytest.LogCaptureFixture) -> None:
    plain = annotate(query(), BUNDLE, PredictConfig(**EASY)).obs["carvae_car_probability"]
    car = {"column": "sorted", "positive": ["CAR"], "negative": ["no"]}
    by_sort = annotate(query(), BUNDLE, PredictConfig(**EASY, car=car)).obs["carvae_car_probability"]
    silent = np.asarray(query()[:, CAR].X.todense()).ravel() == 0
    assert by_sort[:60][silent[:60]].min() > plain[silent].mean() > by_sort[60:][silent[60:]].max()
    protein = annotate(query(), BUNDLE, PredictConfig(**EASY, car={"protein": "protein"})).obs["carvae_car_probability"]
    assert protein[:60].min() > protein[60:][silent[60:]].max()
    without = annotate(query()[:, list(GENES)].copy(), BUNDLE, PredictConfig(**EASY, car=car))
    assert "carvae_car_probability" not in without.obs
    assert "the query has no CAR feature that carvae knows" in caplog.text


def test_a_table_of_samples_says_who_the_patient_is(receptors: Path, tmp_path: Path) -> None:
    unknown = query()
    del unknown.obs["patient"], unknown.obs["timepoint"]
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("sample_id,donor,timepoint,tissue\na,p,product,blood\nb,p,D28,marrow\nc,q,D28,\nd,r,D28,blood\n")
    found = annotate(unknown, BUNDLE, PredictConfig(**EASY, sheet=sheet), clones=receptors)
    assert found.obs["clone_id"].nunique() == 4
    assert found.obs["timepoint"].tolist() == query().obs["timepoint"].tolist()
    assert found.obs["tissue"].isna().sum() == 40
    again = annotate(found, BUNDLE, PredictConfig(**EASY))
    assert list(again.obs) == list(found.obs), "a second run without the table loses nothing of it"
    assert again.obs["timepoint"].tolist() == found.obs["timepoint"].tolist()
    within = annotate(unknown, BUNDLE, PredictConfig(**EASY), clones=receptors)
    assert within.obs["clone_id"].nunique() == 8, "without it, each sample is on its own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "predict.sheet=.* does not exist"),
        ("", "cannot be read as a table"),
        ("patient\np\n", "needs a column 'sample' that names every row .it has patient."),
        ("sample,patient\na,p\na,p\n", "names sample 'a' twice; keep one row of it"),
        ("sample,patient\na,p\n", "has no row for sample 'b', 'c'; its samples are 'a'"),
        ("sample,colour\na,red\n", "says nothing of samples that carvae knows"),
    ],
)
def test_a_table_of_samples_that_cannot_be_used(text: str | None, words: str, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    if text is not None:
        sheet.write_text(text)
    with pytest.raises(CarvaeError, match=words):
        annotate(query(), BUNDLE, PredictConfig(**EASY, sheet=sheet))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"car": {"features": ["FMC63-28"]}},
            "names 'FMC63-28', and the query has no such .* the nearest is 'FMC63-28Z'",
        ),
        ({"car": {"column": "sortd"}}, "predict.car.column names 'sortd', .* the nearest is 'sorted'"),
        ({"car": {"column": "sorted"}}, "needs predict.car.positive or predict.car.negative: .* they are CAR, no"),
        ({"car": {"column": "sorted", "positive": ["yes"]}}, r"'yes' is no value of obs\['sorted'\]; they are CAR, no"),
        ({"car": {"protein": "sample"}}, r"obs\['sample'\] holds no numbers"),
        ({"root": "xx"}, "predict.root='xx' is no state of this model; the nearest is 'x', or give auto"),
        ({"root": "auto"}, "needs the signature memory_stem, which this model does not have; name a state instead: x"),
    ],
)
def test_wrong_settings_are_said_before_anything_is_read(settings: Mapping[str, object], words: str) -> None:
    with pytest.raises(CarvaeError, match=words):
        annotate(query(), BUNDLE, PredictConfig(**EASY, **settings))


def test_what_is_the_same_in_all_cells_of_a_sample_is_of_the_sample() -> None:
    about = pd.DataFrame({"tissue": ["blood", "blood", "marrow", "blood", None], "timepoint_days": [0, 0, 7, 7, 9.0]})
    table = shared(about, np.array([0, 0, 1, 1, 2]), 4)
    assert table["tissue"].tolist()[0] == "blood"
    assert table["tissue"].isna().tolist() == [False, True, True, True]
    assert table["timepoint_days"].tolist()[:3] == [0, 7, 9]


def test_an_order_without_any_score_of_memory_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    item = {"name": "memory_stem", "genes": ["CCR7"], "sources": [{"citation": "Doe 2020", "doi": "10.1/x"}]}
    bundle = replace(BUNDLE, signatures=Signatures.from_dict({"signatures": [item]}))
    obs = annotate(query(), bundle, PredictConfig(root="auto", **EASY)).obs
    assert obs["carvae_pseudotime"].isna().all()
    assert "no cell has a memory_stem score" in caplog.text
