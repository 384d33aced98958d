"""Names of what is uploaded: from a client's words to the parts of a path that this process makes.

Only letters, digits and a few marks are left of a name, it never begins with a dot, and it is short; what points out of
its folder is refused, not mended.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

from carvae.data.readers import names_a_sample
from carvae.errors import ReadError

DATA = (".h5ad", ".h5", ".mtx", ".mtx.gz", ".tsv", ".tsv.gz", ".csv", ".csv.gz")
"""Endings of what is read: matrices, and the features, barcodes and receptors beside them."""
ARCHIVE = ".zip"
REMEDIES = {
    (".rds", ".rda", ".rdata", ".qs"): "an R object; write it as .h5ad in R with anndataR::write_h5ad(object, path)",
    (".loom",): "a loom file; write it as .h5ad: anndata.io.read_loom(path).write_h5ad(path)",
    (".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz"): "an archive of another kind; give a .zip",
    (".xlsx", ".xls", ".txt", ".pdf", ".docx"): "no matrix of counts; give what Cell Ranger or scanpy wrote",
    (".fastq", ".fastq.gz", ".fq.gz", ".bam"): "sequencing reads; run Cell Ranger first",
    (".zarr",): "a folder; zip it, or write .h5ad",
}
TAKEN = "an .h5ad, a 10x .h5, a zipped 10x folder, or the three files matrix.mtx, features.tsv and barcodes.tsv"
MAX_NAME, MAX_DEPTH, MAX_GIVEN = 80, 8, 1024
LETTERS = re.compile(r"[^\w .+=@()-]")


def safe_path(given: str) -> PurePosixPath:
    """A relative path of this process's own making for a client's path.

    Raises
    ------
    ReadError
        It is empty, too long or too deep, or points out of its folder.
    """
    shown = given[:MAX_NAME].encode("ascii", "replace").decode()
    if not given or len(given) > MAX_GIVEN:
        raise ReadError(f"a file has {'no name' if not given else 'a name of more than 1,024 letters'}; rename it")
    parts = given.replace("\\", "/").split("/")
    if "\0" in given:
        raise ReadError(f"the name {shown.replace(chr(0), '?')!r} holds a NUL byte, as no file's does; rename it")
    if given.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", given):
        raise ReadError(f"the name {shown!r} points out of its folder, so nothing of it was used; pack the files again")
    if len(parts) > MAX_DEPTH:
        raise ReadError(f"{shown!r} lies more than {MAX_DEPTH} folders deep; pack the matrix folders alone")
    return PurePosixPath(*(_plain(part) for part in parts if part not in ("", ".")) or ("file",))


def ending(name: str, known: tuple[str, ...]) -> str:
    """The longest of the known endings that the name has, in any case; empty for none."""
    lower = name.lower()
    return max((end for end in known if lower.endswith(end)), key=len, default="")


def stem(name: str) -> str:
    """A name without folders and ending."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    end = ending(last, (*DATA, ARCHIVE))
    return last[: len(last) - len(end)] or last


def home(given: str) -> str:
    """The folder for a query, by which its cells are called where its own name is one of Cell Ranger's."""
    name = safe_path(given).name
    plain = stem(name)
    if names_a_sample(plain):
        return plain
    return name if name != plain else "sample"  # with its ending it is at least the user's file


def refuse_kind(name: str) -> None:
    """Raise ReadError for a file of a kind that is not read, with what to do about it."""
    if ending(name, (*DATA, ARCHIVE)):
        return
    last = name.replace("\\", "/").rpartition("/")[2][:MAX_NAME]
    remedies = {end: remedy for ends, remedy in REMEDIES.items() for end in ends}
    if end := ending(last, tuple(remedies)):
        raise ReadError(f"{last} is {remedies[end]}")
    raise ReadError(f"{last} is not a kind of file that carvae reads; give {TAKEN}")


def is_litter(given: str) -> bool:
    """Whether an operating system left it: hidden files and what macOS packs beside a file."""
    parts = [part for part in given.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini") for part in parts)


def _plain(part: str) -> str:
    text = LETTERS.sub("_", unicodedata.normalize("NFC", part)).strip(" .")
    end = ending(text, DATA)
    base = text[: len(text) - len(end)].lstrip(".-_ ") or "file"
    while len(base.encode()) + len(end) > MAX_NAME:
        base = base[:-1]
    return base.rstrip() + end.lower()
