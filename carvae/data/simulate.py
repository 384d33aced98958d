"""Simulated CAR-T studies for the demo and the tests: planted states, batch effects, and each study's own habits.

Nothing here is measured. Gene symbols are real; every number is drawn. What makes the studies as awkward as real
ones: different depth, gene sets, gene names (Ensembl ids, symbols out of date), column names, label vocabularies, and
places for the counts.

Axes: N cells, G genes, S states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from carvae.data.atomic import replacing_file
from carvae.data.gene_table import TABLES
from carvae.data.genes import GeneTable
from carvae.data.hdf5 import write_anndata
from carvae.errors import LabelError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MITOCHONDRIAL = "MT-"
ABUNDANT = (*"RPL RPS EEF1A1 TMSB B2M ACTB TPT1 HLA-A HLA-B HLA-C FTH1 FTL".split(), MITOCHONDRIAL)
SEX = {"male": ("RPS4Y1", "DDX3Y", "EIF1AY", "KDM5D", "UTY"), "female": ("XIST",)}
LINEAGE = {"CD4": ("CD4", "CD40LG", "TNFRSF25"), "CD8": ("CD8A", "CD8B", "CRTAM", "KLRK1")}
CYCLING = tuple(
    "MKI67 TOP2A ZWINT BIRC5 CCNB1 CCNB2 CCNA2 CDC20 CDK1 CENPF CENPA UBE2C TYMS TK1 RRM2 RRM1 MCM2 MCM3 MCM5 PCNA "
    "PCLAF STMN1 TUBA1B TUBB H2AZ1 HMGB2 NUSAP1 TPX2 AURKB KIF11".split()
)
V_GENES = {
    "TRBV": [f"TRBV{v}" for v in "2 3-1 4-1 5-4 6-2 6-5 7-9 9 10-3 12-4 14 18 20-1 24-1 27 28 29-1 30".split()],
    "TRAV": [f"TRAV{v}" for v in "2 3 4 6 8-1 8-2 9-2 10 12-2 13-1 13-2 22 23DV6 25 26-1 26-2 27 29DV5 35 41".split()],
}
UNLABELLED = "Unlabelled"
SILENT = -12.0
"""Log mean of a gene that a cell does not express."""
# Current symbol -> what it was called, or still is in the clinic.
OLD_SYMBOLS = dict(
    pair.split(">")
    for pair in (
        "ATP5F1A>ATP5A1 ATP5F1B>ATP5B ATP5F1C>ATP5C1 ATP5F1D>ATP5D ATP5F1E>ATP5E ATP5MC2>ATP5G2 ATP5MC3>ATP5G3 "
        "ATP5ME>ATP5I ATP5MG>ATP5L ATP5PD>ATP5H ATP5PF>ATP5J ATP5PO>ATP5O RACK1>GNB2L1 FYB1>FYB SEM1>SHFM1 "
        "SELENOF>SEP15 SELENOK>SELK SELENOT>SELT SELENOW>SEPW1 SEPTIN6>SEPT6 SEPTIN7>SEPT7 SEPTIN9>SEPT9 "
        "SARAF>TMEM66 SNU13>NHP2L1 H2AZ1>H2AFZ PCLAF>KIAA0101 PDCD1>PD1 HAVCR2>TIM3"
    ).split()
)


@dataclass(frozen=True, slots=True)
class Habit:
    """How common a state is, and in which cells."""

    cd8: float = 0.5
    """Share of CD8 cells."""
    product: float = 1.0
    """Relative frequency in infusion products (day 0)."""
    later: float = 1.0
    """Relative frequency after infusion."""
    failure: float = 1.0
    """Factor on the frequency in patients whose treatment fails."""


HABITS: Mapping[str, Habit] = {
    "naive-like": Habit(0.5, 1.6, 0.7, 0.7),
    "stem-like memory": Habit(0.5, 1.0, 0.7, 0.6),
    "central memory": Habit(0.4, 1.8, 1.0, 0.7),
    "effector memory": Habit(0.6, 1.2, 1.4),
    "effector/cytotoxic": Habit(0.85, 0.9, 1.8),
    "progenitor exhausted": Habit(0.7, 0.6, 0.9, 1.3),
    "terminally exhausted": Habit(0.75, 0.5, 1.2, 1.9),
    "regulatory": Habit(0.03, 0.7, 0.7, 1.5),
}
SHORT_NAMES = {
    "naive-like": "Tn", "stem-like memory": "Tscm", "central memory": "Tcm", "effector memory": "Tem",
    "effector/cytotoxic": "CTL", "progenitor exhausted": "Tpex", "terminally exhausted": "Tex", "regulatory": "Treg",
}  # fmt: skip
COARSE_NAMES = {
    "naive-like": "Memory-like", "stem-like memory": "Memory-like", "central memory": "Memory-like",
    "effector memory": "Effector", "effector/cytotoxic": "Effector", "progenitor exhausted": "Dysfunctional",
    "terminally exhausted": "Dysfunctional", "regulatory": "Treg",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StudyDesign:
    """One study: its size, its technique and the names that its authors chose."""

    name: str
    depth: float
    """Median UMI per cell."""
    columns: Mapping[str, str]
    """Contract name -> column of this study."""
    n_patients: int = 4
    days: tuple[int, ...] = (0, 14)
    """Time points of each patient; day 0 is the infusion product."""
    label: str | None = None
    """Column of the author's labels; None where the study has none."""
    vocabulary: Mapping[str, str] = field(default_factory=dict)
    """State -> the author's word for it; a state that is not here keeps its own name."""
    cycling_label: str | None = None
    """The author's one word for all cycling cells, whatever their state."""
    unlabelled: float = 0.0
    """Share of cells that the author left as ``Unlabelled``."""
    counts: str = "X"
    """``X``, or ``layers/NAME`` with log1p(CP10k) in ``X``."""
    gene_names: Literal["symbol", "old symbol", "ensembl"] = "symbol"
    """Today's symbols, some symbols of years ago (:data:`OLD_SYMBOLS`), or Ensembl ids with a version."""
    transgene: str = "CAR"
    """Name of the CAR in this study's reference genome."""
    states: tuple[str, ...] = ()
    """The states that occur in this study, all where empty. One in each study: states and studies are confounded."""


