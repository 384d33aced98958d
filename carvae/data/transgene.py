"""Which cells carry the CAR, when its transcript is missed in many of those that do.

The count k of the transgene in a cell with d other counts is modelled as a mixture of two:

    carrier:      k ~ NB(mean r d, size t)      with share p of the sample's cells
    non-carrier:  k ~ Poisson(a m d)            ambient transcripts: a share a of the sample's mean rate m

A negative binomial for what a cell makes and depth as its exposure are usual for UMI counts (Hafemeister and Satija,
Genome Biol 20:296, 2019); two-component count mixtures with depth as a covariate are what demuxmix fits to hashtags
(Klein, Bioinformatics 39:btad481, 2023); contamination in proportion to the sample's mean is SoupX's model of ambient
RNA (Young and Behjati, GigaScience 9:giaa151, 2020). Nothing is estimated to a point: p, r, t and a are integrated
over a grid, so that the interval of p says how little an undetected transcript tells. r differs between samples (by a
factor of ten in CARPALL) around a mean that they share.

Axes: N cells, U kinds of cells (count, depth, other evidence), R rates, P shares, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from carvae.data.gene_policy import is_transgene

Floats = NDArray[np.float64]

MOST = 30
"""Counts above are as good as this one."""
DEPTH_STEP = 0.25
"""Depth is told in steps of this size in log."""
RATES = np.geomspace(1e-6, 1e-1, 61)
"""Grid of r, transgene counts per other count in a carrier."""
SHARES = np.append(np.append(0.001, np.linspace(0.01, 0.99, 50)), 0.999)
SIZES = np.array([0.5, 0.7, 1.0, 1.4, 2.0])
"""Grid of t; around 1 in cells sorted for the CAR in CARPALL, as log-normal with a factor of 1.5."""
SIZE_FACTOR = 1.5
AMBIENT = (0.005, 0.02, 0.08)
RATE_FACTOR = 2.0
"""Samples of one run differ in r by this factor (one standard deviation); 1.9 in CARPALL."""
INTERVAL = 0.95
MOST_EVIDENCE = float(np.log(99.0))
"""Protein alone says no more than 99 to 1."""
EVIDENCE_STEP = 0.5
MIN_CELLS_FOR_PROTEIN = 50
NEGLIGIBLE = 1e-6
UNKNOWN, CARRIER, OTHER = 0, 1, -1


@dataclass(frozen=True, slots=True)
class CarCalls:
    """Probability that each cell carries the CAR, and the fraction of each sample that does."""

    probability_N: NDArray[np.float32]
    fraction_B: Floats
    low_B: Floats
    high_B: Floats
    detected_B: Floats
    """Share of the cells with a count."""

    def frame(self) -> pd.DataFrame:
        """The columns of the table of samples."""
        return pd.DataFrame(
            {
                "car_detected": self.detected_B,
                "car_fraction": self.fraction_B,
                "car_fraction_low": self.low_B,
                "car_fraction_high": self.high_B,
            }
        )


def transgene_columns(names: Sequence[str], symbols: Sequence[str], own: Sequence[str]) -> NDArray[np.intp]:
    """Places of the vector's features: those of ``own`` (in any case), and those with a name in use."""
    wanted = {name.casefold() for name in own}
    found = [
        i
        for i, (name, symbol) in enumerate(zip(names, symbols, strict=True))
        if is_transgene(str(name)) or {str(name).casefold(), str(symbol).casefold()} & wanted
    ]
    return np.array(found, dtype=np.intp)


def call_car(
    count_N: NDArray[np.integer],
    depth_N: NDArray[np.integer],
    sample_N: NDArray[np.integer],
    n_samples: int,
    used_N: NDArray[np.bool_],
    sorted_N: NDArray[np.integer],
    purity: float,
    evidence_N: Floats | None = None,
) -> CarCalls | None:
    """The calls; None where no cell has a count and nothing else is known.

    Parameters
    ----------
    count_N, depth_N
        Counts of the transgene, and of all other genes.
    sample_N
        Number of each cell's sample.
    used_N
        Cells that the fractions are over; the others get a probability from the same fit.
    sorted_N
        What a cell was sorted for: `CARRIER`, `OTHER`, or `UNKNOWN`.
    purity
        Share of sorted cells that are what they were sorted for.
    evidence_N
        Log-likelihood ratio of the protein, see `protein_evidence`.
    """
    if not count_N.any():
        return None
    kinds, number_N = _kinds(count_N, depth_N, sorted_N, evidence_N)
    mean_B = _mean_rates(count_N, depth_N, sample_N, n_samples)
    fits: dict[int, _Fit] = {}
    for b in np.unique(sample_N[used_N]).tolist():
        own_U, place_N = np.unique(number_N[sample_N == b], return_inverse=True)
        weight_U = np.bincount(place_N[used_N[sample_N == b]], minlength=len(own_U)).astype(np.float64)
        fits[b] = _Fit.of(kinds.take(own_U), weight_U, place_N, float(mean_B[b]), purity)
    prior_R = _shared_prior([fit.evidence_R for fit in fits.values()])
    probability_N = np.full(len(count_N), np.nan, np.float32)
    rows = np.full((n_samples, 4), np.nan)
    for b, fit in fits.items():
        share_P, carrier_U = fit.posterior(prior_R)
        probability_N[sample_N == b] = carrier_U[fit.place_N]
        rows[b, :3] = _fraction(share_P, carrier_U, fit.weight_U, fit.kinds.sorted_U)
        rows[b, 3] = float((count_N[(sample_N == b) & used_N] > 0).mean())
    return CarCalls(probability_N, rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3])


