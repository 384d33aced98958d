"""The commonest bad inputs, through the command line: one clear sentence, exit code 1, nothing left, nothing touched.

Where the right answer is to go on (empty cells, duplicated genes, Ensembl ids), the answer is checked instead.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from trained import STUDIES, Answer, World, carvae, settings, sha256, write_config

from carvae.data.genes import GeneTable
from carvae.data.store import CellStore

SHORT = {"max_epochs": 1, "min_steps": 0}
STUDY = "sim_lymphoma"


def write(adata: AnnData, path: Path) -> Path:
    with ad.settings.override(allow_write_nullable_strings=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that are not unique are meant
        adata.write_h5ad(path)
    return path


def assert_refused(answer: Answer, *words: str) -> None:
    """Exit code 1 and on stderr one sentence, or one with the list of what was found, that holds all the words."""
    assert answer.code == 1, answer.err
    assert answer.out == ""
    first, *listed = answer.err.splitlines()
    assert first.startswith("carvae: ")
    assert not listed or (len(listed) > 1 and all(line.startswith("- ") for line in listed)), answer.err
    assert "Traceback" not in answer.err
    missing = [word for word in words if word not in answer.err]
    assert not missing, answer.err


def annotate(world: World, query: Path, out: Path, model: Path | None = None) -> Answer:
    """Annotate; whatever happens, the query stays as it is."""
    before = sha256(query)
    answer = carvae("annotate", query, "--model", model or world.bundle, "--out", out)
    assert sha256(query) == before
    return answer


def train_on(world: World, folder: Path, study: Path, **sections: Any) -> Answer:
    """Train on one study of the lymphoma's kind, by its labels as they are; the study stays as it is."""
    config = settings(world.folder, folder / "out" / "model", train=SHORT, labels={"tree": "flat"})
    config["ingest"]["studies"] = {"mine": {"path": str(study), "obs": STUDIES[STUDY]["obs"], "label": "cell_type"}}
    for section, changed in sections.items():
        config["ingest"]["studies"]["mine"][section] = changed
    path, before = write_config(folder / "c.yaml", config), sha256(study)
    answer = carvae("train", path)
    assert sha256(study) == before
    return answer


