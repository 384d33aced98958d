"""Every knob of carvae, typed: one frozen section per verb, and no default anywhere else.

A YAML file holds only what differs from the defaults here; ``section.key=value`` on the command line
differs from the YAML. A key that is not here is refused with the nearest key that is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from carvae.errors import ConfigError, join_problems
from carvae.section import Section, apply, read_yaml, sentence
from carvae.section_compare import CompareConfig
from carvae.section_patient import CarConfig, ClonesConfig
from carvae.section_plan import PlanConfig
from carvae.section_report import ReportConfig
from carvae.section_respond import PerturbConfig, RespondConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


MAX_THREADS = 1024
"""More are a slip, and what OpenMP takes for them ends the process."""


class StudyConfig(Section):
    """Where one study lies and how its own names map onto the data contract."""

    path: Path
    """File or folder (from the working folder): .h5ad, zarr, 10x .h5, 10x mtx, or a folder of those."""
    obs: dict[str, str] = Field(default_factory=dict)
    """Contract name -> column of this study, for example ``patient: donor_id``."""
    constants: dict[str, str] = Field(default_factory=dict)
    """Contract name -> one value for the whole study, for example ``tissue: blood``."""
    counts: str = "auto"
    """Where the raw counts are: ``auto``, ``X``, ``raw`` or ``layers/NAME``."""
    label: str | None = None
    """Column with the author's labels; None where the study has none."""
    missing_labels: tuple[str, ...] = ()
    """Values of the label column that mean "not labelled"."""
    mapping: str | None = None
    """Label mapping onto the tree (packaged name or path); None takes the labels as they are."""


class IngestConfig(Section):
    """Many studies to one store: which cells, which genes."""

    studies: dict[str, StudyConfig] = Field(default_factory=dict)
    """Study name -> where it is and how to read it."""
    exclude_patients: tuple[str, ...] = ()
    """Patients left out of everything: panel choice, training and validation."""
    n_top_genes: int = Field(4000, ge=10)
    """Highly variable genes in the panel (scanpy's ``seurat_v3``), before signature genes are added."""
    hvg_batch: Literal["study", "sample", "none"] = "study"
    """Within what the variable genes are ranked before the ranks are combined."""
    hvg_cells: int = Field(50_000, ge=100)
    """Cells drawn (evenly over studies) for the choice of genes; bounds the memory of ingest."""
    exclude_genes: tuple[Literal["transgene", "vdj", "mitochondrial", "ribosomal", "sex", "cell_cycle"], ...] = (
        "transgene",
        "vdj",
        "mitochondrial",
        "sex",
    )
    """Gene policy: groups that never enter the encoder. CAR transgenes name the study, V(D)J genes the clone."""
    transgenes: tuple[str, ...] = ()
    """Vector features of your references, in any case, that ``transgene`` leaves out beside the names it knows."""
    identity_genes: tuple[str, ...] = ("CD3D", "CD3E", "CD3G")
    """Genes that every cell the model is for expresses; always in the panel. Cells that want them look strange to it,
    where the training cells do not want them."""
    min_study_share: Fraction = 0.5
    """A panel gene is measured in at least this share of the studies (signature genes: in any)."""
    min_counts: int = Field(1, ge=0)
    """Cells with fewer counts over all genes are left out, and counted in the receipt."""
    chunk_size: int = Field(4096, ge=1)
    """Cells read at a time."""


class LabelsConfig(Section):
    """What is called what."""

    tree: str = "flat"
    """``flat`` (the labels as they are), a packaged tree (``tree``) or a path to a YAML tree."""
    signatures: str = "signatures"
    """Packaged gene signatures or a path to a YAML file of them."""
    weak: bool = False
    """Label cells of unlabelled studies by signatures. Such labels are marked weak wherever they go."""


