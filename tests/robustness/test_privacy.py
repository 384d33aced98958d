"""What leaves the house: 200 planted identifiers, and none of them in a model, a log, a W&B folder or a shared page."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from apart import begin, command_line
from sklearn.metrics import roc_auc_score
from small import Says
from trained import World, carvae, write_config

from carvae.config import Config
from carvae.data.loader import MinibatchLoader
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.data.split import PatientSplit
from carvae.data.store import CellStore
from carvae.demo import programmes
from carvae.ingest import run as ingest
from carvae.ingest import store_path
from carvae.model.cohort import Cohort
from carvae.train import fit

EACH = 25
PLANTED = {
    "name": [f"Zebulon{i:02d} Quatermain" for i in range(EACH)],
    "record": [f"MRN{7_700_413 + 37 * i}" for i in range(EACH)],
    "date": [f"1961-07-{i + 1:02d}" for i in range(EACH)],
    "email": [f"zq{i:02d}@planted-clinic.example" for i in range(EACH)],
    "barcode": ["".join(np.random.default_rng(i).choice(list("ACGT"), 16)) + "-1" for i in range(EACH)],
    "batch": [f"LANE_QX{i:02d}_flow" for i in range(EACH)],
    "path": [f"Vault{i:02d}k" for i in range(EACH)],
    "argument": [f"planted_word_{i:02d}" for i in range(EACH)],
}
STUDY = "trial"
"""The config's own name of a study is told to W&B, and is planted nowhere."""


@dataclass(frozen=True)
class Leaving:
    """What was written and said."""

    model: Path
    work: Path
    shared: Path
    page: Path
    said: dict[str, str]
    """Verb -> all that it printed."""


def planted(study: ad.AnnData) -> ad.AnnData:
    """The study with identifiers wherever a clinic might leave them."""
    study = study.copy()
    n = study.n_obs
    patient, sample = (study.obs[c].astype("category").cat.codes.to_numpy() for c in ("donor_id", "sample_id"))
    study.obs["donor_id"] = np.array(PLANTED["name"], object)[patient]
    study.obs["sample_id"] = np.array(PLANTED["record"], object)[sample]
    for column, kind in (
        ("contact", "name"), ("mrn", "record"), ("born", "date"), ("mail", "email"), ("lane", "batch")
    ):  # fmt: skip
        study.obs[column] = np.array(PLANTED[kind], object)[np.arange(n) % EACH]
    label = study.obs["cell_type"].astype(str).to_numpy(object)
    label[:EACH] = PLANTED["argument"]  # they are told on the command line to be no labels
    study.obs["cell_type"] = label
    names = study.obs_names.to_numpy(object).copy()
    names[:EACH] = PLANTED["barcode"]
    study.obs_names = names
    study.obs["clone_id"] = [f"{b[:12]}_CASS" for b in np.resize(np.array(PLANTED["barcode"], object), n)]
    study.uns = {"visits": np.array(PLANTED["date"]), "mail": PLANTED["email"][0], "owner": PLANTED["name"][1]}
    return study


@pytest.fixture(scope="module")
def leaving(world: World, tmp_path_factory: pytest.TempPathFactory) -> Leaving:
    """Train with W&B, share, annotate and report, all of it on planted data."""
    folder = tmp_path_factory.mktemp("leaving")
    place = folder.joinpath(*PLANTED["path"])
    place.mkdir(parents=True)
    with ad.settings.override(allow_write_nullable_strings=False):
        study = planted(world.studies["sim_lymphoma"])
        study.write_h5ad(place / "study.h5ad")
        study.obs["cell_type"] = world.studies["sim_lymphoma"].obs["cell_type"].to_numpy()  # which a page shows
        study.write_h5ad(place / "query.h5ad")
    obs = {"patient": "donor_id", "sample": "sample_id", "assay": "lane"}
    config: dict[str, Any] = {
        "output": str(folder / "m"),
        "ingest": {"n_top_genes": 300, "studies": {STUDY: {"path": str(place / "study.h5ad"), "obs": obs}}},
        "model": {"n_latent": 8, "n_hidden": 32, "covariates": ["sample", "assay"]},
        "train": {"accelerator": "cpu", "min_steps": 40, "max_epochs": 2, "calibration_folds": 2, "map_every": 10},
    }
    config["ingest"]["studies"][STUDY]["label"] = "cell_type"
    said = {}
    words = f"ingest.studies.{STUDY}.missing_labels=[{', '.join(PLANTED['argument'])}]"
    command = ["train", str(write_config(folder / "c.yaml", config)), words, "train.wandb=offline"]
    done = begin(command_line, *command, env=os.environ | {"HOME": str(folder)}, cwd=folder).wait()
    assert done.returncode == 0, done.stderr
    said["train"] = done.stdout + done.stderr
    shared, annotated, page = folder / "shared", place / "A.h5ad", folder / "page.html"
    for verb, *arguments in (
        ("export", folder / "m", "--share", "--out", shared),
        ("annotate", place / "query.h5ad", "--model", shared, "--out", annotated),
        ("report", annotated, "--model", shared, "--out", page, "report.names=false"),
        ("report", annotated, "--model", shared, "--out", folder / "own.html"),
    ):
        answer = carvae(verb, *arguments)
        assert answer.code == 0, answer.err
        said[verb] = said.get(verb, "") + answer.out + answer.err
    return Leaving(folder / "m", folder / "m.work", shared, page, said)


