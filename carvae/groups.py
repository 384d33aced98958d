"""Verbs of the command line that come in groups: ``carvae studies ...``, ``carvae hub ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carvae.invocation import Quiet, start

studies = typer.Typer(help="The public CAR-T single-cell studies: list, show, fetch.", no_args_is_help=True)
hub = typer.Typer(help="Models as folders of a Hugging Face repository; nothing is sent.", no_args_is_help=True)


def _studies_from(start: str) -> list[str]:
    """Names that the shell offers."""
    from carvae.data.catalogue import names

    return [name for name in names() if name.startswith(start)]


StudyName = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="Name in the catalogue, or accession.", autocompletion=_studies_from),
]


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
    start(quiet)
    from carvae.studies import fetch as download

    for fetched in download(study, out):
        print(fetched.file)


@hub.command("export")
def hub_export(
    model: Annotated[Path, typer.Argument(help="Model bundle: the output folder of `carvae train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the repository.")],
    licence: Annotated[str, typer.Option(help="As the training data allow it, such as cc-by-4.0, or other.")],
    name: Annotated[str, typer.Option(help="What the model is called; by default as its folder.")] = "",
) -> None:
    """Write a model as the folder of a Hugging Face repository, with its card as README."""
    from carvae.model.hub import to_folder

    print(to_folder(model, out, licence, name or model.resolve().name))


@hub.command("import")
def hub_import(
    folder: Annotated[Path, typer.Argument(help="Folder of a repository, as downloaded.")],
    out: Annotated[Path, typer.Option(help="Folder for the model bundle.")],
) -> None:
    """Write the model bundle that a repository's folder holds, every hash checked."""
    from carvae.model.hub import from_folder

    print(from_folder(folder, out))
