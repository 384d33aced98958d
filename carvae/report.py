"""``carvae report``: one HTML file on an annotated sample, for those who look rather than program.

The sections stand in `carvae.page`; here they are given what they are written from, and put in order.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from carvae import __version__
from carvae.config import Config, PredictConfig, label_file
from carvae.data.atomic import refuse_model, replacing_file
from carvae.data.readers import open_samples
from carvae.data.results import TABLES
from carvae.errors import CarvaeError, ConfigError, CountsError, GeneError, ReadError
from carvae.labels.signatures import Signatures
from carvae.model.bundle import Bundle, load
from carvae.page import (
    cellmap,
    certainty,
    clonal,
    composition,
    downloads,
    evidence,
    inputs,
    limits,
    outcomes,
    quality,
    reproduce,
    verdicts,
)
from carvae.page.annotated import Annotated, read_annotated
from carvae.page.blocks import Section
from carvae.page.expression import Expression, read_expression
from carvae.page.facts import MARKERS, Facts, several
from carvae.page.layout import lay_out
from carvae.page.numbered import numbered
from carvae.page.render import Head, render
from carvae.respond import cells_of, predicted
from carvae.response.cells import described_query
from carvae.section_patient import ClonesConfig
from carvae.section_report import ReportConfig

log = logging.getLogger(__name__)

SECTIONS: tuple[Callable[[Facts], Section], ...] = (
    verdicts.section,
    inputs.section,
    quality.section,
    cellmap.section,
    composition.section,
    certainty.section,
    evidence.section,
    outcomes.section,
    clonal.section,
    limits.section,
    reproduce.section,
    downloads.section,
)
SETTINGS = ("counts", "sample", "min_overlap", "min_counts")
"""Of the annotation, that tell how the file is read again."""
NO_MODEL = "No outcome is said, since the report was made without the model; give --model BUNDLE to carvae report."
NAMELESS = "carvae report annotated.h5ad --out report.html report.names=false"
"""The command that a page without names gives for writing it again."""
NO_OUTCOME = "No outcome is said."
NO_RESPONDER = (
    "No outcome is said, since this model has learned none; carvae train with respond.columns teaches it, where "
    "there are "
    "patients enough."
)


def run(
    annotated: Path,
    out: Path,
    *,
    model: Path | None = None,
    config: ReportConfig | None = None,
    clones: ClonesConfig | None = None,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of an annotated file and return its path, ``out``.

    Parameters
    ----------
    annotated
        ``.h5ad`` or zarr that ``carvae annotate`` wrote, with its ``.samples.csv`` beside it.
    out
        The page, ``.html``: one file that opens without a network.
    model
        The bundle by which the file was annotated: adds its limits, what is usual among its training samples, its
        scores, and outcomes where it predicts them.
    config, clones
        Settings; columns and order of time points are those of ``clones``.
    seed
        Of the choice of cells and of the map.
    command
        The command line that the page gives for writing it again; by default one with these paths.
    progress
        Is told after every section how many are written, and how many there are.

    Raises
    ------
    CarvaeError
        The file was not annotated, or by another model; nothing is written then.
    """
    config, clones = config or ReportConfig(), clones or ClonesConfig()
    refuse(annotated, out)
    cells = read_annotated(annotated, clones)
    cells.author(config.label)
    bundle = None if model is None else _bundle(model, cells)
    panels = Signatures.read(label_file(config.markers)).items
    genes = [*(gene for panel in panels for gene in panel.genes), *MARKERS, *config.genes]
    expression, why = _expression(cells, tuple(dict.fromkeys(genes)))
    if expression is not None and (absent := [gene for gene in config.genes if gene in expression.missing]):
        raise GeneError(f"report.genes names {absent[0]!r}, and {annotated} has no such gene")
    trust = None if bundle is None else bundle.trust
    training = trust.reference.sample_MK if trust is not None and trust.decodes else None
    log.info("laying out %s", several(cells.n_cells, "cell"))
    layout = lay_out(cells, config.max_cells, training, seed)
    said, refused = _outcomes(cells, bundle, seed)
    facts = Facts(
        cells=cells,
        expression=expression,
        no_expression=why,
        bundle=bundle,
        layout=layout,
        panels=panels,
        config=config,
        clones=clones,
        seed=seed,
        command=command or _command(annotated, out, model),
        outcomes=said,
        no_outcomes=refused,
    )
    facts = facts if config.names else _without_names(facts)
    sections = []
    for write in SECTIONS:
        sections.append(write(facts))
        if progress is not None:
            progress(len(sections), len(SECTIONS))
    with replacing_file(out) as scratch:
        scratch.write_text(render(_head(facts), sections), encoding="utf-8")
    log.info("wrote %s", out)
    return out


