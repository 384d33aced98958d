"""One pass over all cells of a query: opened, checked against the model, labelled some cells at a time.

Cells are read by a thread, or labelled by the workers of a Dask cluster; every file is read once, and what is kept of a
cell is some bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from carvae import __version__
from carvae.config import PredictConfig
from carvae.data.genes import GeneReceipt
from carvae.data.readers import CountsSource, open_samples, open_source, refuse_shared
from carvae.data.results import ResultsWriter, earlier_columns
from carvae.model.about import about_cells, check_features
from carvae.model.ahead import ahead
from carvae.model.bundle import Bundle, libraries
from carvae.model.card import calibrated
from carvae.model.cell_clones import Asked, clones_of, late_columns
from carvae.model.labeller import Labelled, Labeller, obsm_widths
from carvae.model.late import Late, LateResults, Sorting, check_root
from carvae.model.sample_table import SampleTable, Verdicts
from carvae.model.tasks import Query, by_workers

log = logging.getLogger(__name__)

UNCALIBRATED = (
    "this model's confidence is not calibrated: it is as trained, usually too sure; train.calibration_folds would have "
    "taught it, and its card says what is known of its errors"
)
TOLD = ("sample", "patient", "timepoint", "product")
"""What is kept of what the query says of its cells."""


class Pass:
    """One pass over all cells of a query; what would be refused before the first cell is refused when it is made."""

    def __init__(
        self, query: Path | AnnData, bundle: Bundle, config: PredictConfig, *, label: bool, whole: bool, asked: Asked
    ) -> None:
        self.query, self.bundle, self.config, self.label, self.whole = query, bundle, config, label, whole
        self.asked = asked
        self.sources = _open(query, config.counts, whole)
        self.earlier = earlier_columns(query)
        obs, self.added = about_cells(self.sources, config, asked.config, self.earlier)
        self.about = obs[[name for name in TOLD if name in obs]].astype("category")
        self.sample = pd.Categorical(obs["sample"])
        self.labellers = [Labeller(source, bundle, config, label=label) for source in self.sources]
        self._say_genes()
        if label and not calibrated(bundle):
            log.info("%s", UNCALIBRATED)
        trees = bundle.tree.axes if label and bundle.tree else ()
        self.states = {axis.name: axis.leaves for axis in trees}
        n_samples = len(self.sample.categories)
        verdicts = None if bundle.trust is None else Verdicts(bundle.trust, config.warn_overlap, n_samples)
        self.table = SampleTable(self.sample, self.states, obs, verdicts) if label else None
        self.late = self._late(obs) if label else None
        self.parts: list[_Kept] = []
        self.columns: list[str] = []

    def _late(self, obs: pd.DataFrame) -> Late:
        assert self.table is not None
        check_root(self.config.root, self.states[self.bundle.axes[0]], [s.name for s in self.bundle.signatures.items])
        check_features(self.config.car.features, self.sources)
        clones = clones_of(self.query, self.sources, obs, self.asked, self.earlier)
        sorting = Sorting.of(obs, self.config.car, self.sources[0].cells.columns)
        return Late(
            self.table.code_N, len(self.table.names), self.table.main, self.config, clones, self.asked.config, sorting
        )

    def _say_genes(self) -> None:
        log.info("genes: %s", self.worst.sentence())
        if self.worst.overlap < self.config.warn_overlap:
            log.warning("%s", _missing_gene_warning(self.worst, self.bundle))
        pairs = list(zip(self.sources, self.labellers, strict=True))
        if self.label and (car := sorted({str(source.genes[at]) for source, own in pairs for at in own.car})):
            log.info("the CAR is told from %s", ", ".join(car))
        for source, labeller in pairs:
            if self.label and labeller.unscored:
                missing = ", ".join(labeller.unscored)
                log.info("%s: too few genes to score %s; those columns are empty", source.name, missing)

    @property
    def worst(self) -> GeneReceipt:
        """How the genes of the source that has the fewest met the panel."""
        return min((labeller.alignment.receipt for labeller in self.labellers), key=lambda receipt: receipt.overlap)

    def labelled(self) -> Generator[Labelled, None, None]:
        """What is said of each chunk, in order; the next one is read meanwhile."""
        for source, labeller in zip(self.sources, self.labellers, strict=True):
            for block in ahead(source.blocks(self.config.chunk_size)):
                yield labeller(block)

    def labelled_on_dask(self, address: str, model: Path, writer: ResultsWriter) -> Generator[Labelled, None, None]:
        """As `labelled`, by the workers of a cluster; the results are the same, to the last digit or nearly.

        Where ``writer`` has places for them, the workers write the rows of ``obsm``, and these do not come here.
        """
        assert isinstance(self.query, Path)
        query = Query(self.query.resolve(), model.resolve(), self.config, self.label, self.whole, secrets.token_hex(8))
        widths = obsm_widths(self.bundle, label=self.label)
        n_cells = [source.n_cells for source in self.sources]
        return by_workers(address, query, n_cells, lambda rows: writer.regions(rows, widths))

    def add(self, part: Labelled) -> None:
        """Keep what is to be known of the cells in the end."""
        self.parts.append(_Kept(part.total_N, part.print_N, part.largest))
        self.columns = list(map(str, part.results.obs))
        if self.table is not None and self.late is not None:
            self.table.add(part)
            self.late.add(part)

    def late_results(self) -> LateResults:
        """What is known now that all cells were read; nothing of an embedding."""
        if self.late is None:
            return LateResults(pd.DataFrame(index=range(len(self.sample))), pd.DataFrame())
        found = self.late.results(np.random.default_rng(self.asked.seed))
        return LateResults(late_columns(self.added.join(found.obs), self.sources, self.earlier), found.samples)

    def confirmed(self) -> list[CountsSource]:
        """The sources, verified now that all was read.

        Raises
        ------
        CountsError, ReadError
            They hold no raw counts after all, or two of them hold the same cells.
        """
        total_N = np.concatenate([part.total_N for part in self.parts])
        print_N = np.concatenate([part.print_N for part in self.parts])
        largest, first, confirmed = max(part.largest for part in self.parts), 0, []
        for source in self.sources:
            own = slice(first, first + source.n_cells)
            confirmed.append(source.confirmed(total_N[own], print_N[own], largest))
            for note in confirmed[-1].notes[len(source.notes) :]:
                log.info("%s: %s", source.name, note)
            first += source.n_cells
        if len(confirmed) > 1:
            refuse_shared(confirmed)
        if self.table is not None and (n_unknown := first - int(self.table.n_used.sum())):
            why = "too few counts over the model's genes" + (", or unlike what it knows" if self.bundle.trust else "")
            log.info("%s of %s cells are unknown: %s", f"{n_unknown:,}", f"{first:,}", why)
        return confirmed

    def uns(self, sources: Sequence[CountsSource], late: pd.DataFrame) -> dict[str, Any]:
        """``uns["carvae"]``: where every column comes from."""
        columns: dict[str, Any] = {}
        if self.late is not None:
            # a later run replaces these columns and no others
            columns["columns"] = np.array([*self.columns, *map(str, late)], dtype=object)
            if self.late.clones is not None and self.late.clones.report is not None:
                columns["clones"] = json.dumps(asdict(self.late.clones.report))
        made = {"query": self._fingerprint(), "run_seed": self.asked.seed, "libraries": json.dumps(libraries())}
        return _provenance(self.bundle, self.config, self.worst, self.states) | _counts_from(sources) | made | columns

    def _fingerprint(self) -> str:
        """Of the counts of all cells, in their order."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(np.ascontiguousarray(part.total_N, np.int64).tobytes())
        for part in self.parts:  # apart, so that nothing depends on where chunks end
            digest.update(np.ascontiguousarray(part.print_N, np.uint64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of a chunk."""

    total_N: np.ndarray[Any, np.dtype[np.int64]]
    print_N: np.ndarray[Any, np.dtype[np.uint64]]
    largest: int


def _open(query: Path | AnnData, counts: str, whole: bool) -> list[CountsSource]:
    if isinstance(query, AnnData):
        return [open_source(query, counts=counts, whole=whole)]
    return open_samples(query, counts=counts, whole=whole)


def _counts_from(sources: Sequence[CountsSource]) -> dict[str, Any]:
    """Which matrix was read, and what was found or assumed on the way."""
    return {
        "counts_in": "; ".join(sorted({source.where for source in sources})),
        "notes": "\n".join(f"{source.name}: {note}" for source in sources for note in source.notes),
    }


def _provenance(
    bundle: Bundle, config: PredictConfig, receipt: GeneReceipt, states: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """``uns["carvae"]``: where every column comes from."""
    return {
        "bundle_id": bundle.bundle_id,
        "carvae_version": __version__,
        "trained_with": bundle.provenance.carvae_version,
        "seed": bundle.provenance.seed,
        "weak_labels": bundle.provenance.weak_labels,
        "settings": config.model_dump_json(),
        "genes": json.dumps(receipt.to_dict()),
        "states": {axis: np.array(names, dtype=object) for axis, names in states.items()},
    }


def _missing_gene_warning(receipt: GeneReceipt, bundle: Bundle) -> str:
    """What the missing genes cost, as measured on held-out patients when the model was trained."""
    missing = 1 - receipt.overlap
    text = f"{missing:.0%} of the model's genes are missing from the query"
    measured = {float(k): v for k, v in bundle.metrics.get("macro_f1_by_missing_genes", {}).items()}
    if not measured:
        return f"{text}; labels will be less sure, by how much was not measured for this model"
    expected = np.interp(missing, sorted(measured), [measured[k] for k in sorted(measured)])
    return (
        f"{text}; on held-out patients macro-F1 was {measured[0.0]:.2f} with all genes and about {expected:.2f} with "
        "this share taken away at random"
    )
