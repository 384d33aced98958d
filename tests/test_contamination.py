"""Doublets and ambient RNA made by the rules by which they come about, and hints of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from carvae.data.contamination import AMBIENT, DOUBLETS, LINEAGES, MIN_CELLS, T_CELL, Hints, Markers, MixedSums

GENES = [*T_CELL, *(gene for group in LINEAGES.values() for gene in group), "ACTB", "GAPDH"]
N = 2000
EXPECTED = {"T": T_CELL, **LINEAGES}


def cells(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Counts of cells of one kind: much of its own markers, none of the others'."""
    mean_G = np.where(np.isin(GENES, EXPECTED[kind]), 4.0, 0.0) + np.isin(GENES, ["ACTB", "GAPDH"]) * 20
    return rng.poisson(np.broadcast_to(mean_G, (n, len(GENES))))


def hints(counts: np.ndarray, sample: np.ndarray | None = None, chunk: int = 700) -> list[Hints]:
    code = np.zeros(len(counts), np.int64) if sample is None else sample
    sums, markers = MixedSums(int(code.max()) + 1), Markers.of(GENES)
    for start in range(0, len(counts), chunk):
        part = slice(start, start + chunk)
        sums.add(code[part], markers.look(sp.csr_matrix(counts[part])))
    return [sums.hints(k) for k in range(int(code.max()) + 1)]


def test_a_clean_sample_gets_no_hint() -> None:
    rng = np.random.default_rng(0)
    counts = np.vstack([cells("T", N, rng), cells("B cells", N, rng)])  # other cells in cells of their own
    (found,) = hints(counts)
    assert found == Hints(0.0, 0.0, ())


@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize(("share", "is_told"), [(0.02, False), (0.1, True)])
def test_doublets_with_another_lineage_are_told_by_how_many(lineage: str, share: float, is_told: bool) -> None:
    rng, n_double = np.random.default_rng(1), int(share * N)
    counts = cells("T", N, rng)
    counts[:n_double] += cells(lineage, n_double, rng)
    (found,) = hints(counts)
    assert found.doublets == pytest.approx(share, abs=0.005)
    assert (found.doublets > DOUBLETS) == is_told
    expected = (f"10% of its T cells hold much RNA of other cells too, most of {lineage} (doublets?)",)
    assert found.words == (expected if is_told else ())


@pytest.mark.parametrize(("mean", "is_told"), [(0.05, False), (0.6, True)])
def test_ambient_rna_is_told_and_is_not_taken_for_doublets(mean: float, is_told: bool) -> None:
    rng = np.random.default_rng(2)
    counts = cells("T", N, rng) + rng.poisson(mean, (N, 1)) * np.isin(GENES, ["HBB"])
    (found,) = hints(counts)
    assert found.ambient == pytest.approx(1 - np.exp(-mean), abs=0.03)
    assert (found.ambient > AMBIENT) == is_told
    assert len(found.words) == is_told
    assert all("RNA of red cells (ambient RNA?)" in words for words in found.words)


def test_each_sample_is_told_of_its_own_cells_and_few_cells_of_nothing() -> None:
    rng = np.random.default_rng(3)
    clean, double = cells("T", 300, rng), cells("T", 300, rng) + cells("monocytes", 300, rng)
    few = cells("T", MIN_CELLS - 1, rng) + cells("B cells", MIN_CELLS - 1, rng)
    sample = np.repeat([0, 1, 2], [300, 300, MIN_CELLS - 1])
    order = rng.permutation(len(sample))
    found = hints(np.vstack([clean, double, few])[order], sample[order], chunk=37)
    assert [len(one.words) for one in found] == [0, 1, 0]
    assert np.isnan(found[2].ambient)
    assert np.isnan(found[2].doublets)


def test_a_source_without_the_markers_gives_no_hint() -> None:
    sums, counts = MixedSums(1), sp.csr_matrix(np.ones((50, 2), np.int64))
    sums.add(np.zeros(50, np.int64), Markers.of(["ACTB", "GAPDH"]).look(counts))
    assert sums.hints(0).words == ()
    assert np.isnan(sums.hints(0).doublets)
