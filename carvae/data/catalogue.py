"""The public CAR-T single-cell studies as data: one YAML each under ``configs/studies``, read without the network.

What is not known is absent. ``checked`` says how far each entry was read in a primary source, and is shown wherever an
entry is: an accession that nobody has verified stays marked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from carvae.config import packaged
from carvae.errors import CatalogueError, join_problems, nearest
from carvae.section import Section, sentence

CONTROLLED = {
    "phs": "dbGaP: an eRA Commons account, a data access request signed by your institution at "
    "https://dbgap.ncbi.nlm.nih.gov, then `prefetch` of sra-tools with the key that dbGaP gives",
    "EGA": "EGA: an account at https://ega-archive.org, a request to the data access committee named there, then "
    "`pyega3 fetch` with that account",
}
"""Start of an accession under controlled access -> what it needs."""
GEO = re.compile(r"GSE(\d+)")
ZENODO = re.compile(r"zenodo\.(\d+)")
ELSEWHERE = {
    "PRJNA": "https://www.ncbi.nlm.nih.gov/bioproject/{0}",
    "E-MTAB": "https://www.ebi.ac.uk/biostudies/arrayexpress/studies/{0}",
    "10.": "https://doi.org/{0}",
    "github.com": "https://{0}",
    "purl.": "https://{0}",
}
"""Start of an accession -> where a person finds it."""


class StudyFile(Section):
    """A file that can be downloaded."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    url: str = Field(pattern=r"^https?://")
    checksum: str | None = None
    """``sha256:...`` or ``md5:...``, where known."""


class Study(Section):
    """What is known of one study."""

    reference: str
    disease: str
    target: str
    product: str
    patients: int | None = None
    size: str | None = None
    """Cells and samples, in the words of the source."""
    timepoints: tuple[str, ...] = ()
    accessions: tuple[str, ...] = ()
    holds: tuple[Literal["expression", "tcr", "bcr", "protein", "response"], ...] = ("expression",)
    response: str | None = None
    """How the study defines it."""
    licence: str | None = None
    """As stated by the source; None where it states none or nobody has looked."""
    checked: Literal["seen", "secondary", "unverified"]
    """``seen``: read in a primary source or the authors' repository; ``secondary``: in a text about the study;
    ``unverified``: from memory, or without an accession."""
    note: str | None = None
    study: dict[str, Any] = Field(default_factory=dict)
    """The entry for ``ingest.studies``, but for its path, where the columns are known."""
    files: tuple[StudyFile, ...] = ()
    """Beside those that the accession's archive lists."""

    def open_accessions(self) -> tuple[str, ...]:
        """Those that anybody may download."""
        return tuple(a for a in self.accessions if not a.startswith(tuple(CONTROLLED)))

    def access(self) -> str:
        """``open``, ``controlled``, ``part controlled`` or ``unknown``."""
        if not self.accessions:
            return "unknown"
        n_open = len(self.open_accessions())
        return "open" if n_open == len(self.accessions) else "part controlled" if n_open else "controlled"


def names() -> list[str]:
    """Names of all studies, without reading what is known of them."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def entries() -> dict[str, Study]:
    """Every study by its name, in the order of the names.

    Raises
    ------
    CatalogueError
        A file of the catalogue does not hold what a study is; all such are named.
    """
    found, problems = {}, []
    for name in names():
        path = _folder() / f"{name}.yaml"
        try:
            found[name] = Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            problems += [f"{path.name}: {sentence(Study, e['loc'], e['type'], e['msg'])}" for e in error.errors()]
        except yaml.YAMLError as error:
            problems.append(f"{path.name} cannot be read as YAML: {' '.join(str(error).split())}")
    if problems:
        raise CatalogueError(join_problems("the catalogue is not in order", problems))
    return found


def find(name: str) -> tuple[str, Study]:
    """The study of that name or accession (in any case), with its name.

    Raises
    ------
    CatalogueError
        There is none; the nearest name is given.
    """
    known = entries()
    wanted = name.strip().lower()
    by_key = {key.lower(): key for key in known}
    by_key |= {a.lower(): key for key, study in known.items() for a in study.accessions}
    if wanted not in by_key:
        raise CatalogueError(
            f"the catalogue has no study {name!r}{nearest(wanted, list(by_key))}; `carvae studies list` shows all"
        )
    return by_key[wanted], known[by_key[wanted]]


def geo_files(accession: str) -> tuple[StudyFile, ...]:
    """The archive of a GEO series' supplementary files, by GEO's own rule for its address; none for another archive."""
    match = GEO.fullmatch(accession)
    if match is None:
        return ()
    group = f"GSE{match[1][:-3]}nnn"
    name = f"{accession}_RAW.tar"
    return (StudyFile(name=name, url=f"https://ftp.ncbi.nlm.nih.gov/geo/series/{group}/{accession}/suppl/{name}"),)


def _folder() -> Path:
    return packaged("studies/anderson_2023.yaml").parent
