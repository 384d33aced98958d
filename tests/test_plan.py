"""Designs of fewer cells and counts: what is kept, what is lost, and which is the cheapest within the error."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from trained import World, carvae

from carvae.config import Config, PlanConfig, PredictConfig
from carvae.data.readers import open_samples
from carvae.errors import ConfigError, CountsError
from carvae.model.bundle import load
from carvae.model.query import UNKNOWN, Calls, Query, Samples, read
from carvae.plan import cheapest, composition, designs, distance, saturation, thinned


def query(n_cells: int = 4000, depth: float = 200.0, seed: int = 0) -> Query:
    """Cells of two samples; a cell is of the kind whose gene it has most of, the first two genes."""
    rng = np.random.default_rng(seed)
    sample_N = np.repeat([0, 1], [n_cells // 4, n_cells - n_cells // 4])
    kind_N = rng.random(n_cells) < np.array([0.2, 0.6])[sample_N]
    mean = depth * np.where(kind_N[:, None], [0.6, 0.2], [0.2, 0.6])
    panel = sp.csr_matrix(rng.poisson(mean))
    total_N = np.asarray(panel.sum(axis=1)).ravel() + rng.poisson(depth * 0.2, n_cells)
    return Query(panel, total_N, sample_N, ("a", "b"), np.ones(2, np.bool_), panel[:, :0], np.ones(0, np.bool_))


def calls_of(panel: sp.csr_matrix) -> Calls:
    dense = panel.toarray()
    label = np.where(dense.sum(1) >= 2, dense.argmax(1), UNKNOWN)
    return Calls(label, (dense.max(1) / np.maximum(dense.sum(1), 1)).astype(np.float32))


def test_all_the_data_agree_with_themselves() -> None:
    table = designs(query(), calls_of, PlanConfig(draws=2), np.random.default_rng(0))
    last = table.iloc[-1]
    assert (last["error_worst"], last["agreement"], last["confidence_change"]) == (0.0, 1.0, 0.0)
    assert last["n_cells"] == 4000
    assert last["cost"] == pytest.approx(query().total_N.sum())
    assert last["cost"] == table["cost"].max()


def test_fewer_cells_err_as_drawing_at_random_does() -> None:
    """With two labels the distance is |p - q|, whose median for n drawn of N is 0.674 standard errors."""
    settings = PlanConfig(umis=(), cells=(100,), draws=400)
    table = designs(query(), calls_of, settings, np.random.default_rng(0))
    whole_BS = composition(query(), calls_of(query().panel).label_N, np.ones(4000, bool))
    n_B = np.array([1000, 3000])
    expected = 0.6745 * np.sqrt(whole_BS[:, 0] * whole_BS[:, 1] / 100 * (n_B - 100) / (n_B - 1))
    row = table[table["cells_per_sample"] == 100].iloc[0]
    assert row["error_worst"] == pytest.approx(expected.max(), rel=0.2)
    assert row["agreement"] == 1.0


def test_shallower_designs_know_less() -> None:
    table = designs(query(), calls_of, PlanConfig(umis=(2, 5, 20, 100), cells=()), np.random.default_rng(0))
    assert table["umis_per_cell"].tolist()[:4] == pytest.approx([2, 5, 20, 100])
    assert table["agreement"].is_monotonic_increasing
    assert table["unknown"].is_monotonic_decreasing
    assert table["unknown"].iloc[0] > 0.3
    assert table["error_worst"].iloc[-1] == 0


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_thinning_takes_away_and_never_adds(seed: int, share: float) -> None:
    cells = query(200)
    found = thinned(cells, np.array([share, 1.0]), np.random.default_rng(seed))
    kept = found.toarray() <= cells.panel.toarray()
    assert kept.all()
    first = cells.sample_N == 0
    assert (found.toarray()[~first] == cells.panel.toarray()[~first]).all()
    n = cells.panel[first].sum()
    assert abs(found[first].sum() - share * n) < 6 * np.sqrt(n * share * (1 - share)) + 1e-6


def test_distance_is_half_of_all_differences_and_whole_where_nothing_is_known() -> None:
    a, b = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]), np.array([[0.5, 0.2, 0.3], [0, 0, 0], [0, 0, 0]])
    assert distance(a, b).tolist() == pytest.approx([0.3, 1.0, 0.0])


def test_reads_follow_from_saturation() -> None:
    molecules, reads = 10_000.0, 8_000.0
    reads_of = saturation(molecules * (1 - np.exp(-reads / molecules)), reads)
    for fewer in (100.0, 4_000.0, reads):
        assert reads_of(molecules * (1 - np.exp(-fewer / molecules))) == pytest.approx(fewer, rel=1e-6)
    assert saturation(500.0, None)(250.0) == 250.0
    with pytest.raises(ConfigError, match=r"plan.reads_per_cell=400 is not above the 500 UMIs per cell"):
        saturation(500.0, 400.0)


def test_the_cheapest_is_within_the_error() -> None:
    table = pd.DataFrame({"error_worst": [0.2, 0.09, 0.05, 0.0], "cost": [1.0, 3.0, 2.0, 9.0]})
    assert cheapest(table, 0.1) == 2
    assert cheapest(table, 0.01) == 3
    assert cheapest(table, 0.5) == 0


def test_cells_are_taken_evenly_over_the_samples(world: World) -> None:
    sources = open_samples(world.query_path)
    samples = Samples.of(sources, None)
    taken_N = samples.evenly(20, np.random.default_rng(0))
    cells = read(sources, load(world.bundle), PredictConfig(), samples, taken_N)
    assert set(np.bincount(cells.sample_N)) == {20 // len(cells.samples)}
    assert cells.panel.shape == (len(cells.total_N), len(load(world.bundle).genes))


def test_the_verb_writes_a_table_and_a_plot(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("plan", world.query_path, "--model", world.bundle, "--out", tmp_path / "o")
    settings = ("plan.umis=[50,100]", "plan.cells=[5]", "plan.draws=2", "predict.min_counts=5")
    answer = carvae(*arguments, *settings)
    assert answer.code == 0, answer.err
    assert "cheapest design that keeps every sample's composition within 0.1: " in caplog.text
    table = pd.read_csv(tmp_path / "o" / "plan.csv")
    assert len(table) == 6
    assert table["cheapest"].sum() == 1
    assert matplotlib.image.imread(tmp_path / "o" / "plan.png").std() > 0.01
    again = carvae(*arguments[:-1], tmp_path / "again", *settings)
    assert again.code == 0
    assert (tmp_path / "again" / "plan.csv").read_bytes() == (tmp_path / "o" / "plan.csv").read_bytes()
    (tmp_path / "file").write_text("mine")
    for out, setting, words in (
        ("file", "plan.draws=2", "is a file; plan writes its tables and pictures into a folder"),
        ("new", "train.lr=1", "changes nothing here; this verb reads plan.* and predict.* and seed alone"),
        ("new", "plan.reads_per_cell=1", "is not above"),
    ):
        refused = carvae(*arguments[:-1], tmp_path / out, setting)
        assert refused.code == 1
        assert words in refused.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "file", "o"]


def test_a_query_of_which_nothing_is_known_has_nothing_to_plan_for() -> None:
    def nothing(panel: sp.csr_matrix) -> Calls:
        return Calls(np.full(panel.shape[0], UNKNOWN), np.ones(panel.shape[0], np.float32))

    with pytest.raises(CountsError, match="every cell of the query is unknown"):
        designs(query(), nothing, PlanConfig(draws=2), np.random.default_rng(0))


@pytest.mark.parametrize("setting", ["plan.umis=[-5]", "plan.umis=[0]", "plan.cells=[-3]"])
def test_designs_without_cells_or_counts_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        Config.parse_overrides([setting])
