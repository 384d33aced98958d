"""Held-out patients seen whole and poorer: what they teach of a model's errors, and how true that is of others.

Axes: N cells, G genes, S leaves of one label axis, T views, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carvae.data.split import PatientSplit
from carvae.labels.axis import main_first
from carvae.model.calibration import MAX_GROUPS, Bins, Calibration, Seen, Temperatures
from carvae.model.cohort import Cohort
from carvae.model.metrics import expected_calibration_error
from carvae.model.network import Network
from carvae.model.novelty import Floats, Reference, Scale, observe, refer, views, without_decoded
from carvae.model.teaching import taught
from carvae.model.trust import Trust, Undecoded
from carvae.model.verdict import LEAST_OVERLAP, MIN_CELLS, SampleFigures, SampleLimits, figures

DEPTHS = (1.0, 0.5, 0.25, 0.1)
"""Shares of their counts at which held-out cells are seen."""
OVERLAPS = (1.0, 0.8, LEAST_OVERLAP)
"""Shares of the panel's genes with which they are seen; which genes is drawn anew for each depth."""
MAX_CELLS = 10_000
"""Held-out cells used at each depth and overlap."""
MIN_LABELLED = 20
"""Labelled cells of a sample that sets the limits for others."""
USUAL = (0.05, 0.5, 0.95)
"""Quantiles over the training samples that a bundle tells of each state's share."""
MIN_USUAL = 5
"""Samples of which quantiles are told."""
COVERAGE = 0.9
"""Coverage at which the sets are measured."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cells of patients that a network did not see."""

    log_probability: dict[str, Floats]
    truth: dict[str, NDArray[np.int32]]
    """Label axis -> leaf by the author, -1 where unknown or the network was not taught the axis."""
    view_NT: NDArray[np.float64]
    counts_N: NDArray[np.float64]
    """Counts over the panel, after thinning."""
    overlap_N: NDArray[np.float64]
    patient_N: NDArray[np.object_]
    known_N: NDArray[np.bool_]
    """Whether the cell bears a label of an axis that the network was taught."""
    whole_N: NDArray[np.bool_]
    """Whether nothing was taken from the cell."""
    shortage_N: NDArray[np.float64]
    """Logarithm of how many times as many labelled cells there are as the network was trained on."""

    def seen(self, axis: str) -> Seen:
        """The cells whose leaf on an axis is known, for calibration."""
        rows = self.take(np.flatnonzero(self.truth[axis] >= 0))
        return Seen(
            rows.log_probability[axis],
            rows.truth[axis],
            rows.counts_N,
            rows.overlap_N,
            rows.patient_N,
            rows.shortage_N,
        )

    def take(self, rows_N: NDArray[Any]) -> HeldOut:
        """Some of the cells."""
        chosen: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            of_axes = isinstance(value, dict)
            chosen[f.name] = {axis: array[rows_N] for axis, array in value.items()} if of_axes else value[rows_N]
        return HeldOut(**chosen)


@dataclass(frozen=True, slots=True)
class Witness:
    """One network's held-out cells, and the samples they make up."""

    cells: HeldOut
    reference: Reference
    samples: list[tuple[NDArray[np.intp], Floats]]
    """Whole cells of each sample (rows of ``cells``), and their latent coordinates."""
    axes: tuple[str, ...]
    """Label axes that the network was taught."""


def reference_of(network: Network, cohort: Cohort, rows_N: NDArray[np.int64], identity: Sequence[str]) -> Reference:
    """The training cells in ``rows_N`` as the network sees them; ``identity`` names genes that all should express."""
    assert cohort.cohort_labels is not None
    counts = cohort.store.counts(rows_N)
    axis = main_first(a.axis for a in cohort.cohort_labels.labels.axes)[0]
    observed = observe(network, counts, np.ones(counts.shape[1], np.bool_))
    sample_N = cohort.obs["sample"].astype("category").cat.codes.to_numpy()[rows_N]
    code_N = cohort.cohort_labels.labels[axis].code[rows_N]
    identity_G = np.isin(np.array(cohort.store.header.genes, dtype=object), list(identity))
    share_G = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    return refer(observed, code_N, sample_N, (share_G / share_G.sum()).astype(np.float32), identity_G)