STUDIES = (
    StudyDesign(
        name="sim_lymphoma",
        depth=4000,
        columns={"patient": "donor_id", "sample": "sample_id", "timepoint_days": "day", "response": "outcome"},
        label="cell_type",
        vocabulary=SHORT_NAMES,
        transgene="Yescarta",
    ),
    StudyDesign(
        name="sim_leukaemia",
        depth=1800,
        columns={"patient": "patient", "sample": "orig.ident", "timepoint_days": "days", "response": "BOR"},
        label="annotation",
        vocabulary=COARSE_NAMES,
        cycling_label="Cycling T",
        counts="layers/counts",
        gene_names="ensembl",
        transgene="FMC63-28Z",
    ),
    StudyDesign(
        name="sim_myeloma",
        depth=2600,
        columns={"patient": "subject", "sample": "library_id", "timepoint_days": "timepoint", "response": "response"},
        n_patients=3,
        days=(0, 30),
        label="state",
        unlabelled=0.1,
        gene_names="old symbol",
        transgene="CAR",
    ),
    StudyDesign(
        name="sim_paediatric",
        depth=800,
        columns={"patient": "PatientID", "sample": "Sample", "timepoint_days": "Day", "response": "Response"},
        n_patients=3,
        transgene="CAT_scFv",
    ),
)


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """How many cells, and how hard the studies are to bring together."""

    studies: tuple[StudyDesign, ...] = STUDIES
    n_cells: int = 500
    """Cells per study."""
    state_effect: float = 1.2
    """Log fold change of a programme's genes in its state (mean; genes differ)."""
    batch_effect: float = 0.5
    """Standard deviation over genes of a study's log factor; patients have a third, samples a fifth of it."""
    missing_genes: float = 0.1
    """Share of all genes that a study lacks."""


