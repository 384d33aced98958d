"""An annotated file as the report reads it: cells, what carvae said of them, and where it came from.

Axes: N cells, K latent, S states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray

from carvae.data.adata import root_of
from carvae.data.results import LATENT, made_before, samples_path
from carvae.data.schema import query_obs
from carvae.data.spreadsheet import neutral_text
from carvae.data.tables import read_table
from carvae.errors import ConfigError, ReadError
from carvae.labels.axis import RESERVED, main_first
from carvae.model.bundle_files import hash_of
from carvae.section_patient import ClonesConfig

AUTHOR_COLUMNS = ("author_cell_type", "cell_type")
"""Where CELLxGENE and others keep the author's labels."""
MAP = "X_umap"


@dataclass(frozen=True, slots=True)
class Annotated:
    """An AnnData that `carvae annotate` wrote, without its counts."""

    path: Path
    sha256: str
    size: int
    """Bytes."""
    obs: pd.DataFrame
    about: pd.DataFrame
    """The contract's columns that are known of each cell, ``sample`` always."""
    latent_NK: NDArray[np.float32]
    own_map: NDArray[np.float32] | None
    """The file's own ``obsm["X_umap"]``, [N, 2]."""
    axes: Mapping[str, tuple[str, ...]]
    """Label axis -> its states; the main one first."""
    made: Mapping[str, Any]
    """``uns["carvae"]``."""
    samples: pd.DataFrame | None
    """The table of samples by sample, where it lies beside the file."""
    samples_text: str

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs)

    @property
    def main(self) -> str:
        """The axis that is called state where there is one."""
        return next(iter(self.axes))

    @property
    def states(self) -> tuple[str, ...]:
        """States of the main axis."""
        return self.axes[self.main]

    @property
    def order(self) -> list[str]:
        """The states, and `RESERVED`: the order of every figure."""
        return [*self.states, RESERVED]

    @property
    def state(self) -> pd.Series[str]:
        """State of each cell on the main axis, numbered as the cells."""
        return pd.Series(self.state_N)

    @property
    def state_N(self) -> NDArray[np.object_]:
        """State of each cell on the main axis."""
        return self.obs[f"carvae_{self.main}"].astype(str).to_numpy(object)

    @property
    def sample_N(self) -> NDArray[np.object_]:
        """Sample of each cell."""
        return self.about["sample"].astype(str).to_numpy(object)

    @property
    def sample_names(self) -> list[str]:
        """All samples, sorted."""
        return sorted(set(self.sample_N))

    @property
    def receipt(self) -> dict[str, Any]:
        """How the query's genes met the model's panel."""
        return dict(json.loads(self.made["genes"]))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `carvae annotate`, section ``predict``."""
        return dict(json.loads(self.made["settings"]))

    def refuse_other(self, bundle_id: str, model: Path, remedy: str) -> None:
        """Raise ConfigError where another than the given model annotated the file."""
        if bundle_id != self.made["bundle_id"]:
            raise ConfigError(
                f"{self.path} was annotated by the model {self.made['bundle_id']}, and {model} is {bundle_id}; {remedy}"
            )

    @property
    def scores(self) -> pd.DataFrame:
        """Signature scores of each cell, named by the signature; those that no cell has are left out."""
        columns = [c for c in map(str, self.obs) if c.startswith("carvae_score_") and self.obs[c].notna().any()]
        return self.obs[columns].rename(columns=lambda column: str(column).removeprefix("carvae_score_"))

    def known(self, name: str) -> pd.Series[Any] | None:
        """A column of the contract, where any cell has a value of it."""
        return self.about[name] if name in self.about and self.about[name].notna().any() else None

    def author(self, column: str | None) -> str | None:
        """The column with the author's labels: the one that is named, else a customary one.

        Raises
        ------
        ReadError
            There is no such column.
        """
        if column is not None and column not in self.obs:
            names = ", ".join(c for c in map(str, self.obs) if not c.startswith("carvae_"))
            raise ReadError(f"{self.path} has no column {column!r} for report.label; it has {names}")
        return column or next((name for name in AUTHOR_COLUMNS if name in self.obs), None)


def read_annotated(path: Path, clones: ClonesConfig) -> Annotated:
    """Read an annotated file and the table of samples beside it.

    Raises
    ------
    ReadError
        The file is not there, is broken, or was not annotated by carvae.
    SchemaError
        A column that the settings name is not there.
    """
    if not path.exists():
        raise ReadError(f"{path} does not exist")
    if path.is_file() and not h5py.is_hdf5(path):
        raise ReadError(f"{path} is no .h5ad and no zarr store; give what `carvae annotate` wrote")
    try:
        with root_of(path) as root:
            obs, made, held = read_elem(root["obs"]), _made(root, path), _obsm(root, path)
    except (OSError, KeyError, ValueError) as error:
        raise ReadError(f"{path} cannot be read as AnnData: {' '.join(str(error).split())}") from None
    states = {str(axis): tuple(map(str, names)) for axis, names in made["states"].items()}
    settings = {"sample": json.loads(made["settings"]).get("sample") or clones.sample, "patient": clones.patient}
    settings |= {"clone_id": clones.clone, "timepoint": clones.timepoint}
    about, _ = query_obs(obs, path.stem, {name: column for name, column in settings.items() if column is not None})
    samples, text = _samples(path, set(about["sample"].astype(str)))
    return Annotated(
        path=path,
        sha256=_sha256(path),
        size=sum(file.stat().st_size for file in _files(path)),
        obs=obs,
        about=about,
        latent_NK=held[LATENT],
        own_map=held.get(MAP),
        axes={axis: states[axis] for axis in main_first(states)},
        made=made,
        samples=samples,
        samples_text=text,
    )


def _made(root: Any, path: Path) -> dict[str, Any]:
    made = made_before(root)
    if "columns" not in made or not made.get("states"):
        raise ReadError(
            f"{path} holds no labels of carvae; run `carvae annotate {path.name} --model BUNDLE --out A.h5ad` and "
            "report on A.h5ad"
        )
    return made


def _obsm(root: Any, path: Path) -> dict[str, NDArray[np.float32]]:
    if f"obsm/{LATENT}" not in root:
        raise ReadError(f"{path} has labels of carvae but no obsm[{LATENT!r}]; annotate the query again")
    found = {LATENT: np.asarray(read_elem(root[f"obsm/{LATENT}"]), np.float32)}
    if not np.isfinite(found[LATENT]).all():
        raise ReadError(f"{path} holds coordinates in obsm[{LATENT!r}] that are no numbers; annotate the query again")
    if f"obsm/{MAP}" in root:
        own = np.asarray(read_elem(root[f"obsm/{MAP}"]), np.float32)
        if own.ndim == 2 and own.shape[1] >= 2 and np.isfinite(own).all():  # noqa: PLR2004 - a plane
            found[MAP] = own[:, :2]
    return found


def _samples(path: Path, names: set[str]) -> tuple[pd.DataFrame | None, str]:
    """The table of samples, by their names as the cells have them, and its text."""
    table = samples_path(path)
    if not table.is_file():
        return None, ""
    frame = read_table(table)
    if "sample" not in frame:
        raise ReadError(f"{table} is no table of samples: it has no column 'sample'; annotate the query again")
    frame = frame.set_index("sample")
    own = {str(neutral_text(name)): name for name in names}  # as the table has them, for spreadsheets
    return frame.rename(index=lambda name: own.get(str(name), str(name))), table.read_text(encoding="utf-8")


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _sha256(path: Path) -> str:
    """Hash of a file; of a zarr store the hash over the names and hashes of its files, in order."""
    if not path.is_dir():
        return hash_of(path)
    digest = hashlib.sha256()
    for part in _files(path):
        digest.update(f"{part.relative_to(path).as_posix()} {hash_of(part)}\n".encode())
    return digest.hexdigest()
