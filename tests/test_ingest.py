"""Many studies to one store: nothing is lost on the way, nothing half-done is left, nothing is built twice."""

from __future__ import annotations

import logging
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from trained import STUDIES, World, carvae, settings, sha256, write_config

from carvae.config import Config
from carvae.data.genes import GeneTable
from carvae.data.simulate import background_genes
from carvae.data.store import CellStore, StoreWriter
from carvae.errors import CarvaeError, ConfigError, CountsError, GeneError, ReadError, SchemaError
from carvae.ingest import run, work_folder
from carvae.labels.signatures import Signatures, score

GENES = [*background_genes()[:60], "LAG3", "PDCD1", "HAVCR2", "XIST", "MT-CO1", "TRBV20-1"]


def study(seed: int, n_cells: int = 60, genes: list[str] | None = None, **obs: Any) -> AnnData:
    """A study of two patients with two samples each."""
    names = GENES if genes is None else genes
    counts = sp.csr_matrix(np.random.default_rng(seed).poisson(1.5, (n_cells, len(names))).astype(np.int32))
    patient = np.array([f"s{seed}_P{cell % 2 + 1}" for cell in range(n_cells)], dtype=object)
    table = {
        "patient": patient,
        "sample": np.array([f"{p}_{cell % 4 // 2}" for cell, p in enumerate(patient)], dtype=object),
        "cell_type": np.array(["naive", "effector", "Unlabelled"], dtype=object)[np.arange(n_cells) % 3],
    } | obs
    index = [f"c{seed}_{cell}" for cell in range(n_cells)]
    return AnnData(counts, obs=pd.DataFrame(table, index=index).astype("category"), var=pd.DataFrame(index=names))


def config(folder: Path, studies: dict[str, AnnData], ingest: dict[str, Any] | None = None, **top: Any) -> Config:
    """Write the studies and return the config that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = {}
    for name, adata in studies.items():
        with ad.settings.override(allow_write_nullable_strings=False):
            adata.write_h5ad(folder / f"{name}.h5ad")
        sections[name] = {"path": folder / f"{name}.h5ad", "label": "cell_type"}
    return Config.parse({"output": folder / "model", "ingest": {"studies": sections} | (ingest or {})} | top)


def changed(base: Config, **ingest: Any) -> Config:
    """The same config with other ingest settings."""
    settings = base.model_dump(mode="json")
    return Config.parse(settings | {"ingest": settings["ingest"] | ingest})


def leftovers(folder: Path) -> list[str]:
    """Everything below the folder but the studies themselves."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".h5ad")


