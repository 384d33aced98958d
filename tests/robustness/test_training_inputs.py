"""Cases B: studies that are not what training needs. Refused with the cause, or trained on what is right of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from small import Says, Small
from test_bad_input import as_mouse, assert_refused, log_normalised, train_on, write
from trained import STUDIES, World, carvae, settings, sha256, write_config

from carvae.data.store import CellStore
from carvae.model.bundle import load

STUDY = "sim_lymphoma"
SHORT = {"max_epochs": 1, "min_steps": 0}


def lymphoma(studies: World) -> AnnData:
    return studies.studies[STUDY].copy()


def renamed(obs: pd.DataFrame, prefix: str) -> pd.DataFrame:
    return obs.assign(**{c: prefix + obs[c].astype(str) for c in ("donor_id", "sample_id")})


def train(folder: Path, studies: dict[str, dict[str, object]], **sections: dict[str, object]) -> object:
    """Train through the command line; the inputs are not changed."""
    config = settings(folder, folder / "out" / "model", train=SHORT, labels={"tree": "flat"})
    config["ingest"]["studies"] = studies
    for section, changed in sections.items():
        config[section] = config.get(section, {}) | changed
    before = [sha256(Path(str(study["path"]))) for study in studies.values()]
    answer = carvae("train", write_config(folder / "c.yaml", config))
    assert [sha256(Path(str(study["path"]))) for study in studies.values()] == before
    return answer


@pytest.mark.case("B07")
def test_one_study_of_eight_that_is_log_normalised_is_found(studies: World, tmp_path: Path, says: Says) -> None:
    """Every time: the whole of every study is looked at, no sample of it."""
    entries = {}
    for s in range(8):
        part = lymphoma(studies)[10 * s : 10 * s + 10].copy()
        part.obs = renamed(part.obs, f"{s}-")
        if s == 5:
            part.X = sp.csr_matrix(log_normalised(part.X.toarray().astype(np.float32)))
        path = write(part, tmp_path / f"s{s}.h5ad")
        entries[f"s{s}"] = {"path": str(path), "obs": STUDIES[STUDY]["obs"], "label": "cell_type"}
    answer = train(tmp_path, entries)
    assert_refused(answer, "study 's5'", "normalised or log-transformed")
    assert not (tmp_path / "out").exists()
    says(answer.err)


@pytest.mark.case("B18", "B17")
def test_two_species_joined_are_refused(studies: World, tmp_path: Path, says: Says) -> None:
    human, mouse = lymphoma(studies), as_mouse(lymphoma(studies))
    mouse.obs_names = ["m" + str(name) for name in mouse.obs_names]
    mouse.obs = renamed(mouse.obs, "m")
    outer = ad.concat([human, mouse], join="outer", fill_value=0)
    answer = train_on(studies, tmp_path, write(outer, tmp_path / "S.h5ad"))
    assert_refused(answer, "mouse genes beside its human ones", "keep the human genes")
    says(answer.err)
    inner = ad.concat([human, mouse], join="inner")
    assert inner.n_vars < 20  # genes without capitals to lose
    answer = train_on(studies, tmp_path, write(inner[:, :0].copy(), tmp_path / "S.h5ad"))
    assert_refused(answer, "holds no genes")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["S.h5ad", "c.yaml"]


@pytest.mark.case("B25")
def test_a_column_of_barcodes_is_no_column_of_samples(studies: World, tmp_path: Path, says: Says) -> None:
    study = lymphoma(studies)
    study.obs["sample_id"] = study.obs_names.astype(str)
    answer = train_on(studies, tmp_path, write(study, tmp_path / "S.h5ad"))
    assert_refused(answer, "sample", "names 100 samples for 100 cells", "map the column")
    says(answer.err)


@pytest.mark.case("B24")
def test_a_label_that_is_the_study_by_another_name_is_refused(studies: World, tmp_path: Path, says: Says) -> None:
    study, entries = lymphoma(studies), {}
    for s, kind in enumerate(sorted(set(study.obs["cell_type"].astype(str)))[:3]):
        part = study[study.obs["cell_type"] == kind].copy()
        part.obs = renamed(part.obs, f"{s}-")
        path = write(part, tmp_path / f"s{s}.h5ad")
        entries[f"s{s}"] = {"path": str(path), "obs": STUDIES[STUDY]["obs"], "label": "cell_type"}
    answer = train(tmp_path, entries)
    assert_refused(answer, "each study bears one label and no two the same")
    assert not (tmp_path / "out" / "model").exists()
    says(answer.err)


@pytest.mark.case("B32")
@pytest.mark.parametrize("word", ["unknown", "Unknown"])
def test_unknown_is_no_state(studies: World, tmp_path: Path, word: str, says: Says) -> None:
    study = lymphoma(studies)
    labels = study.obs["cell_type"].astype(str).to_numpy(object)
    labels[:50] = word
    study.obs["cell_type"] = labels
    answer = train_on(studies, tmp_path, write(study, tmp_path / "S.h5ad"))
    assert_refused(answer, f"called {word!r}", "list it as missing")
    says(answer.err)


@pytest.mark.case("B22", "B23")
def test_missing_labels_are_unlabelled_and_missing_patients_are_refused(
    studies: World, tmp_path: Path, says: Says
) -> None:
    study = lymphoma(studies)
    labels = study.obs["cell_type"].astype(str).astype(object)
    labels.iloc[:3] = np.nan
    study.obs["cell_type"] = pd.Categorical(labels)
    assert train_on(studies, tmp_path, write(study, tmp_path / "S.h5ad")).code == 0
    store = CellStore(tmp_path / "out" / "model.work" / "store.zarr")
    assert (store.obs()["label"].astype(str) == "").sum() + store.obs()["label"].isna().sum() == 3
    assert "nan" not in str(load(tmp_path / "out" / "model").tree)
    donors = study.obs["donor_id"].astype(str).astype(object)
    donors.iloc[:3] = np.nan
    study.obs["donor_id"] = donors
    answer = train_on(studies, tmp_path / "b", write(study, tmp_path / "T.h5ad"))
    assert_refused(answer, "patient", "(3", "missing values", "fill them or drop the cells")
    says(f"cells without a label train the latent space; missing patients: {answer.err}")


@pytest.mark.case("B19", "B21")
def test_a_minibatch_of_one_cell_and_a_patient_of_one_cell_train(studies: World, tmp_path: Path, says: Says) -> None:
    """No BatchNorm: a last minibatch of one cell, or a batch of one, is no special case."""
    study = lymphoma(studies)[:65].copy()
    for column, value in (("donor_id", "P999"), ("sample_id", "S999")):
        names = study.obs[column].astype(str).to_numpy(object)
        names[0] = value
        study.obs[column] = names
    path = write(study, tmp_path / "S.h5ad")
    entry = {"path": str(path), "obs": STUDIES[STUDY]["obs"], "label": "cell_type"}
    answer = train(tmp_path, {"mine": entry}, train=SHORT | {"batch_size": 64, "validation_share": 0})
    assert answer.code == 0, answer.err
    assert load(tmp_path / "out" / "model").provenance.n_cells == 65
    says("trained on 65 cells in minibatches of 64 + 1, one patient with a single cell")


def strings(file: h5py.File) -> None:
    shape = tuple(file["X"].attrs["shape"])
    del file["X"]
    file["X"] = np.full(shape, b"1")
    file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def ten_million_columns(file: h5py.File) -> None:
    file["X"].attrs["shape"] = [file["X"].attrs["shape"][0], 10_000_000]


def overflowing(file: h5py.File) -> None:
    file["X"].attrs["shape"] = [2**62, 2**62]


def deep(file: h5py.File) -> None:
    group = file["obs"]
    for _ in range(200):
        group = group.create_group("x")


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "strings": (strings, "not numbers"),
    "ten million columns declared": (ten_million_columns, "is broken: it is 60 x 10,000,000"),
    "a shape that overflows": (overflowing, "is broken"),
    "groups without end": (deep, "nested without end"),
}


@pytest.mark.case("B27")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(small: Small, tmp_path: Path, what: str, says: Says) -> None:
    change, words = HOSTILE[what]
    query = write(small.query, tmp_path / "Q.h5ad")
    with h5py.File(query, "r+") as file:
        change(file)
    answer = small.annotate(query, tmp_path / "A.h5ad")
    assert_refused(answer, words)
    assert [p.name for p in tmp_path.iterdir()] == ["Q.h5ad"]
    says(f"{what}: {answer.err}")


@pytest.mark.case("B03")
def test_flipped_bits_of_packed_counts_are_found(small: Small, tmp_path: Path, says: Says) -> None:
    """Of plain counts only those that make a value no count can be told: the file bears no check of its own."""
    told = {}
    for packed in ("gzip", None):
        path = tmp_path / "Q.h5ad"
        with ad.settings.override(allow_write_nullable_strings=False):
            AnnData(small.query.X.astype(np.float32), obs=small.query.obs, var=small.query.var).write_h5ad(
                path, compression=packed
            )
        whole = path.read_bytes()
        with h5py.File(path) as file:
            data = file["X/data"]
            chunk = data.id.get_chunk_info(0) if data.chunks else None
            offset, size = (
                (chunk.byte_offset, chunk.size) if chunk else (data.id.get_offset(), data.id.get_storage_size())
            )
        rng, found = np.random.default_rng(0), 0
        for _ in range(20):
            bad = bytearray(whole)
            bad[offset + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            found += carvae("embed", path, "--model", small.model, "--out", tmp_path / "A.csv").code
        told[packed] = found
    assert told["gzip"] == 20
    assert told[None] >= 15
    says(
        f"of 20 flipped bits, found in packed counts {told['gzip']}, in plain ones {told[None]} (no check in the file)"
    )
