"""Settings on outcomes of patients, and on what changes of genes would do; other sections: `carvae.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from carvae.section import Section


class RespondConfig(Section):
    """Outcomes of patients: what is predicted from what. Read by the design ``response`` of `carvae evaluate`, by
    `carvae train` where ``outcome`` is among ``columns``, and by `carvae respond`.
    """

    table: Path | None = None
    """CSV with one row per sample or patient: patient, study, outcome and features (``carvae annotate`` writes one)."""
    model: Path | None = None
    """In place of a table: a model, with which the samples of ``ingest.studies`` are embedded and labelled."""
    clinical: Path | None = None
    """CSV with the outcomes, joined by sample or patient, where the table (or the studies) have none."""
    columns: dict[Literal["sample", "patient", "study", "outcome", "event", "product"], str] = Field(
        default_factory=dict
    )
    """What the columns are called, for example ``outcome: response_day30``. With ``event`` (1 seen, 0 censored) the
    outcome is a time."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only rows with these values, for example ``timepoint: Day 30``."""
    levels: tuple[tuple[str, ...], ...] = Field((("0",), ("1",)), min_length=2)
    """Words of the outcome from worst to best (whatever is last is what a high score predicts), for example
    ``[[SD, PD], [PR], [CR]]``. Two levels are a yes or no, more an order."""
    missing: tuple[str, ...] = ()
    """Words that mean that the outcome is not known; such patients are kept and not scored."""
    score: str | None = None
    """One column that is itself the prediction: nothing is fitted, and its own AUROC is tested on both sides."""
    features: tuple[str, ...] = ()
    """Columns that may predict; by default all numbers but those that say how a sample was measured."""
    trusted: tuple[str, ...] = ()
    """Features that were checked by hand: measured before the outcome, and on each patient by itself. They are not
    suspected of a leak however well they predict."""
    methods: tuple[str, ...] = ()
    """What is compared; by default every method that the data allow."""
    with_study: bool = True
    """Whether the head gives each training study an offset and a small shift of its cells."""
    folds: int = Field(5, ge=2)
    """Groups of patients held out in turn (fewer where a class has fewer patients)."""
    repeats: int = Field(5, ge=1)
    """Times that patients are dealt anew into groups."""
    permutations: int = Field(200, ge=0)
    """Shuffles of the outcome within study, each through the whole pipeline again."""


class PerturbConfig(Section):
    """Genes set up or down in the cells of a query, and what the model then says."""

    up: tuple[str, ...] = ()
    """Signatures or genes that are set up, each by itself; ``TOX+PDCD1`` are set at once. With neither ``up`` nor
    ``down``: every signature of the model, both ways."""
    down: tuple[str, ...] = ()
    """Signatures or genes that are set to zero, likewise."""
    level: Annotated[float, Field(ge=0, le=1)] = 0.9
    """A gene that goes up is set to this quantile of the query's cells that have it (counts per ten thousand)."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only cells with these values in the query's columns, for example ``timepoint: product``."""
    max_cells: int = Field(2000, ge=1)
    """Cells taken of the query, evenly over its samples; bounds memory and time."""
    controls: int = Field(19, ge=0)
    """Draws of random genes of like expression that are set alike: beyond all of 19 is as rare as 1 in 10 by chance
    (each side 1 in 20)."""
