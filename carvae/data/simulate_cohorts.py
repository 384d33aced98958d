"""Simulated cohorts of patients with an outcome, drawn in the latent space of a model that is thought of as trained.

Nothing here is measured. Cells lie around the centres of known states; patients and studies shift them. The outcome may
be carried by a rare state that the labels do not know (its cells are called one of the known states), by composition,
by clones, by nothing, or by the study alone. The expression of 60 genes follows linearly from the latent coordinates,
with the batch effects of the studies that the latent space is free of.

Axes: R patients (one sample each), N cells of a sample, K latent, S states, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from carvae.data.patients import Bag, Floats, Patients

Effect = Literal["rare", "composition", "clones", "nothing", "study"]
EFFECTS: tuple[str, ...] = get_args(Effect)
LATENT, EXPRESSION = "latent", "expression"
"""Spaces of the bags: latent coordinates with state probabilities, and expression."""
FIRST_SHARE = 0.2
"""Least mean share of the first state, which the rare one is taken for."""


@dataclass(frozen=True, slots=True)
class CohortDesign:
    """What is simulated."""

    effect: Effect = "rare"
    n_patients: int = 100
    n_studies: int = 5
    n_cells: int = 200
    """Mean cells per sample; samples vary around it by a third."""
    n_latent: int = 12
    n_states: int = 8
    n_genes: int = 60
    rare_shares: tuple[float, float] = (0.006, 0.04)
    """Median share of the rare state in patients without and with the outcome."""
    rare_shift: float = 5.0
    """Distance of the rare state from the state that it is taken for, in standard deviations of a state's cells."""
    patient_shift: float = 0.25
    """Standard deviation of a patient's shift of all cells, in each latent dimension."""
    study_shift: float = 0.15
    """The same of a study, in the latent space; in expression it is ten times as much."""
    strength: float = 1.2
    """Standard deviations between the classes for the effects of composition and of clones."""


def simulate_cohort(design: CohortDesign, rng: np.random.Generator) -> Patients:
    """Patients with bags of cells and the usual features of a sample."""
    study_R = np.arange(design.n_patients) % design.n_studies
    rate_S = rng.uniform(0.35, 0.6, design.n_studies)
    if design.effect == "study":
        rate_S = np.linspace(0.1, 0.9, design.n_studies)
    y_R = (rng.random(design.n_patients) < rate_S[study_R]).astype(float)
    world = _World.draw(design, rng)
    latents, states = [], []
    for study, y in zip(study_R, y_R, strict=True):
        z_NK, state_N = _cells(design, world, int(study), float(y), rng)
        latents.append(z_NK)
        states.append(state_N)
    probability = [_probability(z_NK, world) for z_NK in latents]
    expression = [
        z_NK @ world.loading_KG + world.batch_SG[s] + rng.normal(0, 1.0, (len(z_NK), design.n_genes))
        for z_NK, s in zip(latents, study_R, strict=True)
    ]
    columns, x_RF = _features(design, probability, expression, y_R, rng)
    names = np.array([f"P{r:03d}" for r in range(design.n_patients)], dtype=object)
    return Patients(
        sample_R=names,
        patient_R=names,
        study_R=np.array([f"study {s + 1}" for s in study_R], dtype=object),
        outcome_R=y_R,
        columns=columns,
        x_RF=x_RF,
        beside={
            "n_cells": np.array([float(len(z)) for z in latents]),
            "median_counts": rng.lognormal(8, 0.3, design.n_patients) * (1 + 0.3 * study_R),
        },
        bags={
            LATENT: tuple(_bag(np.hstack(pair)) for pair in zip(latents, probability, strict=True)),
            EXPRESSION: tuple(map(_bag, expression)),
        },
    )


