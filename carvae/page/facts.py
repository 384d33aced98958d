"""Everything that the sections of a report are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from carvae.labels.axis import RESERVED
from carvae.labels.signatures import Signature
from carvae.model.bundle import Bundle
from carvae.page.annotated import Annotated
from carvae.page.expression import Expression
from carvae.page.layout import Layout
from carvae.plots.look import styles
from carvae.section_patient import ClonesConfig
from carvae.section_report import ReportConfig

MARKERS = {"LAG3": "LAG3", "PDCD1": "PD-1", "HAVCR2": "TIM-3"}
"""Inhibitory receptors: gene -> name of the protein."""
MOST_ROWS = 60
"""Samples that one picture shows; the others are in the tables."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when the report is written."""

    cells: Annotated
    expression: Expression | None
    no_expression: str
    """Why there is none."""
    bundle: Bundle | None
    layout: Layout
    panels: tuple[Signature, ...]
    """Marker genes in groups."""
    config: ReportConfig
    clones: ClonesConfig
    seed: int
    command: str
    """The command line that writes this report again."""
    outcomes: pd.DataFrame | None
    """What `carvae respond` says of each patient."""
    no_outcomes: str

    @property
    def colours(self) -> dict[str, str]:
        """State -> colour, one in every figure and on the map."""
        return {name: style.colour for name, style in styles(self.cells.order).items()}

    @property
    def largest_samples(self) -> list[str]:
        """The samples that pictures show, sorted: all, or the `MOST_ROWS` with the most cells."""
        size = pd.Series(self.cells.sample_N).value_counts()
        return sorted(size.index[:MOST_ROWS])

    @property
    def not_shown(self) -> str:
        """A sentence on the samples that pictures leave out; empty where there are none."""
        rest = len(self.cells.sample_names) - MOST_ROWS
        return (
            f" The {MOST_ROWS} samples with the most cells are shown, {rest:,} more are in the table."
            if rest > 0
            else ""
        )

    @property
    def unknown_N(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Cells without a state."""
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.cells.state_N == RESERVED
        return found

    @property
    def limits(self) -> Mapping[str, tuple[float, float]] | None:
        """Figure of `model.verdict` -> where care is due, and where it is out of range; needs the model."""
        from carvae.model.verdict import FIGURES

        if self.bundle is None or self.bundle.trust is None or self.bundle.trust.limits is None:
            return None
        found = self.bundle.trust.limits
        return {name: (float(c), float(o)) for name, c, o in zip(FIGURES, found.care_F, found.out_F, strict=True)}


def percent(value: float) -> str:
    """A share for a sentence; a dash where it is not known."""
    return "–" if not np.isfinite(value) else f"{value:.0%}" if value == 0 or value >= 0.1 else f"{value:.1%}"  # noqa: PLR2004


def several(n: int, thing: str, things: str | None = None) -> str:
    """``1 sample``, ``1,204 samples``."""
    return f"{n:,} {thing if n == 1 else things or thing + 's'}"
