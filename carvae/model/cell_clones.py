"""Where the clones of a query come from: what the user gave, its own column, or contigs beside its matrices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from carvae.data.clonotypes import Clonotypes, find_clones, own_clones
from carvae.data.contigs import beside
from carvae.data.readers import CountsSource
from carvae.data.schema import named_column
from carvae.errors import CarvaeError, ConfigError, SchemaError
from carvae.section_patient import ClonesConfig

log = logging.getLogger(__name__)

CLONE_ID = "clone_id"
SHOWN, FEW = 8, 0.1
"""Files that are told one by one; share of a file's barcodes below which a warning is due."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked about clones."""

    clones: Path | AnnData | None = None
    """Receptors to read; None takes the query's own column, else what lies beside its matrices."""
    config: ClonesConfig = field(default_factory=ClonesConfig)
    seed: int = 0


def clones_of(
    query: Path | AnnData, sources: Sequence[CountsSource], obs: pd.DataFrame, asked: Asked, earlier: set[str]
) -> Clonotypes | None:
    """The clone of every cell; None where nothing says it.

    Parameters
    ----------
    obs
        All cells in the terms of the contract.
    earlier
        Columns that an earlier run of carvae wrote.

    Raises
    ------
    CarvaeError
        What the user gave cannot be read, fits no cell, or would replace a column of the query's own.
    """
    own = CLONE_ID in obs
    if asked.clones is not None:
        if any(CLONE_ID in map(str, source.cells.columns) for source in sources) and CLONE_ID not in earlier:
            raise SchemaError(
                f"the query has a column {CLONE_ID!r} of its own, which would be replaced; leave out --clones to use "
                "it, or rename it"
            )
        return _say(_read(asked.clones, sources, obs, asked.config))
    if own:
        names = {name for source in sources for name in named_column(source.cells.columns, CLONE_ID)}
        log.info("clones are those of obs[%r]", asked.config.clone or min(names))
        return own_clones(obs[CLONE_ID].astype("string"), _patients(obs))
    if isinstance(query, AnnData):
        return _say(_read(query, sources, obs, asked.config)) if "airr" in query.obsm else None
    if not (files := beside(query)):
        return None
    log.info("contigs are found with the query: %s", ", ".join(map(str, files)))
    try:
        return _say(_read(files, sources, obs, asked.config))
    except CarvaeError as error:  # not asked for: the rest goes on without
        log.warning("clones are left out: %s", error)
        return None


def late_columns(columns: pd.DataFrame, sources: Sequence[CountsSource], earlier: set[str]) -> pd.DataFrame:
    """Those that do not bear the name of a column of the query's own."""
    own = {str(column) for source in sources for column in source.cells.columns} - earlier
    return columns.drop(columns=[column for column in columns if column in own])


def _read(
    given: Path | AnnData | Sequence[Path], sources: Sequence[CountsSource], obs: pd.DataFrame, config: ClonesConfig
) -> Clonotypes:
    names_N = np.concatenate([source.cells.names() for source in sources]).astype(str).astype(object)
    return find_clones(given, names_N, obs["sample"].to_numpy(object), _patients(obs), config)


def _say(clones: Clonotypes) -> Clonotypes:
    assert clones.report is not None
    files = clones.report.files
    for match in files:
        if match.n_matched < FEW * match.n_barcodes:
            log.warning("%s: are these the contigs of this sample?", match.sentence())
        elif len(files) <= SHOWN or match.n_ambiguous:
            log.info("%s", match.sentence())
    if len(files) > SHOWN:
        found, total = (sum(getattr(match, name) for match in files) for name in ("n_matched", "n_barcodes"))
        log.info("%s of %s barcodes in %s files are cells of the query", f"{found:,}", f"{total:,}", len(files))
    log.info("clones: %s", clones.report.sentence())
    return clones


def _patients(obs: pd.DataFrame) -> NDArray[np.object_]:
    if "patient" in obs:
        text = obs["patient"].astype("string")
        if text.isna().any():
            log.info("%s cells have no patient; each of their samples is taken as one", f"{int(text.isna().sum()):,}")
        return text.fillna(obs["sample"].astype("string")).to_numpy(object)
    log.info(
        "the query names no patient, so clones are told within each sample; with clones.patient=COLUMN, or a table of "
        "samples (predict.sheet), they are told within the patient, and can be followed over time"
    )
    return obs["sample"].to_numpy(object)


def check_given(clones: Path | AnnData | str | None) -> Path | AnnData | None:
    """What the user gave, as a path or an AnnData; raises ConfigError where it is something else."""
    if clones is None or isinstance(clones, Path | AnnData):
        return clones
    if isinstance(clones, str):
        return Path(clones)
    raise ConfigError(f"clones takes a path or an AnnData of scirpy, not a {type(clones).__name__}")
