"""The cells of a store as a model sees them: counts, covariates, and labels on one tree.

Axes: N cells, G genes, C covariates, A label axes, S leaves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from carvae.config import Config, label_file
from carvae.data.loader import CellData
from carvae.data.residence import Streamed
from carvae.data.schema import NAMES
from carvae.data.split import PatientSplit
from carvae.data.store import CellStore
from carvae.errors import ConfigError
from carvae.labels.cohort import CohortLabels, StudyLabels, label_cells, refuse_confounded
from carvae.labels.signatures import Signatures
from carvae.labels.tree import EncodedLabels, LabelTree

LABEL = "label"
"""Column of the store with the author's labels, empty where missing."""
SOURCE = "source"
"""Column of the store with the config's name of a study; one file may hold several studies."""
SCORE = "score_"
"""Prefix of the store's columns with signature scores, which weak labels are derived from."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """All cells of a store, ready for training; their counts stay there."""

    store: CellStore
    obs: pd.DataFrame
    covariate_NC: NDArray[np.int64]
    n_categories: dict[str, int]
    study_N: NDArray[np.int64]
    cohort_labels: CohortLabels | None

    @classmethod
    def assemble(cls, store: CellStore, config: Config) -> Cohort:
        """Load the store and map its labels onto the tree.

        Raises
        ------
        LabelError, ConfigError
            Labels do not fit the tree, or say no more than the study; or a covariate is no column of the store.
        """
        obs = store.obs()
        check_covariates(obs, config)
        labels = labels_of(obs, config)
        if labels is not None:
            refuse_confounded(labels.labels, obs[SOURCE].astype(str), obs["patient"].astype(str))
        return cls.of(store, labels, config)

    @classmethod
    def of(cls, store: CellStore, labels: CohortLabels | None, config: Config) -> Cohort:
        """The cells of a store with their labels."""
        obs = store.obs()
        codes = {name: obs[name].astype("category").cat.codes.to_numpy(np.int64) for name in config.model.covariates}
        return cls(
            store=store,
            obs=obs,
            covariate_NC=np.stack([*codes.values()], axis=1) if codes else np.zeros((len(obs), 0), np.int64),
            n_categories={name: int(code.max()) + 1 for name, code in codes.items()},
            study_N=pd.Categorical(obs[SOURCE].astype(str), categories=store.header.studies).codes.astype(np.int64),
            cohort_labels=labels,
        )

    @property
    def tree(self) -> LabelTree | None:
        """The part of the label tree that these labels teach."""
        return None if self.cohort_labels is None else self.cohort_labels.tree

    @property
    def labelled_N(self) -> NDArray[np.bool_]:
        """Whether a cell bears a label on any axis."""
        if self.cohort_labels is None:
            return np.zeros(len(self.obs), np.bool_)
        labelled: NDArray[np.bool_] = np.any([axis.code >= 0 for axis in self.cohort_labels.labels.axes], axis=0)
        return labelled

    @property
    def authored_N(self) -> NDArray[np.bool_]:
        """Whether a cell bears a label of its author on any axis."""
        if self.cohort_labels is None:
            return np.zeros(len(self.obs), np.bool_)
        axes = self.cohort_labels.labels.axes
        authored: NDArray[np.bool_] = np.any([(axis.code >= 0) & ~axis.weak for axis in axes], axis=0)
        return authored

    def labelled_on(self, names: Collection[str]) -> Cohort:
        """The same cells, whose labels on axes other than ``names`` are missing."""
        assert self.cohort_labels is not None
        axes = tuple(
            axis if axis.axis in names else replace(axis, code=np.full_like(axis.code, -1))
            for axis in self.cohort_labels.labels.axes
        )
        return replace(self, cohort_labels=CohortLabels(self.cohort_labels.tree, EncodedLabels(axes)))

    @property
    def weak(self) -> bool:
        """Whether any label was derived from signatures."""
        return self.cohort_labels is not None and self.cohort_labels.labels.weak

    def true_leaf(self, axis: str) -> NDArray[np.int32]:
        """Leaf of each cell by its author, -1 where the label is missing, allows several leaves, or is weak.

        Weak labels are never evaluated: the genes they were derived from are in the model's input.
        """
        assert self.cohort_labels is not None
        labels = self.cohort_labels.labels[axis]
        return np.where(labels.weak, -1, labels.leaf).astype(np.int32)

    def allowed(self) -> dict[str, torch.Tensor]:
        """Label axis -> bool [sets, S], the leaves that each label set allows."""
        if self.cohort_labels is None:
            return {}
        return {axis.axis: torch.from_numpy(axis.allowed) for axis in self.cohort_labels.labels.axes}

    def data(self, train: NDArray[np.int64], config: Config) -> CellData:
        """The cells as tensors, with weights and known categories taken from the training cells alone.

        Their counts stay in the store; `CellData.beside` brings them nearer.
        """
        axes = self.cohort_labels.labels.axes if self.cohort_labels else ()
        code_NA = np.zeros((len(self.obs), len(axes)), np.int64)
        weight_NA = np.zeros((len(self.obs), len(axes)), np.float32)
        for a, axis in enumerate(axes):
            code_NA[:, a] = axis.code
            weight_NA[:, a] = balanced_weights(axis.code, train, config.train.class_balance)
            weight_NA[axis.weak, a] *= config.train.weak_weight
        measured = self.store.measured
        return CellData(
            counts=Streamed(self.store, torch.device("cpu")),
            covariate_NC=torch.from_numpy(_known_categories(self.covariate_NC, train)),
            unmeasured_SG=None if measured.all() else torch.from_numpy(~measured),
            study_N=torch.from_numpy(self.study_N),
            code_NA=torch.from_numpy(code_NA),
            weight_NA=torch.from_numpy(weight_NA),
        )

    def sentence(self, split: PatientSplit) -> str:
        """What is trained on, in one line."""
        patients, studies = self.obs["patient"].nunique(), self.obs["study"].nunique()
        held = f"{len(split.validation_patients)} held out" if split.validation.size else "none held out"
        return (
            f"{len(self.obs):,} cells ({int(self.labelled_N.sum()):,} labelled), "
            f"{patients} patient{'s' * (patients != 1)} ({held}), {studies} stud{'y' if studies == 1 else 'ies'}, "
            f"{len(self.store.header.genes):,} genes"
        )


def check_covariates(obs: pd.DataFrame, config: Config) -> None:
    """Raise ConfigError where a covariate is no column of the contract, or says nothing."""
    if unknown := [name for name in config.model.covariates if name not in obs or name not in NAMES]:
        raise ConfigError(
            f"model.covariates names {', '.join(map(repr, unknown))}, which the studies do not have; "
            f"map it in ingest.studies.*.obs, or choose from {', '.join(name for name in NAMES if name in obs)}"
        )
    if empty := [name for name in config.model.covariates if obs[name].isna().all()]:
        raise ConfigError(
            f"model.covariates names {', '.join(map(repr, empty))}, which no cell has a value of; leave it out, or "
            "map it in ingest.studies.*.obs"
        )


def balanced_weights(code_N: NDArray[np.integer], train: NDArray[np.int64], balance: float) -> NDArray[np.float64]:
    """Weight of each cell, ``count ** -balance`` of its label set, with mean 1 over the labelled training cells."""
    taught = code_N[train]
    taught = taught[taught >= 0]
    if taught.size == 0:
        return np.zeros(code_N.size)
    count = np.bincount(taught, minlength=int(code_N.max()) + 1)
    weight = np.maximum(count, 1).astype(np.float64) ** -balance
    weight /= weight[taught].mean()
    return np.where(code_N >= 0, weight[np.maximum(code_N, 0)], 0.0)


def _known_categories(covariate_NC: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.int64]:
    """-1 for the categories that no training cell has: their rows of the tables are never trained."""
    known = covariate_NC.copy()
    for c in range(known.shape[1]):
        known[~np.isin(known[:, c], np.unique(known[train, c])), c] = -1
    return known


def labels_of(obs: pd.DataFrame, config: Config) -> CohortLabels | None:
    """Labels of cells with the store's columns, on the tree of the config; None where no study has any."""
    how = {
        name: StudyLabels(
            mapping=None if study.mapping is None else label_file(study.mapping),
            missing=study.missing_labels,
            labelled=study.label is not None,
        )
        for name, study in config.ingest.studies.items()
    }
    tree_file = None if config.labels.tree == "flat" else label_file(config.labels.tree)
    weak = None
    if config.labels.weak:
        if tree_file is None:
            raise ConfigError("labels.weak needs a label tree: signatures vote for its nodes; set labels.tree=tree")
        scores = obs[[c for c in obs if str(c).startswith(SCORE)]].rename(columns=lambda c: str(c).removeprefix(SCORE))
        weak = (scores, Signatures.read(label_file(config.labels.signatures)), obs["sample"].astype(str))
    return label_cells(obs[LABEL].astype("string").fillna(""), obs[SOURCE].astype(str), how, tree_file, weak)
