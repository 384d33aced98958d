"""One row per sample, added up as its cells come by: nothing of a cell is kept but its total counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.composition import fraction_interval, mean_interval
from carvae.data.contamination import MixedSums
from carvae.data.schema import NAMES
from carvae.labels.axis import RESERVED, main_first
from carvae.model.labeller import MARKERS, Labelled
from carvae.model.trust import Trust
from carvae.model.verdict import LEAST_OVERLAP, figures_of_means

OF_CELLS = ("sample", "clone_id", "clone_size")
"""Columns of the contract that are of a cell, or are the row itself."""
MEAN = "mean"
"""How the columns with means over cells begin."""


class SampleTable:
    """Cells, depth, composition over states, mean signature scores and marker-positive fractions of each sample.

    Fractions and means are over the cells used, those that are not ``unknown``.

    Parameters
    ----------
    sample
        Sample of each cell, in the order in which they will come.
    states
        Label axis -> its leaves, the main axis first or as `main_first` has it.
    about
        What is known of each cell besides, in the contract's names; what is the same in all cells of a sample is
        written beside it.
    verdicts
        Adds a verdict on each sample.
    """

    def __init__(
        self,
        sample: pd.Categorical,
        states: Mapping[str, tuple[str, ...]],
        about: pd.DataFrame | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.names = sorted(sample.categories)
        self.code_N = np.asarray(sample.set_categories(self.names).codes, np.int64)
        self.states, self.main = states, f"carvae_{main_first(states)[0]}"
        self.n_used = np.zeros(len(self.names), np.int64)
        self.totals: list[NDArray[np.int64]] = []
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        self.done, self.verdicts = 0, verdicts
        self.about = pd.DataFrame() if about is None else shared(about, self.code_N, len(self.names))

    def add(self, labelled: Labelled) -> None:
        """Add the next cells."""
        obs = labelled.results.obs
        code = self.code_N[self.done : self.done + len(obs)]
        used = (obs[self.main] != RESERVED).to_numpy()
        self.done += len(obs)
        if self.verdicts is not None:
            self.verdicts.add(code, labelled)
        self.totals.append(labelled.total_N)
        self.n_used += np.bincount(code[used], minlength=len(self.names))
        columns: dict[str, Any] = {"mean_confidence": obs["carvae_confidence"]}
        for axis, leaves in self.states.items():
            columns |= {f"fraction {leaf}": obs[f"carvae_{axis}"] == leaf for leaf in leaves}
        columns |= {f"fraction {gene}+": found for gene, found in labelled.markers.items()}
        scores = [column for column in obs if str(column).startswith("carvae_score_")]
        columns |= {f"mean {str(column).removeprefix('carvae_')}": obs[column] for column in scores}
        for name, values in columns.items():
            self._add(name, code[used], np.asarray(values, np.float64)[used])

    def _add(self, name: str, code: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        known = ~np.isnan(values)
        n = np.bincount(code[known], minlength=len(self.names))
        total = np.bincount(code[known], weights=values[known], minlength=len(self.names)).astype(np.float64)
        self.sums[name] = total + self.sums.get(name, 0.0)
        self.counts[name] = n + self.counts.get(name, 0)
        if name.startswith(MEAN):
            square = np.bincount(code[known], weights=values[known] ** 2, minlength=len(self.names))
            self.squares[name] = square.astype(np.float64) + self.squares.get(name, 0.0)

    def frame(self, late: pd.DataFrame | None = None) -> pd.DataFrame:
        """The table, samples sorted by name; ``late`` holds further columns in this order."""
        code, total = self.code_N[: self.done], np.concatenate(self.totals)
        table = pd.DataFrame({"sample": self.names}).join(self.about)
        table["n_cells"] = np.bincount(code, minlength=len(self.names))
        table["n_cells_used"] = self.n_used
        table["median_counts"] = pd.Series(total).groupby(code).median().reindex(range(len(self.names))).to_numpy()
        columns: dict[str, Any] = {}
        with np.errstate(invalid="ignore"):
            for name in self._order():
                columns[name] = self.sums[name] / self.counts[name]
                columns |= self._interval(name)
        parts = [table, pd.DataFrame(columns), *([] if late is None else [late])]
        parts += [] if self.verdicts is None else [self.verdicts.frame()]
        return pd.concat(parts, axis=1)

    def _interval(self, name: str) -> dict[str, NDArray[np.float64]]:
        """The interval of a state's fraction or of a mean, as two columns; nothing for any other column."""
        if name.startswith(MEAN):
            low, high = mean_interval(self.sums[name], self.squares[name], self.counts[name])
            ends = (f"low {name}", f"high {name}") if " " in name else (f"{name}_low", f"{name}_high")
            return dict(zip(ends, (low, high), strict=True))
        for leaves in self.states.values():
            if name.removeprefix("fraction ") in leaves and name.startswith("fraction "):
                low, high = fraction_interval(self.sums[name], self.counts[name], len(leaves))
                return {f"low {name}": low, f"high {name}": high}
        return {}

    def _order(self) -> list[str]:
        """The columns: what every source had, then markers that some lacked, then scores."""
        scores = [name for name in self.sums if name.startswith("mean score_")]
        markers = [f"fraction {gene}+" for gene in MARKERS if f"fraction {gene}+" in self.sums]
        return [name for name in self.sums if name not in (*scores, *markers)] + markers + scores


