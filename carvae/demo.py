"""The whole job on simulated studies: train on three, label the fourth, and show what came of it.

Nothing here is special to the demo but the simulation and the page: training and labelling go through the functions
behind ``carvae train`` and ``carvae annotate``, with the settings of ``configs/demo.yaml``.

Axes: N cells.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from carvae.config import Config, packaged
from carvae.data.atomic import refuse_file
from carvae.data.results import LATENT, samples_path
from carvae.data.simulate import STUDIES, SimulationSettings, simulate_studies, write_studies
from carvae.ingest import work_folder
from carvae.labels.signatures import Signatures
from carvae.labels.tree import RESERVED
from carvae.page.index import Figure, Link, Number, Table, write_index
from carvae.plots.cells import plot_composition, plot_signatures_by_state, plot_umap
from carvae.plots.look import save
from carvae.plots.training import plot_confusion, plot_loss
from carvae.predict import embed
from carvae.predict import run as predict
from carvae.report import run as report
from carvae.train import run as train

log = logging.getLogger(__name__)

QUERY = "sim_myeloma"
"""The study that training never sees."""
N_CELLS = 1000
"""Cells per study."""
SEED = 0
ENDINGS = ("h5ad", "cells.csv.gz", "samples.csv")
"""What `carvae annotate` writes."""
REPORT = f"{QUERY}_report.html"
REST = "other studies"
SCORE = "carvae_score_"
INTRODUCTION = (
    "Four small CAR-T studies were simulated, as awkward as real ones: they differ in depth, gene sets, gene names, "
    "column names and words for states, and one has no labels. A model was trained on three of them and then labelled "
    f"the fourth, {QUERY}, without retraining and without being told its batches. Nothing on this page is measured: "
    "the numbers say that the software works, not how well it does on patients."
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """The held-out study after ``carvae annotate``, and the truth that only a simulation has."""

    obs: pd.DataFrame
    samples: pd.DataFrame
    """One row per sample, as written beside the annotated file."""
    receipt: Mapping[str, Any]
    """How the query's genes were matched."""
    states: tuple[str, ...]
    """In the order of the label tree."""

    @property
    def truth(self) -> pd.Series[str]:
        """Planted state of each cell."""
        return self.obs["true_state"].astype(str)

    @property
    def called(self) -> pd.Series[str]:
        """State that the model gives each cell."""
        return self.obs["carvae_state"].astype(str)

    @property
    def accuracy(self) -> float:
        """Share of cells whose state is called as planted; a cell called ``unknown`` is wrong."""
        return float(accuracy_score(self.truth, self.called))

    @property
    def macro_f1(self) -> float:
        """Mean over the planted states of their F1."""
        return float(f1_score(self.truth, self.called, labels=sorted(set(self.truth)), average="macro"))


@dataclass(frozen=True, slots=True)
class CellMap:
    """All cells of all studies in two dimensions."""

    umap: NDArray[np.float32]
    study: pd.Series[str]
    truth: pd.Series[str]


def run(out: Path) -> Path:
    """Run the demo in folder ``out`` and return its page, ``out/index.html``.

    The page is written last and an older one goes first, so a page that is there belongs to the files beside it.

    Raises
    ------
    CarvaeError
        ``out`` is a file.
    """
    refuse_file(out, "demo")
    (out / "index.html").unlink(missing_ok=True)
    start = time.monotonic()
    n_cells = N_CELLS * len(STUDIES)
    log.info("[1/6] simulating %d studies, %s cells (nothing here is measured)", len(STUDIES), f"{n_cells:,}")
    studies = simulate_studies(np.random.default_rng(SEED), programmes(), SimulationSettings(n_cells=N_CELLS))
    paths = {path.stem: path for path in write_studies(studies, out / "studies")}
    log.info("[2/6] training on %s", ", ".join(name for name in paths if name != QUERY))
    config = read_config(out)
    model = train(config)
    log.info("[3/6] labelling %s, which training never saw", QUERY)
    annotated = predict(paths[QUERY], model, out / f"{QUERY}_annotated.h5ad", config.predict, label=True)
    query = _read_labelled(annotated)
    log.info("[4/6] writing the report on it, as for any sample")
    report(annotated, out / REPORT, model=model)
    log.info("[5/6] drawing the map of all cells")
    cells = _map_cells(studies, model)
    log.info("[6/6] drawing figures")
    history = pd.read_csv(work_folder(model) / "fit" / "log" / "metrics.csv")
    figures = _draw_maps(out, query, cells) + _draw_results(out, query, history)
    page = _write_page(out, query, figures, time.monotonic() - start)
    log.info("%s, held out: accuracy %.3f, macro-F1 %.3f", QUERY, query.accuracy, query.macro_f1)
    return page


