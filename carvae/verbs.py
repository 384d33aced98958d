"""Verbs of the command line about what is there already: ``export``, ``reproduce`` and ``doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from carvae.invocation import GATE_FAILED, AsJson, Quiet, start


def export(
    model: Annotated[Path, typer.Argument(help="Model bundle: the output folder of `carvae train`.")],
    out: Annotated[Path, typer.Option(help="Folder for the model that is given away.")],
    share: Annotated[
        bool, typer.Option("--share", help="Leave out the decoder, and all that is of single training samples.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a model to give away: checked, and with --share without its decoder and the places of training samples."""
    start(quiet)
    from carvae.export import run

    run(model, out, share=share)


def reproduce(
    output: Annotated[Path, typer.Argument(help="A model, or an annotated .h5ad or .zarr.")],
    model: Annotated[Path | None, typer.Option(help="Model that labelled the file.")] = None,
    query: Annotated[Path | None, typer.Option(help="What was labelled; by default the file's own counts.")] = None,
    quiet: Quiet = False,
) -> None:
    """Make an output again in a temporary place and say whether it is the same; the exit code is 4 where it is not."""
    start(quiet)
    from carvae.reproduce import run

    found = run(output, model, query)
    print(found.sentence())
    if not found.same:
        raise typer.Exit(GATE_FAILED)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has: Python, libraries, GPU, threads, caches."""
    from carvae.doctor import examine, report

    findings = examine()
    print(json.dumps({f.what: f.found for f in findings}) if as_json else report(findings))
