"""An attack: tell from a shared model and a patient's cells whether the model was trained on that patient.

The attack is by threshold (Yeom et al. 2018, doi:10.1109/CSF.2018.00027) on what a model without its decoder says of
the patient: how probable it finds the author's labels, how sure it is, how strange the cells look. The networks of the
calibration folds are attacked, of each of which it is known whom it has seen. The unit is the patient; only patients
of the same network are compared, and as each is held out once, patients who are easy by themselves tell nothing: where
training leaves no trace, the concordance is a half.

Axes: N cells, S leaves, T views, P patients, B draws of the patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carvae.data.split import PatientSplit
from carvae.model.cohort import Cohort
from carvae.model.network import Network
from carvae.model.novelty import Floats, Reference, observe, views, without_decoded
from carvae.model.trust import Trust

MOST_CELLS = 20_000
"""Cells shown to each network, shared out among the patients."""
MAX_OF_PATIENT = 400
N_DRAWS = 1000
"""Draws of the patients for an interval."""
ATTACKS = {
    "loss": "loss of the author's labels, which the attacker knows",
    "confidence": "mean confidence",
    "novelty": "mean novelty",
}
"""Score -> what it is; a patient with less of the first and the last, and more of the second, is taken for a member."""
BAR = 0.6
"""AUROC up to which a model counts as telling nobody apart."""


@dataclass(frozen=True, slots=True)
class Faced:
    """What one network says of patients that it was trained on, and of others."""

    patient_N: NDArray[np.object_]
    member_N: NDArray[np.bool_]
    loss_N: Floats
    """-log probability of the author's label, NaN where there is none."""
    confidence_N: Floats
    view_NT: NDArray[np.float64]
    """The views that need no decoder."""
    counts_N: NDArray[np.float64]
    overlap_N: NDArray[np.float64]


def face(network: Network, cohort: Cohort, fold: PatientSplit, reference: Reference, rng: np.random.Generator) -> Faced:
    """Show a network some cells of every patient; ``reference`` is of its training cells."""
    assert cohort.tree is not None
    patient_N = cohort.obs["patient"].astype(str).to_numpy(object)
    names = np.unique(patient_N)
    most = min(MAX_OF_PATIENT, max(1, MOST_CELLS // len(names)))
    rows = np.sort(np.concatenate([rng.permutation(np.flatnonzero(patient_N == name))[:most] for name in names]))
    present_G: NDArray[np.bool_] = np.all(cohort.store.measured, axis=0)
    counts = cohort.store.counts(rows).multiply(present_G[None, :]).tocsr()
    observed = observe(network, counts, present_G)
    axis = cohort.tree.axes[0].name
    log_NS, truth_N = observed.log_probability[axis], cohort.true_leaf(axis)[rows]
    loss_N = np.where(truth_N >= 0, -log_NS[np.arange(rows.size), truth_N], np.nan).astype(np.float32)
    return Faced(
        patient_N=patient_N[rows],
        member_N=np.isin(rows, fold.train),
        loss_N=loss_N,
        confidence_N=np.exp(log_NS.max(1)),
        view_NT=without_decoded(views(observed, reference, counts, present_G)),
        counts_N=np.asarray(counts.sum(axis=1), np.float64).ravel(),
        overlap_N=np.full(rows.size, float(present_G.mean())),
    )


def membership(faced: Sequence[Faced], trust: Trust, rng: np.random.Generator) -> dict[str, Any]:
    """How well each of `ATTACKS` tells members from others.

    Returns
    -------
    The number of patients and, for each attack that can be made, AUROC (concordance of a member and a non-member of
    the same network) with a 95% interval over patients; empty with fewer than two patients.
    """
    found: dict[str, Any] = {}
    for name in ATTACKS:
        tables = [_means(one, _scores(one, name, trust)) for one in faced]
        pairs_PP = _pairs(tables)
        if pairs_PP is None:
            continue
        auroc, low, high = _interval(pairs_PP, rng)
        found[name] = {"auroc": auroc, "low": low, "high": high, "patients": len(pairs_PP)}
    return {"bar": BAR, "attacks": found} if found else {}


def _scores(one: Faced, name: str, trust: Trust) -> NDArray[np.floating]:
    """Of each cell, less of which speaks for membership."""
    if name == "loss":
        return one.loss_N
    if name == "confidence":
        return -one.confidence_N
    return trust.shared().scale.novelty(one.view_NT, trust.bins.of(one.counts_N, one.overlap_N))


def _means(one: Faced, score_N: NDArray[np.floating]) -> dict[str, tuple[bool, float]]:
    """Patient -> whether a member, and the mean of its scores; patients without any are left out."""
    found = {}
    for name in np.unique(one.patient_N):
        own = (one.patient_N == name) & ~np.isnan(score_N)
        if own.any():
            found[str(name)] = bool(one.member_N[own].all()), float(score_N[own].mean())
    return found


def _pairs(tables: Sequence[dict[str, tuple[bool, float]]]) -> NDArray[np.float64] | None:
    """Non-member i beside member j of the same network, [P, P]: 1 where j is taken for the member; NaN for no pair."""
    names = sorted(set().union(*tables))
    place = {name: p for p, name in enumerate(names)}
    pairs_PP = np.full((len(names), len(names)), np.nan)
    for table in tables:
        for other, (is_member, score) in table.items():
            for member, (was_member, own) in table.items():
                if was_member and not is_member:
                    pairs_PP[place[other], place[member]] = 1.0 if own < score else 0.5 if own == score else 0.0
    return pairs_PP if np.isfinite(pairs_PP).any() else None


def _interval(pairs_PP: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean over the pairs, and its 95% interval by drawing patients with replacement."""
    known_PP = np.isfinite(pairs_PP)
    right_PP = np.where(known_PP, pairs_PP, 0.0)
    n = len(pairs_PP)
    weight_BP = rng.multinomial(n, np.full(n, 1 / n), size=N_DRAWS).astype(np.float64)
    total_B = ((weight_BP @ known_PP) * weight_BP).sum(1)
    right_B = ((weight_BP @ right_PP) * weight_BP).sum(1)
    drawn_B = right_B[total_B > 0] / total_B[total_B > 0]
    low, high = np.quantile(drawn_B, (0.025, 0.975)) if drawn_B.size else (0.0, 1.0)
    return float(right_PP.sum() / known_PP.sum()), float(low), float(high)
