"""What can be said of cells only when all were read: their clone, whether they carry the CAR, their place in the order.

Axes: N cells, K latent, B samples.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.config import PredictConfig
from carvae.data.clonotypes import Clonotypes
from carvae.data.diversity import clonal_figures
from carvae.data.transgene import CARRIER, OTHER, UNKNOWN, CarCalls, call_car, protein_evidence
from carvae.errors import ConfigError, SchemaError, nearest
from carvae.labels.axis import RESERVED
from carvae.model.labeller import Labelled
from carvae.model.pseudotime import pseudotime, root_cells
from carvae.section_patient import CarConfig, ClonesConfig

log = logging.getLogger(__name__)

AUTO = "auto"
MEMORY = "carvae_score_memory_stem"
CAR, ORDER = "carvae_car_probability", "carvae_pseudotime"
SHOWN = 6


@dataclass(frozen=True, slots=True)
class LateResults:
    """Columns that come when all cells were read."""

    obs: pd.DataFrame
    """One row per cell."""
    samples: pd.DataFrame
    """One row per sample, in the order of the table of samples."""


@dataclass(frozen=True, slots=True)
class Sorting:
    """What the query says of each cell's CAR beside its transcripts."""

    sorted_N: NDArray[np.int64]
    purity: float
    evidence_N: NDArray[np.float64] | None

    @classmethod
    def of(cls, obs: pd.DataFrame, config: CarConfig, columns: Sequence[str]) -> Sorting:
        """From the columns of ``obs`` that the settings name; ``columns`` are all that the query has.

        Raises
        ------
        ConfigError, SchemaError
            A column or a value is not there, or the protein is no number.
        """
        sorted_N = np.full(len(obs), UNKNOWN, np.int64)
        if config.column is not None:
            values = _column(obs, config.column, "column", columns).astype("string").fillna("")
            if not (config.positive or config.negative):
                raise ConfigError(
                    f"predict.car.column={config.column} needs predict.car.positive or predict.car.negative: which of "
                    f"its values mean CAR+ or CAR-; they are {', '.join(sorted(set(values))[:SHOWN])}"
                )
            for given, what in ((config.positive, CARRIER), (config.negative, OTHER)):
                if absent := [value for value in given if value not in set(values)]:
                    raise ConfigError(
                        f"{absent[0]!r} is no value of obs[{config.column!r}]; they are "
                        f"{', '.join(sorted(set(values))[:SHOWN])}"
                    )
                sorted_N[values.isin(given).to_numpy(bool)] = what
        evidence_N = None
        if config.protein is not None:
            signal = pd.to_numeric(_column(obs, config.protein, "protein", columns), errors="coerce")
            if not signal.notna().any():
                raise SchemaError(f"obs[{config.protein!r}] holds no numbers; predict.car.protein names a signal")
            evidence_N = protein_evidence(signal.to_numpy(np.float64))
        return cls(sorted_N, config.purity, evidence_N)

    @property
    def known(self) -> bool:
        """Whether anything is."""
        return bool(self.sorted_N.any()) or self.evidence_N is not None


def _column(obs: pd.DataFrame, name: str, setting: str, columns: Sequence[str]) -> pd.Series[str]:
    if name not in obs:
        raise ConfigError(
            f"predict.car.{setting} names {name!r}, and the query has no such column{nearest(name, columns)}"
        )
    found: pd.Series[str] = obs[name]
    return found


