"""Section 12: the data behind the page, and what its words mean."""

from __future__ import annotations

import csv
import io

from carvae.data.spreadsheet import neutral_text
from carvae.page.blocks import Block, File, Files, Pairs, Section, Text
from carvae.page.facts import Facts
from carvae.page.reproduce import methods, references

GLOSSARY = {
    "bundle": "a trained model in a folder: weights, genes, labels, calibration, card; it holds no cells",
    "calibrated": "of the cells with confidence 0.8, eight in ten are right, on patients that the model did not see",
    "clone": "cells of a patient with the same T-cell receptor, which descend from one cell",
    "confidence": "probability of a cell's likeliest state, by the model",
    "distance to the nearest training sample": "from the mean of the sample's cells to that of the nearest training "
    "sample, in standard deviations within a state",
    "held out": "left out of training, so that it can test what was learned",
    "latent coordinates": "the numbers by which the model describes a cell once depth and batch are taken out",
    "sample": "one sequenced specimen: a patient at a time point in a tissue",
    "novelty": "share of held-out training cells, of like depth and gene overlap, that look less strange",
    "panel": "the genes that the model reads",
    "set of states": "states of which one is right with the stated probability",
    "signature": "a list of genes that go together in a state; its score is from their ranks within a cell",
    "unknown": "a cell with too few counts, or unlike what the model knows",
    "verdict": "whether a sample lies within what the training samples showed when they were held out",
}


def section(facts: Facts) -> Section:
    """Files that the page carries, and the glossary."""
    cells = facts.cells
    files = [
        File("methods.txt", _methods(facts), "text/plain", "methods and references"),
        File(
            "gene_receipt.csv", _receipt(facts), "text/csv", "genes of the model that are missing or have another name"
        ),
    ]
    if cells.samples is not None:
        files.insert(0, File("samples.csv", harmless(cells.samples_text), "text/csv", "the table of samples"))
    if facts.outcomes is not None:
        outcomes = harmless(facts.outcomes.to_csv(index=False))
        files.append(File("outcomes.csv", outcomes, "text/csv", "predicted outcomes of patients"))
    text = (
        "The cells of the map are downloaded from the buttons above it, all or those chosen with the lasso; every "
        "picture "
        f"has a button for PNG and SVG. All cells with every column are in {cells.path.name}."
    )
    blocks: list[Block] = [Text(text), Files(tuple(files)), Pairs(tuple(GLOSSARY.items()))]
    return Section("downloads", "Data and glossary", tuple(blocks))


def harmless(text: str) -> str:
    """The CSV with an apostrophe before every value that a spreadsheet would run as a formula; numbers stay."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([neutral_text(value) for value in row] for row in csv.reader(io.StringIO(text)))
    return out.getvalue()


def _methods(facts: Facts) -> str:
    return methods(facts) + "\n\n" + references(facts) + "\n"


def _receipt(facts: Facts) -> str:
    receipt = facts.cells.receipt
    rows = [f"{gene},missing," for gene in receipt["missing"]]
    rows += [f"{new},by another name,{old}" for old, _, new in (pair.partition("->") for pair in receipt["aliased"])]
    rows += [f"{gene},summed from several columns," for gene in receipt["duplicated"]]
    return harmless("\n".join(["gene,what,name in the file", *rows]) + "\n")
