"""What libraries raise on a file is one sentence, and that memory ran out is told from a file that is broken."""

from __future__ import annotations

import pytest

from carvae.data.broken import MORE_MEMORY, reading
from carvae.errors import GeneError, ReadError


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), f"there is not enough memory to read q.h5ad; {MORE_MEMORY}"),
        (
            MemoryError("Unable to allocate 1.2 GiB for an array"),
            f"there is not enough memory to read q.h5ad (Unable to allocate 1.2 GiB for an array); {MORE_MEMORY}",
        ),
        (
            OSError("Can't read data (memory allocation failed for chunk)"),
            "there is not enough memory to read q.h5ad (Can't read data (memory allocation failed for chunk)); "
            f"{MORE_MEMORY}",
        ),
        (OSError("truncated file: eof = 9"), "q.h5ad is cut short; download or copy it again"),
        (EOFError(), "q.h5ad is cut short; download or copy it again"),
        (KeyError(), "q.h5ad cannot be read (KeyError); download or write it again"),
        (ValueError("bad\n  value"), "q.h5ad cannot be read (bad value); download or write it again"),
    ],
    ids=str,
)
def test_what_a_library_raises_is_one_sentence(raised: Exception, said: str) -> None:
    with pytest.raises(ReadError) as told, reading("q.h5ad"):
        raise raised
    assert str(told.value) == said


def test_a_sentence_of_carvae_stays_as_it_is() -> None:
    with pytest.raises(GeneError, match=r"^mine$"), reading("q.h5ad"):
        raise GeneError("mine")
