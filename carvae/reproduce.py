"""Make an output again from what it carries, and say whether it is the same.

A model is trained again by the config in its ``.work`` folder; an annotated file is labelled again by its model, with
the settings that it carries, from the counts that it still holds. Both happen in a temporary place.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae import __version__
from carvae.config import Config, PredictConfig
from carvae.data.atomic import scratch_folder
from carvae.data.store import CellStore
from carvae.errors import ConfigError
from carvae.ingest import store_path, work_folder
from carvae.model.bundle import Bundle, load
from carvae.model.cell_clones import Asked
from carvae.page.annotated import Annotated, read_annotated
from carvae.page.reproduce import version_of
from carvae.predict import run as annotate
from carvae.section_patient import ClonesConfig
from carvae.train import run as train

log = logging.getLogger(__name__)

SAME_LABELS = 0.999
"""Share of the cells whose states agree in outputs that are the same but for rounding (other threads, other device)."""
SAME_LATENT = 1e-3
"""Largest difference of a latent coordinate in such outputs, in standard deviations of that coordinate."""
CELLS = 5000
"""Training cells by which two models are compared."""


@dataclass(frozen=True, slots=True)
class Reproduced:
    """An output beside the same made again."""

    what: str
    identical: bool
    """To the last bit."""
    labels: float
    """Share of cells with the same state on the axis where it is least; 1 for models without labels."""
    latent: float
    """Largest difference of a latent coordinate, in its standard deviations."""
    differs: tuple[str, ...]
    """What was not the same to begin with: versions, input."""

    @property
    def same(self) -> bool:
        """Whether it is the same output but for rounding."""
        return self.identical or (self.labels >= SAME_LABELS and self.latent <= SAME_LATENT)

    def sentence(self) -> str:
        """The verdict for a person."""
        why = f"; what differs: {', '.join(self.differs)}" if self.differs else ""
        if self.identical:
            return f"{self.what} was made again, identical to the last bit{why}"
        told = (
            f"states agree in {self.labels:.2%} of the cells, latent coordinates to {self.latent:.1g} of their spread"
        )
        verdict = "the same but for rounding" if self.same else "NOT the same"
        return f"{self.what} was made again and is {verdict}: {told}{why or '; nothing that is recorded differs'}"


def run(output: Path, model: Path | None = None, query: Path | None = None) -> Reproduced:
    """Make ``output`` again in a temporary place and compare; nothing is changed.

    Parameters
    ----------
    output
        A model, or an ``.h5ad`` or ``.zarr`` that `carvae annotate` wrote.
    model
        The model that labelled the file.
    query
        What was labelled, where the file's own counts are not wanted.

    Raises
    ------
    CarvaeError
        The output does not carry what it takes, or its input is gone.
    """
    if (output / "model.json").is_file():
        if model is not None or query is not None:
            raise ConfigError("--model and --query are for an annotated file; a model is made again by its own config")
        return _model(output)
    if not output.exists():
        raise ConfigError(f"{output} does not exist; give a model, or an .h5ad or .zarr that `carvae annotate` wrote")
    if output.is_dir() and output.suffix != ".zarr":
        raise ConfigError(f"{output} is a folder, and no model (no model.json in it) nor an annotated .zarr")
    if model is None:
        raise ConfigError(f"give --model, the model that labelled {output}; a file does not hold its model")
    return _annotated(output, model, query)


def _model(output: Path) -> Reproduced:
    bundle = load(output, "cpu")
    if not bundle.decodes:
        raise ConfigError(f"{output} was shared without its decoder; give the whole model that it was made of")
    saved = work_folder(output) / "config.yaml"
    if not saved.is_file():
        raise ConfigError(
            f"{saved} is not there, and a model does not hold the places of its studies; give the model where it was "
            "trained, or train with the same config"
        )
    place = _place(Config.read(saved), output)
    with scratch_folder() as folder:
        again = folder / output.name
        config = Config.read(saved, [f"output={again}", "train.wandb=disabled", "train.map_every=0"])
        with chdir(place):
            train(config)
        made = load(again, "cpu")
        rows = np.random.default_rng(0).permutation(made.provenance.n_cells)[:CELLS]
        labels, latent = _compared(bundle, made, CellStore(store_path(again)), np.sort(rows))
    differs = _versions(bundle.provenance.carvae_version, bundle.provenance.libraries)
    if bundle.provenance.data_fingerprint != made.provenance.data_fingerprint:
        differs.append("the studies are not those that it was trained on (other cells, counts or columns)")
    return Reproduced(str(output), bundle.bundle_id == made.bundle_id, labels, latent, tuple(differs))


def _place(saved: Config, output: Path) -> Path:
    """The folder that the places in a model's config are relative to: this one, or where the model was trained.

    That folder is known where the config names its output by a relative place, since the model lies there.

    Raises
    ------
    ConfigError
        No folder that is tried holds the studies.
    """
    paths = [study.path for study in saved.ingest.studies.values() if not study.path.is_absolute()]
    tried = [Path.cwd()]
    own, model = Path(os.path.normpath(saved.output)).parts, output.resolve()
    if own == model.parts[-len(own) :]:
        tried.append(Path(*model.parts[: -len(own)]))
    for folder in tried:
        if all((folder / path).exists() for path in paths):
            return folder
    gone = next(path for path in paths if not (tried[-1] / path).exists())
    raise ConfigError(
        f"the model was trained on {gone}, which is not found from {' or '.join(map(str, dict.fromkeys(tried)))}; give "
        "the command in the folder where the model was trained"
    )


def _compared(first: Bundle, second: Bundle, store: CellStore, rows: NDArray[np.int64]) -> tuple[float, float]:
    """Share of equal states and largest latent difference of two models on the same cells."""
    if first.genes != second.genes:
        return 0.0, float("inf")
    counts = store.counts(rows)
    said, again = (bundle.network.predict(counts, label=bundle.tree is not None) for bundle in (first, second))
    equal = [
        said.probability_NS[axis].argmax(1) == again.probability_NS[axis].argmax(1)
        for axis in said.probability_NS
        if axis in again.probability_NS
    ]
    return float(min(map(np.mean, equal), default=1.0)), _gap(said.latent_NK, again.latent_NK)


def _gap(first_NK: NDArray[np.floating], second_NK: NDArray[np.floating]) -> float:
    if first_NK.shape != second_NK.shape:
        return float("inf")
    spread_K = np.maximum(first_NK.std(0), 1e-6)
    return float((np.abs(first_NK - second_NK) / spread_K).max())


def _annotated(output: Path, model: Path, query: Path | None) -> Reproduced:
    cells = read_annotated(output, ClonesConfig())
    bundle = load(model, "cpu")
    cells.refuse_other(bundle.bundle_id, model, "give the model that it was annotated by")
    known = PredictConfig.model_fields
    settings = {
        name: value for name, value in cells.settings.items() if name in known and name not in {"sheet", "dask"}
    }
    seed = int(cells.made.get("run_seed", 0))
    with scratch_folder() as folder:
        again = folder / output.name
        annotate(query or output, model, again, PredictConfig(**settings), label=True, asked=Asked(seed=seed))
        made = read_annotated(again, ClonesConfig())
    differs = _versions(str(cells.made["carvae_version"]), json.loads(cells.made.get("libraries", "{}")))
    if cells.made.get("query", made.made["query"]) != made.made["query"]:
        differs.append("the counts are not those that were annotated")
    if cells.n_cells != made.n_cells:
        return Reproduced(str(output), False, 0.0, float("inf"), tuple(differs))
    return Reproduced(
        str(output),
        _identical(cells, made),
        _agreement(cells, made),
        _gap(cells.latent_NK, made.latent_NK),
        tuple(differs),
    )


def _identical(cells: Annotated, made: Annotated) -> bool:
    """Whether all that carvae says of the cells is equal; clones are not asked for again."""
    columns = [c for c in map(str, cells.made["columns"]) if c.startswith("carvae_")]
    return np.array_equal(cells.latent_NK, made.latent_NK) and all(
        c in made.obs and _values(cells.obs[c]).equals(_values(made.obs[c])) for c in columns if c in cells.obs
    )


def _values(column: pd.Series[Any]) -> pd.Series[Any]:
    numeric = pd.api.types.is_numeric_dtype(column)
    return pd.Series(column.to_numpy(float) if numeric else column.astype(str).to_numpy(object))


def _agreement(cells: Annotated, made: Annotated) -> float:
    equal = [
        _values(cells.obs[f"carvae_{axis}"]).to_numpy() == _values(made.obs[f"carvae_{axis}"]).to_numpy()
        for axis in cells.axes
        if f"carvae_{axis}" in made.obs
    ]
    return float(min(map(np.mean, equal), default=0.0))


def _versions(carvae_version: str, libraries: Mapping[str, str]) -> list[str]:
    """What was another version then, of carvae and of the libraries that were recorded."""
    found = []
    for name, then in {"carvae": carvae_version, **libraries}.items():
        now = __version__ if name == "carvae" else version_of(name)
        if now != then:
            found.append(f"{name} {then} then, {now} now")
    return found
