"""Label-transfer baselines, each fitted on the training cells of one fold and nothing else.

Genes, scaling and penalties are chosen on training cells; a method sees the counts of held-out patients, never their
labels. Genes that are missing from the asked cells count as average. Axes: N cells, G genes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from carvae.data.panel import highly_variable
from carvae.errors import EvaluateError
from carvae.evaluation.cells import MISSING, WHOLE, Point, Rows
from carvae.evaluation.task import Fitted, Floats, Said, Settings, Task, unsure

if TYPE_CHECKING:
    from anndata import AnnData

    Strings = NDArray[np.str_]

PENALTIES = (0.001, 0.01, 0.1, 1.0)
N_GENES = 2000
CLIP = 10.0
N_COMPONENTS = 50
N_NEIGHBORS = 15


def labels_of(adata: AnnData) -> Strings:
    """The `label` column as plain strings."""
    return np.asarray(adata.obs["label"].astype(str), dtype=str)


def labelled(adata: AnnData) -> AnnData:
    """The cells whose label is known."""
    return adata[labels_of(adata) != MISSING].copy()


def variable_genes(adata: AnnData, n_genes: int = N_GENES) -> NDArray[np.bool_]:
    """Highly variable genes by scanpy's ``seurat_v3`` on raw counts."""
    if adata.n_vars <= n_genes:
        return np.ones(adata.n_vars, np.bool_)
    n_threads = torch.get_num_threads()
    chosen = highly_variable(adata, n_genes)
    torch.set_num_threads(n_threads)  # numba's parallel kernels reset OpenMP for the whole process
    return chosen


@dataclass(frozen=True, slots=True)
class GeneScaler:
    """log1p(CP10k) of the variable genes, standardised by the cells it was fitted on, clipped at 10 deviations."""

    genes: NDArray[np.object_]
    mean_G: Floats
    scale_G: Floats

    @classmethod
    def fit(cls, adata: AnnData, gene_G: NDArray[np.bool_]) -> GeneScaler:
        """Take the genes' means and deviations from these cells."""
        log_NG = _log_cp10k(adata)[:, gene_G].toarray()
        scale_G = log_NG.std(axis=0)
        names = adata.var_names.to_numpy(dtype=object)[gene_G]
        return cls(names, log_NG.mean(axis=0), np.where(scale_G > 0, scale_G, np.float32(1)))

    def transform(self, adata: AnnData) -> Floats:
        """The cells' standardised expression, shape (N, G); genes that they lack are at the mean."""
        column_G = adata.var_names.get_indexer(pd.Index(self.genes))
        here_G = column_G >= 0
        scaled_NG = np.zeros((adata.n_obs, self.genes.size), np.float32)
        log_NG = _log_cp10k(adata)[:, column_G[here_G]].toarray()
        scaled_NG[:, here_G] = np.clip((log_NG - self.mean_G[here_G]) / self.scale_G[here_G], -CLIP, CLIP)
        return scaled_NG


def _log_cp10k(adata: AnnData) -> sparse.csr_matrix:
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    library_N = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return sparse.csr_matrix(sparse.diags(1e4 / library_N) @ counts, dtype=np.float32).log1p()


def logistic(penalty: float, class_weight: str | None) -> LogisticRegression:
    """An L2 multinomial logistic regression; ``penalty`` is scikit-learn's C."""
    return LogisticRegression(C=penalty, class_weight=class_weight, max_iter=1000)


