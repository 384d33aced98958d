"""What the probabilities of a binary outcome are worth: calibration and net benefit.

Axes: P patients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from carvae.data.patients import Floats

N_BINS = 5
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))
EDGE = 1e-4


def calibration(probability_P: Floats, level_P: Floats) -> dict[str, Any]:
    """Brier score, intercept and slope of a recalibration, and mean probability against share in bins of equal size.

    A slope below 1 says that probabilities are too extreme; the intercept is that at slope 1 (Cox 1958). Patients that
    no fold asked are left out.
    """
    said = ~np.isnan(probability_P)
    p, y = np.clip(probability_P[said], EDGE, 1 - EDGE), level_P[said]
    logit = np.log(p / (1 - p))
    bins = [part for part in np.array_split(np.argsort(p, kind="stable"), N_BINS) if part.size]
    slope = float("nan")
    if np.unique(logit).size > 1 and np.unique(y).size > 1:
        slope = float(LogisticRegression(C=np.inf).fit(logit[:, None], y).coef_[0, 0])
    return {
        "brier": float(np.mean((p - y) ** 2)),
        "brier_of_prevalence": float(np.mean((y.mean() - y) ** 2)),
        "slope": None if np.isnan(slope) else slope,
        "intercept": _intercept(logit, y),
        "bins": [{"said": float(p[b].mean()), "found": float(y[b].mean()), "n": int(b.size)} for b in bins],
    }


def _intercept(logit: Floats, y: Floats) -> float:
    """Shift of the log odds after which as many outcomes are expected as there were (Newton's method)."""
    shift, steps = 0.0, 50
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(logit + shift)))
        shift += float(np.clip((y.sum() - p.sum()) / max((p * (1 - p)).sum(), 1e-9), -1, 1))
    return shift


def decision_curve(probability_P: Floats, level_P: Floats) -> list[dict[str, float]]:
    """Net benefit of acting on those whose probability reaches a threshold, on all, or on none (Vickers, Elkin 2006).

    Net benefit is true positives minus false positives at the odds of the threshold, per patient; of none it is 0.
    """
    said = ~np.isnan(probability_P)
    p, y = probability_P[said], level_P[said].astype(bool)
    rows = []
    for threshold in THRESHOLDS:
        odds, acted = threshold / (1 - threshold), p >= threshold
        benefit = float((acted & y).mean() - odds * (acted & ~y).mean())
        rows.append({"threshold": threshold, "method": benefit, "all": float(y.mean() - odds * (1 - y.mean()))})
    return rows
