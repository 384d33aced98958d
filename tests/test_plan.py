"""Designs of fewer cells and counts: what is kept, what is lost, and which is the cheapest within the error.

That the error is kept is tried as a user would: by draws of the chosen design that the plan never saw.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm
from trained import World, carvae

from carvae.config import Config, PlanConfig, PredictConfig
from carvae.data.readers import open_samples
from carvae.errors import ConfigError, CountsError
from carvae.model.bundle import load
from carvae.model.query import UNKNOWN, Calls, Query, Samples, order_within, read
from carvae.plan import (
    SURE,
    Whole,
    cheapest,
    composition,
    designs,
    distance,
    limits,
    place_of_bound,
    saturation,
    sentence,
    thinned,
)


def query(*sizes: int, depth: float = 200.0) -> Query:
    """Cells of some samples; a cell is of the kind whose gene it has most of, the first two genes."""
    rng = np.random.default_rng(0)
    sizes = sizes or (1000, 3000)
    n_cells, sample_N = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    kind_N = rng.random(n_cells) < np.array([0.2, 0.6])[sample_N % 2]
    mean = depth * np.where(kind_N[:, None], [0.6, 0.2], [0.2, 0.6])
    panel = sp.csr_matrix(rng.poisson(mean))
    total_N = np.asarray(panel.sum(axis=1)).ravel() + rng.poisson(depth * 0.2, n_cells)
    names = tuple("abcdefgh"[: len(sizes)])
    return Query(panel, total_N, sample_N, names, np.ones(2, np.bool_), panel[:, :0], np.ones(0, np.bool_))


def calls_of(panel: sp.csr_matrix) -> Calls:
    dense = panel.toarray()
    label = np.where(dense.sum(1) >= 2, dense.argmax(1), UNKNOWN)
    return Calls(label, (dense.max(1) / np.maximum(dense.sum(1), 1)).astype(np.float32))


def tried(cells: Query, config: PlanConfig, seed: int = 0) -> pd.DataFrame:
    whole = Whole.of(cells, calls_of(cells.panel), config)
    return designs(cells, whole, calls_of, config, np.random.default_rng(seed))


def test_all_the_data_agree_with_themselves() -> None:
    table = tried(query(), PlanConfig(draws=29, thinnings=2))
    last = table.iloc[-1]
    assert (last["error_worst"], last["agreement"], last["confidence_change"]) == (0.0, 1.0, 0.0)
    assert last["n_cells"] == 4000
    assert last["cost"] == pytest.approx(query().total_N.sum())
    assert last["cost"] == table["cost"].max()


def test_fewer_cells_err_as_drawing_at_random_does() -> None:
    """With two labels the distance is |p - q|, half-normal in each sample; the larger of two is the worst."""
    table = tried(query(), PlanConfig(umis=(), cells=(100,), draws=2000))
    whole_BS = composition(query(), calls_of(query().panel).label_N, np.ones(4000, bool))
    n_B = np.array([1000, 3000])
    error_B = np.sqrt(whole_BS[:, 0] * whole_BS[:, 1] / 100 * (n_B - 100) / (n_B - 1))
    expected = brentq(lambda x: np.prod(2 * norm.cdf(x / error_B) - 1) - 0.9, 0, 1)
    row = table[table["cells_per_sample"] == 100].iloc[0]
    assert row["error_worst"] == pytest.approx(expected, rel=0.12)
    assert row["draws_within"] == pytest.approx(np.prod(2 * norm.cdf(0.1 / error_B) - 1), abs=0.03)
    assert row["agreement"] == 1.0


def test_shallower_designs_know_less() -> None:
    table = tried(query(), PlanConfig(umis=(2, 5, 20, 100), cells=(), draws=30, thinnings=5))
    assert table["umis_per_cell"].tolist()[:4] == pytest.approx([2, 5, 20, 100])
    assert table["agreement"].is_monotonic_increasing
    assert table["unknown"].is_monotonic_decreasing
    assert table["unknown"].iloc[0] > 0.3
    assert table["error_worst"].iloc[-1] == 0


@pytest.mark.parametrize("seed", range(4))
def test_the_recommended_design_keeps_what_it_promises_in_draws_of_its_own(seed: int) -> None:
    cells = query(1000, 3000, 600, 400, 60)
    config = PlanConfig(umis=(3, 6, 20), cells=tuple(range(30, 150, 10)), chance=0.9)
    table = tried(cells, config, seed)
    row = table.loc[cheapest(table, config.max_error)]
    assert row["cost"] < table["cost"].max() / 4
    rng = np.random.default_rng(100 + seed)
    share_B = np.minimum(1, row["umis_per_cell"] / cells.depth_B())
    whole_BS, beyond, n_redraws = composition(cells, calls_of(cells.panel).label_N, np.ones(5060, bool)), 0, 300
    for _ in range(n_redraws):
        said = calls_of(thinned(cells, share_B, rng))
        taken_N = order_within(cells.sample_N, rng) < row["cells_per_sample"]
        beyond += distance(composition(cells, said.label_N, taken_N), whole_BS).max() > config.max_error
    assert beyond < binom.ppf(0.999, n_redraws, 1 - config.chance)


def test_samples_too_small_to_judge_are_left_out_and_named() -> None:
    cells, config = query(1000, 3000, 2, 7), PlanConfig(umis=(5,), cells=(400,), draws=50)
    whole = Whole.of(cells, calls_of(cells.panel), config)
    assert whole.judged_B.tolist() == [True, True, False, False]
    assert whole.left_out(cells).endswith("left out of the error: c (2), d (7)")
    errors = tried(cells, config)["error_worst"]
    assert (errors < tried(cells, config.model_copy(update={"min_known": 1}))["error_worst"])[:2].all()
    assert errors.iloc[0] < 0.2
    assert Whole.of(query(), calls_of(query().panel), config).left_out(query()) == ""
    with pytest.raises(CountsError, match=r"no sample has plan.min_known=25 .* \(most has b, 7\)"):
        Whole.of(query(2, 7), calls_of(query(2, 7).panel), config)


@given(st.integers(1, 1000), st.floats(0.05, 0.99))
def test_the_bound_lies_above_the_quantile_as_surely_as_it_says(draws: int, chance: float) -> None:
    config = PlanConfig(draws=draws, chance=chance)
    if 1 - chance**draws < SURE:
        with pytest.raises(ConfigError, match=rf"plan.draws={draws} are too few to tell what holds in"):
            place_of_bound(config)
        return
    place = place_of_bound(config)
    assert binom.cdf(place, draws, chance) >= SURE
    assert binom.cdf(place - 1, draws, chance) < SURE


def test_a_design_is_told_by_numbers_that_can_be_ordered() -> None:
    cells, config = query(1000, 3000, 60, 2), PlanConfig(umis=(50,), cells=(200, 800), draws=100)
    whole, table = Whole.of(cells, calls_of(cells.panel), config), tried(cells, config)
    assert set(table["cells_per_sample"]) == {200, 800, 3000}
    assert set(table["umis_per_cell"]) == {50, cells.depth_B().max()}
    chosen = cheapest(table, 0.1)
    said = sentence(table, chosen, config, 3)
    assert (
        "the compositions of all 3 judged samples within 0.1 in 90% of draws: 200 cells per sample at 50 UMIs" in said
    )
    assert limits(cells, whole, 200, 50.0) == [
        "fewer than 200 cells, so all were taken and only the depth was tried: c (60)"
    ]
    deep = limits(cells, whole, 800, 1e4)
    assert "fewer than 10,000 UMIs per cell, so the depth was left as it is: a (" in deep[1]
    assert "d" not in [name.split()[0] for name in deep[1].split(": ")[1].split(", ")]
    assert "no design smaller than all the data at hand keeps" in sentence(table, table.index[-1], config, 3)


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_thinning_takes_away_and_never_adds(seed: int, share: float) -> None:
    cells = query(50, 150)
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
    settings = ("plan.umis=[50,100]", "plan.cells=[5]", "plan.draws=29", "predict.min_counts=5")
    answer = carvae(*arguments, *settings)
    assert answer.code == 0, answer.err
    assert "judged samples within 0.1 in 90% of draws" in caplog.text
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
        ("new", "plan.draws=28", "plan.draws=28 are too few to tell what holds in 90% of draws; take 29 or more"),
        ("new", "plan.min_known=10000", "no sample has plan.min_known=10000 cells that the model knows"),
    ):
        refused = carvae(*arguments[:-1], tmp_path / out, setting)
        assert refused.code == 1
        assert words in refused.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "file", "o"]


def test_a_query_of_which_nothing_is_known_has_nothing_to_plan_for() -> None:
    def nothing(panel: sp.csr_matrix) -> Calls:
        return Calls(np.full(panel.shape[0], UNKNOWN), np.ones(panel.shape[0], np.float32))

    with pytest.raises(CountsError, match="every cell of the query is unknown"):
        Whole.of(query(), nothing(query().panel), PlanConfig())


@pytest.mark.parametrize("setting", ["plan.umis=[-5]", "plan.umis=[0]", "plan.cells=[-3]"])
def test_designs_without_cells_or_counts_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        Config.parse_overrides([setting])
