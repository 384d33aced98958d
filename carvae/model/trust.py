"""What a model knows about its own errors: calibration, novelty and limits for samples (learned by `witness`).

Axes: N cells, G genes, K latent, S leaves of one label axis, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from carvae.config import ModelConfig
from carvae.errors import BundleError
from carvae.labels.axis import RESERVED, main_first
from carvae.labels.tree import LabelTree
from carvae.model.calibration import COVERAGES, Bins, Calibration
from carvae.model.network import Network
from carvae.model.novelty import LEVELS, VIEWS, Floats, Reference, Scale, observe, views
from carvae.model.verdict import FIGURES, SampleLimits

MATRIX = 2
PREFIX = "trust."
JOIN = " | "
"""Between the states of a set."""
UNSURE = "unsure"
"""The finest sure node of a cell that is known, but of which not even a group of states is sure."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What is said of query cells."""

    latent_NK: Floats
    probability_NS: dict[str, Floats]
    """Calibrated, per label axis."""
    novelty_N: Floats
    bin_N: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Undecoded:
    """What a model judges by that is shared without its decoder."""

    scale: Scale
    """Of the views without the one that needs the decoder."""
    limits: SampleLimits | None
    """By that scale, and by the distance to the middle of the training samples in place of the nearest one."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Everything by which a bundle says how sure it is."""

    reference: Reference
    bins: Bins
    scale: Scale
    calibration: dict[str, Calibration]
    """Label axis -> its calibration; an axis that no held-out cell had a label on is absent."""
    limits: SampleLimits | None
    unknown_rate: float
    """Share of held-out cells of known states that are called unknown."""
    undecoded: Undecoded | None = None
    """None in a model that is shared without its decoder, and in bundles before layout 5."""
    n_samples: int | None = None
    """Training samples that set the limits; None in bundles that do not say."""

    @property
    def decodes(self) -> bool:
        """Whether it judges by the decoder too."""
        return int(self.scale.view_BTQ.shape[1]) == len(VIEWS)

    def shared(self) -> Trust:
        """The same for a model without its decoder; no training sample has a place of its own in it.

        Raises
        ------
        BundleError
            The model was trained before that was learned.
        """
        if self.undecoded is None:
            raise BundleError(
                "the model was trained by a carvae that did not learn novelty without the decoder, so that it cannot "
                "be shared without it; train it again, or share it whole"
            )
        scale, limits = self.undecoded.scale, self.undecoded.limits
        return replace(self, reference=self.reference.without_samples(), scale=scale, limits=limits, undecoded=None)

    def judge(self, network: Network, counts: sp.csr_matrix, present_G: NDArray[np.bool_]) -> Judged:
        """Embed, label and judge cells from their counts over the panel, [N, G]."""
        observed = observe(network, counts, present_G)
        bin_N = self._bins_of(counts, present_G)
        view_NT = views(observed, self.reference, counts, present_G)
        probability = self._calibrated(observed.log_probability, bin_N)
        return Judged(observed.latent_NK, probability, self.scale.novelty(view_NT, bin_N), bin_N)

    def probability(self, network: Network, counts: sp.csr_matrix, present_G: NDArray[np.bool_]) -> dict[str, Floats]:
        """The calibrated probabilities of `judge` alone, which cost less."""
        return self._calibrated(observe(network, counts, present_G).log_probability, self._bins_of(counts, present_G))

    def _bins_of(self, counts: sp.csr_matrix, present_G: NDArray[np.bool_]) -> NDArray[np.int64]:
        return self.bins.of(np.asarray(counts.sum(axis=1)).ravel(), float(present_G.mean()))

    def _calibrated(self, log_probability: Mapping[str, Floats], bin_N: NDArray[np.int64]) -> dict[str, Floats]:
        return {
            axis: self.calibration[axis].probability(log_NS, bin_N) if axis in self.calibration else np.exp(log_NS)
            for axis, log_NS in log_probability.items()
        }

    def unknown(self, judged: Judged) -> NDArray[np.bool_]:
        """Which cells are stranger than the stated share of held-out ones."""
        unknown_N: NDArray[np.bool_] = judged.novelty_N > 1 - self.unknown_rate
        return unknown_N

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arrays by name, for the bundle's weights."""
        parts: dict[str, Any] = {"reference": self.reference, "bins": self.bins, "scale": self.scale}
        parts |= {f"calibration.{a}": c for a, c in enumerate(self.calibration.values())}
        parts |= {} if self.limits is None else {"limits": self.limits}
        if self.undecoded is not None:
            parts["undecoded.scale"] = self.undecoded.scale
            parts |= {} if self.undecoded.limits is None else {"undecoded.limits": self.undecoded.limits}
        arrays = {
            f"{PREFIX}{part}.{f.name}": getattr(value, f.name) for part, value in parts.items() for f in fields(value)
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in arrays.items()}

    def describe(self) -> dict[str, Any]:
        """For model.json, with what `tensors` needs to be read again."""
        return {
            "unknown_rate": self.unknown_rate,
            "axes": list(self.calibration),
            "limits": self.limits is not None,
            "samples": self.n_samples,
            "undecoded": self.undecoded is not None,
        }

    def checked(self, n_genes: int, config: ModelConfig, tree: LabelTree | None, *, decodes: bool = True) -> Trust:
        """Itself, if its arrays fit a model of this size, which ``decodes`` or does not.

        Raises
        ------
        BundleError
            They do not.
        """
        k, h, q, b = config.n_latent, config.n_hidden, LEVELS.size, self.bins.n
        ref, leaves = self.reference, {axis.name: len(axis.leaves) for axis in (tree.axes if tree else ())}
        right = (
            self.bins.edge_VD.ndim == MATRIX
            and len(self.bins.edge_VD) == self.bins.overlap_V.size > 0
            and 0 <= self.unknown_rate <= 1
            and ref.mean_LH.shape[1:] == ref.centre_H.shape == (h,)
            and ref.within_HH.shape == ref.around_HH.shape == (h, h)
            and ref.share_G.shape == ref.identity_G.shape == (n_genes,)
            and ref.sample_MK.shape[1:] == (k,)
            and ref.scale_KK.shape == (k, k)
            and _fits(self.scale, self.limits, (b, len(VIEWS) - (not decodes), q))
            and (self.undecoded is None or _fits(self.undecoded.scale, self.undecoded.limits, (b, len(VIEWS) - 1, q)))
            and all(
                c.temperature_B.shape == (b,)
                and c.level_C.shape == (len(COVERAGES),)
                and c.threshold_BSC.shape == (b, leaves.get(axis), len(COVERAGES))
                for axis, c in self.calibration.items()
            )
        )
        if not right:
            raise BundleError("what it says of its own errors does not fit the model; copy the whole folder again")
        return self

    @classmethod
    def read(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Trust:
        """From `describe` and `tensors`.

        Raises
        ------
        BundleError
            An array is absent.
        """

        def part(kind: Any, name: str) -> Any:
            try:
                return kind(*(tensors[f"{PREFIX}{name}.{f.name}"].numpy() for f in fields(kind)))
            except KeyError as error:
                raise BundleError(f"the weights hold no {error}; copy the whole folder again or retrain") from None

        return cls(
            reference=part(Reference, "reference"),
            bins=part(Bins, "bins"),
            scale=part(Scale, "scale"),
            calibration={axis: part(Calibration, f"calibration.{a}") for a, axis in enumerate(spec["axes"])},
            limits=part(SampleLimits, "limits") if spec["limits"] else None,
            unknown_rate=float(spec["unknown_rate"]),
            undecoded=Undecoded(
                part(Scale, "undecoded.scale"), part(SampleLimits, "undecoded.limits") if spec["limits"] else None
            )
            if spec.get("undecoded")
            else None,
            n_samples=spec.get("samples"),
        )


def _fits(scale: Scale, limits: SampleLimits | None, shape_BTQ: tuple[int, int, int]) -> bool:
    b, _, q = shape_BTQ
    of_figures = limits is None or limits.care_F.shape == limits.out_F.shape == (len(FIGURES),)
    return of_figures and scale.view_BTQ.shape == shape_BTQ and scale.whole_BQ.shape == (b, q)


def set_columns(
    trust: Trust, tree: LabelTree, judged: Judged, known_N: NDArray[np.bool_], coverage: float
) -> dict[str, list[str]]:
    """Columns with each cell's compatible states, the likeliest first, and its finest sure node.

    ``carvae_set`` (``carvae_<axis>_set`` for further axes) joins the names of leaves by `JOIN`;
    ``carvae_<axis>_sure`` is the finest node with at least the probability ``coverage``, or `UNSURE`.
    Both say ``unknown`` for cells that are.
    """
    columns: dict[str, list[str]] = {}
    main = main_first(axis.name for axis in tree.axes)[0]
    for axis in tree.axes:
        if axis.name not in trust.calibration:
            continue
        probability_NS = judged.probability_NS[axis.name]
        held_NS = trust.calibration[axis.name].sets(probability_NS, judged.bin_N, coverage)
        order_NS = np.argsort(-probability_NS, axis=1, kind="stable")
        names = np.array(axis.leaves, dtype=object)
        sets = [JOIN.join(names[s] for s in order if held[s]) for order, held in zip(order_NS, held_NS, strict=True)]
        sure = axis.deepest_sure(probability_NS, coverage)
        known = known_N.tolist()
        column = "carvae_set" if axis.name == main else f"carvae_{axis.name}_set"
        columns[column] = [text if k else RESERVED for text, k in zip(sets, known, strict=True)]
        columns[f"carvae_{axis.name}_sure"] = [
            (node or UNSURE) if k else RESERVED for node, k in zip(sure, known, strict=True)
        ]
    return columns
