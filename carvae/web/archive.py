"""Zip archives unpacked as strangers': nothing lands outside the folder, nothing is larger than it may be."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from carvae.errors import ReadError
from carvae.web.limits import MIB, Limits, size_text
from carvae.web.names import TAKEN, is_litter, safe_path

PLAIN = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
ENCRYPTED = 0x1
DOS_REPARSE = 0x400


def unpack(archive: Path, folder: Path, limits: Limits, progress: Callable[[float], None] | None = None) -> None:
    """Unpack a zip into a new folder; ``progress`` is told the share that is done.

    Sizes are those of what comes out, not those that the archive states of itself.

    Raises
    ------
    ReadError
        It is broken, locked or hostile; what was unpacked so far is the caller's to remove.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = _members(packed, limits)
            total, done = sum(member.file_size for member in members), 0
            room = limits.max_upload * limits.unpacked_factor
            if total > room:
                raise ReadError(f"the zip unpacks to {size_text(total)}, more than {size_text(room)}; {_REPACK}")
            targets = _targets(members, folder)
            for member, target in targets.items():
                done += _write(packed, members[member], target, limits, room - done)
                if progress is not None:
                    progress(done / max(total, 1))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ReadError(f"the zip is broken or cut off ({reason}); pack it or upload it again") from None


_REPACK = "pack the matrix folders alone, or raise --max-upload"


def _members(packed: zipfile.ZipFile, limits: Limits) -> list[zipfile.ZipInfo]:
    """The files in the archive, each looked at; litter left out."""
    entries = packed.infolist()
    if len(entries) > limits.max_files:
        raise ReadError(f"the zip holds {len(entries):,} files, more than {limits.max_files:,}; {_REPACK}")
    members = []
    for entry in entries:
        safe_path(entry.filename)
        kind = entry.external_attr >> 16
        if (kind and stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR)) or entry.external_attr & DOS_REPARSE:
            raise ReadError("the zip holds a link or a device, not only files, and nothing was used; pack it again")
        if entry.is_dir() or is_litter(entry.filename):
            continue
        if entry.flag_bits & ENCRYPTED:
            raise ReadError("the zip is locked with a password; pack it without one")
        if entry.compress_type not in PLAIN:
            raise ReadError("the zip is packed by a method that is not read; pack it with the usual one (deflate)")
        if entry.file_size > MIB and entry.file_size > limits.max_ratio * max(entry.compress_size, 1):
            raise ReadError(f"a file in the zip grows more than {limits.max_ratio}-fold when unpacked, as no counts do")
        members.append(entry)
    if not members:
        raise ReadError(f"the zip holds no files; give {TAKEN}")
    return members


def _targets(members: list[zipfile.ZipInfo], folder: Path) -> dict[int, Path]:
    """Where each member goes; two that would meet in one place are refused."""
    targets = {number: folder / safe_path(member.filename) for number, member in enumerate(members)}
    places = {str(path).casefold() for path in targets.values()}
    if len(places) < len(targets):
        raise ReadError("the zip holds files whose names differ in nothing but marks or case; rename them, pack again")
    parents = {str(parent).casefold() for path in targets.values() for parent in path.parents}
    if places & parents:
        raise ReadError("the zip holds a file and a folder of one name; rename one, and pack again")
    return targets


def _write(packed: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, limits: Limits, room: int) -> int:
    """Unpack one member; returns its size."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    most = min(room, max(MIB, limits.max_ratio * member.compress_size))
    size = 0
    with packed.open(member) as source, target.open("xb") as file:
        while block := source.read(MIB):
            size += len(block)
            if size > most:
                raise ReadError(f"the zip holds more than it says of itself, so nothing of it was used; {_REPACK}")
            file.write(block)
    return size
