"""Who carries the CAR: found by name, told by more than the transcript, and no surer than the data allow."""

from __future__ import annotations

import numpy as np
import pytest

from carvae.data.transgene import CARRIER, OTHER, UNKNOWN, CarCalls, call_car, protein_evidence, transgene_columns


def cells(
    rng: np.random.Generator, n: int, share: float, rate: float = 4e-4, size: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of the transgene, depth, and who carries it, by the model and with ambient transcripts."""
    carrier = rng.random(n) < share
    depth = rng.lognormal(np.log(3000), 0.5, n).astype(np.int64) + 200
    own = rng.poisson(depth * rate * rng.gamma(size, 1 / size, n)) * carrier
    return own + rng.poisson(depth * 0.01 * share * rate), depth, carrier


def call(count: np.ndarray, depth: np.ndarray, **given: object) -> CarCalls:
    n = len(count)
    wanted = {"sample_N": np.zeros(n, np.int64), "n_samples": 1, "used_N": np.ones(n, np.bool_), "purity": 0.95}
    wanted |= {"sorted_N": np.full(n, UNKNOWN)} | given
    found = call_car(count, depth, **wanted)
    assert found is not None
    return found


def test_names_in_use_and_the_users_own_are_found_in_any_case() -> None:
    names = ["CD4", "cat_SCFV", "wpre", "Yescarta", "CAT", "mycar1", "CARD11", "IL13OP", "ENSG1"]
    symbols = [*names[:-1], "SYMBOL"]
    assert list(transgene_columns(names, symbols, ())) == [1, 2, 3, 7]
    assert list(transgene_columns(names, symbols, ("MyCAR1", "symbol"))) == [1, 2, 3, 5, 7, 8]


def test_fractions_hold_the_truth_where_detection_does_not() -> None:
    rng, held, missed = np.random.default_rng(0), 0, 0
    shares = [0.1, 0.3, 0.5, 0.7, 0.9] * 2
    for share in shares:
        count, depth, carrier = cells(rng, 500, share)
        found = call(count, depth)
        held += found.low_B[0] <= carrier.mean() <= found.high_B[0]
        missed += found.detected_B[0] < 0.85 * carrier.mean()
    assert held >= 9
    assert missed == len(shares), "a third of the carriers show no transcript"


def test_a_cell_without_the_transcript_is_doubtful_and_the_more_so_the_shallower() -> None:
    count, depth, carrier = cells(np.random.default_rng(1), 4000, 0.6)
    found = call(count, depth)
    p = found.probability_N
    silent = count == 0
    assert p[count > 2].min() > 0.98
    assert 0.1 < p[silent].mean() < 0.6
    assert p[silent].mean() == pytest.approx(carrier[silent].mean(), abs=0.1)
    deep, shallow = silent & (depth > 5000), silent & (depth < 1500)
    assert p[shallow].mean() > p[deep].mean() + 0.1
    order = np.argsort(depth[silent])
    assert (np.diff(p[silent][order]) <= 1e-6).all()


def test_a_sample_without_carriers_has_next_to_none() -> None:
    rng = np.random.default_rng(2)
    parts = [cells(rng, 400, share) for share in (0.8, 0.0)]
    count, depth = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    found = call(count, depth, sample_N=np.repeat([0, 1], 400), n_samples=2)
    assert found.high_B[1] < 0.05
    assert found.low_B[0] > 0.6
    assert found.probability_N[400:].mean() < 0.05


def test_what_a_cell_was_sorted_for_and_its_protein_are_used() -> None:
    rng = np.random.default_rng(3)
    count, depth, carrier = cells(rng, 600, 0.5, rate=1e-4)
    plain = call(count, depth)
    wide = plain.high_B[0] - plain.low_B[0]
    by_sort = call(count, depth, sorted_N=np.where(carrier, CARRIER, OTHER))
    assert by_sort.high_B[0] - by_sort.low_B[0] < 0.2 * wide
    silent = count == 0
    assert by_sort.probability_N[silent & carrier].min() > 0.7
    assert by_sort.probability_N[silent & ~carrier].max() < 0.1
    signal = rng.lognormal(np.where(carrier, 4.5, 2.0), 0.5)
    by_protein = call(count, depth, evidence_N=protein_evidence(signal))
    right = (by_protein.probability_N > 0.5) == carrier
    assert right.mean() > 0.95 > ((plain.probability_N > 0.5) == carrier).mean()
    assert by_protein.high_B[0] - by_protein.low_B[0] < 0.5 * wide


def test_a_protein_that_says_nothing_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    assert not protein_evidence(rng.lognormal(2.0, 0.4, 300)).any()
    assert not protein_evidence(np.full(300, np.nan)).any()
    signal = np.append(rng.lognormal([2.0, 5.0], 0.3, (200, 2)).ravel(), np.nan)
    evidence = protein_evidence(signal)
    assert evidence[-1] == 0
    assert (np.diff(evidence[:-1][np.argsort(signal[:-1])]) >= -1e-9).all(), "more protein, more evidence"


def test_cells_that_are_not_used_get_a_probability_and_do_not_count() -> None:
    count, depth, _ = cells(np.random.default_rng(5), 300, 0.7)
    used = np.arange(300) < 200
    all_of_them = call(count[:200], depth[:200])
    found = call(count, depth, used_N=used)
    np.testing.assert_allclose(found.fraction_B, all_of_them.fraction_B, atol=0.02)
    assert np.isfinite(found.probability_N).all()


def test_without_any_count_nothing_is_said() -> None:
    n = 20
    nothing = np.zeros(n, np.int64)
    found = call_car(nothing, nothing + 100, nothing, 1, np.ones(n, np.bool_), np.full(n, CARRIER), 0.95)
    assert found is None
