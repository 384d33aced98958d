"""Results open elsewhere without repair: scanpy, CELLxGENE, R, scvi-tools, pipelines; the page of docs is run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
import zarr
from matplotlib.colors import to_hex
from trained import World, carvae

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ecosystem.md"
PIPELINES = ROOT / "docs" / "pipelines"


def block(section: str, language: str) -> str:
    """The first block of a section of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}", 1)[1]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the page assumes it: A.h5ad with its tables, and the model in runs/mine."""
    place = tmp_path_factory.mktemp("doors")
    (place / "runs").mkdir()
    shutil.copytree(world.bundle, place / "runs" / "mine")
    answer = carvae("annotate", world.query_path, "--model", place / "runs" / "mine", "--out", place / "A.h5ad")
    assert answer.code == 0, answer.err
    return place


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # scanpy's, of matplotlib
def test_scanpy_draws_states_in_their_colours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(folder)
    space: dict[str, object] = {}
    exec(block("scanpy", "python"), space)
    adata = space["adata"]
    assert isinstance(adata, ad.AnnData)
    states = adata.obs["carvae_state"].cat.categories
    colours = dict(zip(states, adata.uns["carvae_state_colors"], strict=True))
    assert colours["unknown"] == "#B5B5B5"
    assert len(set(colours.values())) == len(colours)
    axes = next(axes for axes in plt.gcf().axes if axes.get_title() == "carvae_state")
    shown = {text.get_text(): to_hex(handle.get_facecolor()[0]) for text, handle in zip(
        axes.get_legend().get_texts(), axes.get_legend().legend_handles, strict=True
    )}  # fmt: skip
    plt.close("all")
    assert shown
    assert all(colours[state].lower() == colour for state, colour in shown.items())
    assert ad.read_h5ad(folder / "A.umap.h5ad").obsm["X_umap"].shape == (adata.n_obs, 2)


def test_what_cellxgene_asks_of_a_file(folder: Path) -> None:
    # https://github.com/chanzuckerberg/single-cell-curation, schema 5: obs, obsm and uns
    adata = ad.read_h5ad(folder / "A.h5ad")
    embeddings = [key for key in adata.obsm if re.fullmatch(r"X_[a-zA-Z][a-zA-Z0-9_.-]*", key)]
    assert embeddings == ["X_carvae"]
    for key, values in adata.obsm.items():
        assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.-]*", key)
        assert values.ndim == 2
        assert np.issubdtype(values.dtype, np.floating)
        assert np.isfinite(values).all()
    own = [column for column in adata.obs if str(column).startswith("carvae_")]
    for column in own:
        values = adata.obs[column]
        assert isinstance(values.dtype, pd.CategoricalDtype) or np.issubdtype(values.dtype, np.number)
        assert "score_type2" in column or not values.isna().any(), column  # genes that the query lacks
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    for key in (key for key in adata.uns if key.endswith("_colors")):
        values = adata.obs[key.removesuffix("_colors")]
        assert len(adata.uns[key]) == len(values.cat.categories)
        assert all(re.fullmatch(r"#[0-9A-F]{6}", colour) for colour in adata.uns[key])


