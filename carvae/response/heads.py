"""The attention heads as methods: carvae's on latent cells, and the same pooling on principal components beside it.

Axes: N cells, D dimensions, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from carvae.data.patients import Bag, Floats, Patients
from carvae.model.response import Head, HeadSettings, fit_head
from carvae.response.choice import ATTENTION_PCA, HEAD
from carvae.response.methods import Fitted, Method

LATENT, EXPRESSION, COMPONENTS = "latent", "expression", "components"
"""Spaces of the bags: what the model makes of cells, what was measured, and its principal components."""
N_COMPONENTS = 20


def heads(patients: Patients, settings: HeadSettings) -> list[Method]:
    """Those that the bags allow."""

    def head(learn: Patients, grid: Sequence[float], seed: int) -> list[Fitted]:
        return [fit_head(learn, replace(settings, space=LATENT), seed) for _ in grid]

    def on_components(learn: Patients, grid: Sequence[float], seed: int) -> list[Fitted]:
        found = replace(settings, space=COMPONENTS, with_features=False, with_study=False)
        components = Components.of(learn.bags[EXPRESSION])
        return [OnComponents(components, fit_head(components.added(learn), found, seed)) for _ in grid]

    methods = {LATENT: Method(HEAD, head), EXPRESSION: Method(ATTENTION_PCA, on_components)}
    return [method for space, method in methods.items() if space in patients.bags]


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Principal components of the cells of training patients, every sample with the same weight."""

    mean_G: Floats
    axis_GD: Floats

    @classmethod
    def of(cls, bags: Sequence[Bag]) -> Components:
        """From all cells, by the covariance of genes."""
        mean_G = np.mean([bag.mean(0, dtype=np.float64) for bag in bags], axis=0)
        covariance = np.mean([(b - mean_G).T @ (b - mean_G) / len(b) for b in bags], axis=0)
        _, axis_GG = np.linalg.eigh(covariance)
        return cls(mean_G, axis_GG[:, ::-1][:, :N_COMPONENTS])

    def added(self, patients: Patients) -> Patients:
        """The patients with their cells' components as one more space."""
        cells = tuple(((bag - self.mean_G) @ self.axis_GD).astype(np.float32) for bag in patients.bags[EXPRESSION])
        return replace(patients, bags={COMPONENTS: cells})


@dataclass(frozen=True, slots=True, eq=False)
class OnComponents:
    """A head that asks for components of the expression."""

    components: Components
    head: Head

    def score(self, asked: Patients) -> Floats:
        """As the head's."""
        return self.head.score(self.components.added(asked))
