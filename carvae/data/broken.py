"""What libraries raise on a file that they cannot read, as one sentence."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from carvae.errors import CarvaeError, ReadError

WHAT_BREAKS = (
    OSError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError,
    OverflowError, zlib.error,
)  # fmt: skip
OUT_OF_MEMORY = re.compile(
    "not enough memory|can't (allocate memory|start new thread)|out of memory|memory allocation failed", re.IGNORECASE
)
"""What torch, Python of threads, and HDF5 say instead of a MemoryError."""
MORE_MEMORY = (
    "give it more memory (a limit of the shell or of a container counts as well), lower the chunk_size of the verb, or "
    "give it fewer files at a time"
)
"""What helps where memory ran out."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a broken file into one sentence."""
    try:
        yield
    except CarvaeError:
        raise
    except WHAT_BREAKS as error:
        if too_little_memory(error):
            raise ReadError(f"there is not enough memory to read {what}{wanted(error)}; {MORE_MEMORY}") from error
        seen = " ".join(str(error).split()) or type(error).__name__
        if "truncated file" in seen or isinstance(error, EOFError):
            raise ReadError(f"{what} is cut short; download or copy it again") from error
        raise ReadError(f"{what} cannot be read ({seen[:200]}); download or write it again") from error


def too_little_memory(error: BaseException) -> bool:
    """Whether it is that memory ran out."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def wanted(error: BaseException) -> str:
    """How much memory was asked for, in brackets after a space; empty where the error does not say."""
    said = " ".join(str(error).split())
    return f" ({said[:200]})" if said else ""