class Late:
    """Keeps of each cell what is needed, and says in the end what there is to say.

    Parameters
    ----------
    sample_N
        Number of each cell's sample.
    main
        Column of ``obs`` with the state.
    clones
        None where nothing is known of clones.
    """

    def __init__(
        self,
        sample_N: NDArray[np.int64],
        n_samples: int,
        main: str,
        config: PredictConfig,
        clones: Clonotypes | None,
        clones_config: ClonesConfig,
        sorting: Sorting,
    ) -> None:
        self.sample_N, self.n_samples, self.main, self.config = sample_N, n_samples, main, config
        self.clones, self.clones_config, self.sorting = clones, clones_config, sorting
        self.used: list[NDArray[np.bool_]] = []
        self.state: list[NDArray[np.str_]] = []
        self.score: list[NDArray[np.float32]] = []
        self.car: list[NDArray[np.int64] | None] = []
        self.total: list[NDArray[np.int64]] = []
        self.latent: list[NDArray[np.float32]] = []

    def add(self, labelled: Labelled) -> None:
        """Keep what is needed of the next cells."""
        obs = labelled.results.obs
        self.used.append((obs[self.main] != RESERVED).to_numpy())
        self.car.append(labelled.car_N)
        self.total.append(labelled.total_N)
        if self.config.root is not None:
            self.latent.append(labelled.results.latent)
            self.state.append(obs[self.main].to_numpy(dtype=str))
            if self.config.root == AUTO:
                self.score.append(np.asarray(obs[MEMORY], np.float32))

    def results(self, rng: np.random.Generator) -> LateResults:
        """All late columns."""
        obs: dict[str, object] = {}
        samples = [pd.DataFrame(index=range(self.n_samples))]
        used_N = np.concatenate(self.used)
        if (called := self._call_car(used_N)) is not None:
            obs[CAR] = called.probability_N
            samples.append(called.frame())
        if self.config.root is not None:
            place_N = self._order(used_N, rng)
            obs[ORDER] = place_N
            mean = pd.Series(place_N).groupby(self.sample_N).mean().reindex(range(self.n_samples))
            samples.append(mean.rename("mean_pseudotime").to_frame())
        if self.clones is not None:
            obs |= self.clones.columns()
            code_N, config = self.clones.code_N, self.clones_config
            samples.append(
                clonal_figures(code_N, self.sample_N, self.n_samples, config.depth, config.min_cells, config.draws, rng)
            )
        return LateResults(pd.DataFrame(obs, index=range(len(used_N))), pd.concat(samples, axis=1))

    def _call_car(self, used_N: NDArray[np.bool_]) -> CarCalls | None:
        if all(part is None for part in self.car):
            if self.sorting.known:
                log.warning(
                    "the query has no CAR feature that carvae knows (predict.car.features names yours), so what the "
                    "cells were sorted for is all there is, and no probability is given"
                )
            return None
        total_N = np.concatenate(self.total)
        zeros = (np.zeros(len(total), np.int64) for total in self.total)
        count_N = np.concatenate([z if part is None else part for part, z in zip(self.car, zeros, strict=True)])
        called = call_car(
            count_N,
            total_N - count_N,
            self.sample_N,
            self.n_samples,
            used_N,
            self.sorting.sorted_N,
            self.sorting.purity,
            self.sorting.evidence_N,
        )
        if called is None:
            log.info("the CAR is among the features and no cell has a count of it: nothing is said of who carries it")
        return called

    def _order(self, used_N: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
        """Pseudotime of the cells used; NaN for the others."""
        place_N = np.full(len(used_N), np.nan, np.float32)
        state_N = np.concatenate(self.state)[used_N]
        if self.config.root == AUTO:
            roots = root_cells(np.concatenate(self.score)[used_N], state_N)
        else:
            roots = np.flatnonzero(state_N == self.config.root)
        if not len(roots):
            why = "has a memory_stem score" if self.config.root == AUTO else f"is called {self.config.root}"
            log.warning("no cell %s, so no order begins there; choose another predict.root", why)
            return place_N
        place_N[used_N] = pseudotime(np.concatenate(self.latent)[used_N], roots, rng)
        if np.isnan(place_N[used_N]).all():
            log.warning("too few cells are joined to the root for an order; carvae_pseudotime is empty")
        return place_N


def check_root(root: str | None, leaves: Sequence[str], signatures: Sequence[str]) -> None:
    """Raise ConfigError where ``predict.root`` is no state, or there is no score to find one by."""
    if root is None or root in leaves:
        return
    if root != AUTO:
        raise ConfigError(f"predict.root={root!r} is no state of this model{nearest(root, leaves)}, or give auto")
    if MEMORY.removeprefix("carvae_score_") not in signatures:
        raise ConfigError(
            "predict.root=auto needs the signature memory_stem, which this model does not have; name a state instead: "
            f"{', '.join(leaves)}"
        )