def protein_evidence(signal_N: Floats) -> Floats:
    """Log-likelihood ratio of each cell's surface protein for the higher of two normals on asinh of the signal.

    0 where there is no signal, or where one normal describes them as well (Bayesian information criterion).
    """
    from sklearn.mixture import GaussianMixture

    has = np.isfinite(signal_N)
    found = np.zeros(len(signal_N))
    if has.sum() < MIN_CELLS_FOR_PROTEIN:
        return found
    value = np.arcsinh(signal_N[has])[:, None]
    one, two = (GaussianMixture(n, random_state=0, reg_covar=1e-3).fit(value) for n in (1, 2))
    if two.bic(value) >= one.bic(value):
        return found
    high = int(two.means_.ravel().argmax())
    log_2 = [_log_normal(value.ravel(), two.means_[c, 0], two.covariances_[c, 0, 0]) for c in (high, 1 - high)]
    ratio = np.clip(log_2[0] - log_2[1], -MOST_EVIDENCE, MOST_EVIDENCE)
    # Beyond the means the wider normal would win on the wrong side.
    ratio = np.where(value.ravel() >= two.means_[high, 0], np.maximum(ratio, 0.0), ratio)
    found[has] = np.where(value.ravel() <= two.means_[1 - high, 0], np.minimum(ratio, 0.0), ratio)
    return found


