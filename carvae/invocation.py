"""What the verbs of the command line share: their options, how they begin, and what they say in the end.

Everything that takes a QUERY takes ``--dry-run``, ``--json``, ``--threads``, ``--device`` and ``--seed``; the last
three are settings (``predict.threads``, ``predict.device``, ``seed``) under a shorter name.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carvae import __version__
from carvae.config import Config
from carvae.data.atomic import scratch_folder
from carvae.errors import ConfigError

if TYPE_CHECKING:
    from carvae.check import Checked
    from carvae.model.bundle import Bundle
    from carvae.model.cell_clones import Asked

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/reference.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Settings to change.")]
Query = Annotated[Path, typer.Argument(help=".h5ad, zarr, 10x .h5, 10x mtx folder, or a folder of those.")]
Model = Annotated[Path, typer.Option(help="Model bundle: the output folder of `carvae train`.")]
Clones = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE_OR_FOLDER",
        help="T-cell receptors: 10x filtered_contig_annotations.csv, AIRR .tsv, .h5ad of scirpy, or a folder of those.",
    ),
]
ReportPage = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Also write the report: a page with verdicts and the map.")
]
Coverage = Annotated[
    float | None,
    typer.Option(help="Write the set of states of each cell that holds the right one this often, as predict.coverage."),
]
"""Taken by `verb_of_queries`: the verb itself finds it among its settings."""
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a summary for programs, as one line of JSON.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random number.")]

OF_QUERIES: dict[str, tuple[Any, object]] = {
    "overrides": (Overrides, None),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Say what would happen, as `carvae check`.")], False),
    "as_json": (AsJson, False),
    "threads": (Annotated[int | None, typer.Option(help="CPU threads; 0 leaves the libraries' own choice.")], None),
    "device": (Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.")], None),
    "seed": (Seed, None),
    "quiet": (Quiet, False),
}
"""Option of every verb with a query -> its type and default."""
GATE_FAILED = 4
"""Exit code where results were written and do not hold: a gate, or an output that came out otherwise."""
STDOUT = "-"
NAMES = ("study", "timepoint", "tissue", "product", "state", "gene", "model")
"""Columns of tables that are words, also where they look like numbers."""


def at_home(argument: str) -> str:
    """An argument ``--name=~/place`` with the home folder in it: no shell expands it there, and ``~`` would be made."""
    name, sign, place = argument.partition("=")
    return f"{name}={os.path.expanduser(place)}" if sign and name.startswith("--") else argument


def fail(message: str) -> None:
    """End the command line with a sentence and exit code 1."""
    print(f"carvae: {message}", file=sys.stderr)
    raise SystemExit(1)


@dataclass(frozen=True, slots=True)
class Job:
    """What a verb is to do with a query."""

    run: Callable[[], Path]
    """Does it, and returns what it wrote."""
    refuse: Callable[[Bundle], None]
    """Raises what it would refuse before it looks at the query's cells."""
    label: bool = True
    """Whether cells are labelled."""
    asked: Asked | None = None
    """What is asked about clones."""
    written: Callable[[Path], list[Path]] = lambda out: sorted(out.iterdir()) if out.is_dir() else [out]
    """The files of the result."""
    rows: str = ""
    """End of the name of the table whose rows are the summary."""


