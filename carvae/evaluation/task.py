"""One method's work in one fold, and what it gives back.

Axes: N cells, S leaves, K latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from carvae.config import Config
from carvae.evaluation.cells import WHOLE, Cells, Point, Rows
from carvae.evaluation.folds import Fold

Floats = NDArray[np.float32]
Settings = dict[str, float | str]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a method says of some cells."""

    probability_NS: Floats
    """Over all leaves; 0 for those that it was not taught."""
    novelty_N: Floats
    """Greater for cells less like those learned from, on the method's own scale."""
    raw_NS: Floats | None = None
    """Before calibration, where there is one."""
    set_NS: NDArray[np.bool_] | None = None
    """Leaves in the set that holds the true one nine times in ten."""
    unknown_N: NDArray[np.bool_] | None = None
    """Cells for which the method gives no label."""


Answerer = Callable[[Rows, Point], Said]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A method that has learned."""

    says: Answerer
    settings: Settings = field(default_factory=dict)
    """What it chose by itself."""
    latent: Callable[[Rows], Floats] | None = None
    """Coordinates of training cells or asked cells, where the method has a space of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A fold, a seed, and where files may lie."""

    cells: Cells
    fold: Fold
    config: Config
    seed: int
    folder: Path
    """For the answers, and for what methods of the same fold and seed share."""
    fingerprint: str
    """Of the cells."""

    @property
    def stamp(self) -> str:
        """Hash of the cells, the fold and the seed."""
        digest = hashlib.sha256(self.fold.train.tobytes() + b"|" + self.fold.query.tobytes())
        digest.update(json.dumps([self.fingerprint, self.fold.design, self.fold.state, self.seed]).encode())
        return digest.hexdigest()

    @property
    def names(self) -> NDArray[np.object_]:
        """All leaves."""
        return np.array(self.cells.leaves, dtype=object)

    def train(self) -> ad.AnnData:
        """The training cells with their labels, for a baseline."""
        return self.cells.adata(self.fold.train, labels=True)

    def query(self, rows: Rows, point: Point = WHOLE) -> ad.AnnData:
        """Cells to ask, without labels, for a baseline."""
        return self.cells.adata(rows, point)

    def spread(self, probability: NDArray[np.floating], names: NDArray[np.object_]) -> Floats:
        """Columns of the taught leaves among those of all leaves."""
        found = np.zeros((len(probability), len(self.cells.leaves)), np.float32)
        place = {leaf: s for s, leaf in enumerate(self.cells.leaves)}
        found[:, [place[str(name)] for name in names]] = probability
        return found


Method = Callable[[Task], Fitted]


def unsure(probability_NS: Floats) -> Floats:
    """One minus the greatest probability: the usual novelty of a classifier."""
    return np.asarray(1 - probability_NS.max(1))