def witness(
    network: Network, cohort: Cohort, split: PatientSplit, identity: Sequence[str], rng: np.random.Generator
) -> Witness:
    """Show a network the patients that it was not trained on, whole and with counts and genes taken away.

    Labels of axes that it was not taught count as missing: what it says of them is chance.
    """
    assert cohort.cohort_labels is not None
    axes = taught(cohort.cohort_labels.labels, split.train)
    cohort = cohort.labelled_on(axes)
    reference = reference_of(network, cohort, split.train, identity)
    all_G = np.ones(len(cohort.store.header.genes), np.bool_)
    cells, latent_NK = _seen(network, cohort, split.validation, reference, all_G)
    sample_N = cohort.obs["sample"].astype(str).to_numpy()[split.validation]
    samples = [(np.flatnonzero(sample_N == name), latent_NK[sample_N == name]) for name in np.unique(sample_N)]
    labelled = split.validation[cohort.labelled_N[split.validation]]
    parts = [cells]
    for rows_N, depth, kept_G in _poorer(labelled, reference.identity_G > 0, rng):
        found, _ = _seen(network, cohort, rows_N, reference, kept_G, depth, rng)
        parts.append(found)
    cells = joined(parts)
    n_trained = max(int(cohort.labelled_N[split.train].sum()), 1)
    shortage = math.log(max(int(cohort.labelled_N.sum()), 1) / n_trained)
    return Witness(replace(cells, shortage_N=np.full(cells.counts_N.size, shortage)), reference, samples, axes)


def _poorer(
    labelled: NDArray[np.int64], identity_G: NDArray[np.bool_], rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], float, NDArray[np.bool_]]]:
    """Cells, share of counts and genes kept, for every depth and overlap but the full one.

    The identity genes stay: hardly an assay of T cells lacks them, and what they say would be watered down.
    """
    n_genes = identity_G.size
    for overlap in OVERLAPS:
        for depth in DEPTHS:
            if labelled.size and (overlap, depth) != (1.0, 1.0):
                kept_G = identity_G.copy()
                kept_G[rng.permutation(n_genes)[: max(1, round(overlap * n_genes))]] = True
                yield np.sort(rng.permutation(labelled)[:MAX_CELLS]), depth, kept_G


def _seen(
    network: Network,
    cohort: Cohort,
    rows_N: NDArray[np.int64],
    reference: Reference,
    kept_G: NDArray[np.bool_],
    depth: float = 1.0,
    rng: np.random.Generator | None = None,
) -> tuple[HeldOut, Floats]:
    """The cells with a share of their counts and genes, and their latent coordinates."""
    assert cohort.tree is not None
    counts = cohort.store.counts(rows_N)
    if rng is not None:
        counts.data = rng.binomial(counts.data.astype(np.int64), depth).astype(np.float32)
        counts = counts.multiply(kept_G[None, :].astype(np.float32)).tocsr()
    measured, study_N = cohort.store.measured, cohort.study_N[rows_N]
    parts, strange, order = [], [], []
    for study in np.unique(study_N):  # studies differ in the genes that they measured
        own = np.flatnonzero(study_N == study)
        present_G = measured[study] & kept_G
        parts.append(observe(network, counts[own], present_G))
        strange.append(views(parts[-1], reference, counts[own], present_G))
        order.append(own)
    back = np.argsort(np.concatenate(order))
    cells = HeldOut(
        log_probability={
            axis: np.concatenate([part.log_probability[axis] for part in parts])[back]
            for axis in parts[0].log_probability
        },
        truth={axis.name: cohort.true_leaf(axis.name)[rows_N] for axis in cohort.tree.axes},
        view_NT=np.concatenate(strange)[back],
        counts_N=np.asarray(counts.sum(axis=1), np.float64).ravel(),
        overlap_N=np.full(rows_N.size, round(float(kept_G.mean()), 2)),
        patient_N=cohort.obs["patient"].astype(str).to_numpy(object)[rows_N],
        known_N=cohort.labelled_N[rows_N],
        whole_N=np.full(rows_N.size, rng is None),
        shortage_N=np.zeros(rows_N.size),
    )
    return cells, np.concatenate([part.latent_NK for part in parts])[back]


