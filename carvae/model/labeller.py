"""What a bundle says of the cells of one source, some cells at a time.

Axes: N cells, K latent, S leaves of one label axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from carvae.config import PredictConfig
from carvae.data import contamination
from carvae.data.contamination import Mixed
from carvae.data.counts import Checked
from carvae.data.genes import GeneTable
from carvae.data.readers import CountsSource
from carvae.data.results import LATENT, CellResults
from carvae.data.transgene import transgene_columns
from carvae.labels.axis import RESERVED
from carvae.labels.signatures import coverage, score
from carvae.model.bundle import Bundle
from carvae.model.network import Prediction
from carvae.model.trust import Judged, set_columns

MARKERS = ("LAG3", "PDCD1", "HAVCR2")
"""Exhaustion markers whose detection (one count or more) is reported per sample."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What is known of some cells once they were read."""

    results: CellResults
    markers: dict[str, NDArray[np.bool_]]
    """Marker gene -> whether it was detected in each cell; only of genes that the source measured."""
    total_N: NDArray[np.int64]
    print_N: NDArray[np.uint64]
    largest: int
    overlap: float
    """Share of the model's genes that the source measured."""
    car_N: NDArray[np.int64] | None = None
    """Counts of the CAR's features; None where the source has none."""
    mixed: Mixed | None = None
    """What the cells hold of others; None where they are not labelled."""


class Labeller:
    """Embeds, and with ``label`` labels, the cells of one source.

    Raises
    ------
    GeneError
        Too few of the model's genes are in the source.
    """

    def __init__(self, source: CountsSource, bundle: Bundle, config: PredictConfig, *, label: bool) -> None:
        self.bundle, self.config, self.label = bundle, config, label
        resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
        self.alignment = bundle.align(resolved, config.min_overlap)
        self.genes, self.symbols = source.genes, [str(symbol) for symbol in resolved.symbols]

    @cached_property
    def unscored(self) -> list[str]:
        """Signatures of which too few genes are there."""
        return [s.signature for s in coverage(self.symbols, self.bundle.signatures) if not s.scored]

    @cached_property
    def car(self) -> NDArray[np.intp]:
        """Places of the CAR's features."""
        return transgene_columns(self.genes, self.symbols, self.config.car.features)

    @cached_property
    def markers(self) -> dict[str, NDArray[np.intp]]:
        """Marker -> its places."""
        places = {gene: np.flatnonzero(np.asarray(self.symbols) == gene) for gene in MARKERS}
        return {gene: at for gene, at in places.items() if at.size}

    @cached_property
    def others(self) -> contamination.Markers:
        """Places of the markers of other lineages."""
        return contamination.Markers.of(self.symbols)

    def __call__(self, block: Checked) -> Labelled:
        """What is said of the cells of a block."""
        panel = self.alignment.apply(block.counts)
        prediction = self._predict(panel)
        if not self.label:
            results, markers = CellResults(pd.DataFrame(index=range(panel.shape[0])), prediction.latent_NK), {}
        else:
            results = CellResults(
                pd.DataFrame(self._columns(block, panel, prediction)), prediction.latent_NK, self._obsm(prediction)
            )
            markers = {gene: np.diff(block.counts[:, at].indptr) > 0 for gene, at in self.markers.items()}
        overlap = self.alignment.receipt.overlap
        car_N = None
        if self.label and self.car.size:
            car_N = np.asarray(block.counts[:, self.car].sum(axis=1)).ravel().astype(np.int64)
        mixed = self.others.look(block.counts) if self.label else None
        return Labelled(results, markers, block.total_N, block.print_N, block.largest, overlap, car_N, mixed)

    def _predict(self, panel: sp.csr_matrix) -> Prediction | Judged:
        trust, network = self.bundle.trust, self.bundle.network
        if trust is not None and self.label:
            return trust.judge(network, panel, self.alignment.present)
        present_G = self.alignment.present
        return network.predict(panel, self.config.precision, label=self.label, present_G=present_G)

    def _columns(self, block: Checked, panel: sp.csr_matrix, prediction: Prediction | Judged) -> dict[str, Any]:
        """The columns of ``obs``, in order."""
        assert self.bundle.tree is not None
        panel_counts = np.asarray(panel.sum(axis=1)).ravel()
        seen = panel_counts >= self.config.min_counts
        table: dict[str, Any] = {}
        known, trust = seen, self.bundle.trust
        if trust is not None and isinstance(prediction, Judged):
            known = seen & ~trust.unknown(prediction)
            table["carvae_novelty"] = np.where(seen, prediction.novelty_N, np.nan).astype(np.float32)
            if self.config.coverage is not None:
                table |= set_columns(trust, self.bundle.tree, prediction, known, self.config.coverage)
        for axis in map(self.bundle.tree.__getitem__, self.bundle.axes):
            probability = prediction.probability_NS[axis.name]
            best = probability.argmax(1)
            names = pd.Index([*axis.leaves, RESERVED], dtype=object)
            code = np.where(known, best, len(axis.leaves))
            table[f"carvae_{axis.name}"] = pd.Categorical.from_codes(code, names)
            table[f"carvae_{axis.name}_best"] = pd.Categorical.from_codes(best, names[:-1])
            table[confidence_column(axis.name, self.bundle)] = np.where(seen, probability.max(1), 0).astype(np.float32)
        table["carvae_n_counts"] = block.total_N
        table["carvae_n_panel_counts"] = panel_counts
        scores = score(block.counts, self.symbols, self.bundle.signatures)
        return table | {f"carvae_score_{name}": scores[name].to_numpy(np.float32) for name in scores}

    def _obsm(self, prediction: Prediction | Judged) -> dict[str, NDArray[np.float32]]:
        return {probability_key(axis, self.bundle): prediction.probability_NS[axis] for axis in self.bundle.axes}


def obsm_widths(bundle: Bundle, *, label: bool) -> dict[str, int]:
    """Key of ``obsm`` -> columns that a `Labeller` gives it."""
    trees = bundle.tree.axes if label and bundle.tree else ()
    return {LATENT: bundle.config.n_latent} | {probability_key(axis.name, bundle): len(axis.leaves) for axis in trees}


def probability_key(axis: str, bundle: Bundle) -> str:
    """Key of ``obsm`` with the probabilities of the leaves."""
    return "carvae_probability" if axis == bundle.axes[0] else f"carvae_{axis}_probability"


def confidence_column(axis: str, bundle: Bundle) -> str:
    """Name of the column with the probability of the likeliest leaf."""
    return "carvae_confidence" if axis == bundle.axes[0] else f"carvae_{axis}_confidence"
