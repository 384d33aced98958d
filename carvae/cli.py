"""The command line: ``carvae VERB``. Data go to files, messages to stderr; heavy libraries load inside the verbs."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from carvae import __version__
from carvae.config import Config
from carvae.errors import CarvaeError, ConfigError

app = typer.Typer(
    name="carvae",
    help="Cell states of CAR-T single-cell RNA-seq: train over many studies, label new samples without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

studies = typer.Typer(help="The public CAR-T single-cell studies: list, show, fetch.", no_args_is_help=True)
app.add_typer(studies, name="studies")


def _studies_from(start: str) -> list[str]:
    """Names that the shell offers."""
    from carvae.data.catalogue import names

    return [name for name in names() if name.startswith(start)]


StudyName = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="Name in the catalogue, or accession.", autocompletion=_studies_from),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/reference.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Settings to change.")]
Query = Annotated[Path, typer.Argument(help=".h5ad, zarr, 10x .h5, 10x mtx folder, or a folder of those.")]
Model = Annotated[Path, typer.Option(help="Model bundle: the output folder of `carvae train`.")]
Out = Annotated[Path, typer.Option(help="Result: .h5ad, .zarr, .csv or .csv.gz.")]
Clones = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE_OR_FOLDER",
        help="T-cell receptors: 10x filtered_contig_annotations.csv, AIRR .tsv, .h5ad of scirpy, or a folder of those.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def ingest(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Read, check and harmonise many studies into one store."""
    settings = _start(quiet, config, overrides)
    from carvae.ingest import run

    run(settings)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train a model over many studies and write its bundle."""
    settings = _start(quiet, config, overrides)
    from carvae.train import run

    run(settings)


@app.command()
def embed(query: Query, model: Model, out: Out, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Write the latent coordinates of every cell of a new sample."""
    settings = _start(quiet, None, _only(overrides, "predict."))
    from carvae.predict import run

    run(query, model, out, settings.predict, label=False)


@app.command()
def annotate(
    query: Query, model: Model, out: Out, overrides: Overrides = None, clones: Clones = None, quiet: Quiet = False
) -> None:
    """Label every cell of a new sample: state, confidence, signatures, clones, CAR; and a table of samples."""
    settings = _start(quiet, None, _only(overrides, "predict.", "clones.", "seed="))
    from carvae.model.cell_clones import Asked
    from carvae.predict import run

    run(query, model, out, settings.predict, label=True, asked=Asked(clones, settings.clones, settings.seed))


@app.command()
def plan(
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for plan.csv and plan.png.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Find the fewest cells and counts per cell that keep the answer, by thinning the data of a sample at hand."""
    settings = _start(quiet, None, _only(overrides, "plan.", "predict.", "seed="))
    from carvae.plan import run

    run(query, model, out, settings.plan, settings.predict, settings.seed)


@app.command()
def clones(
    table: Annotated[
        Path, typer.Argument(help="Annotated .h5ad or .zarr, a .csv or .tsv of cells, or a folder of those.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Follow clones over a patient's time points: which stay, grow or come, and from which state to which they go."""
    settings = _start(quiet, None, _only(overrides, "clones.", "seed="))
    from carvae.clones import run

    run(table, out, settings.clones, settings.seed)


@app.command("map")
def map_(
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the model with the new rows.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Give a new sample's batches rows in the decoder, trained alone; embedding and states stay as they are."""
    settings = _start(quiet, None, _only(overrides, "map.", "predict.", "seed="))
    from carvae.map import run

    run(query, model, out, settings.map, settings.predict, settings.seed)


@app.command()
def explain(
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for genes.csv, cells.csv, markers.csv and markers.png.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Say which genes speak for the states that a sample's cells are called, and show marker genes by state."""
    settings = _start(quiet, None, _only(overrides, "explain.", "predict.", "seed="))
    from carvae.explain import run

    run(query, model, out, settings.explain, settings.predict, settings.seed)


@app.command()
def respond(
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Table of patients: .csv or .csv.gz.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Predict the outcome of every patient, with an interval, by a model that was trained with outcomes."""
    settings = _start(quiet, None, _only(overrides, "predict.", "seed="))
    from carvae.respond import run

    run(query, model, out, settings.predict, settings.seed)


@app.command()
def perturb(
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for states.csv, samples.csv, response.csv and perturb.png.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Set genes or signatures up or down in a sample's cells, and see what the model then says: a hypothesis."""
    settings = _start(quiet, None, _only(overrides, "perturb.", "predict.", "seed="))
    from carvae.perturb import run

    run(query, model, out, settings.perturb, settings.predict, settings.seed)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Hold out patients, studies or states; compare with the usual methods; write figures, tables and a model card."""
    settings = _start(quiet, config, overrides)
    from carvae.evaluate import run

    run(settings)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As one line of JSON.")] = False) -> None:
    """Say what this machine has: Python, libraries, GPU, threads, caches."""
    from carvae.doctor import examine, report

    findings = examine()
    print(json.dumps({f.what: f.found for f in findings}) if as_json else report(findings))


@studies.command("list")
def list_() -> None:
    """Print the catalogue, a line per study."""
    from carvae.studies import table

    print(table())


@studies.command()
def show(study: StudyName) -> None:
    """Print what is known of a study, and the entry for your config."""
    from carvae.studies import description

    print(description(study))


@studies.command()
def fetch(
    study: StudyName, out: Annotated[Path, typer.Option(help="Folder for the files.")], quiet: Quiet = False
) -> None:
    """Download a study's open files; a download that was cut off goes on."""
    _start(quiet)
    from carvae.studies import fetch as download

    for fetched in download(study, out):
        print(fetched.file)


@app.command("app")
def app_(
    model: Annotated[list[Path], typer.Option(help="Model bundle; may be given several times.")],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8765,
    expose: Annotated[bool, typer.Option("--expose", help="Allow a --host that other machines can reach.")] = False,
    max_upload: Annotated[str, typer.Option(metavar="SIZE", help="Largest upload, such as 500MB or 4GB.")] = "4GB",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    quiet: Quiet = False,
) -> None:
    """Open a web page on this machine: drop a file, see what it holds, get the labelled map and the report."""
    settings = _start(quiet, None, _only(overrides, "predict.", "clones.", "seed="))
    from carvae.app import Address, run
    from carvae.web.limits import Limits, bytes_of

    run(model, Address(host, port, expose, browser), Limits(max_upload=bytes_of(max_upload)), settings)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"), quiet: Quiet = False
) -> None:
    """Simulate four studies, train on three, label the fourth, and show the result: the whole job in minutes."""
    _start(quiet)
    from carvae.demo import run

    print(run(out))


def main() -> None:
    """Run the command line; a CarvaeError becomes one sentence and exit code 1."""
    try:
        app(prog_name="carvae")
    except CarvaeError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))


def _only(overrides: list[str] | None, *known: str) -> list[str]:
    """The overrides, all of which a verb reads."""
    if idle := [override for override in overrides or [] if not override.startswith(known)]:
        read = " and ".join(f"{name.rstrip('=')}*" if name.endswith(".") else name.rstrip("=") for name in known)
        raise ConfigError(f"{', '.join(map(repr, idle))} changes nothing here; this verb reads {read} alone")
    return overrides or []


def _start(quiet: bool, config: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Set up messages and return the settings."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("carvae").setLevel(logging.WARNING if quiet else logging.INFO)
    if config is None:
        return Config.parse_overrides(overrides or [])
    return Config.read(config, overrides or [])


def _fail(message: str) -> None:
    print(f"carvae: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
