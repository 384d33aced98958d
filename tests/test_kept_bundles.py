"""Models that released versions wrote open for ever, and say on the query beside them what they said then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from trained import carvae, sha256

import carvae as library
from carvae.model.bundle_files import FORMAT

KEPT = Path(__file__).resolve().parent / "bundles"
MODELS = sorted(str(file.parent.relative_to(KEPT)) for file in KEPT.glob("*/*/model.json"))
"""The folder of the version and, in it, the model as it was trained or as it was shared."""


def described(model: str) -> dict[str, Any]:
    return dict(json.loads((KEPT / model / "model.json").read_text(encoding="utf-8")))


def test_todays_version_and_layout_are_kept_before_they_are_released() -> None:
    kept = {(model.partition("/")[0].partition("-")[0], described(model)["format"]) for model in MODELS}
    assert (library.__version__, FORMAT) in kept
    layouts = {layout for _, layout in kept}
    assert layouts == set(range(min(layouts), FORMAT + 1))  # none was skipped


@pytest.mark.parametrize("model", MODELS)
def test_a_kept_model_says_what_it_said(model: str, tmp_path: Path) -> None:
    folder = KEPT / model
    before = sha256(folder.parent)
    answer = carvae(
        "annotate", folder.parent / "query.h5ad", "--model", folder, "--out", tmp_path / "A.h5ad",
        "predict.coverage=0.9",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert sha256(folder.parent) == before
    found, expected = ad.read_h5ad(tmp_path / "A.h5ad"), pd.read_csv(f"{folder}.csv", index_col="cell")
    assert list(found.obs_names) == list(expected.index)
    for name in expected:
        if name.startswith("X_carvae_"):
            values = found.obsm["X_carvae"][:, int(name.removeprefix("X_carvae_")) - 1]
            np.testing.assert_allclose(values, expected[name], atol=1e-4)
        elif pd.api.types.is_numeric_dtype(expected[name]):
            np.testing.assert_allclose(found.obs[name], expected[name], atol=1e-4, err_msg=name)
        else:
            assert found.obs[name].astype(str).tolist() == expected[name].astype(str).tolist(), name


def test_a_kept_model_that_was_shared_says_what_the_whole_one_does_but_novelty() -> None:
    for shared in (model for model in MODELS if model.endswith("/shared")):
        whole = shared.replace("/shared", "/model")
        assert described(whole)["decoder"] is True
        assert described(shared)["decoder"] is False
        said, of_whole = (pd.read_csv(KEPT / f"{model}.csv", index_col="cell") for model in (shared, whole))
        same = [c for c in said if c in {"carvae_state_best", "carvae_confidence"} or c.startswith("X_carvae_")]
        assert len(same) == 5
        pd.testing.assert_frame_equal(said[same], of_whole[same])