def shared(about: pd.DataFrame, code_N: NDArray[np.integer], n_samples: int) -> pd.DataFrame:
    """The columns of the cells that say something of samples: a value that all cells of a sample have, else empty."""
    columns = {}
    for name in (name for name in NAMES if name in about and name not in OF_CELLS):
        value, values = pd.factorize(about[name])
        pairs = pd.DataFrame({"sample": code_N, "value": value})[value >= 0].drop_duplicates()
        alone = pairs[~pairs["sample"].duplicated(keep=False)]
        found = pd.Series(np.asarray(values, dtype=object)[alone["value"]], index=alone["sample"].to_numpy())
        columns[name] = found.reindex(range(n_samples)).infer_objects()
    return pd.DataFrame(columns, index=range(n_samples))


class Verdicts:
    """Is each sample inside what the model knows? Added up as `SampleTable` is; samples are numbered.

    Parameters
    ----------
    trust
        What the model knows of its errors.
    care_overlap
        Share of the panel's genes below which care is due.
    n_samples
        How many there are.
    """

    def __init__(self, trust: Trust, care_overlap: float, n_samples: int) -> None:
        self.trust, self.care_overlap = trust, care_overlap
        self.parts: list[pd.DataFrame] = []
        self.overlap: dict[int, float] = {}
        self.latent: dict[int, NDArray[np.float64]] = {}
        self.mixed = MixedSums(n_samples)

    def add(self, code: NDArray[np.int64], labelled: Labelled) -> None:
        """Add the next cells, which are of the samples ``code``."""
        results = labelled.results
        novelty = results.obs["carvae_novelty"].fillna(1.0).to_numpy()  # too few counts to tell: as strange as can be
        counts = results.obs["carvae_n_panel_counts"].to_numpy()
        frame = pd.DataFrame({"sample": code.astype(np.int32), "novelty": novelty, "counts": counts})
        if labelled.mixed is not None:
            self.mixed.add(code, labelled.mixed)
        self.parts.append(frame.astype({"novelty": np.float32, "counts": np.float32}))
        for sample in np.unique(code).tolist():
            self.overlap[sample] = min(labelled.overlap, self.overlap.get(sample, 1.0))
            latent = results.latent[code == sample].sum(0, dtype=np.float64)
            self.latent[sample] = latent + self.latent.get(sample, 0.0)

    def frame(self) -> pd.DataFrame:
        """Verdict, reason and figures; the number of the sample is the index."""
        limits, rows = self.trust.limits, {}
        if limits is None:
            return pd.DataFrame()
        for sample, cells in pd.concat(self.parts, ignore_index=True).groupby("sample"):
            number, overlap = int(str(sample)), self.overlap[int(str(sample))]
            found = figures_of_means(
                len(cells),
                self.latent[number] / len(cells),
                float(cells["novelty"].mean()),
                float((cells["novelty"] > 1 - self.trust.unknown_rate).mean()),
                float(cells["counts"].median()),
                self.trust.reference,
            )
            hints = self.mixed.hints(number)
            told = (self.trust.n_samples, hints.words)
            verdict, reason = limits.verdict(found, overlap, self.care_overlap, LEAST_OVERLAP, *told)
            rows[number] = {
                "verdict": verdict,
                "verdict_reason": reason,
                "gene_overlap": overlap,
                "fraction_unknown": found.fraction_unknown,
                "mean_novelty": found.mean_novelty,
                **_novelty_interval(cells["novelty"].to_numpy(np.float64)),
                "batch_distance": found.batch_distance,
                "ambient_hint": hints.ambient,
                "doublet_hint": hints.doublets,
            }
        return pd.DataFrame.from_dict(rows, orient="index")


def _novelty_interval(novelty: NDArray[np.float64]) -> dict[str, float]:
    ends = mean_interval(np.array([novelty.sum()]), np.array([novelty @ novelty]), np.array([len(novelty)]))
    return dict(zip(("mean_novelty_low", "mean_novelty_high"), (float(end[0]) for end in ends), strict=True))
