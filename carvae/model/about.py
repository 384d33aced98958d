"""What a query says of its cells beside their counts, in the terms of the contract, checked before they are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import pandas as pd

from carvae.config import PredictConfig
from carvae.data.readers import CountsSource
from carvae.data.schema import contract_columns, query_obs
from carvae.data.sheet import told_of_cells
from carvae.errors import ConfigError, nearest
from carvae.section_patient import ClonesConfig

log = logging.getLogger(__name__)

OF_CELLS = ("clone_id", "clone_size")
"""Columns that no table of samples says."""
SAID = re.compile(r"\b(sample|patient|timepoint)\b")
"""Columns whose finding is told."""


def about_cells(
    sources: Sequence[CountsSource], config: PredictConfig, clones: ClonesConfig, earlier: set[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is known of each cell: all of it, and the part that a table of samples added, now or in an earlier run.

    Parameters
    ----------
    earlier
        Columns that an earlier run of carvae wrote, which go where they are not written again.

    Raises
    ------
    CarvaeError
        A column or the table of samples cannot be used.
    """
    obs = pd.concat([_of_source(source, config, clones) for source in sources], ignore_index=True)
    added = obs[[column for column in obs if column in earlier and column not in OF_CELLS]]
    told = told_of_cells(config.sheet, obs["sample"])
    new = {str(column): told[column] for column in told}
    return obs.assign(**new), added.assign(**new)


def _of_source(source: CountsSource, config: PredictConfig, clones: ClonesConfig) -> pd.DataFrame:
    """The contract's columns, and those that settings name."""
    columns, car = source.cells.columns, config.car
    settings = {"sample": config.sample or clones.sample, "patient": clones.patient, "clone_id": clones.clone}
    settings["timepoint"] = clones.timepoint
    mapped = {name: column for name, column in settings.items() if column is not None}
    wanted = {*contract_columns(columns), *mapped.values(), car.column, car.protein}
    obs = source.cells.frame([column for column in columns if column in wanted])
    found, notes = query_obs(obs, source.name, mapped)
    for note in (*source.notes, *(note for note in notes if SAID.search(note))):
        log.info("%s: %s", source.name, note)
    return found.join(obs[[name for name in (car.column, car.protein) if name in obs and name not in found]])


def check_features(features: Sequence[str], sources: Sequence[CountsSource]) -> None:
    """Raise ConfigError where no source has a feature that the user calls the CAR."""
    if not features:
        return
    known = {name.casefold(): name for source in sources for name in (*source.genes, *(source.gene_ids or ()))}
    for feature in features:
        if feature.casefold() not in known:
            hint = nearest(feature, known.values())
            raise ConfigError(f"predict.car.features names {feature!r}, and the query has no such feature{hint}")
