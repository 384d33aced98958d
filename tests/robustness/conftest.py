"""What the robustness suite shares: a small model that is kept in the repository, its query, small studies.

A test bears the cases of ``cases.yaml`` that it decides (``@pytest.mark.case("A01")``) and may say what carvae said by
the fixture ``says``; ``scripts/robustness_table.py`` makes the table of docs/robustness.md of both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from small import KEPT, Small
from trained import World


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("case"):
        item.user_properties += [("case", name) for name in marker.args]


@pytest.fixture
def says(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[object], None]:
    """Keeps what was said, or measured, for the table; paths of this run are left out."""

    def keep(text: object) -> None:
        said = " ".join(str(text).replace(str(tmp_path), "…").split())[:400]
        request.node.user_properties.append(("says", said))

    return keep


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(KEPT / "model", folder / "model")
    shutil.copyfile(KEPT / "query.h5ad", folder / "query.h5ad")
    return Small(folder / "model", ad.read_h5ad(folder / "query.h5ad"), folder / "query.h5ad")


@pytest.fixture
def model(small: Small, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(small.model, tmp_path / "model"))


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Small simulated studies to train on; no model."""
    from carvae.data.simulate import SimulationSettings, simulate_studies, write_studies
    from carvae.demo import programmes

    folder = tmp_path_factory.mktemp("studies")
    made = simulate_studies(np.random.default_rng(3), programmes(), SimulationSettings(n_cells=100))
    write_studies(made, folder)
    by_name = {study.uns["title"]: study for study in made}
    query = by_name["sim_myeloma"]
    return World(folder, by_name, query, folder / "sim_myeloma.h5ad", folder / "none.yaml", KEPT / "model")