def joined(parts: Sequence[HeldOut]) -> HeldOut:
    """All cells together."""
    arrays: dict[str, Any] = {}
    for f in fields(HeldOut):
        values = [getattr(part, f.name) for part in parts]
        arrays[f.name] = (
            {axis: np.concatenate([value[axis] for value in values]) for axis in values[0]}
            if isinstance(values[0], dict)
            else np.concatenate(values)
        )
    return HeldOut(**arrays)


def learn(witnesses: Sequence[Witness], reference: Reference, unknown_rate: float) -> Trust | None:
    """What held-out patients teach a network whose training cells are ``reference``; None without labelled ones."""
    cells = joined([w.cells for w in witnesses])
    if not cells.known_N.any():
        return None
    fitted = _Fitted.on(cells.take(np.flatnonzero(cells.known_N)))
    trust = Trust(reference, fitted.bins, fitted.scale, fitted.calibration, None, unknown_rate)
    undecoded = Undecoded(fitted.undecoded, None)
    blind = replace(trust, undecoded=undecoded).shared()
    undecoded = replace(undecoded, limits=SampleLimits.fit(_figures(witnesses, blind)))
    samples = _figures(witnesses, trust)
    return replace(trust, limits=SampleLimits.fit(samples), undecoded=undecoded, n_samples=len(samples))


def _figures(witnesses: Sequence[Witness], trust: Trust) -> list[SampleFigures]:
    """How far the held-out samples with labels went, by the views and the reference of ``trust``."""
    samples: list[SampleFigures] = []
    for seen in witnesses:
        reference, cells = seen.reference, seen.cells
        if not trust.decodes:
            reference = reference.without_samples()
            cells = replace(cells, view_NT=without_decoded(cells.view_NT))
        for rows, latent_NK in seen.samples:
            own = cells.take(rows)
            if own.known_N.sum() < MIN_LABELLED:
                continue  # a sorted fraction of other cells, say, which sets no example
            novelty_N = trust.scale.novelty(own.view_NT, trust.bins.of(own.counts_N, own.overlap_N))
            samples.append(figures(latent_NK, novelty_N, own.counts_N, reference, trust.unknown_rate))
    return samples


