"""The section of settings on the depth of sequencing; the other sections stand in `carvae.config`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carvae.section import Section


class PlanConfig(Section):
    """What fewer cells and fewer counts per cell would cost, tried on the user's own data."""

    umis: tuple[Annotated[int, Field(ge=1)], ...] = (250, 500, 1000, 2000, 4000, 8000)
    """Mean UMIs per cell that are tried, beside the depth of the data; deeper ones than the data's are left out."""
    cells: tuple[Annotated[int, Field(ge=1)], ...] = (100, 200, 400, 800, 1600, 3200)
    """Cells per sample that are tried, beside all of them; a sample that has fewer enters with all of its own."""
    thinnings: int = Field(20, ge=1)
    """Times that the counts are thinned to each depth; a draw takes every cell from one of them."""
    draws: int = Field(200, ge=1)
    """Random draws of every design; at least 29 for a chance of 0.9."""
    chance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of draws in which the worst sample must be within ``max_error`` (with 95% confidence)."""
    min_known: int = Field(25, ge=1)
    """Cells with a label that a sample needs to be judged; of 25 a share of one half has a standard error of 0.1."""
    max_cells: int = Field(20_000, ge=1)
    """Cells taken of the query, evenly over its samples; bounds memory and time."""
    max_error: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Greatest error of a sample's composition (total variation distance) that is accepted."""
    reads_per_cell: float | None = Field(None, gt=0)
    """Mean reads per cell of the query as sequenced (Cell Ranger's summary tells it). With it costs are in reads: UMIs
    saturate as ``C (1 - exp(-reads / C))`` with C molecules per cell. Without it costs are in UMIs."""
