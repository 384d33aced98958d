from __future__ import annotations

import html
import logging
import struct
from pathlib import Path

import pandas as pd
import pytest

from carvae import demo
from carvae.config import Config, label_file, packaged
from carvae.data.simulate import STUDIES, UNLABELLED, StudyDesign
from carvae.errors import ConfigError
from carvae.labels.tree import LabelTree, Mapping

TREE = LabelTree.read(packaged("labels/tree.yaml"))
CONFIG = Config.read(packaged("demo.yaml"))
LABELLED = [design for design in STUDIES if design.label is not None and design.name != demo.QUERY]
PLOTS = ["umap_query", "umap_state", "umap_study", "confusion", "composition", "signatures", "loss"]


def test_the_config_trains_on_every_study_but_the_query() -> None:
    names = {design.name for design in STUDIES}
    assert set(CONFIG.ingest.studies) == names - {demo.QUERY}
    assert demo.QUERY in names
    for design in STUDIES:
        if design.name != demo.QUERY:
            study = CONFIG.ingest.studies[design.name]
            assert study.obs == dict(design.columns)
            assert study.label == design.label
            assert study.path == Path("demo/studies") / f"{design.name}.h5ad"


def test_one_study_without_labels_helps_in_training_and_two_have_some() -> None:
    labels = [study.label for study in CONFIG.ingest.studies.values()]
    assert labels.count(None) == 1
    assert len(LABELLED) == 2


@pytest.mark.parametrize("design", LABELLED, ids=lambda design: design.name)
def test_mappings_allow_the_planted_state_of_every_word(design: StudyDesign) -> None:
    name = CONFIG.ingest.studies[design.name].mapping
    assert name is not None
    mapping = Mapping.read(label_file(name))
    assert not mapping.problems(TREE)
    axis = TREE["state"]
    planted = demo.programmes()
    said = set()
    for state in planted:
        word = design.vocabulary.get(state, state)
        said.add(word)
        allowed = {axis.leaves[i] for node in mapping.labels[word]["state"] for i in axis.nodes[node]}
        assert allowed == {s for s in planted if design.vocabulary.get(s, s) == word}, word
    if design.cycling_label is not None:
        assert mapping.labels[design.cycling_label] == {"cycling": ("cycling",)}
        said.add(design.cycling_label)
    assert set(mapping.labels) == said
    assert UNLABELLED not in mapping.labels


def test_programmes_are_leaves_of_the_tree_with_genes_of_their_own() -> None:
    programmes = demo.programmes()
    assert set(programmes) <= set(TREE.names("state"))
    assert all(len(set(genes)) == len(genes) >= 5 for genes in programmes.values())
    assert len({frozenset(genes) for genes in programmes.values()}) == len(programmes)


@pytest.mark.parametrize("name", ["demo", "a: b #c", "{x}", "ü, 'q' \"r\"", "123", "null"])
def test_the_config_follows_the_folder_whatever_its_name(name: str) -> None:
    config = demo.read_config(Path(name))
    assert config.output == Path(name) / "model"
    assert {study.path.parent for study in config.ingest.studies.values()} == {Path(name) / "studies"}
    assert config.model_copy(update={"output": CONFIG.output, "ingest": CONFIG.ingest}) == CONFIG


def labelled(truth: list[str], called: list[str]) -> demo.Labelled:
    obs = pd.DataFrame({"true_state": truth, "carvae_state": called, "library_id": f"{demo.QUERY}_P1"})
    return demo.Labelled(obs, pd.DataFrame(), {}, ("a", "b"))


def test_scores_count_unknown_as_wrong_and_average_over_planted_states() -> None:
    query = labelled(["a", "a", "a", "b"], ["a", "a", "unknown", "b"])
    assert query.accuracy == 0.75
    # F1 of a: precision 1, recall 2/3; of b: 1
    assert query.macro_f1 == pytest.approx((0.8 + 1.0) / 2)


def test_a_state_that_is_called_but_not_planted_is_no_class_of_the_mean() -> None:
    assert labelled(["a", "a"], ["a", "b"]).macro_f1 == pytest.approx(2 / 3)


def test_composition_has_called_and_planted_in_neighbouring_rows() -> None:
    table = demo._composition(labelled(["a", "a", "b"], ["a", "unknown", "b"]))
    assert list(table.index) == ["P1, called", "P1, planted"]
    assert table.loc["P1, called"].to_dict() == {"a": 1, "b": 1, "unknown": 1}
    assert table.loc["P1, planted"].to_dict() == {"a": 2, "b": 1, "unknown": 0}


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file; demo writes its tables"):
        demo.run(tmp_path / "demo")
    assert (tmp_path / "demo").read_text(encoding="utf-8") == "mine"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of seconds: few cells, few steps."""
    read = demo.read_config

    def quick(out: Path) -> Config:
        config = read(out)
        train = config.train.model_copy(update={"min_steps": 0, "max_epochs": 2})
        return config.model_copy(update={"train": train})

    monkeypatch.setattr(demo, "N_CELLS", 120)
    monkeypatch.setattr(demo, "read_config", quick)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_demo_writes_its_page_and_can_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my demo"
    with caplog.at_level(logging.INFO, logger="carvae"):
        page = demo.run(out)
    assert page == out / "index.html"
    written = html.unescape(page.read_text(encoding="utf-8"))
    for plot in PLOTS:
        assert f'src="{plot}.png"' in written
        png = (out / f"{plot}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">I", png[16:20]) == (1200,)
    query = demo._read_labelled(out / f"{demo.QUERY}_annotated.h5ad")
    assert len(query.obs) == 120
    assert f"{query.accuracy:.1%}" in written
    steps = [record.getMessage() for record in caplog.records if record.name == "carvae.demo"]
    assert [step[:5] for step in steps[:6]] == [f"[{i}/6]" for i in range(1, 7)]
    assert f'href="{demo.REPORT}"' in written
    assert "carvae report" in (out / demo.REPORT).read_text(encoding="utf-8")
    assert f"accuracy {query.accuracy:.3f}, macro-F1 {query.macro_f1:.3f}" in steps[-1]
    listed = {path.name for path in out.iterdir()}
    table = {"studies", "model", "model.work", *(f"{demo.QUERY}_annotated.{end}" for end in demo.ENDINGS)}
    assert listed == table | {f"{plot}.png" for plot in PLOTS} | {"index.html", demo.REPORT}
    assert all(name in written for name in table)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(out)
    assert not page.exists()
    assert {path.name for path in out.iterdir()} == listed - {"index.html"}
