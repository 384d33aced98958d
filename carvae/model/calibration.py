"""Probabilities that mean what they say, and sets of states that hold the true one as often as stated.

Both are fitted on cells of held-out patients, as they are and with counts and genes taken away. Sets have thresholds
for bins of depth and of gene overlap: one fitted on deep cells alone covers too little on shallow ones. Temperatures
follow depth and overlap by two slopes, since patients differ in depth and a temperature per bin would be a patient's.
The networks that held patients out had fewer cells to learn from than the final one and are surer than they should be:
what is fitted on them is carried over to the final one.

Axes: N cells, S leaves of one label axis, P patients, B bins, V levels of gene overlap, D bins of depth, C stored
coverages, X conditions of a cell (log depth, overlap).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Floats = NDArray[np.float32]

N_DEPTHS = 5
"""Bins of depth at each level of gene overlap, equally filled."""
COVERAGES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Coverages whose thresholds are stored; between them they are interpolated."""
MIN_CELLS = 20
"""Cells of a state that a bin needs for a threshold of its own."""
MAX_GROUPS = 6
"""Groups of patients, each judged by what the others taught."""
LOG_TEMPERATURE = (-1.5, 2.5)
"""Bounds of the logarithm of a temperature."""
PATIENT_CELLS = 1000
"""Cells (each is seen several times) with which a patient counts half as much as one with very many."""
SLOPE_PENALTY = 1e-3
"""Weight of the squared slopes, which without it would be free where cells do not differ in depth or overlap."""
LEAST_DOUBT = 1e-6
"""Probabilities nearer 0 or 1 count as this near."""
PATIENT_SD = 0.25
"""How much patients differ in the logarithm of their temperature, beside what `Temperatures` explains."""
COMMON_SD, SHORTAGE_SD = 1.0, 2.0
"""How large the logarithm of the common temperature and its slope in the shortage are expected to be: weak priors, for
where patients are few or lack equally much."""


@dataclass(frozen=True, slots=True)
class Bins:
    """Bins of cells alike in gene overlap and depth."""

    overlap_V: Floats
    """Levels of the share of panel genes that were measured; a query belongs to the nearest."""
    edge_VD: Floats
    """Counts over the panel that separate the bins of depth, [V, D - 1]."""

    @classmethod
    def fit(cls, counts_N: NDArray[np.floating], overlap_N: NDArray[np.floating]) -> Bins:
        """Equally filled bins of depth at each level of overlap."""
        levels = np.unique(np.asarray(overlap_N, np.float32))
        shares = np.arange(1, N_DEPTHS) / N_DEPTHS
        near_N = np.asarray(overlap_N, np.float32)
        return cls(levels, np.stack([np.quantile(counts_N[near_N == v], shares) for v in levels]).astype(np.float32))

    @property
    def n(self) -> int:
        """B."""
        return int(self.overlap_V.size * (self.edge_VD.shape[1] + 1))

    def of(self, counts_N: NDArray[np.floating], overlap_N: NDArray[np.floating] | float) -> NDArray[np.int64]:
        """Bin of each cell, from its counts over the panel and the share of panel genes measured in it."""
        overlap_N = np.broadcast_to(np.asarray(overlap_N, np.float32), np.shape(counts_N))
        level_N = np.abs(overlap_N[:, None] - self.overlap_V).argmin(1)
        depth_N = (np.asarray(counts_N)[:, None] >= self.edge_VD[level_N]).sum(1)
        bin_N: NDArray[np.int64] = level_N * (self.edge_VD.shape[1] + 1) + depth_N
        return bin_N