@dataclass(frozen=True, slots=True, eq=False)
class _World:
    """What all patients share."""

    centre_SK: Floats
    rare_K: Floats
    """From the centre of the first state to that of the rare one, at right angles to all differences of states."""
    share_S: Floats
    shift_SK: Floats
    """Of each study."""
    loading_KG: Floats
    batch_SG: Floats

    @classmethod
    def draw(cls, design: CohortDesign, rng: np.random.Generator) -> _World:
        centre_SK = rng.normal(0, 2.0, (design.n_states, design.n_latent))
        direction_K = rng.normal(size=design.n_latent)
        span_KD = np.linalg.qr((centre_SK[1:] - centre_SK[0]).T)[0]
        direction_K -= span_KD @ (span_KD.T @ direction_K)
        loading_KG = rng.normal(0, 1 / np.sqrt(design.n_latent), (design.n_latent, design.n_genes))
        share_S = rng.dirichlet(np.full(design.n_states, 4.0))
        share_S[0] = max(share_S[0], FIRST_SHARE)  # room for the rare state inside it
        return cls(
            centre_SK,
            design.rare_shift * direction_K / np.linalg.norm(direction_K),
            share_S / share_S.sum(),
            rng.normal(0, design.study_shift, (design.n_studies, design.n_latent)),
            loading_KG,
            rng.normal(0, 10 * design.study_shift, (design.n_studies, design.n_genes)),
        )


def _cells(
    design: CohortDesign, world: _World, study: int, y: float, rng: np.random.Generator
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Latent coordinates and states of one sample's cells."""
    n = max(20, int(design.n_cells * rng.lognormal(0, 0.3)))
    log_S = np.log(world.share_S) + rng.normal(0, 0.5, design.n_states)
    if design.effect == "composition":
        log_S[1] += 0.5 * design.strength * (y - 0.5)
    share_S = np.exp(log_S) / np.exp(log_S).sum()
    state_N = rng.choice(design.n_states, n, p=share_S)
    shift_K = world.shift_SK[study] + rng.normal(0, design.patient_shift, design.n_latent)
    z_NK = world.centre_SK[state_N] + shift_K + rng.normal(size=(n, design.n_latent))
    median = design.rare_shares[int(y) if design.effect == "rare" else 0]
    taken = np.flatnonzero(state_N == 0)  # of the state that they are called, so that composition stays as it was
    n_rare = min(rng.binomial(n, min(0.3, median * rng.lognormal(0, 0.5))), taken.size)
    rare = rng.choice(taken, n_rare, replace=False)
    z_NK[rare] = world.centre_SK[0] + world.rare_K + shift_K + rng.normal(size=(n_rare, design.n_latent))
    return z_NK, state_N


def _probability(z_NK: Floats, world: _World) -> Floats:
    """Of each known state, by its distance; the rare state is not known."""
    logit_NS = -0.5 * ((z_NK[:, None, :] - world.centre_SK[None]) ** 2).sum(-1)
    logit_NS -= logit_NS.max(1, keepdims=True)
    return np.asarray(np.exp(logit_NS) / np.exp(logit_NS).sum(1, keepdims=True))


def _features(
    design: CohortDesign, probability: list[Floats], expression: list[Floats], y_R: Floats, rng: np.random.Generator
) -> tuple[tuple[str, ...], Floats]:
    """Composition, signatures, pseudobulk and clonal figures, as a table of samples has them."""
    state_RS = np.stack([np.bincount(p.argmax(1), minlength=design.n_states) / len(p) for p in probability])
    mean_RG = np.stack([x.mean(0) for x in expression])
    score_RV = mean_RG.reshape(len(mean_RG), 6, -1).mean(2)
    y = design.strength * (y_R - 0.5) if design.effect == "clones" else np.zeros_like(y_R)
    common_R = rng.normal(size=y_R.size) + y
    clonal_RC = np.stack([common_R + rng.normal(0, 0.4, y_R.size) for _ in range(3)], axis=1)
    columns = [
        *(f"fraction S{s}" for s in range(design.n_states)),
        *(f"mean score_{v}" for v in range(score_RV.shape[1])),
        *("shannon", "chao1", "gini"),
        *(f"pseudobulk {g}" for g in range(design.n_genes)),
    ]
    return tuple(columns), np.column_stack([state_RS, score_RV, clonal_RC, mean_RG])


def _bag(x: Floats) -> Bag:
    return np.ascontiguousarray(x, np.float32)
