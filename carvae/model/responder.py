"""What a bundle knows of outcomes: one predictor, the same learned of other draws of the patients, and its provenance.

Axes: R rows (samples), F features, C cuts between levels of the outcome, B draws of the patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carvae.data.patients import Floats, Patients
from carvae.errors import BundleError
from carvae.model.response import NO_SPREAD, Head

__all__ = ["EDGE", "FRACTION", "NO_SPREAD", "PREFIX", "Linear", "Recalibration", "Responder", "transformed"]

PREFIX = "response."
"""Of the tensors in a bundle."""
FRACTION = "fraction "
"""Start of the names of columns that hold shares of cells."""
EDGE = 1e-6
"""Least probability whose log odds are taken."""
PARTS = ("median_F", "centre_F", "scale_F", "coefficient_CF", "intercept_C")


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear model of some columns."""

    columns: tuple[str, ...]
    median_F: Floats
    """In place of missing values."""
    centre_F: Floats
    scale_F: Floats
    coefficient_CF: Floats
    intercept_C: Floats
    kind: str

    def score(self, asked: Patients) -> Floats:
        """Expected level (two levels: probability of the better); for a time to an event minus the log hazard."""
        x_RF = transformed(asked.of(self.columns), self.columns)
        x_RF = (np.where(np.isnan(x_RF), self.median_F, x_RF) - self.centre_F) / self.scale_F
        logit_RC = x_RF @ self.coefficient_CF.T + self.intercept_C
        return np.asarray(logit_RC[:, 0] if self.kind == "time" else (1 / (1 + np.exp(-logit_RC))).sum(1))

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors, of 32 bits."""
        return {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))).float() for name in PARTS}

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"columns": list(self.columns), "kind": self.kind}

    @classmethod
    def read(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Linear:
        """From what `describe` and `tensors` gave; raises BundleError where they do not fit together."""
        parts = {name: tensors[name].double().numpy() for name in PARTS}
        if {parts[name].shape[-1] for name in PARTS[:-1]} != {len(spec["columns"])}:
            raise BundleError("the response model's weights do not fit its columns; retrain the model")
        return cls(tuple(spec["columns"]), **parts, kind=spec["kind"])


def transformed(x_RF: Floats, columns: Sequence[str]) -> Floats:
    """Features as they are, fractions by their square root, which evens out their variance."""
    share_F = np.array([name.startswith(FRACTION) for name in columns], bool)
    return np.where(share_F, np.sqrt(np.clip(x_RF, 0, None)), x_RF)


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What makes probabilities of a yes or no as sure as they may be: log odds times ``slope`` plus ``shift``."""

    slope: float = 1.0
    shift: float = 0.0

    def __call__(self, probability: Floats) -> Floats:
        """The probabilities it makes of others, in the same order."""
        p = np.clip(probability, EDGE, 1 - EDGE)
        return np.asarray(1 / (1 + np.exp(-(self.slope * np.log(p / (1 - p)) + self.shift))))


@dataclass(frozen=True, slots=True, eq=False)
class Responder:
    """A prediction of outcomes that was learned with a model, and what is to be known of it."""

    method: str
    """What predicts: ``head``, or the baseline that the head did not beat."""
    predictor: Head | Linear
    refits: tuple[Head | Linear, ...]
    """The same method learned of patients drawn anew, for intervals."""
    levels: tuple[str, ...]
    kind: str
    products: tuple[str, ...]
    """Digests of the names of the products that were learned from; empty where none was named."""
    n_patients: int
    n_studies: int
    recalibration: Recalibration | None
    """Learned in the inner folds; None but for two levels."""
    inner: Mapping[str, float]
    """Method -> concordance within study in the inner folds by which one was chosen."""

    def score(self, asked: Patients) -> tuple[Floats, Floats]:
        """Prediction of each sample [R], and those of the refits [B, R]."""
        found = self.predictor.score(asked), np.stack([refit.score(asked) for refit in self.refits])
        again = self.recalibration
        return found if again is None else (again(found[0]), again(found[1]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Features that are read."""
        return self.predictor.columns

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        parts = enumerate((self.predictor, *self.refits))
        return {f"{PREFIX}{k}.{name}": tensor for k, part in parts for name, tensor in part.tensors().items()}

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "predictor": self.predictor.describe(),
            "n_refits": len(self.refits),
            "levels": list(self.levels),
            "kind": self.kind,
            "products": list(self.products),
            "n_patients": self.n_patients,
            "n_studies": self.n_studies,
            "recalibration": None if self.recalibration is None else asdict(self.recalibration),
            "inner": dict(self.inner),
        }

    @classmethod
    def read(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Responder:
        """From what `describe` and `tensors` gave; raises BundleError where they do not fit together."""
        kind: type[Head] | type[Linear] = Head if "space" in spec["predictor"] else Linear
        parts = []
        for k in range(int(spec["n_refits"]) + 1):
            start = f"{PREFIX}{k}."
            own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            parts.append(kind.read(spec["predictor"], own))
        return cls(
            method=str(spec["method"]),
            predictor=parts[0],
            refits=tuple(parts[1:]),
            levels=tuple(map(str, spec["levels"])),
            kind=str(spec["kind"]),
            products=tuple(map(str, spec["products"])),
            n_patients=int(spec["n_patients"]),
            n_studies=int(spec["n_studies"]),
            recalibration=None if spec["recalibration"] is None else Recalibration(**spec["recalibration"]),
            inner={str(name): float(value) for name, value in spec["inner"].items()},
        )
