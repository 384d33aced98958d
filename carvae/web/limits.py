"""How much the web page takes, of everything, so that no client and no file can take all."""

from __future__ import annotations

import re
from dataclasses import dataclass

from carvae.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = {"": 1, "B": 1, "KB": KIB, "MB": MIB, "GB": GIB, "TB": GIB << 10}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the web page."""

    max_upload: int = 4 * GIB
    """Bytes of one job's files together."""
    unpacked_factor: int = 8
    """An archive may unpack to this many times ``max_upload``."""
    max_ratio: int = 200
    """How much larger than its packed form a member of an archive may be, once it is over a mebibyte."""
    max_files: int = 2000
    """Files of one job, and members of an archive."""
    stored_factor: int = 8
    """All jobs together may hold this many times ``max_upload``, as uploaded."""
    max_jobs: int = 500
    """Jobs that are kept at a time."""
    max_sessions: int = 1000
    """Browsers that are known at a time; the one seen longest ago is forgotten."""
    parallel_uploads: int = 4
    """Files that are received at a time; others wait."""
    upload_wait_s: float = 120.0
    """How long an upload waits for its turn."""
    header_s: float = 10.0
    """Time to send a request's headers."""
    silence_s: float = 20.0
    """Longest silence within a request's body."""
    grace_s: float = 10.0
    """After this time an upload must have been faster than ``least_rate``."""
    least_rate: int = 16 * KIB
    """Bytes per second."""
    max_body: int = 256 * KIB
    """Bytes of a request that is no upload."""
    connections: int = 256
    """Connections at a time."""
    check_s: float = 900.0
    """Longest time of looking at a query."""
    run_s: float = 12 * 3600.0
    """Longest time of labelling it."""
    memory_share: float = 0.8
    """Share of the machine's memory that the process of a job may take."""


def bytes_of(text: str) -> int:
    """Bytes of a size such as ``2GB`` or ``500MB`` (units of 1,024).

    Raises
    ------
    ConfigError
        It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    size = float(match[1]) * UNITS[match[2] if match[2].endswith("B") else match[2] and f"{match[2]}B"] if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is no size; write for example 500MB or 4GB")
    return int(size)


def size_text(n_bytes: float) -> str:
    """Bytes for a person: ``1.5 GB``."""
    for unit, size in (("GB", GIB), ("MB", MIB), ("KB", KIB)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{int(n_bytes)} bytes"