def _log_normal(value: Floats, mean: float, variance: float) -> Floats:
    found: Floats = -0.5 * ((value - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    return found


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Cells that are alike in all that the model sees."""

    count_U: Floats
    depth_U: Floats
    sorted_U: NDArray[np.int64]
    evidence_U: Floats

    def take(self, own_U: NDArray[np.intp]) -> _Kinds:
        """Some of them."""
        return _Kinds(self.count_U[own_U], self.depth_U[own_U], self.sorted_U[own_U], self.evidence_U[own_U])


def _kinds(
    count_N: NDArray[np.integer],
    depth_N: NDArray[np.integer],
    sorted_N: NDArray[np.integer],
    evidence_N: Floats | None,
) -> tuple[_Kinds, NDArray[np.intp]]:
    """The kinds, and which of them each cell is."""
    frame = pd.DataFrame(
        {
            "count": np.minimum(count_N, MOST).astype(np.int64),
            "depth": np.rint(np.log(np.maximum(depth_N, 1)) / DEPTH_STEP).astype(np.int64),
            "sorted": np.asarray(sorted_N, np.int64),
            "evidence": 0 if evidence_N is None else np.rint(evidence_N / EVIDENCE_STEP).astype(np.int64),
        }
    )
    groups = frame.groupby(list(frame.columns), sort=True)
    kinds = groups.size().reset_index()
    found = _Kinds(
        count_U=kinds["count"].to_numpy(np.float64),
        depth_U=np.exp(kinds["depth"].to_numpy(np.float64) * DEPTH_STEP),
        sorted_U=kinds["sorted"].to_numpy(np.int64),
        evidence_U=kinds["evidence"].to_numpy(np.float64) * EVIDENCE_STEP,
    )
    return found, groups.ngroup().to_numpy().astype(np.intp)


def _mean_rates(
    count_N: NDArray[np.integer], depth_N: NDArray[np.integer], sample_N: NDArray[np.integer], n_samples: int
) -> Floats:
    """Transgene counts per other count in each sample; a sample without any has what a single count would give."""
    count_B = np.bincount(sample_N, weights=count_N, minlength=n_samples)
    depth_B = np.bincount(sample_N, weights=depth_N, minlength=n_samples)
    return np.maximum(count_B, 1.0) / np.maximum(depth_B, 1.0)


@dataclass(frozen=True, slots=True)
class _Fit:
    """One sample on the grid."""

    kinds: _Kinds
    weight_U: Floats
    """Cells of each kind that count."""
    place_N: NDArray[np.intp]
    """Kind of each cell of the sample."""
    mean: float
    purity: float
    log_RP: tuple[Floats, ...]
    """Log-likelihood of rate and share for each of ``_nuisance``."""

    @classmethod
    def of(cls, kinds: _Kinds, weight_U: Floats, place_N: NDArray[np.intp], mean: float, purity: float) -> _Fit:
        """The sample's likelihood over the whole grid."""
        log_RP = []
        for size, ambient in _nuisance():
            _, total_URP = _terms(kinds, mean, purity, size, ambient)
            log_prior = -0.5 * (np.log(size) / np.log(SIZE_FACTOR)) ** 2
            log_RP.append(np.tensordot(weight_U, total_URP, axes=1) + log_prior)
        return cls(kinds, weight_U, place_N, mean, purity, tuple(log_RP))

    @property
    def evidence_R(self) -> Floats:
        """Log-likelihood of each rate, all else alike."""
        return np.asarray(logsumexp(np.stack(self.log_RP), axis=(0, 2)))

    def posterior(self, log_prior_R: Floats) -> tuple[Floats, Floats]:
        """Probability of each share, and of each kind to carry the CAR."""
        log_SRP = np.stack(self.log_RP) + log_prior_R[:, None]
        weight_SRP = np.exp(log_SRP - log_SRP.max())
        weight_SRP /= weight_SRP.sum()
        carrier_U = np.zeros(len(self.weight_U))
        for weight_RP, (size, ambient) in zip(weight_SRP, _nuisance(), strict=True):
            if weight_RP.sum() > NEGLIGIBLE:
                both_URP, total_URP = _terms(self.kinds, self.mean, self.purity, size, ambient)
                carrier_U += np.tensordot(np.exp(both_URP - total_URP), weight_RP, axes=2)
        return weight_SRP.sum((0, 1)), np.clip(carrier_U, 0.0, 1.0)


def _nuisance() -> list[tuple[float, float]]:
    """What is integrated over without being of interest: t and a."""
    return [(float(size), ambient) for size in SIZES for ambient in AMBIENT]


def _terms(kinds: _Kinds, mean: float, purity: float, size: float, ambient: float) -> tuple[Floats, Floats]:
    """Log-likelihood of each kind with being a carrier, and in all; for every rate and share."""
    sorted_U1 = kinds.sorted_U[:, None]
    share_UP = np.where(sorted_U1 == CARRIER, purity, np.where(sorted_U1 == OTHER, 1.0 - purity, SHARES))
    carrier_UR = _log_nb(kinds.count_U[:, None], kinds.depth_U[:, None] * RATES, size) + kinds.evidence_U[:, None]
    other_U = _log_poisson(kinds.count_U, kinds.depth_U * ambient * mean)
    both_URP = np.log(share_UP)[:, None, :] + carrier_UR[:, :, None]
    return both_URP, np.logaddexp(both_URP, (np.log1p(-share_UP) + other_U[:, None])[:, None, :])


def _shared_prior(evidences: Sequence[Floats]) -> Floats:
    """Log prior of the rate: log-normal around the mean under which the samples together are likeliest."""
    log_rate, spread = np.log(RATES), np.log(RATE_FACTOR)
    prior_MR = -0.5 * ((log_rate - log_rate[:, None]) / spread) ** 2
    prior_MR -= logsumexp(prior_MR, axis=1, keepdims=True)
    total_M = sum(logsumexp(prior_MR + evidence_R, axis=1) for evidence_R in evidences)
    return np.asarray(prior_MR[int(np.argmax(total_M))])


def _fraction(
    share_P: Floats, carrier_U: Floats, weight_U: Floats, sorted_U: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Fraction of a sample that carries the CAR, with its interval: sorted cells as called, others by their share."""
    n_sorted = weight_U[sorted_U != UNKNOWN].sum()
    rest = (weight_U.sum() - n_sorted) / weight_U.sum()
    base = (weight_U * carrier_U)[sorted_U != UNKNOWN].sum() / weight_U.sum()
    mean, tail = float((share_P * SHARES).sum()), (1.0 - INTERVAL) / 2
    ends = np.interp([tail, 1.0 - tail], np.cumsum(share_P), SHARES)
    return base + rest * mean, base + rest * float(ends[0]), base + rest * float(ends[1])


def _log_nb(count: Floats, mean: Floats, size: float) -> Floats:
    found: Floats = (
        gammaln(count + size)
        - gammaln(size)
        - gammaln(count + 1)
        + size * np.log(size / (size + mean))
        + count * np.log(mean / (size + mean))
    )
    return found


def _log_poisson(count: Floats, mean: Floats) -> Floats:
    found: Floats = count * np.log(mean) - mean - gammaln(count + 1)
    return found
