from __future__ import annotations

import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from carvae.config import Config, StudyConfig, label_file, packaged
from carvae.errors import ConfigError
from carvae.section import Section

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = packaged("reference.yaml")
PRINTED = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12)
CONFIGS = sorted(REFERENCE.parent.glob("*.yaml"))


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def test_reference_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "reference_yaml.py"))["render"]()
    assert REFERENCE.read_text(encoding="utf-8") == written, "run: python scripts/reference_yaml.py"


def test_reference_names_every_key_with_its_default_and_a_comment() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    settings = flat(yaml.safe_load(text))
    assert set(settings) == set(keys(Config))
    assert Config.read(REFERENCE) == Config()
    lines = text.splitlines()
    for name in {key.split(".")[-1] for key in settings}:
        above = [lines[i - 1].strip() for i, line in enumerate(lines) if line.strip().startswith(f"{name}:")]
        assert above, name
        assert all(line.startswith("#") for line in above), name


def test_reference_shows_every_key_of_a_study() -> None:
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "# studies:")
    end = next(i for i, line in enumerate(lines) if line.strip() == "studies: {}")
    example = yaml.safe_load("\n".join(line.replace("  # ", "", 1) for line in lines[start:end]))
    study = example["studies"]["my_study"]
    assert set(study) == set(StudyConfig.model_fields)
    assert StudyConfig(**study) == StudyConfig(path=Path(study["path"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_packaged_config_is_valid_and_names_label_files_that_exist(path: Path) -> None:
    config = Config.read(path)
    assert "output" in yaml.safe_load(path.read_text(encoding="utf-8"))
    assert label_file(config.labels.signatures).is_file()
    assert config.labels.tree == "flat" or label_file(config.labels.tree).is_file()
    for study in config.ingest.studies.values():
        assert study.mapping is None or label_file(study.mapping).is_file()


def test_the_promised_configs_are_there() -> None:
    promised = {"demo", "carpall", "carpall_tree", "pbmc", "reference"}
    assert promised <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {max_epoch: 5}", ["train.max_epoch is not a key", "'max_epochs'"]),
        ("trian: {max_epochs: 5}", ["trian is not a key", "'train'"]),
        ("ingest: {studies: {a: {path: x, lable: y}}}", ["ingest.studies.a.lable", "'label'"]),
        ("train: {max_epoch: 5}\nmodel: {latent: 3}", ["2 problems", "'max_epochs'", "'n_latent'"]),
        ("train: {max_epochs: many}", ["train.max_epochs", "integer"]),
        ("train: {lr: 0}", ["train.lr", "greater than 0"]),
        ("train: {precision: half}", ["train.precision", "'32-true'", "'bf16-mixed'"]),
        ("ingest: {studies: {a: {label: x}}}", ["ingest.studies.a.path", "required"]),
        ("model: {covariates: [patient, sample]}", ["covariates", "'patient'"]),
        ("- train", ["must hold", "list"]),
        ("train: [", ["cannot be read as YAML"]),
    ],
)
def test_wrong_settings_are_refused_by_name(text: str, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Config.read(path)
    assert str(path) in str(caught.value) or "is a value" in str(caught.value)
    for part in named:
        assert part in str(caught.value), caught.value


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist; see configs/reference\.yaml"):
        Config.read(tmp_path / "nowhere.yaml")


def test_an_empty_config_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing differs\n", encoding="utf-8")
    assert Config.read(path) == Config() == Config.parse_overrides([])


def test_overrides_win_over_the_file_and_keep_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("output: runs/mine\ntrain: {max_epochs: 5, lr: 0.01}\n", encoding="utf-8")
    config = Config.read(
        path, ["train.max_epochs=7", "ingest.studies.a.path=x.h5ad", "model.covariates=[study, sample]", "seed=3"]
    )
    assert (config.train.max_epochs, config.train.lr, config.output, config.seed) == (7, 0.01, Path("runs/mine"), 3)
    assert config.ingest.studies["a"].path == Path("x.h5ad")
    assert config.model.covariates == ("study", "sample")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_epochs", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("train.max_epoch=3", "the nearest is 'max_epochs'"),
        ("seed.deep=3", "'seed' is a value, not a section"),
        ("train.lr=[", "cannot be read as YAML"),
    ],
)
def test_wrong_overrides_are_refused(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Config.read(path, [override])


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("ingest:\n  studies:\n    a: {path: x}\n    b: {path: y}\n    a: {path: z}\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml says things twice \(2 problems\)") as error:
        Config.read(path)
    assert "'seed' occurs 2 times in the block at line 1" in str(error.value)
    assert "'a' occurs 2 times in the block at line 3" in str(error.value)


def test_names_in_a_config_are_text_and_merged_blocks_stay(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    one, no, both = "2024.10: &one {path: x, label: mine}", "no: {path: y}", "b: {<<: *one, path: z}"
    path.write_text(f"ingest:\n  studies:\n    {one}\n    {no}\n    {both}\n")
    studies = Config.read(path).ingest.studies
    assert list(studies) == ["2024.10", "no", "b"]
    assert (studies["b"].path, studies["b"].label) == (Path("z"), "mine")


def test_numbers_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: .* finite number"):
        Config.parse_overrides(["train.lr=1e400"])


def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    twice = ["seed=1", "predict.coverage=0.9", "predict.coverage=0.8"]
    with pytest.raises(ConfigError, match=r"predict\.coverage is given more than once; give each setting once"):
        Config.parse_overrides(twice)


def test_threads_without_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"predict\.threads: .* less than or equal to 1024"):
        Config.parse_overrides(["predict.threads=100000"])


def test_a_config_is_frozen_at_every_depth() -> None:
    config = Config.parse({"ingest": {"studies": {"a": {"path": "x"}}}})
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.ingest.studies["a"].label = "x"


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(1e-6, 1.0),
    study=st.dictionaries(st.sampled_from(["patient", "sample", "tissue"]), PRINTED),
    missing=st.lists(PRINTED, max_size=3),
)
def test_the_saved_config_is_the_config(seed: int, lr: float, study: dict[str, str], missing: list[str]) -> None:
    settings = {
        "seed": seed,
        "train": {"lr": lr},
        "ingest": {"studies": {"a b": {"path": "x y.h5ad", "obs": study, "missing_labels": missing}}},
    }
    config = Config.parse(settings)
    assert Config.parse(yaml.safe_load(config.to_yaml())) == config


def test_packaged_files_are_found_and_others_named() -> None:
    assert packaged("labels/tree.yaml").is_file()
    assert label_file("signatures") == packaged("labels/signatures.yaml")
    with pytest.raises(ConfigError, match=r"no packaged file 'labels/tre\.yaml'.*carpall.*tree"):
        label_file("tre")
    with pytest.raises(ConfigError, match="does not exist"):
        label_file("nowhere/tree.yaml")


def test_a_label_file_of_ones_own_is_taken_by_path(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text(textwrap.dedent("name: mine"), encoding="utf-8")
    assert label_file(str(path)) == path


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config.parse_overrides(["output=~/runs/one", "ingest.studies.a.path=~/a.h5ad", "respond.table=~/t.csv"])
    assert config.output == tmp_path / "runs" / "one"
    assert config.ingest.studies["a"].path == tmp_path / "a.h5ad"
    assert config.respond.table == tmp_path / "t.csv"
    assert Config.parse_overrides(["output=runs/a~b"]).output == Path("runs/a~b")
    (tmp_path / "tree.yaml").touch()
    assert label_file("~/tree.yaml") == tmp_path / "tree.yaml"
