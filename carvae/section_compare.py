"""Settings of `carvae compare`, and the gate: limits that a product must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from carvae.errors import ConfigError, join_problems
from carvae.section import Section, read_yaml, sentence


class CompareConfig(Section):
    """Two tables of samples side by side."""

    a: dict[str, str] = Field(default_factory=dict)
    """Only rows of A with these values, for example ``timepoint: D0``: two time points may come from one file."""
    b: dict[str, str] = Field(default_factory=dict)
    """Only rows of B with these values."""
    unit: Literal["auto", "patient", "sample"] = "auto"
    """What intervals are over: patients where every row names one (``auto``), or samples. Samples of one patient are no
    two patients: with ``sample`` that is not heeded."""
    paired: bool = True
    """Patients that are on both sides are compared each with itself."""


class Limit(Section):
    """What one figure of the comparison must keep."""

    min: float | None = None
    """Least value."""
    max: float | None = None
    """Greatest value."""
    within: float | None = Field(None, gt=0)
    """Greatest difference from A, up or down."""

    @model_validator(mode="after")
    def _says_something(self) -> Limit:
        if self.min is None and self.max is None and self.within is None:
            raise ValueError("a limit needs min, max or within")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Gate(Section):
    """When B passes: each of its samples, or its mean, keeps all limits; A is what it is compared with."""

    of: Literal["sample", "mean"] = "sample"
    """``sample``: every sample of B must keep the limits; ``mean``: their mean must."""
    judge: Literal["estimate", "interval"] = "estimate"
    """``estimate``: the value itself; ``interval``: the whole 95% interval, so that few cells are no excuse."""
    worst_verdict: Literal["in range", "with care", "out of range"] = "out of range"
    """The worst verdict that a sample of B may have; models without ``train.calibration_folds`` give none."""
    same_model: bool = True
    """Both sides were labelled by one and the same model."""
    limits: dict[str, Limit] = Field(default_factory=dict)
    """Figure (column of the table of samples, such as ``fraction memory`` or ``mean_confidence``) -> its limit."""

    @classmethod
    def read(cls, path: Path) -> Gate:
        """The gate in a YAML file; raises ConfigError naming every wrong key and value."""
        if not path.exists():
            raise ConfigError(f"the gate {str(path)!r} does not exist; configs/gates/release.yaml is an example")
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            problems = [sentence(cls, e["loc"], e["type"], e["msg"]) for e in error.errors()]
            raise ConfigError(join_problems(f"{path} is not a valid gate", problems)) from None
