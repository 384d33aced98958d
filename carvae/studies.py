"""The catalogue of public studies on the command line: what there is, what is known of one, and its files.

A download goes on where it was cut off, is kept only when complete and, where a checksum is known, right. Nothing
connects to the network but `fetch`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from carvae.data.catalogue import CONTROLLED, ELSEWHERE, ZENODO, StudyFile, entries, find, geo_files
from carvae.errors import CatalogueError

log = logging.getLogger(__name__)

ZENODO_API = "https://zenodo.org/api/records/"
TRIES = 3
"""Connections for one file before giving up; a later call goes on from there."""
CHECKED = {
    "seen": "accession or figures read in a primary source or the authors' repository",
    "secondary": "read only in a text about the study",
    "unverified": "UNVERIFIED: from memory, or without an accession",
}
CHUNK = 1 << 14
"""Bytes at a time: at most so many are lost with a connection."""
TIMEOUT = 30
"""Seconds without an answer."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a download left."""

    file: Path
    sha256: str
    known: bool
    """Whether the catalogue or the archive said what the checksum must be."""


def table() -> str:
    """All studies, a line each."""
    rows = [("STUDY", "DISEASE", "PRODUCT", "PATIENTS", "HOLDS", "ACCESS", "CHECKED", "ACCESSION")]
    for name, s in entries().items():
        patients = "?" if s.patients is None else str(s.patients)
        also = ",".join(part for part in s.holds if part != "expression") or "-"
        rows.append((name, s.disease, s.product, patients, also, s.access(), s.checked, ", ".join(s.accessions) or "?"))
    widths = [min(max(map(len, column)), 34) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_cut(cell, w).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"{len(rows) - 1} studies; `carvae studies show STUDY` tells more of one"])


def description(name: str) -> str:
    """What is known of one study, with the entry for ``ingest.studies`` where its columns are known.

    Raises
    ------
    CatalogueError
        There is no such study.
    """
    key, study = find(name)
    shown = {
        "reference": study.reference,
        "disease": study.disease,
        "target": study.target,
        "product": study.product,
        "patients": study.patients or "not known here",
        "size": study.size or "not known here",
        "time points": "; ".join(study.timepoints) or "not known here",
        "holds": ", ".join(study.holds),
        "response": study.response or ("yes, see the study" if "response" in study.holds else "none known"),
        "accession": ", ".join(study.accessions) or "not known",
        "access": study.access(),
        "licence": study.licence or "none stated in the catalogue: ask the authors before you redistribute",
        "checked": CHECKED[study.checked],
    } | ({"note": study.note} if study.note else {})
    lines = [key, *(f"  {label + ':':13} {text}" for label, text in shown.items())]
    lines += [f"  {_where(accession)}" for accession in study.accessions]
    if study.study:
        entry = {"ingest": {"studies": {key: {"path": f"PATH/TO/{key}"} | study.study}}}
        lines += ["", "for your config:", "", yaml.safe_dump(entry, sort_keys=False).rstrip()]
    else:
        lines += ["", "Its obs columns are not known here: look into the files, and name them in ingest.studies."]
    return "\n".join(lines)


def fetch(name: str, out: Path) -> list[Fetched]:
    """Download the open files of a study into ``out``.

    Raises
    ------
    CatalogueError
        There is no such study, nothing of it is open, its archive is none that can be asked for files, or a download
        failed; what is complete stays, and what is not goes on with the next call.
    """
    key, study = find(name)
    files = list(study.files)
    for accession in study.open_accessions():
        files += geo_files(accession)
        if match := ZENODO.fullmatch(accession):
            files += _zenodo(match[1])
    for accession in set(study.accessions) - set(study.open_accessions()):
        log.warning("%s", _where(accession))
    if not files:
        places = "; ".join(_where(accession) for accession in study.accessions) or "it has no accession here"
        raise CatalogueError(f"nothing of {key!r} can be fetched by carvae: {places}")
    if study.checked != "seen":
        log.warning("%s: %s", key, CHECKED[study.checked])
    fetched = []
    for file in files:
        fetched.append(_download(file, out))
        known = "as expected" if fetched[-1].known else "nobody has stated what it must be; keep it with your results"
        log.info("%s: sha256 %s (%s)", fetched[-1].file, fetched[-1].sha256, known)
    return fetched


