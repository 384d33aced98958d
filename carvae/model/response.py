"""A head for outcomes of patients: gated attention over the cells of a sample, with features of the sample beside it.

Attention follows Ilse, Tomczak and Welling (2018), eq. 9: a cell weighs ``softmax(w . (tanh(V x) * sigmoid(U x)))``,
taken over the cells of its bag, and the sample is the weighted mean of its cells. Cohorts are small, so the head is
too: few hidden units, no layer between the pooled cell and the outcome, decay on everything, cells drawn anew in every
step, and the mean of several members that differ in their seeds. A study may have an offset and a small shift of its
cells, both drawn to zero, which a study that was not seen does not have.

Axes: R samples, N cells of a sample, M cells drawn, D dimensions of a cell, H hidden units, E members, F features, S
studies, C cuts between the levels of the outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from carvae.data.patients import Bag, Floats, Patients
from carvae.errors import BundleError, RespondError

LEAST_SPREAD, NO_SPREAD = 1e-9, 1e12
"""Features that vary less than the first among training samples are divided by the second: nothing is left of them."""


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How the head is fitted; found on simulated cohorts, never on a real outcome."""

    space: str = "latent"
    """Which cells of the bags are read."""
    with_features: bool = True
    """Whether features of the sample stand beside the pooled cell (those of the pseudobulk never do)."""
    with_study: bool = True
    """Whether a training study has an offset and a shift of its own."""
    n_hidden: int = 8
    n_members: int = 3
    n_cells: int = 40
    """Cells drawn of each sample in a step."""
    n_steps: int = 80
    lr: float = 0.06
    decay: float = 0.01
    """Of AdamW, on all weights."""
    feature_decay: float = 0.2
    study_decay: float = 0.1
    """Squared penalties on the features' coefficients, and on what belongs to a study."""


