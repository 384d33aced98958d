"""Is a sample inside what the model knows? Its figures beside those of training samples that were held out.

Axes: M training samples, F figures, K latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carvae.model.novelty import Reference

Floats = NDArray[np.float32]

FIGURES = {
    "fraction_unknown": "{value:.0%} of its cells are unknown ({usual}at most {limit:.0%})",
    "mean_novelty": "mean novelty {value:.2f} ({usual}at most {limit:.2f})",
    "batch_distance": "its mean is {value:.1f} from the training samples ({usual}at most {limit:.1f})",
    "shallowness": "median depth {depth:.0f} counts over the panel ({usual}at least {least:.0f})",
}
"""Figures in which more is worse -> what is said of a sample beyond its limit, of ``usual`` samples by `_usual`.
Shallowness is -log2 of the median counts over the panel, on which a halving is a step."""
IN_RANGE, WITH_CARE, OUT_OF_RANGE = "in range", "with care", "out of range"
MOST = 0.9
"""Share of the training samples that are in range by definition: one may be odd itself."""
LEAST_OVERLAP = 0.5
"""Share of the panel's genes below which no held-out cell was ever seen."""
MIN_CELLS = 20
"""Cells without which a sample has no verdict but caution, and is no measure for others."""
MIN_STEP = {"fraction_unknown": 0.05, "mean_novelty": 0.05, "batch_distance": 0.5, "shallowness": 0.5}
"""Least distance between the limits, for cohorts whose samples are all alike."""


@dataclass(frozen=True, slots=True)
class SampleFigures:
    """What the verdict on one sample rests on."""

    n_cells: int
    fraction_unknown: float
    mean_novelty: float
    batch_distance: float
    """From its latent mean to that of the nearest training sample (of a model shared without its decoder: to their
    middle), in standard deviations within a state."""
    shallowness: float

    def array(self) -> NDArray[np.float64]:
        """The figures in the order of `FIGURES`."""
        return np.array([getattr(self, name) for name in FIGURES])


@dataclass(frozen=True, slots=True)
class SampleLimits:
    """How far the labelled training samples went when their patients were held out.

    Samples of other cells alone, which have no labels, set no limits and may lie far beyond them.
    """

    care_F: Floats
    """What nine in ten of them stay within."""
    out_F: Floats
    """As far beyond that as it is from their median."""

    @classmethod
    def fit(cls, samples: list[SampleFigures]) -> SampleLimits | None:
        """Limits from held-out training samples; None where none has cells enough."""
        large = [sample.array() for sample in samples if sample.n_cells >= MIN_CELLS]
        if not large:
            return None
        care_F, median_F = np.quantile(large, MOST, axis=0, method="higher"), np.median(large, axis=0)
        step_F = np.maximum(care_F - median_F, list(MIN_STEP.values()))
        return cls(care_F.astype(np.float32), (care_F + step_F).astype(np.float32))

    def verdict(
        self,
        sample: SampleFigures,
        overlap: float,
        care_overlap: float,
        least_overlap: float,
        n_samples: int | None = None,
        hints: Sequence[str] = (),
    ) -> tuple[str, str]:
        """The verdict and its reasons, the worst first.

        Parameters
        ----------
        sample
            The sample's figures.
        overlap
            Share of the panel's genes that it has.
        care_overlap, least_overlap
            Shares below which care is due, and below which the model was never tested.
        n_samples
            Training samples behind the limits; None where that is not known.
        hints
            Of doublets and ambient RNA, for which care is due.
        """
        beyond = [f for f, value in enumerate(sample.array()) if value > self.care_F[f]]
        beyond.sort(key=lambda f: sample.array()[f] <= self.out_F[f])
        found: list[tuple[int, str]] = []
        for f in beyond:
            value, limit, text = float(sample.array()[f]), float(self.care_F[f]), list(FIGURES.values())[f]
            usual = "" if found else _usual(n_samples)  # once, at the first
            words = text.format(value=value, limit=limit, depth=2.0**-value, least=2.0**-limit, usual=usual)
            found.append((2 if value > self.out_F[f] else 1, words))
        if overlap < care_overlap:
            found.append((2 if overlap < least_overlap else 1, f"{1 - overlap:.0%} of the model's genes are missing"))
        if sample.n_cells < MIN_CELLS:
            found.append((1, f"only {sample.n_cells} cells"))
        found += [(1, hint) for hint in hints]
        if not found:
            return IN_RANGE, ""
        found.sort(key=lambda grade: -grade[0])
        return (OUT_OF_RANGE if found[0][0] > 1 else WITH_CARE), "; ".join(words for _, words in found)


def _usual(n_samples: int | None) -> str:
    """Whose limit it is."""
    whose = "the labelled training samples" if n_samples is None else f"{n_samples:,} labelled training samples"
    return f"nine in ten of {whose}, held out: "


def figures(
    latent_NK: NDArray[np.floating],
    novelty_N: NDArray[np.floating],
    counts_N: NDArray[np.floating],
    reference: Reference,
    unknown_rate: float,
) -> SampleFigures:
    """Figures of one sample from all its cells."""
    unknown, depth = float((novelty_N > 1 - unknown_rate).mean()), float(np.median(counts_N))
    return figures_of_means(len(latent_NK), latent_NK.mean(0), float(novelty_N.mean()), unknown, depth, reference)


def figures_of_means(
    n_cells: int,
    mean_K: NDArray[np.floating],
    mean_novelty: float,
    fraction_unknown: float,
    median_counts: float,
    reference: Reference,
) -> SampleFigures:
    """Figures of one sample from what its cells add up to."""
    gap_MK = mean_K - reference.sample_MK
    squared_M = np.einsum("mk,kl,ml->m", gap_MK, reference.scale_KK, gap_MK)
    return SampleFigures(
        n_cells=n_cells,
        fraction_unknown=fraction_unknown,
        mean_novelty=mean_novelty,
        batch_distance=float(np.sqrt(max(squared_M.min(), 0.0))),
        shallowness=-float(np.log2(max(median_counts, 1.0))),
    )