def found(content: bytes, kinds: tuple[str, ...] = tuple(PLANTED)) -> list[str]:
    return [value for kind in kinds for value in PLANTED[kind] if value.encode() in content]


def bytes_of(folder: Path, *, but: tuple[Path, ...] = ()) -> bytes:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not {p, *p.parents} & set(but)]
    assert files
    return b"\0".join(p.relative_to(folder).as_posix().encode() + b"\0" + p.read_bytes() for p in files)


def test_the_planted_identifiers_are_there_to_be_found(leaving: Leaving, record_property: Any) -> None:
    assert sum(map(len, PLANTED.values())) == len({v for values in PLANTED.values() for v in values}) == 200
    kept = bytes_of(leaving.work)  # the store and the config of the run, which are never given away
    assert {kind for kind in PLANTED if found(kept, (kind,))} >= {"path", "argument"}
    assert found((store_path(leaving.model) / "zarr.json").read_bytes() + kept)


def test_no_identifier_is_in_a_model_whole_or_shared(leaving: Leaving) -> None:
    assert found(bytes_of(leaving.model)) == []
    assert found(bytes_of(leaving.shared)) == []


def test_no_identifier_is_in_logs_or_the_folder_of_wandb(leaving: Leaving) -> None:
    logs = bytes_of(leaving.work, but=(store_path(leaving.model), leaving.work / "config.yaml"))
    assert b".wandb" in logs
    assert found(logs) == []


def test_no_identifier_is_on_a_page_without_names(leaving: Leaving) -> None:
    page = leaving.page.read_bytes()
    assert found(page) == []
    assert b"sample 1" in page
    for clone in {b"_CASS", str(leaving.page.parent).encode()}:
        assert clone not in page


def test_a_page_with_names_holds_nothing_of_other_columns(leaving: Leaving) -> None:
    page = leaving.page.with_name("own.html").read_bytes()
    assert found(page, ("record",)), "samples are called by their names"
    assert found(page, ("date", "email")) == []
    assert not set(PLANTED["name"][6:]) & set(found(page, ("name",))), "names of others than the patients"


def test_messages_name_no_one_but_the_files_that_were_given_and_samples_with_a_verdict(leaving: Leaving) -> None:
    for verb, text in leaving.said.items():
        kinds = [kind for kind in PLANTED if kind != "path" and (verb, kind) != ("annotate", "record")]
        assert found(text.encode(), tuple(kinds)) == [], verb


@pytest.mark.case("E04")
def test_the_reconstruction_loss_does_not_tell_the_cells_that_were_trained_on(tmp_path: Path, says: Says) -> None:
    """Cells of the same patients, half of them trained on: a loss without overfitting tells neither half."""
    design = replace(STUDIES[0], n_patients=6, days=(0,))
    studies = simulate_studies(np.random.default_rng(1), programmes(), SimulationSettings((design,), n_cells=2000))
    write_studies(studies, tmp_path)
    obs = {"patient": "donor_id", "sample": "sample_id"}
    study = {"path": str(tmp_path / f"{design.name}.h5ad"), "obs": obs, "label": "cell_type"}
    ingested = {"n_top_genes": 500, "studies": {design.name: study}}
    config = Config.parse(
        {"output": str(tmp_path / "m"), "ingest": ingested, "train": {"wandb": "disabled", "accelerator": "cpu"}}
    )
    cohort = Cohort.assemble(CellStore(ingest(config)), config)
    everyone = np.arange(len(cohort.obs))
    taught = np.sort(np.random.default_rng(0).permutation(everyone)[:1000])
    vae = fit(cohort, PatientSplit(taught, taught[:0], ()), config, tmp_path / "fit").network.vae
    (cells,) = MinibatchLoader(cohort.data(taught, config), everyone, everyone.size)
    with torch.no_grad():
        posterior = vae.encoder(cells.counts)
        loss_N = vae.elbo(cells.counts, posterior, posterior.mean_NK, cells.covariate_NC).reconstruction_N.numpy()
    auroc = roc_auc_score(np.isin(everyone, taught), -loss_N)
    assert auroc < 0.55
    says(f"1,000 training cells beside 1,000 others: AUROC {auroc:.3f}; with 300 of each 0.588")