def verb_of_queries(*reads: str, prints: bool = False) -> Callable[[Callable[..., Job]], Callable[..., None]]:
    """Make a verb of a function that takes the settings, a query and a model, and says what is to be done.

    Parameters
    ----------
    reads
        Settings that the verb reads, such as ``predict.`` or ``seed=``.
    prints
        Whether the result is a table that ``--out -`` prints.
    """

    def decorated(verb: Callable[..., Job]) -> Callable[..., None]:
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in OF_QUERIES.items()
        ]

        def command(**given: Any) -> None:
            common = {name: given.pop(name) for name in OF_QUERIES} | {"coverage": given.pop("coverage", None)}
            name = verb.__name__.rstrip("_")
            if str(given["out"]) == STDOUT and not prints:
                raise ConfigError(f"{name} writes a folder, which cannot be printed; give --out a name")
            if str(given["out"]) == STDOUT and given.get("report") is not None:
                raise ConfigError(
                    "--report is made of a file with counts, and --out - prints a table; give --out A.h5ad"
                )
            _do(name, given, common, lambda settings: verb(settings, **given), reads)

        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        command.__signature__ = inspect.Signature([*parameters, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return command

    return decorated


def _do(
    name: str,
    given: dict[str, Any],
    common: dict[str, Any],
    job_of: Callable[[Config], Job],
    reads: tuple[str, ...],
) -> None:
    """Run a verb, or say what it would do."""
    as_json, piped = common["as_json"], str(given["out"]) == STDOUT
    if as_json and piped and not common["dry_run"]:
        raise ConfigError("--json and --out - both write to the standard output; leave one out")
    flags = {f"predict.{flag}": common[flag] for flag in ("threads", "device", "coverage")} | {"seed": common["seed"]}
    own = [f"{key}={value}" for key, value in flags.items() if value is not None]
    settings = start(common["quiet"] or common["dry_run"], None, [*only(common["overrides"], *reads), *own])
    warned = _Warnings()
    logging.getLogger("carvae").addHandler(warned)
    begun = time.monotonic()
    try:
        with _piped(given, shown=not common["dry_run"]) if piped else _as_it_is():
            job = job_of(settings)
            if common["dry_run"]:
                checked = _checked(job, given["query"], given["model"], settings)
                print(json.dumps(checked.to_dict()) if as_json else checked.text())
                return
            out = job.run()
    finally:
        logging.getLogger("carvae").removeHandler(warned)
    if as_json:
        paths = job.written(out)
        summary = {
            "verb": name,
            "carvae_version": __version__,
            "query": str(given["query"]),
            "model": str(given["model"]),
            "bundle_id": _bundle_id(given["model"]),
            "seed": settings.seed,
            "out": str(out),
            "written": list(map(str, paths)),
            "seconds": round(time.monotonic() - begun, 2),
            "warnings": warned.said,
            "rows": rows_of(paths, job.rows),
        }
        print(json.dumps(summary))


def _checked(job: Job, query: Path, model: Path, settings: Config) -> Checked:
    """What the verb would do; raises what it would refuse."""
    from carvae.check import of_query
    from carvae.model.cell_clones import Asked
    from carvae.model.machine import load_on

    bundle = load_on(model, settings.predict)
    job.refuse(bundle)
    return of_query(query, settings, bundle, job.asked or Asked(config=settings.clones), label=job.label)


class _Warnings(logging.Handler):
    """Keeps warnings for the summary; they are on stderr as well."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _piped(given: dict[str, Any], *, shown: bool) -> Iterator[None]:
    """Let a verb write its table to a scratch file that goes to the standard output when it is complete."""
    with scratch_folder() as folder:
        given["out"] = folder / "table.csv"
        yield
        if shown:
            _print(given["out"])


def _print(table: Path) -> None:
    """A table to the standard output; whoever reads it may stop early, as ``head`` does."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            shutil.copyfileobj(file, sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the end


def _bundle_id(model: Path) -> str:
    """As `Bundle.bundle_id`; the model was read by then."""
    return str(json.loads((model / "model.json").read_text(encoding="utf-8"))["sha256"])[:12]


def rows_of(paths: list[Path], end: str) -> list[dict[str, Any]]:
    """Rows of the main table, with null for what is missing."""
    from carvae.data.tables import read_table

    table = next((path for path in paths if end and path.name.endswith(end)), None)
    rows: list[dict[str, Any]] = (
        [] if table is None else json.loads(read_table(table, text=NAMES).to_json(orient="records"))
    )
    return rows


def only(overrides: list[str] | None, *known: str) -> list[str]:
    """The overrides, all of which a verb reads."""
    if idle := [override for override in overrides or [] if not override.startswith(known)]:
        read = " and ".join(f"{name.rstrip('=')}*" if name.endswith(".") else name.rstrip("=") for name in known)
        raise ConfigError(f"{', '.join(map(repr, idle))} changes nothing here; this verb reads {read} alone")
    return overrides or []


def start(quiet: bool, config: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Set up messages and return the settings."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("carvae").setLevel(logging.WARNING if quiet else logging.INFO)
    if config is None:
        return Config.parse_overrides(overrides or [])
    return Config.read(config, overrides or [])
