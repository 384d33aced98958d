"""The command line: ``carvae VERB``. Data go to files, messages to stderr; heavy libraries load inside the verbs."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carvae import __version__, verbs
from carvae.config import Config
from carvae.data.atomic import inputs_kept
from carvae.data.broken import MORE_MEMORY, too_little_memory, wanted
from carvae.errors import CarvaeError, ConfigError
from carvae.groups import hub, studies
from carvae.invocation import (
    GATE_FAILED,
    AsJson,
    Clones,
    ConfigFile,
    Coverage,
    Job,
    Model,
    Overrides,
    Query,
    Quiet,
    ReportPage,
    Seed,
    at_home,
    fail,
    only,
    rows_of,
    start,
    verb_of_queries,
)

if TYPE_CHECKING:
    from carvae.model.bundle import Bundle

app = typer.Typer(
    name="carvae",
    help="Cell states of CAR-T single-cell RNA-seq: train over many studies, label new samples without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(studies, name="studies")
app.add_typer(hub, name="hub")

Out = Annotated[Path, typer.Option(help="Result: .h5ad, .zarr, .csv or .csv.gz; - prints a table.")]
FULL = "; nothing was changed: make room, and give the same command again"
REMEDY = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: FULL, errno.EROFS: "; choose another output"}
"""What to do about an error of the system."""


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def ingest(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Read, check and harmonise many studies into one store."""
    settings = start(quiet, config, overrides)
    from carvae.ingest import run

    run(settings)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train a model over many studies and write its bundle."""
    settings = start(quiet, config, overrides)
    from carvae.train import run

    run(settings)


@app.command()
@verb_of_queries("predict.", prints=True)
def embed(settings: Config, query: Query, model: Model, out: Out) -> Job:
    """Write the latent coordinates of every cell of a new sample."""
    from carvae import predict

    return Job(
        lambda: predict.run(query, model, out, settings.predict, label=False),
        lambda bundle: predict.refuse(bundle, query, out, settings.predict, label=False),
        label=False,
    )


@app.command()
@verb_of_queries("predict.", "clones.", "report.", "seed=", prints=True)
def annotate(
    settings: Config,
    query: Query,
    model: Model,
    out: Out,
    clones: Clones = None,
    report: ReportPage = None,
    coverage: Coverage = None,
) -> Job:
    """Label every cell of a new sample: state, confidence, signatures, clones, CAR; and a table of samples."""
    from carvae import predict
    from carvae.model.cell_clones import Asked

    if report is None and "report" in settings.model_fields_set:
        raise ConfigError("report.* is about the page, and none is asked for; give --report PAGE.html, or leave it out")
    asked = Asked(clones, settings.clones, settings.seed)
    job = Job(
        lambda: predict.run(query, model, out, settings.predict, label=True, asked=asked),
        lambda bundle: predict.refuse(bundle, query, out, settings.predict, label=True),
        asked=asked,
        written=lambda out: predict.written(out, label=True),
        rows=".samples.csv",
    )
    return job if report is None else _with_report(job, out, report, model, settings)


def _with_report(job: Job, out: Path, page: Path, model: Path, settings: Config) -> Job:
    """The same job, after which the report on what it wrote is written."""
    from carvae.report import after, refuse

    def both() -> Path:
        refuse(out, page)  # before any cell is labelled
        return after(job.run(), page, model, settings)

    def refused(bundle: Bundle) -> None:
        refuse(out, page)
        job.refuse(bundle)

    return replace(job, run=both, refuse=refused, written=lambda out: [*job.written(out), page])


@app.command()
@verb_of_queries("plan.", "predict.", "seed=")
def plan(
    settings: Config,
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for plan.csv and plan.png.")],
) -> Job:
    """Find the fewest cells and counts per cell that keep the answer, by thinning the data of a sample at hand."""
    from carvae import plan

    return Job(
        lambda: plan.run(query, model, out, settings.plan, settings.predict, settings.seed),
        lambda bundle: plan.refuse(bundle, out),
        rows=plan.TABLE,
    )


@app.command("map")
@verb_of_queries("map.", "predict.", "seed=")
def map_(
    settings: Config,
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the model with the new rows.")],
) -> Job:
    """Give a new sample's batches rows in the decoder, trained alone; embedding and states stay as they are."""
    from carvae import map as mapping

    return Job(
        lambda: mapping.run(query, model, out, settings.map, settings.predict, settings.seed),
        lambda bundle: mapping.refuse(bundle, model, out),
        label=False,
        written=lambda out: [out, mapping.samples_path(out)],
        rows=".samples.csv",
    )


@app.command()
@verb_of_queries("explain.", "predict.", "seed=")
def explain(
    settings: Config,
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for genes.csv, cells.csv, markers.csv and markers.png.")],
) -> Job:
    """Say which genes speak for the states that a sample's cells are called, and show marker genes by state."""
    from carvae import explain

    return Job(
        lambda: explain.run(query, model, out, settings.explain, settings.predict, settings.seed),
        lambda bundle: explain.refuse(bundle, out),
        rows=explain.GENES,
    )


@app.command()
@verb_of_queries("predict.", "seed=", prints=True)
def respond(
    settings: Config,
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Table of patients: .csv or .csv.gz; - prints it.")],
) -> Job:
    """Predict the outcome of every patient, with an interval, by a model that was trained with outcomes."""
    from carvae import respond

    return Job(
        lambda: respond.run(query, model, out, settings.predict, settings.seed),
        lambda bundle: respond.refuse(bundle, out),
        rows=".csv",
    )