DEFAULT_SETTINGS = SimulationSettings()


def simulate_studies(
    rng: np.random.Generator, programmes: Mapping[str, Sequence[str]], settings: SimulationSettings = DEFAULT_SETTINGS
) -> list[ad.AnnData]:
    """Draw one AnnData per study design; the same generator state gives the same studies.

    The cells' truth is in ``obs`` as ``true_state``, ``true_lineage`` and ``true_cycling`` beside the study's own
    columns. ``uns["title"]`` is the study's name. Counts are negative binomial with a dispersion per gene.

    Parameters
    ----------
    rng
        Source of all randomness; each study draws from a child of it.
    programmes
        State -> symbols of the genes that are up in it; every state given is planted.
    settings
        Size and difficulty.

    Raises
    ------
    LabelError
        A programme has no genes, or there is no programme.
    """
    empty = sorted(state for state, genes in programmes.items() if not genes)
    if empty or not programmes:
        raise LabelError(f"states without programme genes: {', '.join(empty) or 'all'}; give each at least one symbol")
    shared, *own = rng.spawn(1 + len(settings.studies))
    biology = _draw_biology(shared, programmes, settings)
    return [_draw_study(r, biology, design, settings) for r, design in zip(own, settings.studies, strict=True)]


def write_studies(studies: Sequence[ad.AnnData], folder: Path) -> list[Path]:
    """Write each study to ``folder/<title>.h5ad`` and return the paths; a file appears only when it is whole."""
    paths = [folder / f"{study.uns['title']}.h5ad" for study in studies]
    for study, path in zip(studies, paths, strict=True):
        with replacing_file(path) as scratch:
            write_anndata(study, scratch, compression="gzip")
    return paths


@dataclass(frozen=True, slots=True)
class _Biology:
    """What all studies share: the genes and how they answer to state, lineage and cycle (log scale)."""

    genes: NDArray[np.str_]
    states: tuple[str, ...]
    base_G: Floats
    state_SG: Floats
    cd8_G: Floats
    cycling_G: Floats
    dispersion_G: Floats

    def index(self, symbols: Sequence[str]) -> Integers:
        """Columns of those genes."""
        return np.searchsorted(self.genes, sorted(symbols))


def background_genes() -> list[str]:
    """Symbols of the genes that every simulated cell may express, families spelled out."""
    lines = (TABLES / "background_genes.txt").read_text(encoding="utf-8").splitlines()
    families = (line.partition(":") for line in lines if not line.startswith("#"))
    return [prefix + ending for prefix, _, endings in families for ending in endings.split()]


def _draw_biology(
    rng: np.random.Generator, programmes: Mapping[str, Sequence[str]], settings: SimulationSettings
) -> _Biology:
    marker_lists = (*programmes.values(), *LINEAGE.values(), *SEX.values(), CYCLING, *V_GENES.values())
    genes = np.array(sorted({g for listed in (background_genes(), *marker_lists) for g in listed}))
    planted_G = np.isin(genes, [g for listed in programmes.values() for g in listed])
    cycling_G = np.isin(genes, CYCLING)

    base_G = rng.normal(-0.6, 1.0, genes.size)
    base_G[[g.startswith(ABUNDANT) for g in genes]] += 2.0
    base_G[planted_G] += 0.6
    base_G[cycling_G] -= 1.0
    # A state also shifts many genes a little, as in real cells; only its programme moves far.
    state_SG = rng.normal(0.0, 0.2, (len(programmes), genes.size)) * ~planted_G
    for row, up in zip(state_SG, programmes.values(), strict=True):
        up_G = np.isin(genes, list(up))
        row[up_G] = settings.state_effect * rng.uniform(0.5, 1.5, up_G.sum())
    return _Biology(
        genes=genes,
        states=tuple(programmes),
        base_G=base_G,
        state_SG=state_SG,
        cd8_G=2.0 * (np.isin(genes, LINEAGE["CD8"]).astype(float) - np.isin(genes, LINEAGE["CD4"])),
        cycling_G=2.0 * cycling_G.astype(float),
        dispersion_G=rng.lognormal(1.5, 0.5, genes.size),
    )


