"""Inputs that the coverage-guided runs of scripts/fuzz.py found worth keeping, those that were findings once, and some
that are drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hostile import TARGETS, Target, open_target

CORPUS = Path(__file__).parent / "corpus"
CASES = [(name, file) for name in TARGETS for file in sorted((CORPUS / name).glob("*"))]
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about what is in the way; ours are logged
N_DRAWN = 12
Opened = Callable[[str], Target]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return cache(lambda name: open_target(name, tmp_path_factory.mktemp(name)))


def run(target: Target, data: bytes, folder: Path) -> None:
    place = folder / "place"
    place.mkdir()
    target.run(data, place)


@pytest.mark.case("A14", "B05", "F06")
@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{file.name}" for name, file in CASES])
def test_what_was_kept_is_read_or_refused(opened: Opened, tmp_path: Path, name: str, case: Path) -> None:
    run(opened(name), case.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", range(N_DRAWN))
def test_what_is_drawn_is_read_or_refused(opened: Opened, tmp_path: Path, name: str, seed: int) -> None:
    run(opened(name), random.Random(f"{name} {seed}").randbytes(4 + 4 * seed), tmp_path)