def spoilt(study: AnnData, how: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> AnnData:
    other = study.copy()
    other.X = sp.csr_matrix(how(study.X.toarray().astype(np.float32)))
    return other


def log_normalised(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logs: np.ndarray[Any, Any] = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    return logs.round(2)  # so that it cannot be undone exactly


def with_value(value: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def spoil(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x[-1, -1] = value  # the very last of all: no sample of values would meet it
        return x

    return spoil


BAD_COUNTS = {
    "log-normalised": (
        log_normalised,
        ("X", "normalised or log-transformed", "provide raw counts in layers['counts']"),
    ),
    "negative": (with_value(-1), ("X", "negative values (down to -1)", "provide raw counts")),
    "fractional": (with_value(0.5), ("X", "fractional values", "provide raw counts")),
    "NaN": (with_value(np.nan), ("X", "NaN or infinite", "provide raw counts")),
}


@pytest.mark.parametrize("kind", BAD_COUNTS)
@pytest.mark.parametrize("verb", ["annotate", "train"])
def test_a_matrix_that_is_not_counts(world: World, tmp_path: Path, kind: str, verb: str) -> None:
    how, words = BAD_COUNTS[kind]
    if verb == "annotate":
        query = write(spoilt(world.query, how), tmp_path / "Q.h5ad")
        assert_refused(annotate(world, query, tmp_path / "A.h5ad"), "Q holds no raw counts", *words)
        assert [p.name for p in tmp_path.iterdir()] == ["Q.h5ad"]
    else:
        study = write(spoilt(world.studies[STUDY], how), tmp_path / "S.h5ad")
        assert_refused(train_on(world, tmp_path, study), "study 'mine'", *words)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["S.h5ad", "c.yaml"]


def test_empty_cells_are_unknown_and_counted(world: World, tmp_path: Path) -> None:
    def emptied(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x[[3, 50]] = 0
        return x

    query = write(spoilt(world.query, emptied), tmp_path / "Q.h5ad")
    answer = annotate(world, query, tmp_path / "A.h5ad")
    assert answer.code == 0, answer.err
    result = ad.read_h5ad(tmp_path / "A.h5ad")
    empty = np.isin(np.arange(result.n_obs), [3, 50])
    assert list(result.obs_names) == list(world.query.obs_names)
    assert list(result.obs["carvae_state"] == "unknown") == list(empty)
    assert (result.obs["carvae_confidence"][empty] == 0).all()
    assert np.isfinite(result.obsm["X_carvae"]).all()
    samples = pd.read_csv(tmp_path / "A.samples.csv")
    assert samples["n_cells"].sum() == result.n_obs
    assert samples["n_cells_used"].sum() == result.n_obs - 2

    study = write(spoilt(world.studies[STUDY], emptied), tmp_path / "S.h5ad")
    assert train_on(world, tmp_path, study).code == 0
    store = CellStore(tmp_path / "out" / "model.work" / "store.zarr")
    assert store.n_cells == world.studies[STUDY].n_obs - 2
    assert store.header.receipt["studies"]["mine"][0]["cells_below_min_counts"] == 2


def test_duplicated_genes_are_summed(world: World, tmp_path: Path) -> None:
    x = world.query.X.toarray()
    half = x[:, :200] // 2
    both = sp.csr_matrix(np.hstack([half, x[:, 200:], x[:, :200] - half]))
    names = [*world.query.var_names, *world.query.var_names[:200]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        query = write(AnnData(both, obs=world.query.obs, var=pd.DataFrame(index=names)), tmp_path / "Q.h5ad")
    same_answer(world, query, tmp_path)


def test_ensembl_ids_are_matched(world: World, tmp_path: Path) -> None:
    table = GeneTable.default()
    id_of = {symbol: gene_id for gene_id, symbol in table.by_id.items()}
    symbols = table.resolve(list(world.query.var_names), None).symbols
    other = world.query.copy()
    other.var_names = [f"{id_of[s]}.7" if s in id_of else s for s in symbols]
    assert sum(name.startswith("ENSG") for name in other.var_names) > 900
    same_answer(world, write(other, tmp_path / "Q.h5ad"), tmp_path)


def same_answer(world: World, query: Path, folder: Path) -> None:
    """The answer is that on the query as it was simulated."""
    assert annotate(world, query, folder / "A.csv").code == 0
    assert annotate(world, world.query_path, folder / "B.csv").code == 0
    found, expected = (pd.read_csv(folder / name, index_col="cell") for name in ("A.csv", "B.csv"))
    pd.testing.assert_frame_equal(found, expected, atol=2e-5)


def few_genes(study: AnnData, panel: set[str], share: float) -> AnnData:
    """The study with a share of the panel's genes, and all its other genes."""
    symbols = GeneTable.default().resolve(list(study.var_names), None).symbols
    inside = np.array([s in panel for s in symbols])
    kept = np.flatnonzero(inside)[: round(share * len(panel))]
    return study[:, np.sort(np.append(kept, np.flatnonzero(~inside)))].copy()


def panel_of(world: World) -> set[str]:
    return set(CellStore(world.folder / "model.work" / "store.zarr").header.genes)


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_most_genes_missing(world: World, tmp_path: Path, verb: str) -> None:
    query = write(few_genes(world.query, panel_of(world), 0.395), tmp_path / "Q.h5ad")
    before = sha256(query)
    answer = carvae(verb, query, "--model", world.bundle, "--out", tmp_path / "A.h5ad")
    assert_refused(answer, "% of the model's 1139 genes are in the query", "40.0%", "give the unfiltered matrix")
    assert [p.name for p in tmp_path.iterdir()] == ["Q.h5ad"]
    assert sha256(query) == before


def test_many_genes_missing_are_a_warning_with_the_loss(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = write(few_genes(world.query, panel_of(world), 0.5), tmp_path / "Q.h5ad")
    assert annotate(world, query, tmp_path / "A.csv").code == 0
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "50% of the model's genes are missing" in warning
    assert "macro-F1" in warning


def as_mouse(study: AnnData) -> AnnData:
    mouse = study.copy()
    symbols = GeneTable.default().resolve(list(study.var_names), None).symbols
    mouse.var_names = [str(s).capitalize() for s in symbols]
    return mouse


def test_another_species(world: World, tmp_path: Path) -> None:
    query = write(as_mouse(world.query), tmp_path / "Q.h5ad")
    answer = annotate(world, query, tmp_path / "A.h5ad")
    assert_refused(answer, "mouse genes", "convert them to their human orthologues")
    study = write(as_mouse(world.studies[STUDY]), tmp_path / "S.h5ad")
    answer = train_on(world, tmp_path, study)
    assert_refused(answer, "study 'mine'", "mouse genes", "convert them to their human orthologues")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Q.h5ad", "S.h5ad", "c.yaml"]


def test_a_missing_obs_column(world: World, tmp_path: Path) -> None:
    adata = world.studies[STUDY].copy()
    del adata.obs["donor_id"]
    study = write(adata, tmp_path / "S.h5ad")
    answer = train_on(world, tmp_path, study)
    assert_refused(
        answer, "study 'mine'", "'patient'", "'donor_id', which is missing", "(160)", "the file has sample_id"
    )
    answer = train_on(world, tmp_path, world.folder / f"{STUDY}.h5ad", label="celltype")
    assert_refused(answer, "study 'mine'", "no column 'celltype'", "ingest.studies.mine.label", "cell_type")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["S.h5ad", "c.yaml"]


def test_one_label_only(world: World, tmp_path: Path) -> None:
    adata = world.studies[STUDY].copy()
    adata.obs["cell_type"] = "T cell"
    study = write(adata, tmp_path / "S.h5ad")
    assert_refused(train_on(world, tmp_path, study), "'T cell'", "label")
    # all but one are declared missing
    kinds = sorted(set(world.studies[STUDY].obs["cell_type"].astype(str)))
    answer = train_on(world, tmp_path, world.folder / f"{STUDY}.h5ad", missing_labels=kinds[1:])
    assert_refused(answer, f"'{kinds[0]}'")
    # no model; the store beside it is complete and serves the next run
    assert not (tmp_path / "out" / "model").exists()
    assert CellStore(tmp_path / "out" / "model.work" / "store.zarr").n_cells == 160
    beside = {p.name for p in (tmp_path / "out" / "model.work").iterdir()}
    assert beside <= {"store.zarr", "config.yaml", "receipt.json"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(world: World, tmp_path: Path, share: float) -> None:
    whole = world.query_path.read_bytes()
    query = tmp_path / "Q.h5ad"
    query.write_bytes(whole[: int(share * len(whole))])
    assert_refused(annotate(world, query, tmp_path / "A.h5ad"), str(query))
    assert_refused(train_on(world, tmp_path, query), "study 'mine'", str(query))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Q.h5ad", "c.yaml"]


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json", "metrics.json", "card.md"])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_changed_byte_of_the_model(world: World, tmp_path: Path, name: str, place: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.bundle, model)
    content = bytearray((model / name).read_bytes())
    at = {"start": 0, "middle": len(content) // 2, "end": len(content) - 1}[place]
    content[at] ^= 1
    (model / name).write_bytes(content)
    before = sha256(model)
    answer = annotate(world, world.query_path, tmp_path / "A.h5ad", model)
    assert_refused(answer, str(model), name, "was changed", "copy the folder again")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sha256(model) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json", "metrics.json", "card.md"])
def test_a_file_of_the_model_is_gone(world: World, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.bundle, model)
    (model / name).unlink()
    assert_refused(annotate(world, world.query_path, tmp_path / "A.h5ad", model), str(model), name)
    assert_refused(annotate(world, world.query_path, tmp_path / "A.h5ad", tmp_path), "no model bundle", "carvae train")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_training_never_writes_over_what_is_no_model(world: World, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "model"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("irreplaceable", encoding="utf-8")
    answer = train_on(world, tmp_path, world.folder / f"{STUDY}.h5ad")
    assert_refused(answer, str(mine), "'thesis.txt'", "choose another output")
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert [p.name for p in mine.parent.iterdir()] == ["model"]  # said before any work was done