def _draw_study(
    rng: np.random.Generator, biology: _Biology, design: StudyDesign, settings: SimulationSettings
) -> ad.AnnData:
    cells = _draw_cells(rng, biology.states, design, settings.n_cells)
    counts_NG = _draw_counts(rng, biology, cells, design, settings)
    symbols = np.append(biology.genes, design.transgene).astype(object)
    kept = rng.permutation(symbols.size)[: round((1 - settings.missing_genes) * symbols.size)]
    if symbols.size - 1 not in kept:
        kept[0] = symbols.size - 1
    names = _gene_names(symbols[kept], design)
    counts = sparse.csr_matrix(counts_NG[:, kept].astype(np.int32))
    obs = _own_obs(rng, cells, design)
    study = ad.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=names), uns={"title": design.name})
    if design.counts != "X":
        study.layers[design.counts.removeprefix("layers/")] = counts
        per_cell = np.maximum(counts.sum(axis=1).A1, 1)
        study.X = sparse.csr_matrix(counts.multiply(1e4 / per_cell[:, None]), dtype=np.float32).log1p()
    return study


def _gene_names(symbols: NDArray[np.object_], design: StudyDesign) -> list[str]:
    if design.gene_names == "ensembl":
        id_of = {symbol: f"{gene_id}.1" for gene_id, symbol in GeneTable.default().by_id.items()}
        return [id_of.get(symbol, symbol) for symbol in symbols]
    if design.gene_names == "old symbol":
        return [OLD_SYMBOLS.get(symbol, symbol) for symbol in symbols]
    return list(symbols)


def _draw_cells(rng: np.random.Generator, states: Sequence[str], design: StudyDesign, n_cells: int) -> pd.DataFrame:
    """One row per cell with contract names and the truth; patients are named after their study."""
    habits = [HABITS.get(state, Habit()) for state in states]
    patients = rng.integers(design.n_patients, size=n_cells)
    days = np.asarray(design.days)[rng.integers(len(design.days), size=n_cells)]
    fails = rng.permutation(design.n_patients) % 2 == 1
    sex = rng.choice(list(SEX), size=design.n_patients)
    state = np.empty(n_cells, dtype=np.int64)
    present = np.flatnonzero(np.isin(states, design.states)) if design.states else np.arange(len(states))
    for patient in range(design.n_patients):
        for day in design.days:
            weight = np.array([(h.later if day else h.product) * (h.failure if fails[patient] else 1) for h in habits])
            here = (patients == patient) & (days == day)
            weight = weight[present]
            state[here] = rng.choice(present, size=here.sum(), p=rng.dirichlet(12 * weight / weight.sum()))
    names = np.array([f"{design.name}_P{p + 1}" for p in range(design.n_patients)])[patients]
    return pd.DataFrame(
        {
            "patient": names,
            "sample": [f"{name}_D{day}" for name, day in zip(names, days, strict=True)],
            "timepoint_days": days,
            "response": np.where(fails[patients], "NR", "CR"),
            "sex": sex[patients],
            "true_state": np.array(states)[state],
            "true_lineage": np.where(rng.random(n_cells) < np.array([h.cd8 for h in habits])[state], "CD8", "CD4"),
            "true_cycling": rng.random(n_cells) < np.where(days == 0, 0.25, 0.1),
        }
    )