def over_panel(adata: AnnData, genes: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Counts of the study over the panel, by names alone; columns of one gene summed."""
    symbols = GeneTable.default().resolve(list(adata.var_names), None).symbols
    table = pd.DataFrame(np.asarray(sp.csr_matrix(adata.X).todense()), columns=symbols).T.groupby(level=0).sum().T
    return table.reindex(columns=list(genes), fill_value=0).to_numpy()


@pytest.fixture
def two(tmp_path: Path) -> Config:
    return config(tmp_path, {"one": study(1), "two": study(2)})


def test_the_store_holds_the_counts_of_every_study(tmp_path: Path) -> None:
    first, second = study(1), study(2, genes=[*GENES[5:], "TOX", "GZMB"])
    store = CellStore(run(config(tmp_path, {"one": first, "two": second})))
    expected = np.vstack([over_panel(first, store.header.genes), over_panel(second, store.header.genes)])
    np.testing.assert_array_equal(store.counts().toarray(), expected)
    obs = store.obs()
    assert list(obs["study"].astype(str)) == ["one"] * 60 + ["two"] * 60
    for name in ("patient", "sample"):
        assert list(obs[name].astype(str)) == [*first.obs[name].astype(str), *second.obs[name].astype(str)]
    assert list(obs["label"].astype(str)) == [*first.obs["cell_type"], *second.obs["cell_type"]]
    np.testing.assert_array_equal(
        obs["n_counts"], np.concatenate([np.asarray(s.X.sum(axis=1)).ravel() for s in (first, second)])
    )
    measured = pd.DataFrame(store.measured, index=store.header.studies, columns=list(store.header.genes))
    for name, adata in (("one", first), ("two", second)):
        symbols = set(GeneTable.default().resolve(list(adata.var_names), None).symbols)
        assert [bool(v) for v in measured.loc[name]] == [gene in symbols for gene in measured.columns]


def test_the_store_of_the_simulated_studies_is_right_whatever_their_names(world: World) -> None:
    store = CellStore(work_folder(world.bundle) / "store.zarr")
    start = 0
    for name in STUDIES:  # Ensembl ids and a layer in one, old symbols in none of these three
        adata = world.studies[name].copy()
        if "counts" in adata.layers:
            adata.X = adata.layers["counts"]
        n = adata.n_obs
        row = store.header.studies.index(name)
        here = np.flatnonzero(store.obs()["study"].astype(str).to_numpy() == name)
        np.testing.assert_array_equal(store.counts()[here].toarray(), over_panel(adata, store.header.genes))
        assert len(here) == n
        assert 0.8 < store.measured[row].mean() < 1
        start += n
    assert start == store.n_cells


@pytest.mark.parametrize("size", [1, 7, 59, 10_000])
def test_the_store_does_not_depend_on_the_chunk_size(two: Config, tmp_path: Path, size: int) -> None:
    whole = CellStore(run(two))
    other = CellStore(run(changed(two, chunk_size=size).model_copy(update={"output": tmp_path / "other"})))
    assert other.header.genes == whole.header.genes
    assert other.content == whole.content
    assert (other.counts() != whole.counts()).nnz == 0
    pd.testing.assert_frame_equal(other.obs(), whole.obs())


def test_a_store_is_built_once_and_again_when_inputs_or_settings_change(
    two: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "carvae")
    store = run(two)
    before = sha256(store)
    assert "up to date" not in caplog.text
    caplog.clear()
    assert run(two) == store
    assert "up to date" in caplog.text
    assert sha256(store) == before
    # settings of other verbs do not matter, those of ingest do
    caplog.clear()
    run(two.model_copy(update={"train": two.train.model_copy(update={"lr": 0.1})}))
    assert "up to date" in caplog.text
    for other in (changed(two, min_counts=3), two.model_copy(update={"seed": 5})):
        caplog.clear()
        run(other)
        assert "up to date" not in caplog.text
    run(two)
    caplog.clear()
    replaced = study(3)
    config(tmp_path, {"two": replaced})
    run(two)
    assert "up to date" not in caplog.text
    np.testing.assert_array_equal(
        CellStore(store).counts().toarray()[60:], over_panel(replaced, CellStore(store).header.genes)
    )


def test_a_broken_store_is_built_again(two: Config) -> None:
    store = run(two)
    before = CellStore(store).content
    (store / "zarr.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ReadError):
        CellStore(store)
    assert CellStore(run(two)).content == before


@pytest.mark.parametrize("there", [False, True], ids=["first time", "over an old store"])
def test_what_dies_while_writing_leaves_what_was_there(
    two: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    before = sha256(run(two)) if there else ""
    files = leftovers(tmp_path)

    class FullDiskError(Exception):
        pass

    def fail(self: StoreWriter, *_: object) -> None:
        raise FullDiskError

    monkeypatch.setattr(StoreWriter, "close", fail)
    with pytest.raises(FullDiskError):
        run(changed(two, min_counts=2))
    store = work_folder(two.output) / "store.zarr"
    assert (sha256(store) if there else "") == before
    assert [f for f in leftovers(tmp_path) if f != "model.work"] == [f for f in files if f != "model.work"]


def test_what_a_run_left_that_died_after_the_store_was_there_is_put_right(two: Config) -> None:
    """Found by scripts/kill_test.py: the store was up to date, so the old receipt and the old store's litter stayed."""
    store = run(two)
    receipt = store.with_name("receipt.json")
    right = receipt.read_text()
    receipt.write_text("of the run before")
    litter = store.with_name(
        f".store.{re.sub(r'[^a-zA-Z0-9_]', '-', socket.gethostname())}.999999999.00000000.tmp.zarr"
    )
    litter.mkdir()
    run(two)
    assert receipt.read_text() == right
    assert not litter.exists()


def test_excluded_patients_are_nowhere(two: Config) -> None:
    everyone = CellStore(run(two))
    less = CellStore(run(changed(two, exclude_patients=["s1_P2"])))
    patient = everyone.obs()["patient"].astype(str).to_numpy()
    np.testing.assert_array_equal(
        less.counts().toarray(), everyone.counts()[np.flatnonzero(patient != "s1_P2")].toarray()
    )
    assert "s1_P2" not in set(less.obs()["patient"].astype(str))
    assert less.content != everyone.content


def test_excluding_nobody_known_or_everybody_is_an_error(two: Config) -> None:
    with pytest.raises(ConfigError, match=r"'nobody', who are in no study; there are s1_P1, s1_P2, s2_P1, s2_P2"):
        run(changed(two, exclude_patients=["nobody"]))
    with pytest.raises(ConfigError, match="leaves no patient"):
        run(changed(two, exclude_patients=["s1_P1", "s1_P2", "s2_P1", "s2_P2"]))


def test_a_study_whose_patients_are_all_excluded_does_no_harm(two: Config) -> None:
    store = CellStore(run(changed(two, exclude_patients=["s1_P1", "s1_P2"])))
    assert set(store.obs()["study"].astype(str)) == {"two"}
    np.testing.assert_array_equal(store.counts().toarray(), over_panel(study(2), store.header.genes))


def test_shallow_cells_are_left_out_and_counted(tmp_path: Path) -> None:
    adata, counts = study(1), study(1).X.toarray()
    counts[[7, 11]] = 0
    counts[11, 0] = 4
    adata.X = sp.csr_matrix(counts)
    store = CellStore(run(config(tmp_path, {"one": adata})))
    assert store.n_cells == 59
    [receipt] = store.header.receipt["studies"]["one"]
    assert (receipt["cells"], receipt["cells_left_out"], receipt["cells_below_min_counts"]) == (59, 1, 1)
    store = CellStore(run(config(tmp_path, {"one": adata}, {"min_counts": 5})))
    assert store.n_cells == 58
    np.testing.assert_array_equal(
        store.counts().toarray(), np.delete(over_panel(adata, store.header.genes), [7, 11], axis=0)
    )


def test_the_policy_keeps_genes_out_of_the_panel_and_signatures_bring_theirs_in(tmp_path: Path) -> None:
    genes = [*GENES, "FMC63-28Z", "CAR"]
    adata, counts = study(1, genes=genes), study(1, genes=genes).X.toarray()
    counts[:, genes.index("HAVCR2")] = 0  # never seen, so not variable
    adata.X = sp.csr_matrix(counts)
    store = CellStore(run(config(tmp_path, {"one": adata}, {"n_top_genes": 20})))
    panel = set(store.header.genes)
    assert not panel & {"XIST", "MT-CO1", "TRBV20-1", "FMC63-28Z", "CAR"}
    assert {"LAG3", "PDCD1", "HAVCR2"} <= panel
    receipt = store.header.receipt["panel"]
    assert receipt["variable"] == 20
    assert receipt["variable"] + receipt["signature"] == len(panel)
    assert receipt["excluded"]["transgene"] == 2
    everything = CellStore(run(config(tmp_path, {"one": adata}, {"exclude_genes": []})))
    assert {"XIST", "MT-CO1", "TRBV20-1"} <= set(everything.header.genes)


def test_studies_that_share_few_genes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    halves = {"one": study(1, genes=GENES[:40]), "two": study(2, genes=GENES[30:])}
    run(config(tmp_path, halves, {"identity_genes": []}, output=tmp_path / "a"))
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(r"of the \d+ genes of the panel 10 are measured by all studies \(.*two 5\d%\)", said)
    assert "raise ingest.min_study_share" in said


def test_identity_genes_that_no_study_has_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = study(1, genes=[*GENES, "CD3E"])
    run(config(tmp_path, {"one": adata}, {"identity_genes": ["CD3E", "XIST"]}, output=tmp_path / "a"))
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "ingest.identity_genes: XIST is not in the panel" in said
    caplog.clear()
    run(config(tmp_path, {"one": adata}, {"identity_genes": ["CD3E"]}, output=tmp_path / "b"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_gene_of_too_few_studies_is_not_in_the_panel(tmp_path: Path) -> None:
    studies = {f"n{k}": study(k, genes=[*GENES, "GAPDH"] if k == 1 else GENES) for k in (1, 2, 3)}
    assert "GAPDH" not in GENES
    assert "GAPDH" not in CellStore(run(config(tmp_path, studies))).header.genes
    assert "GAPDH" in CellStore(run(config(tmp_path, studies, {"min_study_share": 0.3}))).header.genes


def test_duplicated_genes_are_summed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's, that the names are not unique
        adata = study(1, genes=[*GENES[:-1], GENES[0]])
        written = config(tmp_path, {"one": adata})
    store = CellStore(run(written))
    column = store.header.genes.index(GENES[0])
    np.testing.assert_array_equal(
        store.counts()[:, column].toarray().ravel(), (adata.X[:, 0] + adata.X[:, -1]).toarray().ravel()
    )


def test_a_folder_of_samples_is_one_study(tmp_path: Path) -> None:
    whole = study(1)
    for sample in sorted(set(whole.obs["sample"])):
        part = whole[whole.obs["sample"] == sample].copy()
        del part.obs["sample"]
        (tmp_path / "parts").mkdir(exist_ok=True)
        with ad.settings.override(allow_write_nullable_strings=False):
            part.write_h5ad(tmp_path / "parts" / f"{sample}.h5ad")
    store = CellStore(
        run(Config.parse({"output": tmp_path / "m", "ingest": {"studies": {"one": {"path": tmp_path / "parts"}}}}))
    )
    order = np.argsort(whole.obs["sample"].astype(str), kind="stable")
    assert list(store.obs()["sample"].astype(str)) == list(whole.obs["sample"].astype(str).iloc[order])
    np.testing.assert_array_equal(store.counts().toarray(), over_panel(whole, store.header.genes)[order])
    assert set(store.obs()["label"].astype(str)) == {""}
    assert len(store.header.receipt["studies"]["one"]) == 4


def test_scores_for_weak_labels_are_those_of_the_whole_matrix(tmp_path: Path) -> None:
    adata = study(1, genes=[*background_genes()[:300], "LAG3", "PDCD1", "HAVCR2", "CTLA4", "TIGIT", "TOX", "ENTPD1"])
    top = {"labels": {"weak": True, "tree": "tree"}}
    store = CellStore(run(config(tmp_path, {"one": adata}, {"chunk_size": 13}, **top)))
    from carvae.config import label_file

    symbols = [str(s) for s in GeneTable.default().resolve(list(adata.var_names), None).symbols]
    expected = score(adata.X, symbols, Signatures.read(label_file("signatures")))["exhaustion"]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(store.obs()["score_exhaustion"], expected, atol=1e-6)


def broken_studies() -> Iterator[tuple[str, dict[str, AnnData], type[CarvaeError], str]]:
    negative = study(1)
    negative.X = negative.X.astype(np.float32)
    negative.X.data[3] = -1
    yield "counts", {"one": negative}, CountsError, "negative"
    shared = study(2)
    shared.obs["patient"] = study(1).obs["patient"].to_numpy(object)
    yield "patients", {"one": study(1), "two": shared}, SchemaError, "occur in 2 studies"
    contradiction = study(1, response=np.array(["CR", "NR", "NR"], dtype=object)[np.arange(60) % 3])
    yield "response", {"one": contradiction}, SchemaError, "more than one response"
    mouse = study(1, genes=[gene.capitalize() for gene in GENES])
    yield "species", {"one": mouse}, GeneError, "mouse"
    yield "species of one of two", {"human": study(2), "mouse": mouse}, GeneError, "study 'mouse'.*mouse genes"
    nonsense = study(1, genes=[f"feature_{k}" for k in range(60)])
    yield "names", {"one": nonsense}, GeneError, "HGNC symbol or Ensembl id"


@pytest.mark.parametrize(("studies", "kind", "words"), [pytest.param(*rest, id=i) for i, *rest in broken_studies()])
def test_a_broken_study_is_refused_and_nothing_is_written(
    tmp_path: Path, studies: dict[str, AnnData], kind: type[CarvaeError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        run(config(tmp_path, studies))
    assert leftovers(tmp_path) == []


def test_the_problems_of_all_studies_come_at_once(tmp_path: Path) -> None:
    first, second = study(1), study(2)
    del first.obs["patient"]
    second.obs["sample"] = [None, *["x"] * 59]
    with pytest.raises(SchemaError) as caught:
        run(config(tmp_path, {"one": first, "two": second}))
    assert "study 'one', column 'patient'" in str(caught.value)
    assert "study 'two', column 'sample'" in str(caught.value)
    settings = config(tmp_path, {"one": study(1), "two": study(2)})
    for name in ("one", "two"):
        (tmp_path / f"{name}.h5ad").write_bytes(b"nothing")
    with pytest.raises(ReadError, match=r"(?s)study 'one'.*study 'two'"):
        run(settings)


def test_missing_label_columns_of_all_studies_come_at_once_with_what_there_is(tmp_path: Path) -> None:
    first, second = study(1), study(2)
    del first.obs["cell_type"], second.obs["cell_type"]
    with pytest.raises(SchemaError, match=r"(?s)study 'one'.*'cell_type'.*patient.*study 'two'.*'cell_type'"):
        run(config(tmp_path, {"one": first, "two": second}))
    assert leftovers(tmp_path) == []


def test_no_studies_and_a_missing_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ingest\.studies is empty"):
        run(Config())
    with pytest.raises(ReadError, match=r"'one': .*gone\.h5ad does not exist; correct ingest\.studies\.one\.path"):
        run(Config.parse({"output": tmp_path / "m", "ingest": {"studies": {"one": {"path": tmp_path / "gone.h5ad"}}}}))
    assert leftovers(tmp_path) == []


def test_the_verb_writes_the_store_and_nothing_else(world: World, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "out" / "model"))
    before = {name: sha256(world.folder / f"{name}.h5ad") for name in STUDIES}
    answer = carvae("ingest", path)
    assert (answer.code, answer.err) == (0, "")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.work"]
    assert "store.zarr" in [p.name for p in (tmp_path / "out" / "model.work").iterdir()]
    assert CellStore(tmp_path / "out" / "model.work" / "store.zarr").n_cells == 480
    assert {name: sha256(world.folder / f"{name}.h5ad") for name in STUDIES} == before
