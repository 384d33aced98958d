"""Models that released versions wrote open for ever, and say on the query beside them what they said then."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from trained import carvae, sha256

import carvae as library

KEPT = Path(__file__).resolve().parent / "bundles"
VERSIONS = sorted(folder.name for folder in KEPT.iterdir())


def test_the_version_that_is_built_is_kept_before_it_is_released() -> None:
    assert library.__version__ in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kept_model_says_what_it_said(version: str, tmp_path: Path) -> None:
    folder = KEPT / version
    before = sha256(folder)
    answer = carvae(
        "annotate", folder / "query.h5ad", "--model", folder / "model", "--out", tmp_path / "A.h5ad",
        "predict.coverage=0.9",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert sha256(folder) == before
    found, expected = ad.read_h5ad(tmp_path / "A.h5ad"), pd.read_csv(folder / "answers.csv", index_col="cell")
    assert list(found.obs_names) == list(expected.index)
    for name in expected:
        if name.startswith("X_carvae_"):
            values = found.obsm["X_carvae"][:, int(name.removeprefix("X_carvae_")) - 1]
            np.testing.assert_allclose(values, expected[name], atol=1e-4)
        elif pd.api.types.is_numeric_dtype(expected[name]):
            np.testing.assert_allclose(found.obs[name], expected[name], atol=1e-4, err_msg=name)
        else:
            assert found.obs[name].astype(str).tolist() == expected[name].astype(str).tolist(), name
    assert json.loads((folder / "model" / "model.json").read_text())["provenance"]["carvae_version"] == version