def after(labelled: Path, page: Path, model: Path, settings: Config) -> Path:
    """Write the report on what was labelled just now, which stays whatever comes of the page; returns ``labelled``.

    Raises
    ------
    CarvaeError
        As `run`; says that the labels are there.
    """
    try:
        run(labelled, page, model=model, config=settings.report, clones=settings.clones, seed=settings.seed)
    except CarvaeError as error:
        raise type(error)(f"{error}; the labels are in {labelled}, and `carvae report` makes the page") from None
    except OSError:
        log.warning("the labels are in %s, and `carvae report` makes the page, of which nothing was written", labelled)
        raise
    return labelled


def _without_names(facts: Facts) -> Facts:
    """The same, by numbers."""
    without = numbered(facts.cells, facts.cells.author(facts.config.label))
    said, refused = facts.outcomes, facts.no_outcomes
    return replace(
        facts,
        cells=without.cells,
        clones=ClonesConfig(top=facts.clones.top),
        command=NAMELESS,
        outcomes=None if said is None else without.outcomes(said),
        no_outcomes=refused if refused in {"", NO_MODEL, NO_RESPONDER} else NO_OUTCOME,
    )


def refuse(annotated: Path, out: Path) -> None:
    """Raise what `run` refuses before it looks at the annotated file, which need not be there yet."""
    if annotated.name.endswith(TABLES):
        raise ReadError(
            f"{annotated} is a table of cells without counts; annotate with --out A.h5ad and report on that"
        )
    if not out.name.endswith((".html", ".htm")):
        raise ConfigError(f"--out {str(out)!r} is no page; end it in .html")
    if out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder; name a file in it")
    refuse_model(out)
    if annotated.suffix == ".zarr" and annotated.resolve() in out.resolve().parents:
        raise ConfigError(f"--out {str(out)!r} lies in the store that is reported on; choose another folder")


def _bundle(model: Path, cells: Annotated) -> Bundle:
    bundle = load(model)
    cells.refuse_other(bundle.bundle_id, model, "give the model that it was annotated by, or annotate again")
    return bundle


def _expression(cells: Annotated, genes: tuple[str, ...]) -> tuple[Expression | None, str]:
    """The counts of some genes, or why there are none."""
    try:
        return read_expression(cells.path, str(cells.settings.get("counts", "auto")), genes), ""
    except CountsError:
        return None, (
            "The file holds no raw counts any more, so no gene can be shown; report on the file as carvae annotate "
            "wrote it."
        )


def _outcomes(cells: Annotated, bundle: Bundle | None, seed: int) -> tuple[pd.DataFrame | None, str]:
    """What the model predicts of the patients, or the sentence by which it refuses."""
    if bundle is None:
        return None, NO_MODEL
    if bundle.responder is None or bundle.tree is None:
        return None, NO_RESPONDER
    predict = PredictConfig(**{name: cells.settings[name] for name in SETTINGS if name in cells.settings})
    try:
        sources = open_samples(cells.path, counts=predict.counts)
        obs = cells_of(sources, predict)
        described = described_query(bundle, sources, obs["sample"].to_numpy(str), predict, seed)
        return predicted(bundle, described, obs)[0], ""
    except CarvaeError as error:
        return None, f"No outcome is said: {error}."


def _command(annotated: Path, out: Path, model: Path | None) -> str:
    words = ["carvae", "report", str(annotated), "--out", str(out)]
    return shlex.join([*words, *([] if model is None else ["--model", str(model)])])


def _head(facts: Facts) -> Head:
    cells = facts.cells
    unknown = int(np.sum(facts.unknown_N))
    patients = cells.known("patient")
    of = "" if patients is None else f" of {several(patients.nunique(), 'patient')}"
    return Head(
        title=f"carvae report: {cells.path.stem}",
        introduction=(
            f"{several(cells.n_cells, 'cell')} in {several(len(cells.sample_names), 'sample')}{of}, labelled by the "
            "model "
            f"{cells.made['bundle_id']}; {unknown:,} are unknown to it. For research only: it is no diagnostic."
        ),
        footer=f"Written by carvae {__version__}. The page is one file and asks the network for nothing.",
    )