@app.command()
def clones(
    table: Annotated[
        Path, typer.Argument(help="Annotated .h5ad or .zarr, a .csv or .tsv of cells, or a folder of those.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be followed, and write nothing.")] = False,
    as_json: AsJson = False,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Follow clones over a patient's time points: which stay, grow or come, and from which state to which they go."""
    own = [] if seed is None else [f"seed={seed}"]
    settings = start(quiet or dry_run, None, [*only(overrides, "clones.", "seed="), *own])
    from carvae.clones import PLOTS, TABLES, facts, look, run, sentence

    if dry_run:
        found = look(table, out, settings.clones)
        print(json.dumps(facts(found)) if as_json else sentence(found))
        return
    run(table, out, settings.clones, settings.seed)
    if as_json:
        paths = [out / name for name in (*TABLES, *PLOTS) if (out / name).exists()]
        told = {"verb": "clones", "carvae_version": __version__, "query": str(table), "seed": settings.seed}
        told |= {"out": str(out), "written": list(map(str, paths)), "rows": rows_of(paths, "samples.csv")}
        print(json.dumps(told))


@app.command()
def check(
    what: Annotated[
        Path, typer.Argument(metavar="QUERY|CONFIG", help="What `carvae annotate` or `carvae train` would read.")
    ],
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="Model bundle that a query is to be labelled by.")] = None,
    clones: Clones = None,
    as_json: AsJson = False,
) -> None:
    """Say what would happen with a query or a config, without doing it; the exit code is 1 where it is refused."""
    is_config = what.suffix in {".yaml", ".yml"}
    if is_config and model is not None:
        raise ConfigError("--model is for a query; a config makes its own model")
    reads = () if is_config else ("predict.", "clones.", "seed=")
    settings = start(True, what if is_config else None, overrides if is_config else only(overrides, *reads))
    from carvae.check import of_config, of_query
    from carvae.model.cell_clones import Asked
    from carvae.model.machine import load_on

    if is_config:
        checked = of_config(settings)
    else:
        bundle = None if model is None else load_on(model, settings.predict)
        label = bundle is not None and bundle.tree is not None
        checked = of_query(what, settings, bundle, Asked(clones, settings.clones, settings.seed), label=label)
    print(json.dumps(checked.to_dict()) if as_json else checked.text())


@app.command()
def report(
    annotated: Annotated[Path, typer.Argument(metavar="FILE", help=".h5ad or .zarr that `carvae annotate` wrote.")],
    out: Annotated[Path, typer.Option(help="The page, .html: one file that opens without a network.")],
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="Model bundle that labelled the file: its limits, scores and outcomes.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a page on an annotated file: verdicts, map, states, evidence, clones, limits, methods."""
    settings = start(quiet, None, only(overrides, "report.", "clones.", "seed="))
    from carvae.report import run

    told = shlex.join(["carvae", *sys.argv[1:]])
    run(annotated, out, model=model, config=settings.report, clones=settings.clones, seed=settings.seed, command=told)


@app.command()
@verb_of_queries("perturb.", "predict.", "seed=")
def perturb(
    settings: Config,
    query: Query,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for states.csv, samples.csv, response.csv and perturb.png.")],
) -> Job:
    """Set genes or signatures up or down in a sample's cells, and see what the model then says: a hypothesis."""
    from carvae import perturb

    return Job(
        lambda: perturb.run(query, model, out, settings.perturb, settings.predict, settings.seed),
        lambda bundle: perturb.refuse(bundle, out),
        rows=perturb.STATES,
    )


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="Reference: annotated file, its table of samples, or a folder.")
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="What is compared with it; the same file for two time points.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for compare.csv, metrics.json, compare.png (and gate.csv).")],
    overrides: Overrides = None,
    gate: Annotated[
        Path | None, typer.Option(help="Limits that B must keep, as configs/gates/release.yaml; else exit code 4.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Two runs, lots or time points side by side, with intervals, and a pass or fail for a release."""
    settings = start(quiet, None, only(overrides, "compare.", "seed="))
    from carvae.compare import METRICS, run

    compared = run(a, b, out, settings.compare, gate, settings.seed)
    if as_json:
        print(json.dumps(json.loads((compared.out / METRICS).read_text(encoding="utf-8"))))
    if not compared.passed:
        raise typer.Exit(GATE_FAILED)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Hold out patients, studies or states; compare with the usual methods; write figures, tables and a model card."""
    settings = start(quiet, config, overrides)
    from carvae.evaluate import run

    run(settings)


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
    settings = start(quiet, None, only(overrides, "predict.", "clones.", "seed="))
    from carvae.app import Address, run
    from carvae.web.limits import Limits, bytes_of

    run(model, Address(host, port, expose, browser), Limits(max_upload=bytes_of(max_upload)), settings)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"), quiet: Quiet = False
) -> None:
    """Simulate four studies, train on three, label the fourth, and show the result: the whole job in minutes."""
    start(quiet)
    from carvae.demo import run

    print(run(out))


for verb in (verbs.export, verbs.reproduce, verbs.doctor):
    app.command()(verb)


def main() -> None:
    """Run the command line; a CarvaeError becomes one sentence and exit code 1."""
    sys.argv[1:] = [at_home(argument) for argument in sys.argv[1:]]
    try:
        with inputs_kept():
            app(prog_name="carvae")
    except CarvaeError as error:
        fail(str(error))
    except OSError as error:
        said = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        fail(f"{said}{REMEDY.get(error.errno or 0, '')}")
    except (MemoryError, RuntimeError) as error:
        if not too_little_memory(error):
            raise
        fail(f"there is not enough memory{wanted(error)}; {MORE_MEMORY}")


if __name__ == "__main__":
    main()
