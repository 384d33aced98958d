"""Mixing of batches is never shown without what it cost; scib-metrics, where it is there, ranks plain cases right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from carvae.data.gene_table import ResolvedGenes
from carvae.evaluation import integration
from carvae.evaluation.answers import Answer
from carvae.evaluation.cells import Cells, Source

LEAVES, N = ("A", "B", "C"), 300
STATE = np.arange(N) % 3
BATCH = np.arange(N) // 3 % 2


def cells() -> Cells:
    """Three states in two studies, four patients; every tenth cell has no label."""
    names = np.array(["G"], dtype=object)
    source = Source("s", ("G",), None, ResolvedGenes(names, names, names), sp.csr_matrix((N, 1)), 0)
    obs = pd.DataFrame({"study": np.where(BATCH, "x", "y"), "patient": [f"P{i % 4}" for i in range(N)]})
    truth_N = np.where(np.arange(N) % 10 == 9, -1, STATE).astype(np.int32)
    return Cells((source,), obs, truth_N, "state", LEAVES, ("G",), names)


def spaces() -> dict[str, NDArray[np.float32]]:
    """Uncorrected cells; the same with their batches brought together; and all of them in one heap."""
    rng = np.random.default_rng(0)
    states = np.eye(8)[STATE] * 8 + rng.normal(size=(N, 8))
    apart = states + np.eye(8)[3 + BATCH] * 8
    heap = rng.normal(size=(N, 8))
    return {name: z.astype(np.float32) for name, z in (("knn", apart), ("carvae", states), ("heap", heap))}


def answer_of(z_NK: NDArray[np.float32], cells: Cells, asked_N: NDArray[np.bool_]) -> Answer:
    train = np.flatnonzero(~asked_N & (cells.truth_N >= 0))
    asked = np.flatnonzero(asked_N)
    nothing: dict[str, Any] = dict.fromkeys(("raw_NS", "set_NS", "unknown_N", "sweep_PLS"))
    known: dict[str, Any] = {"train_rows_M": train, "train_latent_MK": z_NK[train], "latent_NK": z_NK[asked]}
    chance: dict[str, Any] = {"probability_NS": np.full((asked.size, 3), 1 / 3), "novelty_N": np.zeros(asked.size)}
    return Answer(asked, **chance, **nothing, **known, settings={}, seconds=0.0)


def mixing(z_NK: NDArray[np.float32], batch_N: NDArray[np.str_], *_: Any) -> dict[str, float]:
    """Share of neighbours that are of another batch."""
    near = NearestNeighbors(n_neighbors=15).fit(z_NK).kneighbors(return_distance=False)
    return {"batch": float((batch_N[near] != batch_N[:, None]).mean())}


def test_a_space_that_mixes_everything_is_called_over_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "scores", mixing)
    own = cells()
    folds = [np.arange(N) % 4 == p for p in range(4)]
    answers = {name: [answer_of(z, own, asked) for asked in folds] for name, z in spaces().items()}
    rows = {row["method"]: row for row in integration.table_of(answers, own, "study", 250)}
    assert rows["knn"]["batch"] < 0.05
    assert min(rows["carvae"]["batch"], rows["heap"]["batch"]) > 0.4
    assert rows["carvae"]["conserved"] == rows["knn"]["conserved"] == 1
    assert rows["heap"]["conserved"] < 0.5
    assert {name for name, row in rows.items() if row["over_corrected"]} == {"heap"}


def test_too_few_cells_are_not_scored(caplog: pytest.LogCaptureFixture) -> None:
    own = cells()
    answers = {"knn": [answer_of(spaces()["knn"], own, np.arange(N) % 4 == 0)]}
    assert integration.table_of(answers, own, "study", integration.MIN_CELLS - 1) == []
    assert "the mixing of batches is not scored" in caplog.text


def test_scib_metrics_rank_the_spaces_and_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scib_metrics", reason="scib-metrics is not installed (extra `bench`)")
    batch, state, given = BATCH.astype(str), np.array(LEAVES)[STATE], spaces()
    found = {name: integration.scores(z, batch, state, given["knn"]) for name, z in given.items()}
    assert found["carvae"]["batch"] > found["knn"]["batch"] + 0.2
    assert found["carvae"]["bio"] > found["heap"]["bio"] + 0.3
    assert found["carvae"]["total"] == max(scores["total"] for scores in found.values())
    few = np.r_[np.arange(100), 100:110]
    alone = np.where(np.arange(110) < 100, state[few], "alone")  # a state of one batch, which it would tell of
    integration.scores(given["carvae"][few], np.where(alone == "alone", "0", batch[few]), alone, given["knn"][few])
    assert "INFO" not in "".join(capfd.readouterr())
