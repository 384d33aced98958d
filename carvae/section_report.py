"""The section of settings on the report; the other sections stand in `carvae.config`."""

from __future__ import annotations

from pydantic import Field

from carvae.section import Section


class ReportConfig(Section):
    """The HTML report of an annotated file."""

    max_cells: int = Field(50_000, ge=100)
    """Cells on the interactive map and in the table that comes with it. Of more, as large a share is drawn of every
    state in every sample, but 20 cells of each where there are as many; everything else is said of all cells."""
    label: str | None = None
    """Column with the author's labels, shown beside the states that were called; by default ``author_cell_type`` or
    ``cell_type`` where there is one."""
    markers: str = "markers"
    """Marker genes in groups: packaged name, or path to a YAML file in the format of the signatures."""
    genes: tuple[str, ...] = ()
    """Further genes by which the map can be coloured."""
    names: bool = True
    """Whether samples, patients, clones, cells and files are called by their names. false numbers them, and leaves out
    paths and commands: for a page that is given away."""
