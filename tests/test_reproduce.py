"""An output made again: the same to the bit here, the same but for rounding elsewhere, and what differs by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from trained import World, carvae, sha256

from carvae.config import Config
from carvae.errors import ConfigError
from carvae.ingest import work_folder
from carvae.reproduce import _place, run


@pytest.fixture(scope="module")
def annotated(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("annotated") / "A.h5ad"
    answer = carvae("annotate", world.query_path, "--model", world.bundle, "--out", out, "predict.min_counts=30")
    assert answer.code == 0, answer.err
    return out


def test_a_model_is_made_again_to_the_bit_and_nothing_is_touched(world: World) -> None:
    before = sha256(world.folder)
    answer = carvae("reproduce", world.bundle, "--quiet")
    assert (answer.code, answer.out) == (0, f"{world.bundle} was made again, identical to the last bit\n"), answer.err
    assert sha256(world.folder) == before


def test_an_annotated_file_is_made_again_from_itself_and_from_its_query(
    world: World, annotated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="carvae")
    before = sha256(annotated)
    for query in ((), ("--query", world.query_path)):
        answer = carvae("reproduce", annotated, "--model", world.bundle, *query)
        assert (answer.code, answer.out) == (0, f"{annotated} was made again, identical to the last bit\n"), answer.err
    assert sha256(annotated) == before
    assert "genes found" in caplog.text
    assert "/carvae-" not in caplog.text, "a place that is gone by now"


def changed(annotated: Path, folder: Path, change: Callable[[ad.AnnData], None]) -> Path:
    """A copy of the file that says something else."""
    adata = ad.read_h5ad(annotated)
    change(adata)
    with ad.settings.override(allow_write_nullable_strings=False):
        adata.write_h5ad(folder / "B.h5ad")
    return folder / "B.h5ad"


def rounded(adata: ad.AnnData) -> None:
    adata.obsm["X_carvae"] = adata.obsm["X_carvae"] + np.float32(1e-6)


def relabelled(adata: ad.AnnData) -> None:
    state = adata.obs["carvae_state"].astype(str).to_numpy(object)
    state[:5] = np.where(state[:5] == "regulatory", "naive-like", "regulatory")
    adata.obs["carvae_state"] = pd.Categorical(state)


def other_counts(adata: ad.AnnData) -> None:
    counts = adata.X.tocsr()
    counts.data[0] += 1
    adata.X = counts


def older(adata: ad.AnnData) -> None:
    adata.uns["carvae"]["carvae_version"] = "0.0.9"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (rounded, 0, "is the same but for rounding: states agree in 100.00% of the cells"),
        (relabelled, 4, "is NOT the same: states agree in 96.88% of the cells"),
        (other_counts, 4, "what differs: the counts are not those that were annotated"),
        (older, 0, "identical to the last bit; what differs: carvae 0.0.9 then, "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_is_named(
    world: World, annotated: Path, tmp_path: Path, change: Callable[[ad.AnnData], None], code: int, said: str
) -> None:
    answer = carvae("reproduce", changed(annotated, tmp_path, change), "--model", world.bundle)
    assert said in answer.out
    assert answer.code == code
    assert len(answer.out.splitlines()) == 1


def test_what_cannot_be_made_again_is_refused(world: World, annotated: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothere does not exist; give a model"):
        run(tmp_path / "nothere")
    with pytest.raises(ConfigError, match=r"is a folder, and no model \(no model.json in it\)"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="give --model"):
        run(annotated)
    with pytest.raises(ConfigError, match="for an annotated file"):
        run(world.bundle, model=world.bundle)
    shutil.copytree(world.bundle, tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"alone\.work/config\.yaml is not there"):
        run(tmp_path / "alone")
    assert not work_folder(tmp_path / "alone").exists()
    assert carvae("export", world.bundle, "--share", "--out", tmp_path / "shared").code == 0
    with pytest.raises(ConfigError, match="shared without its decoder"):
        run(tmp_path / "shared")
    with pytest.raises(ConfigError, match="was annotated by the model"):
        run(annotated, tmp_path / "shared")
    answer = carvae("reproduce", world.query_path, "--model", world.bundle)
    assert answer.code == 1
    assert "holds no labels of carvae" in answer.err


def test_studies_at_relative_places_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = {"path": "in/a.h5ad", "obs": {"patient": "donor_id", "sample": "sample_id"}}
    saved = Config.parse({"output": "out/../out/model", "ingest": {"studies": {"a": study}}})
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "in", home / "out" / "model", elsewhere / "in"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match=r"trained on in/a\.h5ad, which is not found from .*elsewhere or .*home; "):
        _place(saved, home / "out" / "model")
    (home / "in" / "a.h5ad").touch()
    assert _place(saved, Path("../home/out/model")) == home
    with pytest.raises(ConfigError, match=r"not found from \S*elsewhere; give the command in the folder"):
        _place(saved, home / "model")  # moved: where it was trained is not known any more
    (elsewhere / "in" / "a.h5ad").touch()
    assert _place(saved, home / "model") == elsewhere
    placed = Config.parse({"ingest": {"studies": {"a": study | {"path": str(home / "in" / "a.h5ad")}}}})
    assert _place(placed, home / "model") == elsewhere


def test_what_was_annotated_is_known_again_whatever_the_chunks(world: World, annotated: Path, tmp_path: Path) -> None:
    again = tmp_path / "A.h5ad"
    how = ("predict.min_counts=30", "predict.chunk_size=33")
    assert carvae("annotate", world.query_path, "--model", world.bundle, "--out", again, *how).code == 0
    assert ad.read_h5ad(again).uns["carvae"]["query"] == ad.read_h5ad(annotated).uns["carvae"]["query"]
