"""Section 2: what went in, and what the model could not find in it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from carvae.page.blocks import Absent, Block, Bullets, Grid, Pairs, Section
from carvae.page.facts import Facts, several

MOST_NAMES = 40
MEGABYTE = 1e6


def section(facts: Facts) -> Section:
    """File, counts, genes and samples."""
    cells, receipt, expression = facts.cells, facts.cells.receipt, facts.expression
    pairs = [
        ("file", f"{cells.path.name}, {cells.size / MEGABYTE:,.1f} MB"),
        ("SHA-256", cells.sha256),
        ("cells", f"{cells.n_cells:,} in {several(len(cells.sample_names), 'sample')}{_of_patients(facts)}"),
        ("raw counts", f"found in {cells.made.get('counts_in', 'the file')}, checked over the whole matrix"),
        ("genes of the model", _matched(receipt)),
        ("model", f"bundle {cells.made['bundle_id']}, trained with carvae {cells.made['trained_with']}"),
        (
            "labels of the model",
            "some derived from gene signatures (weak)" if cells.made["weak_labels"] else "by authors",
        ),
    ]
    if expression is not None:
        ids = "Ensembl ids" if expression.by_id else "symbols"
        pairs.insert(4, ("genes of the file", f"{expression.n_genes:,}, identified by {ids}"))
    blocks: list[Block] = [Pairs(tuple(pairs)), _missing(facts)]
    notes = [note for note in str(cells.made.get("notes", "")).split("\n") if note]
    if notes:
        blocks.append(Bullets(tuple(notes)))
    blocks.append(_samples(facts))
    return Section("input", "What went in", tuple(blocks))


def _of_patients(facts: Facts) -> str:
    patient = facts.cells.known("patient")
    return "" if patient is None else f" of {several(patient.nunique(), 'patient')}"


def _matched(receipt: dict[str, Any]) -> str:
    text = f"{receipt['matched']:,} of {receipt['n_panel']:,} found ({receipt['overlap']:.1%})"
    if receipt["aliased"]:
        text += f", {len(receipt['aliased']):,} by another name"
    return text


def _missing(facts: Facts) -> Block:
    """Genes that are wanted and not there, markers by name."""
    said = []
    missing = list(facts.cells.receipt["missing"])
    if facts.expression is None:
        said.append(facts.no_expression)
    elif absent := facts.expression.missing:
        said.append(f"Marker genes that the file does not have: {_names(absent)}.")
    else:
        said.append("Every marker gene of this report is in the file.")
    said.append(
        f"Genes of the model that are missing: {_names(missing)}." if missing else "No gene of the model is missing."
    )
    if ambiguous := list(facts.cells.receipt["ambiguous"]):
        said.append(f"Names that several genes bear, and which were left alone: {_names(ambiguous)}.")
    unscored = [
        c for c in map(str, facts.cells.obs) if c.startswith("carvae_score_") and facts.cells.obs[c].isna().all()
    ]
    if unscored:
        names = ", ".join(c.removeprefix("carvae_score_") for c in unscored)
        said.append(f"Signatures without a score, because fewer than half of their genes are there: {names}.")
    return Bullets(tuple(said))


def _names(genes: list[str]) -> str:
    more = f" and {len(genes) - MOST_NAMES:,} more" if len(genes) > MOST_NAMES else ""
    return ", ".join(genes[:MOST_NAMES]) + more


def _samples(facts: Facts) -> Block:
    """What is known of each sample."""
    cells, columns = facts.cells, {}
    names = pd.Series(cells.sample_N)
    for name in ("study", "patient", "timepoint", "timepoint_days", "tissue", "product", "assay", "disease"):
        column = cells.known(name)
        if column is not None:
            values = pd.Series(column.astype(object).to_numpy()).groupby(names.to_numpy()).agg(_one)
            columns[name.replace("_", " ")] = values
    if not columns:
        return Absent(
            "Nothing but the sample's name is known of the samples; give predict.sheet=samples.csv to annotate."
        )
    frame = pd.DataFrame(columns).rename_axis("sample")
    frame["cells"] = names.value_counts().reindex(frame.index)
    return Grid("Samples", frame, "Empty where it is not known, or differs within the sample.")


def _one(values: pd.Series[Any]) -> object:
    known = values.dropna().unique()
    return known[0] if len(known) == 1 else None