def choose_penalty(parts: Sequence[tuple[Floats, Strings, Floats, Strings]], class_weight: str | None) -> float:
    """The C with the best mean of pooled accuracy and macro-F1 over (x, y, x held out, y held out) parts."""
    if not parts:
        return PENALTIES[len(PENALTIES) // 2]
    truth = np.concatenate([part[3] for part in parts])
    names = np.unique(truth)

    def score(penalty: float) -> float:
        fits = (logistic(penalty, class_weight).fit(x, y).predict(x_out) for x, y, x_out, _ in parts)
        guess = np.concatenate(list(fits))
        macro = f1_score(truth, guess, average="macro", labels=names, zero_division=0)
        return float(accuracy_score(truth, guess) + macro) / 2

    return max(PENALTIES, key=score)


def inner_parts(
    train: AnnData, transform: Callable[[AnnData, AnnData], tuple[Floats, Floats]]
) -> list[tuple[Floats, Strings, Floats, Strings]]:
    """Leave one training patient out at a time; those without whom a single label is left are not.

    ``transform`` fits on its first argument, and gives the coordinates of its labelled cells and of the second.
    """
    patients = np.asarray(train.obs["patient"].astype(str))
    known = labels_of(train) != MISSING
    parts = []
    for held_out in np.unique(patients[known]):
        rest, out = train[patients != held_out], labelled(train[patients == held_out])
        if len(set(labels_of(labelled(rest)))) > 1:
            x, x_out = transform(rest, out)
            parts.append((x, labels_of(labelled(rest)), x_out, labels_of(out)))
    return parts


def _scaled(train: AnnData, query: AnnData) -> tuple[Floats, Floats]:
    scaler = GeneScaler.fit(labelled(train), variable_genes(train))
    return scaler.transform(labelled(train)), scaler.transform(query)


def majority(task: Task) -> Fitted:
    """Every cell is of the commonest state, with the probability that it has among the training cells."""
    names, count = np.unique(labels_of(labelled(task.train())), return_counts=True)
    prior_S = task.spread((count / count.sum())[None, :], names.astype(object))

    def says(rows: Rows, point: Point) -> Said:
        probability_NS = np.repeat(prior_S, rows.size, axis=0)
        return Said(probability_NS, unsure(probability_NS))

    return Fitted(says)


def gene_logistic(task: Task, class_weight: str | None = None) -> Fitted:
    """Logistic regression on the 2,000 genes that vary most over all training cells; C by leaving patients out."""
    train = task.train()
    penalty = choose_penalty(inner_parts(train, _scaled), class_weight)
    known = labelled(train)
    scaler = GeneScaler.fit(known, variable_genes(train))
    model = logistic(penalty, class_weight).fit(scaler.transform(known), labels_of(known))

    def says(rows: Rows, point: Point) -> Said:
        found = task.spread(model.predict_proba(scaler.transform(task.query(rows, point))), model.classes_)
        return Said(found, unsure(found))

    return Fitted(says, {"C": penalty})


def pca_knn(task: Task) -> Fitted:
    """The vote of 15 neighbours in 50 principal components of 2,000 genes; novelty is their mean distance."""
    train = task.train()
    known = labelled(train)
    scaler = GeneScaler.fit(known, variable_genes(train))
    x = scaler.transform(known)
    pca = PCA(min(N_COMPONENTS, *x.shape), svd_solver="full", random_state=task.seed).fit(x)
    model = KNeighborsClassifier(min(N_NEIGHBORS, len(x))).fit(pca.transform(x), labels_of(known))

    def latent(rows: Rows, point: Point = WHOLE) -> Floats:
        found: Floats = pca.transform(scaler.transform(task.query(rows, point))).astype(np.float32)
        return found

    def says(rows: Rows, point: Point) -> Said:
        z = latent(rows, point)
        far, _ = model.kneighbors(z)
        return Said(task.spread(model.predict_proba(z), model.classes_), far.mean(1).astype(np.float32))

    return Fitted(says, {"n_components": int(pca.n_components_), "n_neighbors": int(model.n_neighbors)}, latent)


def celltypist(task: Task) -> Fitted:
    """CellTypist trained with its own feature selection on log1p(CP10k) of all genes, cell by cell.

    Raises
    ------
    EvaluateError
        It is not installed.
    """
    try:
        import celltypist as package
    except ImportError:
        raise EvaluateError(NO_CELLTYPIST) from None
    package.logger.set_level(logging.ERROR)
    n_threads = torch.get_num_threads()
    # celltypist 1.7 asks scikit-learn's regression for one class against the rest, which from 1.8 on it no longer does
    by_descent = "multi_class" not in LogisticRegression().get_params()
    settings: Settings = {"version": str(package.__version__), "fitted by": "SGD" if by_descent else "LR"}
    model: Any = package.train(
        _logged(labelled(task.train())),
        labels="label",
        n_jobs=1,
        feature_selection=True,
        check_expression=False,
        max_iter=100,
        use_SGD=by_descent,
        random_state=task.seed,
    )
    torch.set_num_threads(n_threads)

    def says(rows: Rows, point: Point) -> Said:
        found = package.annotate(_logged(task.query(rows, point)), model=model)
        table = found.probability_matrix
        probability_NS = task.spread(table.to_numpy(np.float32), table.columns.to_numpy(dtype=object))
        return Said(probability_NS, unsure(probability_NS))

    return Fitted(says, settings)


NO_CELLTYPIST = (
    "celltypist is not installed; `pip install celltypist` (extra `bench`) or leave it out of evaluate.methods"
)


def _logged(adata: AnnData) -> AnnData:
    adata.X = _log_cp10k(adata)
    return adata


def _balanced(task: Task) -> Fitted:
    return gene_logistic(task, class_weight="balanced")


METHODS: dict[str, Callable[[Task], Fitted]] = {
    "majority": majority,
    "logistic": partial(gene_logistic, class_weight=None),
    "logistic_balanced": _balanced,
    "knn": pca_knn,
    "celltypist": celltypist,
}