@dataclass(frozen=True, slots=True)
class Seen:
    """Held-out cells, as a network saw them that was not trained on their patient."""

    log_probability_NS: NDArray[np.floating]
    truth_N: NDArray[np.integer]
    """Leaf by the author."""
    counts_N: NDArray[np.floating]
    """Counts over the panel."""
    overlap_N: NDArray[np.floating]
    """Share measured of the panel's genes."""
    patient_N: NDArray[np.object_]
    shortage_N: NDArray[np.floating]
    """Logarithm of how many times as many labelled cells the final network is trained on."""

    def condition_NX(self) -> NDArray[np.float64]:
        """What temperatures depend on within a patient."""
        return np.stack([np.log1p(self.counts_N), self.overlap_N], axis=1).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Temperatures:
    """The logarithm of a cell's temperature: one for all, a slope for each condition and one for the shortage."""

    common: float
    """At the centre of the conditions and without shortage."""
    slope_X: NDArray[np.float64]
    centre_X: NDArray[np.float64]
    of_shortage: float
    """What a network is surer than it should be, per unit of `Seen.shortage_N`."""

    @classmethod
    def fit(cls, seen: Seen) -> Temperatures:
        """With which the likeliest leaf is right as often as its probability says.

        A temperature divides log probabilities (Guo et al. 2017, arXiv:1706.04599); its loss is that of the likeliest
        leaf being right or not (top-label calibration, Gupta and Ramdas 2022, arXiv:2107.08353). By the likelihood of
        the true leaf, which counts also how wrong the other leaves are, shallow cells stay too sure.

        First each patient has a temperature of its own beside the common slopes of the conditions: what one large or
        deep patient has by itself is neither taken for the rule nor for an effect of depth. The slopes are learned
        within patients, whose cells were thinned. Then the patients' own are regressed on the shortage of the networks
        that did not see them (Bayesian linear regression, Bishop 2006, section 3.3), and a new patient has what is
        expected without shortage.
        """
        own_P, slope_X, centre_X, cells_P = _by_patient(seen)
        patients, code_N = np.unique(seen.patient_N.astype(str), return_inverse=True)
        shortage_P = np.bincount(code_N, seen.shortage_N, minlength=patients.size) / cells_P
        design_P2 = np.stack([np.ones_like(own_P), shortage_P], axis=1)
        weight_P = cells_P / (cells_P + PATIENT_CELLS) / PATIENT_SD**2
        precision = design_P2.T @ (weight_P[:, None] * design_P2) + np.diag([COMMON_SD**-2, SHORTAGE_SD**-2])
        common, of_shortage = np.linalg.solve(precision, design_P2.T @ (weight_P * own_P))
        return cls(float(common), slope_X, centre_X, float(of_shortage))

    def at(self, condition_NX: NDArray[np.floating], shortage_N: NDArray[np.floating] | float = 0.0) -> Floats:
        """Temperatures under some conditions."""
        log_N = self.common + (condition_NX - self.centre_X) @ self.slope_X + self.of_shortage * shortage_N
        temperature_N: Floats = np.exp(log_N.clip(*LOG_TEMPERATURE)).astype(np.float32)
        return temperature_N