def _download(file: StudyFile, out: Path) -> Fetched:
    """One file, by pooch, which looks at the checksum and puts the file in its place when all of it is right."""
    import pooch

    known = None if file.checksum is None else file.checksum.removeprefix("sha256:")
    target = out / file.name
    if known is None and target.exists():
        log.info("%s is there already", target)
        return Fetched(target, pooch.file_hash(str(target)), known=False)
    pooch.get_logger().setLevel(logging.ERROR)
    part = out / f".{file.name}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = Path(pooch.retrieve(file.url, known, file.name, out, downloader=lambda u, to, _: _resume(u, part, to)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CatalogueError(
            f"no space is left on the disk of {out}; {part.name} holds {_size(part)} of {file.name}: make room and run "
            "the same again, it goes on from there"
        ) from None
    except ValueError:  # pooch: the checksum is another; it has removed the file
        raise CatalogueError(
            f"{file.url} does not have the checksum {file.checksum}: the file was altered or cut on its way, and was "
            "not kept; run the same again, and ask the study's authors if it stays"
        ) from None
    return Fetched(path, pooch.file_hash(str(path)), known=known is not None)


def _resume(url: str, part: Path, target: str) -> None:
    """Fill ``part`` from where it ends, then move it to ``target``; a cut connection is tried again."""
    import requests

    problem = ""
    for _ in range(TRIES):
        try:
            if _receive(url, part):
                os.replace(part, target)
                return
            problem = "the connection was cut"
        except requests.RequestException as error:
            problem = type(error).__name__
    raise CatalogueError(
        f"{url} could not be read whole in {TRIES} tries ({problem}); {_size(part)} are kept: run the same again, it "
        "goes on from there"
    )


def _receive(url: str, part: Path) -> bool:
    """Append to ``part`` what the server has beyond it; whether it is now complete.

    The server's own mark of the file is kept beside it: where it has changed, the file is read anew.
    """
    import requests

    mark = part.with_suffix(".mark")
    begun = part.stat().st_size if part.exists() and mark.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if begun:
        headers |= {"Range": f"bytes={begun}-", "If-Range": mark.read_text(encoding="utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if begun and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return _whole_length(answer) == begun or _forget(part, mark)
        _refuse_errors(answer)
        goes_on = answer.status_code == requests.codes.partial_content
        said = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if said:
            mark.write_text(said, encoding="utf-8")
        else:
            mark.unlink(missing_ok=True)
        length = _whole_length(answer) if goes_on else _number(answer.headers.get("Content-Length"))
        with part.open("ab" if goes_on else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
    if length is not None and part.stat().st_size != length:
        return False
    mark.unlink(missing_ok=True)
    return True


def _refuse_errors(answer: Any) -> None:
    if not answer.ok:
        raise CatalogueError(f"{answer.url} answers {answer.status_code} {answer.reason}; look whether it has moved")


def _whole_length(answer: Any) -> int | None:
    """Length of the whole file in ``Content-Range: bytes 5-9/10``."""
    match = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _forget(part: Path, mark: Path) -> bool:
    part.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)
    return False


def _zenodo(record: str) -> list[StudyFile]:
    """The files of a Zenodo record, with the checksums that Zenodo states."""
    import requests

    url = ZENODO_API + record
    try:
        answer = requests.get(url, timeout=TIMEOUT)
        _refuse_errors(answer)
        return [
            StudyFile(name=f["key"], url=f["links"]["self"], checksum=f["checksum"]) for f in answer.json()["files"]
        ]
    except requests.JSONDecodeError:
        raise CatalogueError(f"{url} does not list files as Zenodo does; look at it in a browser") from None
    except requests.RequestException as error:
        raise CatalogueError(f"{url} cannot be reached ({type(error).__name__}); try again later") from None
    except (ValueError, KeyError, TypeError):
        raise CatalogueError(f"{url} does not list files as Zenodo does; look at it in a browser") from None


def _where(accession: str) -> str:
    """Where an accession is found, and what it takes."""
    for start, needs in CONTROLLED.items():
        if accession.startswith(start):
            return f"{accession} is under controlled access. It needs, from {needs}"
    if geo := geo_files(accession):
        return (
            f"{accession}: https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc={accession} (fetch takes {geo[0].name})"
        )
    if match := ZENODO.fullmatch(accession):
        return f"{accession}: https://zenodo.org/records/{match[1]}"
    address = next((form for start, form in ELSEWHERE.items() if accession.startswith(start)), "{0}")
    return f"{accession}: {address.format(accession)}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _size(part: Path) -> str:
    return f"{part.stat().st_size if part.exists() else 0:,} bytes"
