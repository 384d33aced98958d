"""Small tables of patients for the tests of response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from carvae.data.patients import Patients


def patients_of(
    n: int = 40, n_studies: int = 2, effect: float = 0.0, n_features: int = 4, seed: int = 0, samples: int = 1
) -> Patients:
    """Alternating outcomes, noise in every feature, and ``effect`` standard deviations in the first."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n), samples)
    level = (patient // n_studies % 2).astype(float)
    x_RF = rng.normal(size=(patient.size, n_features))
    x_RF[:, 0] += effect * level
    names = np.array([f"P{p:02d}" for p in patient], dtype=object)
    return Patients(
        sample_R=np.array([f"{name}-{r}" for r, name in enumerate(names)], dtype=object),
        patient_R=names,
        study_R=np.array([f"s{p % n_studies}" for p in patient], dtype=object),
        outcome_R=level,
        columns=tuple(f"f{k}" for k in range(n_features)),
        x_RF=x_RF,
    )


def with_cells(patients: Patients, n_cells: int = 30, seed: int = 1) -> Patients:
    """The same with cells of four dimensions; a twentieth of those of responders lie apart."""
    rng = np.random.default_rng(seed)
    bags = []
    for level in patients.outcome_R:
        bag = rng.normal(size=(n_cells, 4)).astype(np.float32)
        bag[: round(n_cells / 20 * (level == 1) * 2)] += np.array([0, 0, 6, 0], np.float32)
        bags.append(bag)
    clones = tuple(frozenset(f"{name}{k}" for k in range(3)) for name in patients.patient_R)
    return replace(patients, bags={"latent": tuple(bags)}, clones=clones)
