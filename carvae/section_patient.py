"""Settings of what belongs to a patient rather than a cell: clones, the CAR transgene, time points."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carvae.section import Section


class ClonesConfig(Section):
    """Clones: what makes two cells one clone, how they are counted, and what the columns are called."""

    sequence: Literal["nt", "aa"] = "nt"
    """What must be equal in two cells of a clone: the nucleotides of the CDR3 junction, or its amino acids."""
    chains: Literal["pair", "beta"] = "pair"
    """``pair``: beta (delta) and alpha (gamma) chain are equal, and a cell with one chain joins the only clone of its
    patient that has it; ``beta``: the beta (delta) chain alone, and cells without one have no clone."""
    depth: int | None = Field(None, ge=2)
    """Cells with a clone to which samples are thinned, so that their diversity can be compared; by default as many as
    the smallest sample has that has ``min_cells``. Give a number to compare with samples of other runs."""
    min_cells: int = Field(50, ge=2)
    """Samples with fewer cells with a clone have no figures at equal depth."""
    draws: int = Field(200, ge=20)
    """Random draws at that depth."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """A clone expands or contracts between two time points where the false discovery rate is below this."""
    patient: str | None = None
    """Column with the patient; by default ``patient`` or a customary name for it."""
    sample: str | None = None
    """Column with the sample, likewise; ``carvae clones`` takes patient and time point where there is none."""
    timepoint: str | None = None
    """Column with the time point; by default ``timepoint`` (words such as M0, D28, week 4, product), else
    ``timepoint_days``."""
    state: str | None = None
    """Column with the state, for ``carvae clones``; by default ``carvae_state``, ``state`` or ``cell_type``."""
    clone: str | None = None
    """Column with the clone; by default ``clone_id`` or ``clonotype``."""
    order: tuple[str, ...] = ()
    """The time points from first to last, where their names do not say it; those that are not named are left out."""
    top: int = Field(12, ge=1)
    """Clones of each patient that are drawn."""


class CarConfig(Section):
    """Which cells carry the CAR."""

    features: tuple[str, ...] = ()
    """Names of the transgene in your reference, in any case, beside those that carvae knows (CAR, FMC63, WPRE ...)."""
    column: str | None = None
    """Column of the query that says what a cell was sorted for."""
    positive: tuple[str, ...] = ()
    """Values of that column that mean CAR+."""
    negative: tuple[str, ...] = ()
    """Values of that column that mean CAR-."""
    purity: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How many of the cells that were sorted for CAR+ (CAR-) are."""
    protein: str | None = None
    """Column of the query with the CAR's surface protein (counts or a normalised signal)."""
