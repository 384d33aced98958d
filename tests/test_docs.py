"""The README and the pages in docs/: every block of code runs, and what is written from the code is complete."""

from __future__ import annotations

import gzip
import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import yaml
from pages import Block, Session, blocks_of
from test_floors import FLOOR
from trained import World, carvae

import carvae as library

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# What lies in the reader's folder when a page begins.
LIES_THERE = {
    "README.md": ("data", "new.h5ad"),
    "annotate.md": ("new.h5ad", "runs/mine"),
    "journeys.md": ("reference.h5ad", "query.h5"),
    "ecosystem.md": ("data", "demo", "new.h5ad", "runs/mine"),
    "labels.md": ("data", "new.h5ad"),
    "train.md": ("data",),
    "results.md": ("new.h5ad", "runs/mine"),
    "tutorial.md": ("demo",),
}
# Blocks that do not run here, by page. A block more must be written here too.
NOT_RUN = {"README.md": 3, "ecosystem.md": 3, "install.md": 1, "journeys.md": 2, "train.md": 1, "tutorial.md": 1}
REASONS = ("a GPU", "a browser", "the network", "an installation", "minutes", "R;")


@pytest.fixture(scope="module")
def shelf(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a page may begin with."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "data").mkdir()
    smith = world.studies["sim_lymphoma"].copy()
    smith.obs["cell_type"] = np.where(np.arange(smith.n_obs) % 9, smith.obs["cell_type"].astype(str), "Unlabelled")
    _write(smith, folder / "data" / "smith2023.h5ad")
    jones = world.studies["sim_paediatric"]
    for sample in jones.obs["Sample"].unique():
        _write_10x(jones[jones.obs["Sample"] == sample], folder / "data" / "jones2024" / str(sample))
    smith.obs = smith.obs.rename(columns={"donor_id": "patient", "sample_id": "sample"})
    _write(smith, folder / "reference.h5ad")
    query = world.query.copy()
    _write_10x_h5(query, folder / "query.h5")
    query.obs["cell_type"] = query.obs["true_state"]
    _write(query, folder / "new.h5ad")
    shutil.copytree(world.bundle, folder / "runs" / "mine")
    (folder / "demo" / "studies").mkdir(parents=True)
    for study in world.folder.glob("*.h5ad"):
        shutil.copy(study, folder / "demo" / "studies")
    return folder


def _write(adata: ad.AnnData, path: Path) -> None:
    with ad.settings.override(allow_write_nullable_strings=False):
        adata.write_h5ad(path)


def _write_10x(adata: ad.AnnData, folder: Path) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(adata.X).T.astype(np.int64), field="integer")
    for name, lines in (
        ("features.tsv.gz", [f"{gene}\t{gene}\tGene Expression" for gene in adata.var_names]),
        ("barcodes.tsv.gz", list(adata.obs_names.str.removeprefix(f"{folder.name}_"))),
    ):
        with gzip.open(folder / name, "wt", encoding="utf-8") as text:
            text.write("\n".join(lines) + "\n")


def _write_10x_h5(adata: ad.AnnData, path: Path) -> None:
    """As Cell Ranger 3 writes it: a column per cell."""
    counts, names = sp.csr_matrix(adata.X), adata.var_names.to_numpy(str).astype("S")
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(counts, name).astype(np.int64)
        matrix["shape"] = np.array(counts.shape[::-1])
        matrix["barcodes"] = adata.obs_names.to_numpy(str).astype("S")
        for name, value in (("id", names), ("name", names), ("feature_type", np.full(names.size, b"Gene Expression"))):
            matrix[f"features/{name}"] = value