def programmes() -> dict[str, tuple[str, ...]]:
    """State -> genes that are up in it, composed of the packaged signatures; neighbouring states share genes."""
    signatures = Signatures.read(packaged("labels/signatures.yaml"))
    names = ("memory_stem", "effector_cytotoxic", "exhaustion", "activation", "regulatory")
    memory, effector, exhaustion, activation, regulatory = (signatures[name].genes for name in names)
    return {
        "naive-like": memory,
        "central memory": memory[::2] + activation[::2],
        "effector memory": effector[1::2] + memory[1::2],
        "effector/cytotoxic": effector,
        "progenitor exhausted": exhaustion[::2] + memory[::2],
        "terminally exhausted": exhaustion,
        "regulatory": regulatory,
    }


def read_config(out: Path) -> Config:
    """The packaged ``demo.yaml`` with its studies and its output in folder ``out``."""
    source = packaged("demo.yaml")
    places = {"output": out / "model"}
    for study in Config.read(source).ingest.studies:
        places[f"ingest.studies.{study}.path"] = out / "studies" / f"{study}.h5ad"
    # JSON text is YAML text in which no character of a path means anything else
    return Config.read(source, [f"{key}={json.dumps(str(path))}" for key, path in places.items()])


def _read_labelled(annotated: Path) -> Labelled:
    query = ad.read_h5ad(annotated)
    return Labelled(
        obs=query.obs,
        samples=pd.read_csv(samples_path(annotated)).set_index("sample"),
        receipt=json.loads(query.uns["carvae"]["genes"]),
        states=tuple(state for state in query.obs["carvae_state"].cat.categories if state != RESERVED),
    )


def _map_cells(studies: Sequence[ad.AnnData], model: Path) -> CellMap:
    """Embed every study by the model, the query like the others, and lay all cells out in two dimensions."""
    import umap

    latent_NK = np.concatenate([embed(study, model).obsm[LATENT] for study in studies])
    layout = umap.UMAP(n_neighbors=15, min_dist=0.3, n_epochs=200, random_state=SEED, n_jobs=1)
    return CellMap(
        umap=layout.fit_transform(latent_NK),
        study=pd.Series([study.uns["title"] for study in studies for _ in range(study.n_obs)]),
        truth=pd.concat([study.obs["true_state"].astype(str) for study in studies], ignore_index=True),
    )


def _draw_maps(out: Path, query: Labelled, cells: CellMap) -> list[Figure]:
    """Three colourings of one map."""
    called = pd.Series(REST, index=cells.study.index, dtype=object)
    called[cells.study == QUERY] = query.called.to_numpy()
    return [
        _figure(
            plot_umap(cells.umap, called, f"{QUERY}: states as called by the model", query.states),
            out / "umap_query.png",
            "The new study on the map",
            "Each dot is a cell; cells that lie close together express the same genes once the differences between "
            f"studies are taken out. In colour {QUERY}, which training never saw, by the state that the model gives "
            "each cell; in grey the cells of the studies that it was trained on.",
        ),
        _figure(
            plot_umap(cells.umap, cells.truth, "All cells: states as planted", query.states),
            out / "umap_state.png",
            "The same map by the truth",
            "All cells of all studies by the state that the simulation planted. Most of these labels were hidden from "
            "training: one study has none, another only coarse ones. Dividing cells may form islands of their own: "
            "whether a cell cycles is an axis beside its state.",
        ),
        _figure(
            plot_umap(cells.umap, cells.study, "All cells: studies", [design.name for design in STUDIES]),
            out / "umap_study.png",
            "The same map by study",
            "Where the colours mix, the batch effects between studies are gone: depth, genes measured and the level of "
            f"each gene differ between them. {QUERY} was placed on the map without any fitting to it.",
        ),
    ]


