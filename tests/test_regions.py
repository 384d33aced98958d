"""Rows of ``obsm`` from several processes: none is lost, whoever writes first, twice, or dies as it writes."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.data.on_disk import readable_by_others
from carvae.data.regions import Regions, Rest
from carvae.errors import ConfigError

WIDTHS = {"X_carvae": 3, "carvae_probability": 2}


def rows_of(start: int, stop: int) -> dict[str, np.ndarray]:
    """What belongs to some cells; of the first cells all is zero."""
    place_N = np.maximum(np.arange(start, stop, dtype=np.float32) - 3, 0)
    return {key: np.repeat(place_N[:, None], width, 1) * (1 + width) for key, width in WIDTHS.items()}


def made(folder: Path, n_cells: int, chunk: int, zarr_format: int = 3) -> Regions:
    root = zarr.open_group(folder / "s.zarr", mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    with readable_by_others():
        write_elem(root, "obsm", {"X_carvae": np.ones((n_cells, 5)), "X_pca": np.ones((n_cells, 2))})
        return Regions.made(folder / "s.zarr", root, n_cells, chunk, WIDTHS)


def assert_all_there(regions: Regions) -> None:
    regions.finish()
    for key, rows in rows_of(0, regions.n_cells).items():
        found = regions.read(key, 0, regions.n_cells)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rows)


def chunks(regions: Regions) -> dict[Path, bytes]:
    files = [path for key in WIDTHS for path in (regions.store / "obsm" / key).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != "zarr.json" and not path.name.startswith(".z")}


@settings(max_examples=40)
@given(st.data())
def test_no_two_parts_share_a_chunk_and_no_row_is_lost_in_any_order(data: st.DataObject) -> None:
    ends = np.cumsum([0, *data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8), "cells of each part")])
    n_cells, chunk = int(ends[-1]), data.draw(st.integers(1, 40), "chunk")
    parts = [(int(start), int(stop)) for start, stop in pairwise(ends)]
    order = data.draw(st.permutations(parts), "order")
    again = data.draw(st.lists(st.sampled_from(parts), max_size=3), "done twice")
    with tempfile.TemporaryDirectory() as folder:
        regions = made(Path(folder), n_cells, chunk)
        rest: list[Rest] = []
        for start, stop in order:
            before = chunks(regions)
            rest += regions.write(start, rows_of(start, stop))
            after = chunks(regions)
            assert {path: after[path] for path in before} == before, "a chunk of another part was written again"
        written = chunks(regions)
        for start, stop in again:
            regions.write(start, rows_of(start, stop))
        assert chunks(regions) == written
        n_rest = sum(len(some.obsm["X_carvae"]) for some in rest)
        assert n_rest <= 2 * (chunk - 1) * len(parts)
        if len(parts) == 1:
            assert not n_rest
        for some in rest:
            regions.write_rest(some)
        after = chunks(regions)
        assert {path: after[path] for path in written} == written, "the rest is in chunks that a part may write yet"
        assert_all_there(regions)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_a_process_left_that_died_as_it_wrote_is_written_over_or_goes(tmp_path: Path, zarr_format: int) -> None:
    regions = made(tmp_path, 25, 10, zarr_format)
    for start in (0, 10, 20):
        regions.write(start, rows_of(start, min(start + 10, 25)))
    for path in chunks(regions):
        path.write_bytes(b"torn")
        path.with_suffix(".0123.partial").write_bytes(b"half")
    for start in (20, 0, 10):
        regions.write(start, rows_of(start, min(start + 10, 25)))
    assert_all_there(regions)
    assert not list(regions.store.rglob("*.partial"))
    assert regions.read("X_pca", 0, 25).shape == (25, 2)


def test_rows_that_never_came_are_no_zeros(tmp_path: Path) -> None:
    regions = made(tmp_path, 25, 10)
    regions.write(0, rows_of(0, 20))
    with pytest.raises(AssertionError, match="2 of 3 chunks of obsm/X_carvae came"):
        regions.finish()


def test_a_process_that_does_not_see_the_store_says_so_and_makes_nothing(tmp_path: Path) -> None:
    regions = Regions(tmp_path / "elsewhere" / ".o.zarr", 25, 10, tuple(WIDTHS))
    with pytest.raises(ConfigError, match=r"does not see the store that is written in .*elsewhere; give an --out in"):
        regions.write(0, rows_of(0, 20))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_must_not_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = made(tmp_path, 25, 10)

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(zarr, "open_array", refuses)
    with pytest.raises(ConfigError, match=r"must not write into the store that is written in "):
        regions.write(0, rows_of(0, 20))