def _by_patient(seen: Seen) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Each patient's log temperature, the slopes of the conditions and their centre, and each patient's cells."""
    patients, code_N = np.unique(seen.patient_N.astype(str), return_inverse=True)
    n_P = np.bincount(code_N)
    part_P = n_P / (n_P + PATIENT_CELLS)
    weight_N, rows = (part_P / part_P.sum() / n_P)[code_N], np.arange(seen.truth_N.size)
    best_N = seen.log_probability_NS.argmax(1)
    right_N = (best_N == seen.truth_N).astype(np.float64)
    condition_NX = seen.condition_NX()
    centre_X = condition_NX.mean(0)
    centred_NX = condition_NX - centre_X

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        own_P, slope_X = values[: patients.size], values[patients.size :]
        scaled_NS = seen.log_probability_NS * np.exp(-(own_P[code_N] + centred_NX @ slope_X))[:, None]
        p_NS = softmax(scaled_NS, axis=1)
        p_N = p_NS[rows, best_N].clip(LEAST_DOUBT, 1 - LEAST_DOUBT)
        steep_N = p_N * ((p_NS * scaled_NS).sum(1) - scaled_NS[rows, best_N])  # of p_N, per log temperature
        gradient_N = -weight_N * (right_N / p_N - (1 - right_N) / (1 - p_N)) * steep_N
        loss_N = right_N * np.log(p_N) + (1 - right_N) * np.log1p(-p_N)
        total = -float(weight_N @ loss_N) + SLOPE_PENALTY * float(slope_X @ slope_X)
        of_slopes = gradient_N @ centred_NX + 2 * SLOPE_PENALTY * slope_X
        return total, np.concatenate([np.bincount(code_N, gradient_N, minlength=patients.size), of_slopes])

    bounds = [LOG_TEMPERATURE] * patients.size + [(-1.0, 1.0)] * centre_X.size
    best = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds).x
    return best[: patients.size], best[patients.size :], centre_X, n_P


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures and set thresholds of one label axis."""

    temperature_B: Floats
    threshold_BSC: Floats
    """Set score up to which a leaf belongs to the set, at each of `COVERAGES`."""
    level_C: Floats
    """Coverage of cells like those fitted on, at which cells of other patients are covered by each of `COVERAGES`."""

    @classmethod
    def fit(cls, seen: Seen, bins: Bins, rule: Temperatures) -> Calibration:
        """Fit on held-out cells, with the temperatures of ``rule``.

        Sets are fitted on scores under each network's own temperature: so they are of networks as sure as they should
        be, which the final one is.
        """
        bin_N, condition_NX = bins.of(seen.counts_N, seen.overlap_N), seen.condition_NX()
        cells_B = np.bincount(bin_N, minlength=bins.n)
        sum_BX = np.stack([np.bincount(bin_N, x_N, minlength=bins.n) for x_N in condition_NX.T], axis=1)
        at_BX = np.where(cells_B[:, None], sum_BX / cells_B.clip(1)[:, None], condition_NX.mean(0))
        probability_NS = tempered(seen.log_probability_NS, rule.at(at_BX[bin_N], seen.shortage_N))
        score_N = set_scores(probability_NS)[np.arange(seen.truth_N.size), seen.truth_N]
        scored = _Scored(score_N, seen.truth_N, bin_N, (bins.n, seen.log_probability_NS.shape[1]))
        return cls(rule.at(at_BX), scored.thresholds(), _levels(scored, seen.patient_N))

    def probability(self, log_probability_NS: NDArray[np.floating], bin_N: NDArray[np.int64]) -> Floats:
        """Calibrated probabilities."""
        return tempered(log_probability_NS, self.temperature_B[bin_N])

    def sets(
        self, probability_NS: NDArray[np.floating], bin_N: NDArray[np.int64], coverage: float
    ) -> NDArray[np.bool_]:
        """Which leaves are compatible with each cell; never none of them.

        The true leaf is among them with probability ``coverage``, for each leaf by itself, in cells exchangeable with
        the held-out ones of the same bin (Vovk 2012, doi:10.1007/s10994-013-5355-6). Cells of another patient are not
        quite, so that as much more is asked as patients left out of the fit have needed.
        """
        at = np.array(COVERAGES)
        asked = float(np.interp(coverage, at, self.level_C))
        i = min(int(np.searchsorted(at, asked, "right")) - 1, at.size - 2)
        part = (asked - at[i]) / (at[i + 1] - at[i])
        low_BS, high_BS = self.threshold_BSC[..., i], self.threshold_BSC[..., i + 1]
        held_NS: NDArray[np.bool_] = set_scores(probability_NS) <= (low_BS + part * (high_BS - low_BS))[bin_N]
        held_NS[np.arange(len(held_NS)), probability_NS.argmax(1)] = True
        return held_NS


def tempered(log_probability_NS: NDArray[np.floating], temperature_N: NDArray[np.floating]) -> Floats:
    """Probabilities with their logarithm divided by each cell's temperature."""
    log_NS: Floats = log_softmax(log_probability_NS / temperature_N[:, None], axis=1).astype(np.float32)
    return np.exp(log_NS)