WEIGHTS = ("v_EDH", "u_EDH", "w_EH", "c_ED", "f_EF", "b_E", "cut_EC")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A head that has learned. All tensors are of 32 bits."""

    weights: Mapping[str, Tensor]
    centre_D: Tensor
    scale_D: Tensor
    median_F: Tensor
    centre_F: Tensor
    scale_F: Tensor
    columns: tuple[str, ...]
    space: str
    kind: str

    def score(self, asked: Patients) -> Floats:
        """Expected level (two levels: probability of the better), for times minus the log hazard; mean of members."""
        bags = asked.bags.get(self.space)
        if bags is None:
            raise RespondError(f"the samples come without their cells in the space {self.space!r}")
        x_RF = self._features(asked)
        return np.array([float(self._call(bag, x_F)[0].mean()) for bag, x_F in zip(bags, x_RF, strict=True)])

    def attention(self, bag: Bag) -> Floats:
        """Weight of each cell of a sample, mean of the members; sums to 1."""
        with torch.no_grad():
            x_ND = (torch.from_numpy(bag) - self.centre_D) / self.scale_D
            weight_EN = torch.softmax(_gate(self.weights, x_ND), -1)
        return weight_EN.mean(0).numpy().astype(float)

    def _features(self, asked: Patients) -> Tensor:
        x_RF = torch.from_numpy(asked.of(self.columns)).float()
        x_RF = torch.where(torch.isnan(x_RF), self.median_F, x_RF)
        return (x_RF - self.centre_F) / self.scale_F

    def _call(self, bag: Bag, x_F: Tensor) -> Tensor:
        with torch.no_grad():
            x_ND = (torch.from_numpy(bag) - self.centre_D) / self.scale_D
            logit_ER = _logits(self.weights, x_ND[None], x_F[None])
            return _level(logit_ER, self.weights["cut_EC"], self.kind).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        fixed = {name: getattr(self, name) for name in ("centre_D", "scale_D", "median_F", "centre_F", "scale_F")}
        return {name: tensor.contiguous() for name, tensor in (dict(self.weights) | fixed).items()}

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"columns": list(self.columns), "space": self.space, "kind": self.kind}

    @classmethod
    def read(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
        """A head from what `describe` and `tensors` gave; raises BundleError where they do not fit together."""
        known = dict(tensors)
        weights = {name: known.pop(name) for name in WEIGHTS}
        n_dim, n_features = known["centre_D"].numel(), len(spec["columns"])
        shapes = (weights["v_EDH"].shape[1], weights["c_ED"].shape[1], known["scale_D"].numel())
        beside = (weights["f_EF"].shape[1], known["median_F"].numel(), known["centre_F"].numel())
        if set(shapes) != {n_dim} or set(beside) != {n_features}:
            raise BundleError("the response head's weights do not fit its description; retrain the model")
        return cls(weights, **known, columns=tuple(spec["columns"]), space=spec["space"], kind=spec["kind"])


def fit_head(learn: Patients, settings: HeadSettings, seed: int) -> Head:
    """Fit the head to training patients; every sample bears the outcome of its patient, and shares its weight."""
    bags = learn.bags[settings.space]
    columns = tuple(n for n in learn.columns if not n.startswith("pseudobulk ")) if settings.with_features else ()
    scaled = _Scaled.of(learn, bags, columns)
    rng, made = np.random.default_rng((seed, 31)), torch.Generator().manual_seed(seed)
    weights = _start(scaled, settings, len(learn.levels) - 1 if learn.kind != "time" else 0, made)
    study = _StudyTerms.start(scaled, settings)
    trained = [t for t in [*weights.values(), *study.tensors] if t.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.decay)
    loss_of = _loss_of(learn)
    for step in range(settings.n_steps):
        for group in optimiser.param_groups:  # falls to nothing along a half cosine
            group["lr"] = settings.lr * 0.5 * (1 + np.cos(np.pi * step / settings.n_steps))
        x_RMD = scaled.drawn(rng, settings.n_cells)
        logit_ER = _logits(weights, x_RMD - study.shift_SD[scaled.study_R][:, None], scaled.x_RF)
        loss = loss_of(logit_ER + study.offset_S[scaled.study_R], weights["cut_EC"])
        loss = loss + settings.feature_decay * weights["f_EF"].square().sum() + settings.study_decay * study.square()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    kept = {name: tensor.detach() for name, tensor in weights.items()}
    fixed = (scaled.centre_D, scaled.scale_D, scaled.median_F, scaled.centre_F, scaled.scale_F)
    return Head(kept, *fixed, columns=columns, space=settings.space, kind=learn.kind)


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """Training samples on one scale."""

    cells_ND: Tensor
    """All cells, sample after sample."""
    first_R: NDArray[np.int64]
    size_R: NDArray[np.int64]
    x_RF: Tensor
    study_R: Tensor
    centre_D: Tensor
    scale_D: Tensor
    median_F: Tensor
    centre_F: Tensor
    scale_F: Tensor

    @classmethod
    def of(cls, learn: Patients, bags: tuple[Bag, ...], columns: tuple[str, ...]) -> _Scaled:
        """Cells by mean and spread of all, features centred within study."""
        cells_ND = torch.from_numpy(np.concatenate(bags))
        centre_D, scale_D = cells_ND.mean(0), cells_ND.std(0) + 1e-6
        size_R = np.array([len(bag) for bag in bags])
        _, code_R = np.unique(learn.study_R.astype(str), return_inverse=True)
        x_RF = learn.of(columns)
        some_F = ~np.isnan(x_RF).all(0)
        median_F = np.zeros(x_RF.shape[1])
        median_F[some_F] = np.nanmedian(x_RF[:, some_F], axis=0)
        x_RF = np.where(np.isnan(x_RF), median_F, x_RF)
        mean_SF = np.stack([x_RF[code_R == s].mean(0) for s in range(code_R.max() + 1)])
        within_RF = x_RF - mean_SF[code_R]
        scale_F = within_RF.std(0)
        scale_F[scale_F < LEAST_SPREAD] = NO_SPREAD
        floats = (within_RF / scale_F, median_F, mean_SF.mean(0), scale_F)
        x, median, centre, scale = (torch.from_numpy(np.asarray(a)).float() for a in floats)
        cells_ND = (cells_ND - centre_D) / scale_D
        study_R = torch.from_numpy(code_R.astype(np.int64))
        return cls(cells_ND, np.cumsum(size_R) - size_R, size_R, x, study_R, centre_D, scale_D, median, centre, scale)

    def drawn(self, rng: np.random.Generator, n: int) -> Tensor:
        """Cells of every sample, drawn with replacement: [R, M, D]."""
        place_RM = self.first_R[:, None] + (rng.random((self.size_R.size, n)) * self.size_R[:, None]).astype(np.int64)
        return self.cells_ND[torch.from_numpy(place_RM.ravel())].view(self.size_R.size, n, -1)


@dataclass(frozen=True, slots=True, eq=False)
class _StudyTerms:
    """What a training study has to itself."""

    offset_S: Tensor
    shift_SD: Tensor

    @classmethod
    def start(cls, scaled: _Scaled, settings: HeadSettings) -> _StudyTerms:
        n = int(scaled.study_R.max()) + 1
        learned = settings.with_study and n > 1
        shape = (n, scaled.centre_D.numel())
        return cls(torch.zeros(n, requires_grad=learned), torch.zeros(shape, requires_grad=learned))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.offset_S, self.shift_SD

    def square(self) -> Tensor:
        """Sum of the squares."""
        return self.offset_S.square().sum() + self.shift_SD.square().sum()


def _start(scaled: _Scaled, settings: HeadSettings, n_cuts: int, made: torch.Generator) -> dict[str, Tensor]:
    n_dim, members, hidden = scaled.centre_D.numel(), settings.n_members, settings.n_hidden

    def random(*shape: int, spread: float) -> Tensor:
        return (torch.randn(members, *shape, generator=made) * spread).requires_grad_()

    return {
        "v_EDH": random(n_dim, hidden, spread=n_dim**-0.5),
        "u_EDH": random(n_dim, hidden, spread=n_dim**-0.5),
        "w_EH": random(hidden, spread=hidden**-0.5),
        "c_ED": random(n_dim, spread=0.01),
        "f_EF": torch.zeros(members, scaled.x_RF.shape[1], requires_grad=True),
        "b_E": torch.zeros(members, requires_grad=True),
        "cut_EC": torch.zeros(members, max(0, n_cuts - 1), requires_grad=n_cuts > 1),
    }


def _gate(weights: Mapping[str, Tensor], x_ND: Tensor) -> Tensor:
    """Attention before the softmax, [E, N]."""
    members, n_dim, hidden = weights["v_EDH"].shape
    both = torch.cat([weights["v_EDH"], weights["u_EDH"]], -1).permute(1, 0, 2).reshape(n_dim, -1)
    out_NEH = (x_ND @ both).view(-1, members, 2 * hidden)
    gated = torch.tanh(out_NEH[..., :hidden]) * torch.sigmoid(out_NEH[..., hidden:])
    return (gated * weights["w_EH"]).sum(-1).T


def _logits(weights: Mapping[str, Tensor], x_RMD: Tensor, x_RF: Tensor) -> Tensor:
    """Log odds of the better side of the first cut, [E, R]."""
    n_rows, n_cells, n_dim = x_RMD.shape
    weight_ERM = torch.softmax(_gate(weights, x_RMD.reshape(-1, n_dim)).view(-1, n_rows, n_cells), -1)
    value_ERM = (x_RMD.reshape(-1, n_dim) @ weights["c_ED"].T).T.view(-1, n_rows, n_cells)
    return (weight_ERM * value_ERM).sum(-1) + weights["f_EF"] @ x_RF.T + weights["b_E"][:, None]


def _cut(logit_ER: Tensor, cut_EC: Tensor) -> Tensor:
    """Log odds of the better side of every cut, falling from cut to cut: [E, R, C]."""
    below = torch.cumsum(softplus(cut_EC), -1)
    return torch.cat([logit_ER[..., None], logit_ER[..., None] - below[:, None]], -1)


def _level(logit_ER: Tensor, cut_EC: Tensor, kind: str) -> Tensor:
    return logit_ER if kind == "time" else torch.sigmoid(_cut(logit_ER, cut_EC)).sum(-1)


def _loss_of(learn: Patients) -> Any:
    """Loss of logits [E, R] and cuts: mean over patients, summed over members."""
    _, code_R, n = np.unique(learn.patient_R.astype(str), return_inverse=True, return_counts=True)
    weight_R = torch.from_numpy(1 / n[code_R]).float()
    weight_R = weight_R / weight_R.sum()
    if learn.kind == "time":
        return _cox_loss(learn, weight_R)
    above_RC = torch.from_numpy(learn.outcome_R[:, None] > np.arange(len(learn.levels) - 1)).float()

    def loss(logit_ER: Tensor, cut_EC: Tensor) -> Tensor:
        found_ERC = _cut(logit_ER, cut_EC)
        lost = binary_cross_entropy_with_logits(found_ERC, above_RC.expand_as(found_ERC), reduction="none")
        return (lost.mean(-1) * weight_R).sum()

    return loss


def _cox_loss(learn: Patients, weight_R: Tensor) -> Any:
    """Minus the log of Cox's partial likelihood (1972), within study; a greater score is a lower hazard."""
    assert learn.event_R is not None
    later = learn.outcome_R[None, :] >= learn.outcome_R[:, None]
    at_risk_RR = torch.from_numpy(later & (learn.study_R[None, :] == learn.study_R[:, None]))
    seen_R = torch.from_numpy(learn.event_R).float() * weight_R

    def loss(logit_ER: Tensor, cut_EC: Tensor) -> Tensor:
        hazard = -logit_ER
        risk = torch.where(at_risk_RR, hazard[:, None, :], -torch.inf)
        return ((torch.logsumexp(risk, -1) - hazard) * seen_R).sum() / seen_R.sum().clamp(min=1e-9)

    return loss