def usual_shares(witnesses: Sequence[Witness], trust: Trust, leaves: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Which shares of states are usual among the training samples, as networks call them that did not see them.

    Nine in ten samples lie between ``low`` and ``high``; quantiles alone, so that no sample can be told from them.

    Parameters
    ----------
    leaves
        Label axis -> its states.

    Returns
    -------
    Per label axis the number of samples, and for every state low, middle and high; empty with fewer than `MIN_USUAL`
    samples of `MIN_CELLS` cells that are not unknown.
    """
    shares: dict[str, list[NDArray[np.float64]]] = {axis: [] for axis in leaves}
    for seen in witnesses:
        for rows, _ in seen.samples:
            own = seen.cells.take(rows)
            novelty_N = trust.scale.novelty(own.view_NT, trust.bins.of(own.counts_N, own.overlap_N))
            known = own.take(np.flatnonzero(novelty_N <= 1 - trust.unknown_rate))
            if known.counts_N.size < MIN_CELLS:
                continue
            for axis, names in leaves.items():
                if axis not in seen.axes:
                    continue
                label_N = known.log_probability[axis].argmax(1)
                shares[axis].append(np.bincount(label_N, minlength=len(names)) / label_N.size)
    found: dict[str, Any] = {}
    for axis, parts in shares.items():
        if len(parts) >= MIN_USUAL:
            ends_QS = np.quantile(np.stack(parts), USUAL, axis=0)
            states = {
                name: dict(zip(("low", "middle", "high"), map(float, ends_Q), strict=True))
                for name, ends_Q in zip(leaves[axis], ends_QS.T, strict=True)
            }
            found[axis] = {"samples": len(parts), "states": states}
    return found


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What cells with labels teach."""

    bins: Bins
    scale: Scale
    undecoded: Scale
    """Of the views that need no decoder."""
    rules: dict[str, Temperatures]
    """Label axis -> temperatures of networks with any shortage."""
    calibration: dict[str, Calibration]

    @classmethod
    def on(cls, known: HeldOut) -> _Fitted:
        bins = Bins.fit(known.counts_N, known.overlap_N)
        seen = {axis: known.seen(axis) for axis, truth_N in known.truth.items() if (truth_N >= 0).any()}
        rules = {axis: Temperatures.fit(cells) for axis, cells in seen.items()}
        calibration = {axis: Calibration.fit(cells, bins, rules[axis]) for axis, cells in seen.items()}
        bin_N = bins.of(known.counts_N, known.overlap_N)
        scale = Scale.fit(known.view_NT, bin_N, bins.n)
        undecoded = Scale.fit(without_decoded(known.view_NT), bin_N, bins.n)
        return cls(bins, scale, undecoded, rules, calibration)


def measure(witnesses: Sequence[Witness], unknown_rate: float) -> dict[str, Any]:
    """How true it all is of patients that taught nothing: fitted on the others, each group of patients in turn.

    Returns
    -------
    Per label axis the calibration error before and after, coverage and mean size of the 90% sets, each for whole cells
    and for the poorer ones; and the share of cells of known states called unknown, by all views and by those that need
    no decoder. Empty with a single patient.
    """
    cells = joined([w.cells for w in witnesses])
    known = cells.take(np.flatnonzero(cells.known_N))
    patients = np.unique(known.patient_N)
    if patients.size <= 1:
        return {}
    group_N = np.searchsorted(patients, known.patient_N) % min(MAX_GROUPS, patients.size)
    tested = [_tested(known, group_N == g, unknown_rate) for g in np.unique(group_N)]
    whole = np.concatenate([known.whole_N[group_N == g] for g in np.unique(group_N)])
    unknown, blind = (np.concatenate([found.pop(name) for found in tested]) for name in ("unknown", "undecoded"))
    result: dict[str, Any] = {
        "patients": int(patients.size),
        "unknown_rate": {"asked": unknown_rate, "whole": _mean(unknown[whole]), "poorer": _mean(unknown[~whole])},
        "undecoded": {"whole": _mean(blind[whole]), "poorer": _mean(blind[~whole])},
    }
    for axis in set.intersection(*map(set, tested)):
        raw, tempered, truth, held = (np.concatenate(values) for values in zip(*(f[axis] for f in tested), strict=True))
        for name, rows in (("whole", whole), ("poorer", ~whole)):
            sure = rows & (truth >= 0)
            if sure.any():
                inside = held[sure, truth[sure]]
                result.setdefault(axis, {})[name] = {
                    "n_cells": int(sure.sum()),
                    "ece_before": expected_calibration_error(raw[sure], truth[sure]),
                    "ece": expected_calibration_error(tempered[sure], truth[sure]),
                    "coverage": _mean(inside),
                    "set_size": _mean(held[sure].sum(1)),
                }
    return result


def _tested(known: HeldOut, out: NDArray[np.bool_], unknown_rate: float) -> dict[str, Any]:
    """What the cells outside ``out`` say of those in it."""
    fitted = _Fitted.on(known.take(np.flatnonzero(~out)))
    test = known.take(np.flatnonzero(out))
    bin_N = fitted.bins.of(test.counts_N, test.overlap_N)
    found: dict[str, Any] = {
        "unknown": fitted.scale.novelty(test.view_NT, bin_N) > 1 - unknown_rate,
        "undecoded": fitted.undecoded.novelty(without_decoded(test.view_NT), bin_N) > 1 - unknown_rate,
    }
    for axis, calibration in fitted.calibration.items():
        log_NS = test.log_probability[axis]
        shortage_N = np.exp(fitted.rules[axis].of_shortage * test.shortage_N)  # the calibration is of a network without
        probability_NS = calibration.probability(log_NS / shortage_N[:, None], bin_N)
        held_NS = calibration.sets(probability_NS, bin_N, COVERAGE)
        found[axis] = (np.exp(log_NS), probability_NS, test.truth[axis], held_NS)
    return found


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else 0.0
