"""What is seen of a run while it goes on: rate, time left, losses of studies, maps; looking changes nothing."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from trained import World, carvae, settings, write_config

from carvae.model.progress import Pace, duration
from carvae.model.trainer import LiveLine


@given(st.integers(1, 10_000), st.integers(0, 100), st.floats(0.1, 1e4))
def test_at_an_even_pace_the_time_left_is_right(n_steps: int, first: int, per_step: float) -> None:
    pace = Pace(first + 2 * n_steps, 64.0, first, begun=5.0)
    said = pace.said(first + n_steps, 5.0 + n_steps * per_step)
    assert said == f"{64 / per_step:,.0f} cells/s, at most {duration(n_steps * per_step)} left"
    assert pace.said(first, 9.0) == ""


def test_durations_are_in_the_unit_that_fits() -> None:
    assert [duration(s) for s in (0.2, 100, 119, 121, 7100, 7300)] == [
        *("1 s", "100 s", "119 s", "2 minutes", "118 minutes", "2.0 hours"),
    ]


def test_the_line_on_a_terminal_tells_how_far_the_run_is_and_goes_in_the_end() -> None:
    text = io.StringIO()
    line = LiveLine(Console(file=text, force_terminal=True, width=120))
    metrics = {"train_loss": 650.25, "val_loss": 660.0}
    trainer = SimpleNamespace(global_step=10, current_epoch=2, max_epochs=20, callback_metrics=metrics)
    module = SimpleNamespace(n_steps=100, pace=SimpleNamespace(said=lambda done, _: f"{done} done"))
    line.on_train_start(trainer, module)  # type: ignore[arg-type]
    trainer.global_step = 25
    line.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    line.bar.refresh()
    line.teardown(trainer, module, "fit")  # type: ignore[arg-type]
    shown = text.getvalue()
    assert "epoch 3 of 20" in shown
    assert "25%" in shown
    assert "train loss 650.2, held-out loss 660.0, 25 done" in shown
    assert line.bar.finished is False
    assert not line.bar.live.is_started


@pytest.fixture(scope="module")
def watched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in what is drawn, with half of the patients held out."""
    folder = tmp_path_factory.mktemp("watched")
    short = {"max_epochs": 2, "min_steps": 0, "validation_share": 0.5}
    for name, every in (("plain", 0), ("drawn", 1)):
        config = settings(world.folder, folder / name, train=short | {"map_every": every})
        answer = carvae("train", write_config(folder / f"{name}.yaml", config))
        assert answer.code == 0, answer.err
    return folder


def test_losses_of_studies_are_those_of_all_held_out_cells(watched: Path) -> None:
    log = pd.read_csv(watched / "plain.work" / "fit" / "log" / "metrics.csv")
    columns = [column for column in log if column.startswith("val_elbo/study_")]
    assert columns
    assert set(columns) <= {f"val_elbo/study_{i}" for i in (1, 2, 3)}
    rows = log.dropna(subset=["val_reconstruction", *columns])
    assert len(rows) == 2
    whole = (rows["val_reconstruction"] + rows["val_kl"]).to_numpy()
    parts = rows[columns].to_numpy()
    assert (parts.min(1) <= whole).all()
    assert (whole <= parts.max(1)).all()
    if len(columns) == 2:  # the weights of the mean are the cells of each, the same in every epoch
        share = (whole - parts[:, 1]) / (parts[:, 0] - parts[:, 1])
        assert share[0] == pytest.approx(share[1], abs=1e-3)


def test_maps_are_drawn_and_change_nothing(watched: Path) -> None:
    maps = sorted((watched / "drawn.work" / "fit" / "maps").iterdir())
    assert [path.name for path in maps] == ["map_1.png", "map_2.png"]
    image = matplotlib.image.imread(maps[0])
    assert image.shape[1] == 1200
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    assert not (watched / "plain.work" / "fit" / "maps").exists()
    plain, drawn = ((watched / name / "weights.safetensors").read_bytes() for name in ("plain", "drawn"))
    assert plain == drawn