# What the libraries that a page goes on with are about to change is theirs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in blocks_of(page) if block.not_run is None]
    monkeypatch.chdir(tmp_path)
    for name in LIES_THERE.get(page.name, ()):
        copy = shutil.copytree if (shelf / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(shelf / name, tmp_path / name)
    session = Session(tmp_path)
    for block in blocks:
        try:
            session.run(block)
        except Exception as error:
            error.add_note(f"in the block at {page.name}:{block.line}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_are_not_run_are_counted_and_compile(page: Path) -> None:
    marked = [block for block in blocks_of(page) if block.not_run is not None]
    assert len(marked) == NOT_RUN.get(page.name, 0), [f"{page.name}:{block.line} {block.not_run}" for block in marked]
    for block in marked:
        assert block.not_run is not None
        assert block.not_run.startswith(REASONS), block.not_run
        if block.language == "python":
            compile(block.code, str(page), "exec")


def test_a_reader_who_meets_an_error_is_a_failure(tmp_path: Path) -> None:
    for language, code in (("python", "1 / 0"), ("bash", "carvae fly"), ("bash", "ls nowhere"), ("yaml", "a: [")):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
            Session(tmp_path).run(Block(language, code, 1, None))


def test_a_mark_holds_for_the_block_below_it_and_stands_nowhere_else(tmp_path: Path) -> None:
    page, block = tmp_path / "page.md", "```bash\nls\n```\n"
    page.write_text(f"<!-- not run: a GPU -->\n{block}\n{block}", encoding="utf-8")
    assert [found.not_run for found in blocks_of(page)] == ["a GPU", None]
    page.write_text(f"<!-- not run: a GPU -->\nWords.\n\n{block}", encoding="utf-8")
    with pytest.raises(AssertionError, match="does not stand above"):
        blocks_of(page)


@pytest.fixture(scope="module")
def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("written", DOCS / "written.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_has_every_option_that_help_prints(written: ModuleType) -> None:
    sections = dict(part.split("`\n", 1) for part in written.commands().split("### `")[1:])
    shown = carvae("--help").out
    verbs = re.findall(r"^\W*([a-z]+) {2,}\w", shown[shown.index("Commands") :], re.MULTILINE)
    assert {"train", "annotate", "demo"} < set(verbs)
    for verb in verbs:
        pages = {name: text for name, text in sections.items() if f"{name} ".startswith(f"carvae {verb} ")}
        assert pages, f"no section for {verb}"
        for name, text in pages.items():
            told = carvae(*name.split()[1:], "--help").out
            options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", told)) - {"--help"}
            assert options <= set(re.findall(r"--[a-z][a-z-]+", text)), f"{name}: {options}"


def _paths(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Section and key of every setting."""
    found = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found += _paths(value, f"{prefix}{key}.")
        else:
            found.append((prefix.rstrip(".") or "Top level", key))
    return found


def test_the_page_of_settings_has_every_key_of_the_reference(written: ModuleType) -> None:
    reference = yaml.safe_load((ROOT / "configs" / "reference.yaml").read_text(encoding="utf-8"))
    sections = dict(part.split("\n", 1) for part in written.settings().split("## ")[1:])
    sections = {title.strip("`"): text for title, text in sections.items()}
    assert len(_paths(reference)) > 50
    for section, key in _paths(reference):
        assert f"| `{key}` |" in sections[section], f"{section}.{key}"


def test_the_drawing_has_every_module_on_its_floor(written: ModuleType) -> None:
    assert written.read_floors() == FLOOR
    drawn = {}
    for floor in written.floors(FLOOR).split("<div class='floor'>")[1:]:
        level = re.search(r"class='level'>(\d+)<", floor)
        assert level is not None
        drawn |= dict.fromkeys(re.findall(r"<code>(\w+)(?:/|\.py)</code> \w", floor), int(level[1]))
    package = ROOT / "carvae"
    built = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert drawn == {name: level for name, level in FLOOR.items() if name in built - {"__main__"}}


def test_the_api_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in set(library.__all__) - {"__version__", "CarvaeError"}:
        assert f"carvae.{name}\n" in page, name
    assert "automodule:: carvae.errors" in page