def set_scores(probability_NS: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probability of the leaves likelier than each leaf, and half its own: small for a leaf that fits.

    The score of adaptive prediction sets (Romano et al. 2020, arXiv:2006.02544) at the middle of its random part, so
    that the same cell always gets the same set.
    """
    order_NS = np.argsort(-probability_NS, axis=1, kind="stable")
    sorted_NS = np.take_along_axis(probability_NS, order_NS, axis=1)
    score_NS = np.empty_like(probability_NS)
    np.put_along_axis(score_NS, order_NS, sorted_NS.cumsum(1) - sorted_NS / 2, axis=1)
    return score_NS


@dataclass(frozen=True, slots=True)
class _Scored:
    """Set scores of the true leaves."""

    score_N: NDArray[np.floating]
    truth_N: NDArray[np.integer]
    bin_N: NDArray[np.int64]
    shape: tuple[int, int]
    """Bins and leaves."""

    def take(self, rows_N: NDArray[np.bool_]) -> _Scored:
        return _Scored(self.score_N[rows_N], self.truth_N[rows_N], self.bin_N[rows_N], self.shape)

    def thresholds(self) -> Floats:
        """Quantiles of the score: of the leaf in the bin, else of the leaf, else of the bin, else of all; [B, S, C]."""
        n_bins, n_leaves = self.shape
        table = np.empty((n_bins, n_leaves, len(COVERAGES)), np.float32)
        for s in range(n_leaves):
            for b in range(n_bins):
                of_leaf, of_bin = self.truth_N == s, self.bin_N == b
                pools = (of_leaf & of_bin, of_leaf, of_bin)
                pool = next((p for p in pools if p.sum() >= MIN_CELLS), np.ones(self.truth_N.size, np.bool_))
                table[b, s] = _quantiles(self.score_N[pool])
        return table


def _levels(scored: _Scored, patient_N: NDArray[np.object_]) -> Floats:
    """Quantiles of the coverage at which a true leaf enters its set, each group of patients judged by the others."""
    patients, code_N = np.unique(patient_N.astype(str), return_inverse=True)
    if patients.size == 1:
        return np.array(COVERAGES, np.float32)
    group_N = code_N % MAX_GROUPS
    level_N = np.empty(scored.score_N.size)
    for group in np.unique(group_N):
        out = group_N == group
        table = scored.take(~out).thresholds()
        level_N[out] = _entering(scored.score_N[out], table[scored.bin_N[out], scored.truth_N[out]])
    return _quantiles(level_N).astype(np.float32)


def _entering(score_N: NDArray[np.floating], threshold_NC: Floats) -> NDArray[np.floating]:
    """Coverage at which each score meets its threshold, by interpolation."""
    at = np.array(COVERAGES)
    above_N = np.clip((threshold_NC < score_N[:, None]).sum(1), 1, at.size - 1)
    rows = np.arange(score_N.size)
    low_N, high_N = threshold_NC[rows, above_N - 1], threshold_NC[rows, above_N]
    part_N = np.clip((score_N - low_N) / np.maximum(high_N - low_N, 1e-9), 0, 1)
    level_N: NDArray[np.floating] = at[above_N - 1] + part_N * (at[above_N] - at[above_N - 1])
    return level_N


def _quantiles(score_N: NDArray[np.floating]) -> NDArray[np.floating]:
    """The ceil((n + 1) c)-th smallest score, which a further exchangeable one exceeds with probability at most 1 - c.

    Scores are at most 1, which stands where that many cells are not there.
    """
    ordered = np.append(np.sort(score_N), 1.0)
    rank = np.ceil((score_N.size + 1) * np.array(COVERAGES)).astype(int)
    return np.where(rank == 0, 0.0, ordered[np.clip(rank - 1, 0, score_N.size)])
