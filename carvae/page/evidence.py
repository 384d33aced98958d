"""Section 7: do the genes speak for the states? None of this is read by the model as such."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from carvae.data.markers import AUTHOR, PREDICTED, Grouping, marker_table
from carvae.page.blocks import Absent, Block, Grid, Section, Text
from carvae.page.expression import Expression
from carvae.page.facts import MARKERS, Facts
from carvae.page.picture import picture
from carvae.plots.evidence import coexpression, draw_signatures, plot_coexpression
from carvae.plots.markers import draw_markers
from carvae.plots.training import plot_confusion

NO_LABEL = "(none)"
MOST_LABELS = 30


def section(facts: Facts) -> Section:
    """Marker genes, inhibitory receptors together, signatures; beside the author's labels where there are some."""
    blocks: list[Block] = []
    if facts.expression is None:
        blocks.append(Absent(facts.no_expression))
    else:
        blocks += [_markers(facts, facts.expression), *_receptors(facts, facts.expression)]
    blocks += [*_author(facts), _signatures(facts)]
    text = "Which genes drove each call is said by carvae explain."
    return Section("evidence", "Evidence: genes behind the states", (*blocks, Text(text)))


def _author_labels(facts: Facts) -> tuple[str, pd.Series[str]] | None:
    column = facts.cells.author(facts.config.label)
    if column is None:
        return None
    label = facts.cells.obs[column].astype("string").fillna("").astype(str).replace({"": NO_LABEL})
    return (column, label) if label.nunique() <= MOST_LABELS else None


def _markers(facts: Facts, expression: Expression) -> Block:
    groupings = [Grouping(PREDICTED, facts.cells.state_N, facts.cells.order)]
    author = _author_labels(facts)
    if author is not None:
        groupings.append(Grouping(AUTHOR, author[1].to_numpy(object), sorted(set(author[1]))))
    table = marker_table(expression.counts, expression.total_N, expression.measured_E, expression.genes, groupings)
    panels = [(panel.name, panel.genes) for panel in facts.panels]
    table = table[table["gene"].isin({gene for _, genes in panels for gene in genes})]

    def draw() -> Canvas:
        return draw_markers(table, panels)

    shows = "Size: share of the state's cells with a count; colour: mean expression relative to the gene's greatest."
    if author is not None:
        shows += f" Below, the same by the author's labels, those of obs['{author[0]}']."
    return picture("markers", "Marker genes by state", shows, draw)


def _receptors(facts: Facts, expression: Expression) -> list[Block]:
    there = {
        protein: expression.of(gene) > 0
        for gene, protein in MARKERS.items()
        if expression.measured_E[expression.genes.index(gene)]
    }
    if len(there) < 2:  # noqa: PLR2004 - two make a pair
        names = ", ".join(MARKERS.values())
        return [Absent(f"The file has fewer than two of {names}, so whether cells carry several cannot be said.")]
    table = coexpression(there, facts.cells.state, facts.cells.order)

    def draw() -> Axes:
        return plot_coexpression(table)

    every = np.all(list(there.values()), axis=0)
    absent = [protein for protein in MARKERS.values() if protein not in there]
    shows = (
        f"Share of the cells in which exactly these are detected (one count or more); {int(every.sum()):,} cells "
        "carry all "
        f"{len(there)}. Detection falls with depth: a gene that is not seen may still be there."
    )
    if absent:
        shows += f" {', '.join(absent)} is not in the file."
    by_sample = coexpression(there, pd.Series(facts.cells.sample_N), facts.cells.sample_names)
    percents = by_sample.map(lambda v: f"{v:.1%}").droplevel("n_cells").rename_axis("sample")
    title = f"{', '.join(there)} together"
    return [picture("receptors", title, shows, draw), Grid(f"{title}, by sample", percents)]


def _author(facts: Facts) -> list[Block]:
    author = _author_labels(facts)
    if author is None:
        text = "There are no labels by an author to compare with; name their column with report.label=COLUMN."
        return [Absent(text)]
    column, label = author

    def draw() -> Axes:
        ax = plot_confusion(label, facts.cells.state, facts.cells.order[:-1], title="")
        ax.set(xlabel="called by carvae", ylabel="the author's label (cells)")
        return ax

    both = (label != NO_LABEL).to_numpy() & ~facts.unknown_N & label.isin(facts.cells.states).to_numpy()
    shows = f"Where the cells of each label of obs['{column}'] went."
    if both.any():
        same = float((label.to_numpy(object)[both] == facts.cells.state_N[both]).mean())
        shows += f" Of {int(both.sum()):,} cells with a state that bear one of its names, {same:.0%} bear the same"
        shows += " (of cells that the model was trained on, more than of others)."
    return [picture("author", "Beside the author's labels", shows, draw)]


def _signatures(facts: Facts) -> Block:
    scores = facts.cells.scores
    if scores.empty or not len(scores.columns):
        return Absent("No signature could be scored, since too few of their genes are in the file.")

    def draw() -> Canvas:
        return draw_signatures(scores, facts.cells.state, facts.cells.order, facts.colours)

    shows = (
        "UCell scores, 0 to 1, from the ranks of genes within each cell, by state; the bars are medians. They come "
        "from the "
        "counts alone, but share genes with what the model was trained on."
    )
    return picture("signatures", "Signatures by state", shows, draw)