class ModelConfig(Section):
    """The network (names as in scVI)."""

    n_latent: int = Field(32, ge=2)
    """Dimensions of the latent space."""
    n_hidden: int = Field(128, ge=2)
    """Width of the hidden layers."""
    n_layers: int = Field(1, ge=1)
    """Hidden layers of the encoder and of the decoder."""
    dropout_rate: Fraction = 0.1
    """Dropout after every hidden layer of the encoder."""
    gene_likelihood: Literal["nb", "zinb"] = "nb"
    """Distribution of the counts."""
    covariates: tuple[str, ...] = ("study", "sample")
    """Covariates corrected for: one embedding table each, in the decoder alone."""
    label_sharing: Fraction = 0.9
    """How far labels share what is learned with those that share a word of their name or a node of the tree: at 1
    they differ by shared parts alone where those suffice, at 0 each also has all of its own."""
    head_dropout: Fraction = 0.0
    """Dropout on the latent coordinates that the state head reads."""
    gene_penalty: float = Field(1e-2, gt=0)
    """Weight of the squared coefficients of the state head's view of the genes, against the mean label loss."""


class TrainConfig(Section):
    """One pass of semi-supervised training."""

    batch_size: int = Field(128, ge=1)
    """Cells per minibatch."""
    max_epochs: int = Field(20, ge=1)
    """Passes over the training cells."""
    min_steps: int = Field(500, ge=0)
    """Small data: passes are added until this many steps are reached."""
    lr: float = Field(4e-3, gt=0)
    """Peak learning rate of Adam (cosine schedule, warm-up over the first 5% of steps)."""
    weight_decay: float = Field(1e-6, ge=0)
    """L2 penalty of Adam."""
    kl_warmup: Fraction = 0.2
    """Share of the steps over which ``kl_weight`` and ``align_weight`` rise from 0."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the KL term after the warm-up."""
    label_weight: float = Field(50.0, ge=0)
    """Weight of the label loss (nats per labelled cell) against the ELBO (nats per cell)."""
    align_weight: float = Field(0.0, ge=0)
    """Weight of a penalty on batches that put the same state at different places: the squared distance of their means,
    in units of the latent variance. It mixes batches within states; within a state it also takes away what truly
    differs between them, so leave it at 0 where that is looked for."""
    class_balance: Fraction = 0.5
    """0 weighs every labelled cell alike, 1 every class alike; between: weight = count ** -class_balance."""
    weak_weight: Fraction = 0.3
    """Weight of a weak label against an author's label."""
    thinning: Fraction = 0.5
    """Share of cells whose encoder input is thinned to a random depth, so that shallow data are known."""
    min_depth: Fraction = 0.1
    """Least share of its counts that a thinned cell keeps."""
    gene_dropout: Fraction = 0.3
    """Share of cells from whose encoder input genes are dropped, so that missing genes are known."""
    max_gene_dropout: Fraction = 0.6
    """Greatest share of genes dropped from such a cell."""
    validation_share: Fraction = 0.15
    """Share of the patients held out for early stopping and for the scores in the card (at least one patient)."""
    patience: int = Field(5, ge=1)
    """Epochs without a better held-out loss before training stops."""
    refit: bool = False
    """After the held-out run, which gives the scores, train again on all patients for the whole schedule: for small
    cohorts, where a held-out patient is dear and one patient's loss a poor guide to when to stop."""
    calibration_folds: Literal[0, 2, 3, 4, 5, 6, 7, 8, 9, 10] = 0
    """Groups of patients (of studies, where several have labels), each labelled by a network trained on the others, to
    learn how sure labels are: calibration, sets, ``unknown``, verdicts. Costs as many more runs; 0 learns nothing."""
    unknown_rate: Fraction = 0.05
    """Share of held-out cells of known states that are called ``unknown``: the threshold on novelty is set for it."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the matrix products."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; ``auto`` takes CUDA when present."""
    cuda_graph: bool = True
    """On CUDA: record a training step once and replay it, which costs the host next to nothing."""
    data: Literal["auto", "resident", "stream"] = "auto"
    """Where the counts are during training: all on the device (``resident``), or read from the store a window of
    cells at a time, which bounds memory (``stream``). ``auto`` computes the size and takes the device where it fits."""
    devices: int = Field(1, ge=1)
    """Processes on each machine, one per GPU where there are GPUs. A minibatch is divided among all processes."""
    num_nodes: int = Field(1, ge=1)
    """Machines. On several, each process is started from outside (SLURM or torchrun)."""
    shards: int = Field(0, ge=0)
    """Pieces that the cells are cut into; each minibatch has the same number of cells of each piece, and a process
    reads its own pieces alone. Runs with equal shards see the same minibatches on any number of processes that divides
    it. 0: one per process."""
    threads: int = Field(1, ge=0, le=MAX_THREADS)
    """CPU threads of torch; 0 leaves torch's own choice. Two threads on a busy machine can be slower."""
    map_every: int = Field(0, ge=0)
    """Epochs after which a map of cells (UMAP, up to 2,000) by state and by study is drawn into the log's folder and
    W&B, with studies by number; 0 draws none. A map takes some ten seconds."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline needs no account and no network."""

    def warmth(self, progress: float) -> float:
        """Share of their full weight that the KL term and the alignment have when this share of the steps is done."""
        return min(1.0, progress / self.kl_warmup) if self.kl_warmup else 1.0