def _draw_counts(
    rng: np.random.Generator, biology: _Biology, cells: pd.DataFrame, design: StudyDesign, settings: SimulationSettings
) -> Integers:
    """Negative binomial counts [N, G + 1], the transgene last."""
    n_cells, n_genes = len(cells), biology.genes.size
    state = pd.Categorical(cells["true_state"], categories=biology.states).codes
    # Cells differ in how far they are in their state, and each holds something of another one.
    own_N, other_N = rng.beta(6, 2, n_cells), 0.4 * rng.beta(1, 4, n_cells)
    log_NG = biology.base_G + own_N[:, None] * biology.state_SG[state]
    log_NG += other_N[:, None] * biology.state_SG[rng.integers(len(biology.states), size=n_cells)]
    log_NG += np.where(cells["true_lineage"] == "CD8", 0.5, -0.5)[:, None] * biology.cd8_G
    log_NG += cells["true_cycling"].to_numpy()[:, None] * biology.cycling_G
    for group, share in (("study", 1.0), ("patient", 1 / 3), ("sample", 1 / 5)):
        codes = np.zeros(n_cells, dtype=int) if group == "study" else pd.factorize(cells[group])[0]
        log_NG += rng.normal(0, share * settings.batch_effect, (codes.max() + 1, n_genes))[codes]
    log_NG[:, np.char.startswith(biology.genes, MITOCHONDRIAL)] += rng.normal(0, 0.3, n_cells)[:, None]
    _set_sex_and_receptor(rng, biology, cells, log_NG)

    share_NG = np.exp(log_NG)
    share_NG /= share_NG.sum(axis=1, keepdims=True)
    depth_N = design.depth * rng.lognormal(0, 0.35, n_cells)
    transgene_N = np.where(cells["true_cycling"], 1.5, 1.0) * depth_N * 5e-4
    mean_NG = np.column_stack([share_NG * depth_N[:, None], transgene_N])
    dispersion_G = np.append(biology.dispersion_G, 1.0)
    return rng.poisson(rng.gamma(dispersion_G, mean_NG / dispersion_G))


def _set_sex_and_receptor(rng: np.random.Generator, biology: _Biology, cells: pd.DataFrame, log_NG: Floats) -> None:
    """Write into the log means: no genes of the other sex, and one V gene per chain, from few clones per patient."""
    for sex, absent in SEX.items():
        log_NG[np.ix_(np.flatnonzero(cells["sex"] != sex), biology.index(absent))] = SILENT
    for genes in V_GENES.values():
        columns = biology.index(genes)
        log_NG[:, columns] = SILENT
        for patient in cells["patient"].unique():
            rows = np.flatnonzero(cells["patient"] == patient)
            log_NG[rows, rng.choice(columns, size=rows.size, p=rng.dirichlet(np.full(columns.size, 0.5)))] = 1.5


def _own_obs(rng: np.random.Generator, cells: pd.DataFrame, design: StudyDesign) -> pd.DataFrame:
    """The study's ``obs``: its own column names and words, and the hidden truth."""
    obs = cells[list(design.columns)].rename(columns=dict(design.columns))
    if design.label is not None:
        label = cells["true_state"].map(lambda state: design.vocabulary.get(state, state))
        if design.cycling_label is not None:
            label = label.mask(cells["true_cycling"], design.cycling_label)
        obs[design.label] = label.mask(rng.random(len(cells)) < design.unlabelled, UNLABELLED)
    truth = ["true_state", "true_lineage", "true_cycling"]
    obs = pd.concat([obs, cells[truth]], axis=1)
    text = obs.select_dtypes(exclude=["number", "bool"]).columns
    obs[text] = obs[text].astype("category")
    letters = rng.choice(list("ACGT"), size=(len(cells), 16))
    obs.index = pd.Index([f"{sample}_{''.join(row)}-1" for sample, row in zip(cells["sample"], letters, strict=True)])
    return obs
