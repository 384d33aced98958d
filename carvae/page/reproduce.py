"""Section 11: how to get the same again, and what to write in a paper."""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from carvae import __version__
from carvae.config import PredictConfig
from carvae.page.blocks import Block, Code, Pairs, Section, Text
from carvae.page.facts import Facts, several
from carvae.page.layout import UMAP

LIBRARIES = ("anndata", "matplotlib", "numpy", "pandas", "scikit-learn", "scipy", "scvi-tools", "torch", "umap-learn")
CITATIONS = {
    "scvi": "Lopez R et al. Deep generative modeling for single-cell transcriptomics. Nat Methods 15:1053 (2018). "
    "doi:10.1038/s41592-018-0229-2",
    "ucell": "Andreatta M, Carmona SJ. UCell: robust and scalable single-cell gene signature scoring. Comput Struct "
    "Biotechnol J 19:3796 (2021). doi:10.1016/j.csbj.2021.06.043",
    "umap": "McInnes L, Healy J, Melville J. UMAP: uniform manifold approximation and projection for dimension "
    "reduction. arXiv:1802.03426 (2018)",
    "anndata": "Virshup I et al. The scverse project provides a computational ecosystem for single-cell omics data "
    "analysis. Nat Biotechnol 41:604 (2023). doi:10.1038/s41587-023-01733-8",
    "conformal": "Romano Y, Sesia M, Candès EJ. Classification with valid and adaptive coverage. NeurIPS (2020). "
    "arXiv:2006.02544",
    "energy": "Liu W et al. Energy-based out-of-distribution detection. NeurIPS (2020). arXiv:2010.03759",
    "scirpy": "Sturm G et al. Scirpy: a Scanpy extension for analyzing single-cell T-cell receptor-sequencing data. "
    "Bioinformatics 36:4817 (2020). doi:10.1093/bioinformatics/btaa611",
}


def section(facts: Facts) -> Section:
    """Commands, versions, hashes, and a paragraph of methods."""
    made = facts.cells.made
    pairs = [
        ("annotated file", f"{facts.cells.path.name}, SHA-256 {facts.cells.sha256}"),
        ("model", f"bundle {made['bundle_id']} (start of the hash of its model.json)"),
        (
            "carvae",
            f"{__version__} wrote this page, {made['carvae_version']} annotated, {made['trained_with']} trained",
        ),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("libraries", ", ".join(f"{name} {version_of(name)}" for name in LIBRARIES)),
        ("seeds", f"{made['seed']} in training, {facts.seed} for this page"),
    ]
    blocks: list[Block] = [
        Code("Commands", _commands(facts)),
        Pairs(tuple(pairs)),
        Text("A paragraph for the methods of a paper; check it against what you did."),
        Code("Methods", methods(facts)),
        Code("References", references(facts)),
    ]
    return Section("reproduce", "Reproduce", tuple(blocks))


def references(facts: Facts) -> str:
    """The works that the methods rest on, numbered."""
    return "\n".join(f"{i}. {CITATIONS[key]}" for i, key in enumerate(_cited(facts), 1))


def version_of(library: str) -> str:
    """Of an installed library; says so where it is not."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _commands(facts: Facts) -> str:
    """The annotation with the settings that differ from the defaults, and this report."""
    default = PredictConfig().model_dump(mode="json")
    changed = [f"predict.{name}={_value(value)}" for name, value in _changed(facts.cells.settings, default)]
    words = ["carvae", "annotate", "QUERY", "--model", "BUNDLE", "--out", facts.cells.path.name, *changed]
    return "\n".join(
        (
            f"# QUERY is your file of counts; BUNDLE is the folder of model {facts.cells.made['bundle_id']}",
            shlex.join(words),
            facts.command,
        )
    )


def _changed(settings: dict[str, Any], default: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _changed(value, default.get(name, {}), f"{prefix}{name}.")
        elif value != default.get(name):
            found.append((prefix + name, value))
    return found


def _value(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _cited(facts: Facts) -> list[str]:
    """The works that the methods rest on, in the order of their numbers."""
    used = ["scvi", "anndata"]
    if "carvae_novelty" in facts.cells.obs:
        used.append("energy")
    if "carvae_set" in facts.cells.obs:
        used.append("conformal")
    if len(facts.cells.scores.columns):
        used.append("ucell")
    if UMAP in facts.layout.places:
        used.append("umap")
    if "clones" in facts.cells.made:
        used.append("scirpy")
    return used


def methods(facts: Facts) -> str:
    """The paragraph, with the run's own numbers."""
    cells, cited = facts.cells, _cited(facts)
    number = {key: f"[{i}]" for i, key in enumerate(cited, 1)}
    matched, obs = cells.receipt, cells.obs
    said = [
        f"Cell states of {cells.n_cells:,} cells from {several(len(cells.sample_names), 'sample')} were assigned "
        "with carvae "
        f"{cells.made['carvae_version']} and the model {cells.made['bundle_id']} without retraining. carvae embeds "
        "raw counts "
        f"by the encoder of a variational autoencoder with the likelihood of scVI {number['scvi']}, which is given "
        "no batch, "
        f"and labels each cell by a classifier over {several(len(cells.states), 'state')}; {matched['matched']:,} of "
        "the "
        f"model's {matched['n_panel']:,} genes were measured.",
    ]
    least = cells.settings["min_counts"]
    unknown = f"Cells with fewer than {least} counts over these genes"
    if "energy" in number:
        unknown += (
            " or stranger than the model allows for, judged by energy "
            f"{number['energy']}, distance, reconstruction and lineage genes against held-out patients,"
        )
    said.append(f"{unknown} were called unknown ({int(facts.unknown_N.sum()):,} cells).")
    if "conformal" in number:
        said.append(
            f"Sets of states with coverage {cells.settings['coverage']} are conformal, calibrated on held-out patients "
            f"{number['conformal']}."
        )
    if "ucell" in number:
        said.append(f"Signatures were scored by ranks {number['ucell']}.")
    said.append("Intervals of composition are Dirichlet-multinomial.")
    if "clone_id" in obs:
        said.append(
            f"Clones were told within the {'patient' if 'patient' in obs else 'sample'}"
            + (f" from receptors {number['scirpy']}." if "scirpy" in number else ".")
        )
    if "umap" in number:
        said.append(
            f"The map is UMAP of the latent coordinates (umap-learn {version_of('umap-learn')}) {number['umap']}."
        )
    said.append(f"Data were kept as AnnData {number['anndata']}.")
    return " ".join(said)
