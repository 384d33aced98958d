"""Four small simulated studies, a model trained on three of them by the command line, and the command line itself.

The fourth study is never trained on: its patients are the query. It names some genes by old symbols and lacks a tenth.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import yaml

if TYPE_CHECKING:
    from anndata import AnnData

PROGRAMMES = {
    "naive-like": "CCR7 SELL LEF1 TCF7 IL7R KLF2 LRRN3 MAL ACTN1 CD27".split(),
    "central memory": "CCR7 IL7R CD28 CD27 GPR183 LTB ANXA1 FAS CXCR3 AQP3".split(),
    "effector/cytotoxic": "GZMB PRF1 GNLY NKG7 GZMH IFNG FGFBP2 CX3CR1 TBX21 KLRG1".split(),
    "terminally exhausted": "HAVCR2 ENTPD1 LAG3 PDCD1 CTLA4 TOX LAYN CXCL13 TNFRSF9 TIGIT".split(),
    "regulatory": "FOXP3 IL2RA CTLA4 IKZF2 CCR4 TNFRSF4 TNFRSF18 BATF CCR8 RTKN2".split(),
}
QUERY = "sim_myeloma"
STUDIES: dict[str, dict[str, Any]] = {
    "sim_lymphoma": {  # symbols, every cell labelled
        "obs": {"patient": "donor_id", "sample": "sample_id", "timepoint_days": "day", "response": "outcome"},
        "label": "cell_type",
        "mapping": "demo_lymphoma",
    },
    "sim_leukaemia": {  # Ensembl ids, log-normalised X with counts in a layer, coarse labels
        "obs": {"patient": "patient", "sample": "orig.ident", "timepoint_days": "days", "response": "BOR"},
        "label": "annotation",
        "mapping": "demo_leukaemia",
    },
    "sim_paediatric": {  # shallow, no labels
        "obs": {"patient": "PatientID", "sample": "Sample", "timepoint_days": "Day", "response": "Response"},
    },
}


@dataclass(frozen=True, slots=True)
class World:
    """What the end-to-end tests share; none of them changes it."""

    folder: Path
    studies: dict[str, AnnData]
    query: AnnData
    query_path: Path
    config: Path
    bundle: Path


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def carvae(*arguments: object) -> Answer:
    """Run ``carvae ARGUMENTS`` in this process, through the entry point of the console script."""
    from carvae.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["carvae", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


def settings(folder: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config of the three training studies in ``folder``, small enough to train in seconds."""
    config: dict[str, Any] = {
        "output": str(output),
        "ingest": {
            "n_top_genes": 5000,  # all that are allowed
            "studies": {name: study | {"path": str(folder / f"{name}.h5ad")} for name, study in STUDIES.items()},
        },
        "labels": {"tree": "tree"},
        "model": {"n_latent": 16, "n_hidden": 64},
        "train": {"wandb": "disabled", "accelerator": "cpu", "batch_size": 64, "min_steps": 150, "gene_dropout": 0.8},
    }
    for section, changed in sections.items():
        config[section] = config.get(section, {}) | changed
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a config as YAML; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def sha256(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def build_world(folder: Path) -> World:
    """Simulate, write, and train through the command line."""
    import numpy as np

    from carvae.data.simulate import SimulationSettings, simulate_studies, write_studies

    studies = simulate_studies(np.random.default_rng(0), PROGRAMMES, SimulationSettings(n_cells=160, batch_effect=0.4))
    write_studies(studies, folder)
    by_name = {study.uns["title"]: study for study in studies}
    config = write_config(folder / "config.yaml", settings(folder, folder / "model"))
    answer = carvae("train", config)
    assert answer.code == 0, answer.err
    return World(folder, by_name, by_name[QUERY], folder / f"{QUERY}.h5ad", config, folder / "model")