def encodings(node: h5py.Group | zarr.Group, path: str = "") -> dict[str, str]:
    """Place -> how anndata wrote it, of everything in a file."""
    found = {}
    for name in node:
        child = node[name]
        found[f"{path}/{name}"] = str(child.attrs.get("encoding-type", ""))
        if isinstance(child, h5py.Group | zarr.Group):
            found |= encodings(child, f"{path}/{name}")
    return found


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_text_is_stored_so_that_r_reads_it(world: World, tmp_path: Path, ending: str) -> None:
    modern = world.query.copy()
    modern.obs["note"] = pd.array(["a", None] * (modern.n_obs // 2), dtype="string")  # a nullable string
    modern.obs.index = pd.Index(modern.obs.index.astype("string"))
    with ad.settings.override(allow_write_nullable_strings=True):
        modern.write_h5ad(tmp_path / "q.h5ad")
    out = tmp_path / f"A.{ending}"
    assert carvae("annotate", tmp_path / "q.h5ad", "--model", world.bundle, "--out", out).code == 0
    if ending == "zarr":
        found = encodings(zarr.open_group(out, mode="r"))
    else:
        with h5py.File(out) as file:
            found = encodings(file)
    obs = {place: kind for place, kind in found.items() if place.startswith(("/obs/", "/uns/"))}
    assert not [place for place, kind in obs.items() if kind.startswith("nullable")]
    assert found["/obs/carvae_state"] == "categorical"
    assert found["/obs/carvae_state/categories"] == "string-array"
    assert found["/obs/note"] == "categorical"
    assert found["/uns/carvae_state_colors"] == "string-array"


def test_seurat_takes_it(folder: Path) -> None:
    needs = ["Rscript", "-e", "for (p in c('hdf5r', 'Seurat')) stopifnot(requireNamespace(p, quietly = TRUE))"]
    if not shutil.which("Rscript") or subprocess.run(needs, capture_output=True, check=False).returncode:
        pytest.skip("R with hdf5r and Seurat is not here")
    sizes = 'dim(seurat), sum(GetAssayData(seurat, layer = "counts")), dim(Embeddings(seurat, "carvae"))'
    (folder / "run.R").write_text("\n".join([block("R and Seurat", "r"), f"cat({sizes})"]), encoding="utf-8")
    done = subprocess.run(["Rscript", "run.R"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    adata = ad.read_h5ad(folder / "A.h5ad")
    n_genes, n_cells, total, rows, latent = map(float, done.stdout.split()[-5:])
    assert (n_cells, n_genes, total) == (adata.n_obs, adata.n_vars, adata.X.sum())
    assert (rows, latent) == adata.obsm["X_carvae"].shape
    assert adata.obs["carvae_state"].value_counts().index[0].split()[0] in done.stdout


def test_scvi_tools_tells_which_genes_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    space: dict[str, object] = {}
    exec(block("scvi-tools", "python"), space)
    genes, adata = space["genes"], space["adata"]
    assert isinstance(genes, pd.DataFrame)
    assert isinstance(adata, ad.AnnData)
    assert np.isfinite(genes["lfc_mean"]).all()
    # an independent answer: the raw means of the same cells
    first, second = (adata.obs["carvae_state"] == space[name] for name in ("first", "second"))
    known = [gene for gene in genes.index if gene in adata.var_names]
    share = (adata.X / adata.X.sum(1)).tocsr() if hasattr(adata.X, "tocsr") else adata.X
    share = pd.DataFrame.sparse.from_spmatrix(share, columns=adata.var_names).sparse.to_dense()
    raw = (share[first.to_numpy()].mean() - share[second.to_numpy()].mean())[known]
    top = raw.abs().nlargest(30).index
    assert (np.sign(genes.loc[top, "lfc_mean"]) == np.sign(raw[top])).mean() > 0.8


# pipelines


def commands(text: str) -> list[list[str]]:
    """The command lines of carvae in a workflow: verb, and the long options."""
    joined = re.sub(r'"\s*\n\s*"|\\+\n', " ", text)
    found = re.findall(r"carvae (annotate|compare|check) ([^\n]*)", joined)
    return [[verb, *re.findall(r"--[a-z-]+", rest)] for verb, rest in found]


@pytest.mark.parametrize("name", ["snakemake/Snakefile", "nextflow/main.nf"])
def test_a_workflow_uses_options_that_exist(name: str) -> None:
    text = (PIPELINES / name).read_text(encoding="utf-8")
    code = re.sub(r"^\s*(#|//).*$", "", text, flags=re.MULTILINE)
    assert [code.count(c) for c in "([{"] == [code.count(c) for c in ")]}"]
    lines = commands(code)
    assert lines
    for verb, *options in lines:
        known = carvae(verb, "--help").out
        assert options
        assert not [option for option in options if option not in known]


def test_the_workflow_of_snakemake_lints_and_plans(folder: Path, tmp_path: Path) -> None:
    if not (snakemake := shutil.which("snakemake")):
        pytest.skip("snakemake is not here")
    shutil.copytree(PIPELINES / "snakemake", tmp_path / "flow")
    config = yaml.safe_load((tmp_path / "flow" / "config.yaml").read_text(encoding="utf-8"))
    config |= {"model": str(folder / "runs" / "mine"), "reference": str(folder / "A.samples.csv")}
    config |= {"gate": str(ROOT / "configs" / "gates" / "release.yaml"), "queries": {"lot": str(folder / "A.h5ad")}}
    (tmp_path / "flow" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for more in (["--lint"], ["--dry-run", "--cores", "1"]):
        done = subprocess.run([snakemake, *more], cwd=tmp_path / "flow", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_of_instructions_and_names_what_is_there() -> None:
    text = re.sub(r"\\\n", " ", (PIPELINES / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in lines} <= known
    assert lines[0].startswith("FROM python:3.")
    assert [line for line in lines if line.startswith("ENTRYPOINT")] == ['ENTRYPOINT ["carvae"]']
    order = [line.split()[0] for line in lines]
    assert order.index("USER") < order.index("ENTRYPOINT")  # not as root
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]\"", text):
        assert f"\n{extra} = [" in project
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
