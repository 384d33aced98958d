"""The store gives back what was written, whatever the chunks and shards; half a store is no store."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import counts_of, obs_of, write_store

from carvae.data import store as module
from carvae.data.atomic import replacing_folder
from carvae.data.store import CellStore, StoreHeader, StoreWriter
from carvae.errors import ReadError


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "store.zarr"
    write_store(path, counts_of(20), obs_of({"a": 12, "b": 8}))
    return path


@settings(max_examples=12)
@given(
    st.integers(1, 20),
    st.integers(1, 12),
    st.sampled_from([(4, 8), (16, 16), (8, 64)]),
    st.integers(0, 4),
    st.sets(st.integers(0, 19)),
)
def test_counts_come_back_for_any_chunks_and_shards(
    n: int, written: int, sizes: tuple[int, int], gap: int, chosen: set[int]
) -> None:
    counts, obs = counts_of(n, seed=n), obs_of({"a": n})
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(module, "CHUNK", sizes[0]),
        mock.patch.object(module, "SHARD", sizes[1]),
        mock.patch.object(module, "GAP", gap),
    ):
        store = write_store(Path(folder) / "s", counts, obs, chunk=written)
        assert (store.counts() != counts).nnz == 0
        assert store.counts().has_sorted_indices
        assert store.n_cells == n
        assert store.largest == counts.data.max()
        rows = np.array(sorted(i for i in chosen if i < n), np.int64)
        assert (store.counts(rows) != counts[rows]).nnz == 0
        assert store.entries(rows).tolist() == np.diff(counts[rows].indptr).tolist()
        assert all(gene.size < sizes[1] + 12 + 12 * gap for gene, _ in store.read(rows))


def test_cells_without_counts_and_large_counts_come_back(tmp_path: Path) -> None:
    counts = sp.csr_matrix(np.array([[0, 0, 0], [0, 1 << 20, 0], [0, 0, 0], [1, 0, 2], [0, 0, 0]]))
    store = write_store(tmp_path / "s", counts, obs_of({"a": 5}), chunk=2)
    assert np.array_equal(store.counts().toarray(), counts.toarray())


def test_many_genes_are_not_cut_to_sixteen_bits(tmp_path: Path) -> None:
    for n_genes, bits in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        counts = sp.csr_matrix(([3, 7], ([0, 1], [0, n_genes - 1])), shape=(2, n_genes))
        store = write_store(tmp_path / str(n_genes), counts, obs_of({"a": 2}))
        assert (store.counts() != counts).nnz == 0
        assert store._array("gene").dtype == bits


def test_obs_comes_back_with_text_numbers_and_what_is_missing(tmp_path: Path) -> None:
    obs = obs_of({"é b": 3, "a/c": 3}).assign(
        timepoint_days=[1.5, np.nan, -3, 0, 7, 28],
        tissue=pd.Categorical(["blood", None, "marrow"] * 2, categories=["never", "marrow", "blood"]),
        n=pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
    )
    back = write_store(tmp_path / "s", counts_of(6), obs, chunk=2).obs()
    assert list(back) == list(obs)
    for name in ("study", "sample", "patient", "label", "tissue"):
        expected = obs[name].astype(object).where(obs[name].notna(), None).tolist()
        assert back[name].astype(object).where(back[name].notna(), None).tolist() == expected
    for name in ("timepoint_days", "n"):
        assert np.array_equal(back[name], obs[name].to_numpy(np.float64), equal_nan=True)


def test_unused_categories_do_not_come_back(tmp_path: Path) -> None:
    """Peer fault: phantom classes from unused categories."""
    obs = obs_of({"a": 4}).assign(label=pd.Categorical(["x", "y", "x", "y"], categories=["ghost", "y", "x"]))
    assert list(write_store(tmp_path / "s", counts_of(4), obs).obs()["label"].cat.categories) == ["x", "y"]


def test_a_column_that_one_study_lacks_is_missing_there(tmp_path: Path) -> None:
    first, second = obs_of({"a": 2}, "one").assign(day=3.0, tissue="blood"), obs_of({"b": 2}, "two")
    writer = StoreWriter(tmp_path / "s", StoreHeader("f", ("A", "B"), ("one", "two"), {}), np.ones((2, 2), np.bool_))
    for obs in (first, second):
        writer.append(counts_of(2, 2), obs)
    writer.close()
    back = CellStore(tmp_path / "s").obs()
    assert np.array_equal(back["day"], [3, 3, np.nan, np.nan], equal_nan=True)
    assert back["tissue"].isna().tolist() == [False, False, True, True]


def test_header_and_measured_genes_come_back(tmp_path: Path) -> None:
    measured = np.array([[True] * 11 + [False]])
    store = write_store(tmp_path / "s", counts_of(5), obs_of({"a": 5}), measured=measured)
    assert store.header == StoreHeader("print", tuple(f"GENE{i}" for i in range(12)), ("s",), {"note": 1})
    assert np.array_equal(store.measured, measured)


def test_the_content_hash_depends_on_the_cells_alone(tmp_path: Path) -> None:
    """One hash for one data set, however it was cut; another one where counts, labels or patients differ."""
    counts, obs = counts_of(20), obs_of({"a": 12, "b": 8}, label="x")
    changed = counts.copy()
    changed.data[3] += 1
    moved = counts.copy()
    moved.indices[-1] = 11 if moved.indices[-1] < 11 else 10
    variants = {
        "counts": (changed, obs),
        "gene": (moved, obs),
        "cells": (counts[::-1].tocsr(), obs),
        "labels": (counts, obs.assign(label=["y", *obs["label"][1:]])),
        "patients": (counts, obs_of({"a": 11, "b": 9}, label="x")),
        "column": (counts, obs.rename(columns={"sample": "specimen"})),
    }
    original = write_store(tmp_path / "0", counts, obs, chunk=3).content
    assert write_store(tmp_path / "1", counts, obs, chunk=20).content == original
    contents = {name: write_store(tmp_path / name, *given).content for name, given in variants.items()}
    assert len({original, *contents.values()}) == len(variants) + 1, contents


def test_memory_is_bounded_by_a_shard_not_by_the_data(tmp_path: Path) -> None:
    """60 chunks of 2,000 entries pass through; about one shard of 8,192 is held."""
    chunk, obs = sp.csr_matrix(np.ones((100, 20), np.int64)), obs_of({"a": 100})
    with mock.patch.object(module, "CHUNK", 4096), mock.patch.object(module, "SHARD", 8192):
        writer = StoreWriter(
            tmp_path / "s", StoreHeader("f", tuple(map(str, range(20))), ("s",), {}), np.ones((1, 20), np.bool_)
        )
        held = []
        for _ in range(60):
            writer.append(chunk.copy(), obs)
            held.append(sum(block.nnz for block in writer._pending))
        writer.close()
        store = CellStore(tmp_path / "s")
        assert store.n_cells == 6_000
        assert max(held) < 8192
        tracemalloc.start()
        assert sum(gene.size for gene, _ in store.read(np.arange(6_000))) == 120_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 120_000 * 6, "reading held the whole store"


def test_a_failure_while_writing_leaves_the_old_store(stored: Path) -> None:
    before = CellStore(stored).content

    def broken() -> None:
        with replacing_folder(stored) as scratch:
            writer = StoreWriter(scratch, StoreHeader("new", ("A",), ("s",), {}), np.ones((1, 1), np.bool_))
            writer.append(counts_of(3, 1), obs_of({"a": 3}))
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        broken()
    assert CellStore(stored).content == before
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_a_store_that_was_not_closed_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", StoreHeader("f", ("A",), ("s",), {}), np.ones((1, 1), np.bool_))
    writer.append(counts_of(3, 1), obs_of({"a": 3}))
    with pytest.raises(ReadError, match="no complete carvae store"):
        CellStore(tmp_path / "s")


def test_what_is_no_store_or_of_another_layout_is_refused(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "text"):
        with pytest.raises(ReadError, match="no complete carvae store"):
            CellStore(path)
    zarr.open_group(stored, mode="a").attrs["format"] = 99
    with pytest.raises(ReadError, match="has layout 99"):
        CellStore(stored)


def test_a_lost_part_is_refused_not_read_as_zeros(stored: Path, tmp_path: Path) -> None:
    parts = sorted(p.relative_to(stored) for p in stored.rglob("*") if p.is_file() and "c" in p.parent.parts)
    assert len(parts) == 9  # measured, indptr, gene, count and four columns
    for part in parts:
        copy = tmp_path / "copy"
        shutil.copytree(stored, copy)
        (copy / part).unlink()
        with pytest.raises(ReadError, match="has lost a part of"):
            CellStore(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize("array", ["gene", "count", "indptr", "obs/patient"])
def test_a_truncated_part_is_refused(stored: Path, array: str) -> None:
    part = next(p for p in (stored / array / "c").rglob("*") if p.is_file())
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(ReadError, match=r"is damaged .*; delete the store"):
        (CellStore(stored).counts(), CellStore(stored).obs())


def test_counts_that_do_not_fit_the_panel_are_a_fault_of_the_caller(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", StoreHeader("f", ("A", "B"), ("s",), {}), np.ones((1, 2), np.bool_))
    with pytest.raises(AssertionError):
        writer.append(counts_of(3, 5), obs_of({"a": 3}))
