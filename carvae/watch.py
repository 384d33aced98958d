"""Maps of cells while a model is trained, by state and by study, to see whether batches mix and states come apart.

Axes: N cells, K latent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from carvae.config import Config
from carvae.data.loader import MinibatchLoader
from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.network import Network
from carvae.plots.cells import plot_umap
from carvae.plots.look import save

MOST, AT_ONCE = 2000, 1024
"""Cells of a map, and cells that are embedded at a time."""
UNLABELLED = "unlabelled"


class Watch:
    """Draws the map of some cells, always the same ones: of the held-out patients where there are any.

    Studies are numbered, as in all that may go to W&B: their names are not for everyone.

    Parameters
    ----------
    folder
        Where pictures go.
    """

    def __init__(self, network: Network, cohort: Cohort, split: PatientSplit, config: Config, folder: Path) -> None:
        rows = split.validation if split.validation.size else split.train
        chosen = np.random.default_rng((config.seed, 71)).permutation(rows)[:MOST]
        self.rows = np.sort(chosen)
        self.network, self.cohort, self.config, self.folder = network, cohort, config, folder
        self.study = [f"study {number}" for number in cohort.study_N[self.rows] + 1]
        self.state = self._state()

    def _state(self) -> list[str] | None:
        """Author's state of each cell on the first axis; None where no study has labels."""
        if self.cohort.tree is None:
            return None
        axis = self.cohort.tree.axes[0]
        names = np.array([*axis.leaves, UNLABELLED], dtype=object)
        return [str(name) for name in names[self.cohort.true_leaf(axis.name)[self.rows]]]

    def __call__(self, epoch: int) -> Path:
        """Draw the map after an epoch, and return the picture."""
        import umap

        coordinates = umap.UMAP(random_state=self.config.seed, n_jobs=1).fit_transform(self._latent())
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        axes = Figure(figsize=(16, 5.5), layout=layout).subplots(1, 2 if self.state is not None else 1, squeeze=False)[
            0
        ]
        if self.state is not None:
            assert self.cohort.tree is not None
            plot_umap(
                coordinates, self.state, f"Epoch {epoch}: state by author", self.cohort.tree.axes[0].leaves, axes[0]
            )
        plot_umap(coordinates, self.study, f"Epoch {epoch}: study, in the order of the config", ax=axes[-1])
        self.folder.mkdir(parents=True, exist_ok=True)
        return save(axes[0], self.folder / f"map_{epoch}.png")

    @torch.no_grad()
    def _latent(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Latent means of the cells, [N, K]."""
        device = next(self.network.parameters()).device
        training = self.network.training
        self.network.eval()
        loader = MinibatchLoader(self.cohort.data(self.rows, self.config), self.rows, AT_ONCE)
        found = [self.network.vae.encoder(batch.to(device).counts).mean_NK.float().cpu() for batch in loader]
        self.network.train(training)
        latent: np.ndarray[tuple[int, int], np.dtype[np.float32]] = torch.cat(found).numpy()
        return latent