class PredictConfig(Section):
    """Embedding and labelling of new samples."""

    counts: str = "auto"
    """Where the query's raw counts are: ``auto``, ``X``, ``raw`` or ``layers/NAME``."""
    sample: str | None = None
    """Column of the query's ``obs`` that names the sample; by default ``sample`` or a customary name for it."""
    chunk_size: int = Field(4096, ge=1)
    """Cells read and embedded at a time; bounds the memory."""
    min_overlap: Fraction = 0.4
    """Below this share of the panel's genes, the query is refused."""
    min_counts: int = Field(20, ge=1)
    """Cells with fewer counts over the panel are called ``unknown``."""
    warn_overlap: Fraction = 0.9
    """Below this share a warning states the loss that was measured on held-out patients."""
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Writes for every cell the set of states that holds the true one with this probability (``carvae_set``), and the
    finest state or group of states that is at least so probable (``carvae_state_sure``)."""
    precision: Literal["32-true", "bf16"] = "32-true"
    """Arithmetic of the encoder's first layer where cells are embedded; bf16 moves coordinates by about a hundredth.
    A calibrated model labels in 32 bits whatever this says, as it was calibrated."""
    dask: str | None = None
    """Workers: the address of a Dask scheduler (``tcp://HOST:8786``), or ``local`` or ``local:N`` for N processes on
    this machine. All workers must be able to read the query and the model under their paths, and to write a ``.zarr``
    output: each writes its own cells' part of ``obsm``."""
    sheet: Path | None = None
    """CSV with one row per sample of the query (column ``sample``) and what is known of it: patient, timepoint, tissue,
    product ... Where clones are told within the patient and the query does not say who that is, as 10x does not."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where the network is: ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` takes CUDA when present."""
    threads: int = Field(0, ge=0, le=MAX_THREADS)
    """CPU threads; 0 leaves the libraries' own choice."""
    root: str | None = None
    """A state at the memory-like end, or ``auto`` for those of the highest ``memory_stem`` scores: every cell then
    gets its place in the order from there (``carvae_pseudotime``). For this, cells stay in memory."""
    car: CarConfig = Field(default_factory=CarConfig)


class MapConfig(Section):
    """Rows for the batches of a new sample in the decoder's tables of covariates."""

    obs: dict[str, str] = Field(default_factory=dict)
    """Covariate (contract name) -> column of the query, for example ``assay: chemistry``; by default the contract's or
    a customary name. The study is the file's name unless ``obs`` has a column ``study``."""
    constants: dict[str, str] = Field(default_factory=dict)
    """Covariate -> one value for the whole query, for example ``assay: 5' v2``."""
    max_cells: int = Field(20_000, ge=1)
    """Cells taken of the query, evenly over its samples; bounds memory and time."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of each sample's cells that is held out to tell whether the rows help; they are then trained on all."""


class ExplainConfig(Section):
    """Genes that speak for the states that were called, and marker genes by state."""

    max_cells: int = Field(5000, ge=1)
    """Cells taken of the query, evenly over its samples; bounds memory and time."""
    n_genes: int = Field(50, ge=1)
    """Genes listed for every state, and for every cell that is asked for."""
    barcodes: tuple[str, ...] = ()
    """Cells to explain one by one, whether they were taken or not."""
    label: str | None = None
    """Column of the query with the author's labels, shown beside the states that were called."""
    markers: str = "markers"
    """Marker genes in groups: packaged name, or path to a YAML file in the format of the signatures."""


class EvaluateConfig(Section):
    """What is held out, what is compared, and on how much of the data."""

    designs: tuple[Literal["patient", "study", "state", "reference", "response"], ...] = ("patient",)
    """Each patient, study or state held out in turn; ``reference``: train on some studies, label the others;
    ``response`` (alone): predict outcomes of patients, see ``respond``."""
    hold_out: tuple[str, ...] = ()
    """Only these patients, studies or states are held out; all in turn where empty."""
    reference: tuple[str, ...] = ()
    """Studies that the design ``reference`` trains on."""
    methods: tuple[str, ...] = (
        *("carvae", "majority", "logistic", "logistic_balanced", "knn", "scvi_logistic", "scanvi", "celltypist"),
    )
    """What is compared, each in the same folds."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """Seeds of training; figures are means over them."""
    depths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.25, 0.1, 0.05)
    """Shares of the reads to which held-out cells are thinned."""
    umis: tuple[Annotated[int, Field(ge=1)], ...] = (1000, 500)
    """UMIs per cell to which they are thinned; a cell that has fewer stays as it is."""
    missing: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    """Shares of all genes that held-out cells are deprived of, as if not measured."""
    integration_cells: int = Field(1000, ge=0)
    """Labelled cells on which the mixing of batches is scored, in the largest fold; 0 leaves it out."""
    licences: dict[str, str] = Field(default_factory=dict)
    """Study -> licence of its data, for the card."""
    processes: int = Field(1, ge=1)
    """Folds at a time, each with one thread; fewer where memory does not suffice."""


class Config(Section):
    """All settings of a run."""

    output: Path = Path("runs/carvae")
    """Folder that receives the bundle and everything beside it."""
    seed: int = Field(0, ge=0)
    """Seed of every random number."""
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    labels: LabelsConfig = Field(default_factory=LabelsConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    predict: PredictConfig = Field(default_factory=PredictConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    map: MapConfig = Field(default_factory=MapConfig)
    explain: ExplainConfig = Field(default_factory=ExplainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    clones: ClonesConfig = Field(default_factory=ClonesConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    respond: RespondConfig = Field(default_factory=RespondConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    perturb: PerturbConfig = Field(default_factory=PerturbConfig)

    @model_validator(mode="after")
    def _covariates_are_contract_names(self) -> Config:
        clash = sorted(set(self.model.covariates) & {"response", "patient", "clone_id"})
        if clash:
            raise ValueError(f"model.covariates may not hold {clash}: correcting for it would remove what is sought")
        return self

    @classmethod
    def read(cls, path: Path | str, overrides: Sequence[str] = ()) -> Config:
        """Return the config of a YAML file with ``section.key=value`` overrides applied.

        Raises
        ------
        ConfigError
            The file is missing or no YAML mapping, or a key or value is not allowed; all problems at once.
        """
        path = Path(path)
        settings = read_yaml(path)
        apply(settings, overrides)
        return cls.parse(settings, source=str(path))

    @classmethod
    def parse_overrides(cls, overrides: Sequence[str]) -> Config:
        """Return the defaults with ``section.key=value`` overrides applied; raises ConfigError."""
        settings: dict[str, Any] = {}
        apply(settings, overrides)
        return cls.parse(settings, source="the command line")

    @classmethod
    def parse(cls, settings: dict[str, Any], source: str = "config") -> Config:
        """Return the config of nested settings; raises ConfigError naming every wrong key and value."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            problems = [sentence(cls, e["loc"], e["type"], e["msg"]) for e in error.errors()]
            raise ConfigError(join_problems(f"{source} is not a valid config", problems)) from None

    def to_yaml(self) -> str:
        """Every setting, resolved, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def packaged(relative: str) -> Path:
    """Return the path of a file under ``configs/``, in a wheel or in the repository.

    Raises
    ------
    ConfigError
        There is no such file.
    """
    here = Path(__file__).resolve().parent
    roots = (here / "configs", here.parent / "configs")
    for root in roots:
        if (root / relative).exists():
            return root / relative
    known = sorted(p.stem for root in roots for p in (root / relative).parent.glob("*.yaml"))
    raise ConfigError(f"there is no packaged file {relative!r}; known here: {', '.join(known) or 'none'}")


def label_file(name: str) -> Path:
    """Path of a label YAML given by packaged name (``tree``) or by path (``my/tree.yaml``)."""
    path = Path(os.path.expanduser(name))
    if path.suffix in {".yaml", ".yml"}:
        if not path.exists():
            raise ConfigError(f"label file {name!r} does not exist; give a path to a YAML file or a packaged name")
        return path
    return packaged(f"labels/{name}.yaml")