def _draw_results(out: Path, query: Labelled, history: pd.DataFrame) -> list[Figure]:
    """What the model says of the query, beside the truth, and how it was trained."""
    shares = _composition(query)
    scores = query.obs.filter(like=SCORE).rename(columns=lambda column: column.removeprefix(SCORE))
    curves = history.rename(columns={"val_loss": "validation_loss", "val_state_macro_f1": "macro_f1"})
    return [
        _figure(
            plot_confusion(query.truth, query.called, query.states, f"{QUERY}: called against planted state"),
            out / "confusion.png",
            "How often the model is right",
            "One row per planted state: where its cells went. Perfect calls would fill the diagonal alone.",
        ),
        _figure(
            plot_composition(shares, f"{QUERY}: states per sample", query.states, n_cells=shares.sum(axis=1)),
            out / "composition.png",
            "What each sample is made of",
            "Two bars per sample (a patient at a time point): as called by the model and, below, as planted. The "
            "called shares are in the table of samples that carvae annotate writes.",
        ),
        _figure(
            plot_signatures_by_state(
                scores, query.called, f"{QUERY}: mean signature score per called state", query.states
            ),
            out / "signatures.png",
            "Do the states carry their genes?",
            "Rank-based signature scores of each cell, averaged by called state. They come from the counts alone and "
            "know nothing of the model; but the simulation planted its states with genes of these very signatures.",
        ),
        _figure(
            plot_loss(curves, "Training on three studies"),
            out / "loss.png",
            "Training",
            "Loss on the cells trained on and on the patients of the three studies that were held out of training, "
            "with the macro-F1 of their states. Patients differ in depth, so the two losses need not meet. The model "
            "of the epoch with the lowest held-out loss is kept.",
        ),
    ]


def _figure(ax: Axes, path: Path, title: str, shows: str) -> Figure:
    return Figure(save(ax, path).name, title, shows)


def _composition(query: Labelled) -> pd.DataFrame:
    """Cells per state for each sample, as called and as planted, in neighbouring rows."""
    sample = next(design.columns["sample"] for design in STUDIES if design.name == QUERY)
    rows = [
        pd.crosstab(
            query.obs[sample].astype(str).str.removeprefix(f"{QUERY}_") + end,
            state.to_numpy(),
            rownames=[None],
            colnames=[None],
        )
        for end, state in ((", called", query.called), (", planted", query.truth))
    ]
    return pd.concat(rows).fillna(0).astype(int).sort_index()


def _write_page(out: Path, query: Labelled, figures: Sequence[Figure], seconds: float) -> Path:
    """Write the index page from the run's own numbers."""
    commonest = query.truth.value_counts(normalize=True)
    labelled = (query.called != RESERVED).mean()
    numbers = [
        Number(f"{query.accuracy:.1%}", "Accuracy", f"cells of {QUERY} called as planted"),
        Number(f"{query.macro_f1:.3f}", "Macro-F1", f"mean over {query.truth.nunique()} states"),
        Number(f"{commonest.iloc[0]:.1%}", "Accuracy to beat", f"calling every cell {commonest.index[0]}"),
        Number(f"{len(query.obs):,}", "New cells", f"{labelled:.0%} with enough counts for a state"),
        Number(
            f"{query.receipt['overlap']:.0%}",
            "Genes found",
            f"{query.receipt['matched']:,} of {query.receipt['n_panel']:,}",
        ),
        Number(f"{seconds:.0f} s", "From nothing to this page", "on this machine"),
    ]
    shown = {"n_cells_used": "cells", "median_counts": "median counts", "mean_confidence": "mean confidence"}
    samples = query.samples.rename(columns=shown)
    columns = [*shown.values(), *(c for c in map(str, samples) if c.startswith("fraction") and c.endswith("+"))]
    files = pd.DataFrame(
        {
            "What it is": [
                "the four simulated studies",
                "the model bundle: weights, settings, model card; this is what one shares",
                "store, checkpoints, logs and resolved settings; never shared",
                "the new study with its results",
                "one row per cell, for R and Excel",
                "one row per sample: states, signatures, marker-positive fractions",
                "the report on the new study: one file that opens without a network",
            ]
        },
        index=pd.Index(
            ["studies/", "model/", "model.work/", *(f"{QUERY}_annotated.{end}" for end in ENDINGS), REPORT],
            name="File",
        ),
    )
    return write_index(
        out,
        "carvae demo: three studies in, a new one labelled",
        figures,
        [Table("Samples of the new study", samples[columns]), Table("What lies in this folder", files)],
        numbers,
        INTRODUCTION,
        Link(
            REPORT,
            f"Open the report on {QUERY}",
            "The page that carvae report writes on every sample: a verdict on each, a map to colour and choose cells "
            "from, states with intervals, evidence, clones, limits. What follows here is what only a simulation can "
            "tell: how the answers compare with the truth.",
        ),
    )
