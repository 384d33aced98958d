"""Label-transfer baselines, each fitted on the training patients of one fold and nothing else.

Genes, scaling and penalties are chosen on training cells; a method sees the counts of the held-out patient,
never its labels. Axes of arrays: N cells, G genes, L latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scanpy as sc
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    Strings = NDArray[np.str_]
    Floats = NDArray[np.float32]

MISSING = "Unlabelled"
PENALTIES = (0.001, 0.01, 0.1, 1.0)
N_GENES = 2000
CLIP = 10.0


@dataclass(frozen=True, slots=True)
class Fold:
    """One held-out patient: ``obs`` of both parts has `label`, `patient`, `sample`; the query's labels are hidden."""

    patient: str
    train: AnnData
    query: AnnData
    cache: Path
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label for every query cell, in order, and the settings that the method chose."""

    labels_N: Strings
    settings: dict[str, float | str] = field(default_factory=dict)


Method = Callable[[Fold], Prediction]


def labels_of(adata: AnnData) -> Strings:
    """The `label` column as plain strings."""
    return np.asarray(adata.obs["label"].astype(str), dtype=str)


def labelled(adata: AnnData) -> AnnData:
    """The cells whose label is known."""
    return adata[labels_of(adata) != MISSING].copy()


def variable_genes(adata: AnnData, n_genes: int = N_GENES) -> NDArray[np.bool_]:
    """Highly variable genes by scanpy's ``seurat_v3`` on raw counts."""
    n_threads = torch.get_num_threads()
    table = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=n_genes, inplace=False)
    torch.set_num_threads(n_threads)  # numba's parallel kernels reset OpenMP for the whole process
    return np.asarray(table["highly_variable"], dtype=bool)


@dataclass(frozen=True, slots=True)
class GeneScaler:
    """log1p(CP10k) of the variable genes, standardised by the cells it was fitted on, clipped at 10 deviations."""

    gene_G: NDArray[np.bool_]
    mean_G: Floats
    scale_G: Floats

    @classmethod
    def fit(cls, adata: AnnData, gene_G: NDArray[np.bool_]) -> GeneScaler:
        """Take the genes' means and deviations from these cells."""
        log_NG = _log_cp10k(adata, gene_G)
        scale_G = log_NG.std(axis=0)
        return cls(gene_G, log_NG.mean(axis=0), np.where(scale_G > 0, scale_G, np.float32(1)))

    def transform(self, adata: AnnData) -> Floats:
        """The cells' standardised expression, shape (N, G)."""
        scaled_NG = (_log_cp10k(adata, self.gene_G) - self.mean_G) / self.scale_G
        clipped_NG: Floats = np.clip(scaled_NG, -CLIP, CLIP)
        return clipped_NG


def _log_cp10k(adata: AnnData, gene_G: NDArray[np.bool_]) -> Floats:
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    library_N = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    dense: Floats = (sparse.diags(1e4 / library_N) @ counts[:, gene_G]).toarray()
    return np.log1p(dense, dtype=np.float32)


def logistic(penalty: float, class_weight: str | None) -> LogisticRegression:
    """An L2 multinomial logistic regression; ``penalty`` is scikit-learn's C."""
    return LogisticRegression(C=penalty, class_weight=class_weight, max_iter=1000)


def choose_penalty(parts: Sequence[tuple[Floats, Strings, Floats, Strings]], class_weight: str | None) -> float:
    """The C with the best mean of pooled accuracy and macro-F1 over (x, y, x held out, y held out) parts."""
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
    """Leave one training patient out at a time.

    ``transform`` fits on its first argument, and gives the coordinates of its labelled cells and of the second.
    """
    patients = np.asarray(train.obs["patient"].astype(str))
    parts = []
    for held_out in np.unique(patients):
        rest, out = train[patients != held_out], labelled(train[patients == held_out])
        x, x_out = transform(rest, out)
        parts.append((x, labels_of(labelled(rest)), x_out, labels_of(out)))
    return parts


def _scaled(train: AnnData, query: AnnData, genes_from_all: bool = False) -> tuple[Floats, Floats]:
    known = labelled(train)
    scaler = GeneScaler.fit(known, variable_genes(train if genes_from_all else known))
    return scaler.transform(known), scaler.transform(query)


def gene_logistic(fold: Fold, class_weight: str | None = None, genes_from_all: bool = False) -> Prediction:
    """Logistic regression on 2,000 genes; C by leaving training patients out, genes chosen anew each time.

    The genes vary most over the labelled training cells, or with ``genes_from_all`` over the unlabelled ones as well.
    """
    scaled = partial(_scaled, genes_from_all=genes_from_all)
    penalty = choose_penalty(inner_parts(fold.train, scaled), class_weight)
    x, x_query = scaled(fold.train, fold.query)
    model = logistic(penalty, class_weight).fit(x, labels_of(labelled(fold.train)))
    return Prediction(model.predict(x_query), {"C": penalty})


def pca_knn(fold: Fold, n_components: int = 50, n_neighbors: int = 15) -> Prediction:
    """The vote of 15 neighbours in 50 principal components of 2,000 genes."""
    x, x_query = _scaled(fold.train, fold.query)
    pca = PCA(n_components, svd_solver="arpack", random_state=fold.seed).fit(x)
    model = KNeighborsClassifier(n_neighbors).fit(pca.transform(x), labels_of(labelled(fold.train)))
    settings: dict[str, float | str] = {"n_components": n_components, "n_neighbors": n_neighbors}
    return Prediction(model.predict(pca.transform(x_query)), settings)


@dataclass(frozen=True, slots=True)
class ScviRecipe:
    """The tuned recipe measured on this data (lr 4e-3, warm-up 20, 50 epochs) with scArches' layer settings."""

    n_latent: int = 30
    n_layers: int = 2
    dropout_rate: float = 0.2
    lr: float = 4e-3
    n_epochs_kl_warmup: int = 20
    epochs: int = 50
    scanvi_epochs: int = 20
    query_epochs: int = 100


RECIPE = ScviRecipe()
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}


def reference_scvi(fold: Fold) -> Any:
    """An SCVI on the training patients' cells, labelled or not; kept in the fold's cache for both its users."""
    import scvi

    scvi.settings.seed = fold.seed
    folder = fold.cache / "scvi"
    if folder.exists():
        return scvi.model.SCVI.load(str(folder), accelerator="cpu")
    train = fold.train[:, variable_genes(fold.train)].copy()
    scvi.model.SCVI.setup_anndata(train, batch_key="sample", labels_key="label")
    model = scvi.model.SCVI(
        train,
        n_latent=RECIPE.n_latent,
        n_layers=RECIPE.n_layers,
        dropout_rate=RECIPE.dropout_rate,
        gene_likelihood="nb",
        encode_covariates=True,
        use_layer_norm="both",
        use_batch_norm="none",
    )
    plan = {"lr": RECIPE.lr, "n_epochs_kl_warmup": RECIPE.n_epochs_kl_warmup}
    model.train(RECIPE.epochs, plan_kwargs=plan, **QUIET)
    unfinished = folder.with_suffix(".partial")
    model.save(str(unfinished), save_anndata=True, overwrite=True)
    unfinished.replace(folder)
    return model


def map_query(fold: Fold, reference: Any) -> Any:
    """The reference with new columns for the query's samples, trained alone, as in the scArches tutorial."""
    model_class, query = type(reference), fold.query.copy()
    model_class.prepare_query_anndata(query, reference)
    mapped = model_class.load_query_data(query, reference, accelerator="cpu")
    mapped.train(RECIPE.query_epochs, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    return mapped


def scvi_logistic(fold: Fold) -> Prediction:
    """Logistic regression on scVI's latent, standardised; C by leaving training patients out."""
    reference = reference_scvi(fold)
    known_N = labels_of(reference.adata) != MISSING
    train = reference.adata[known_N]
    z_NL = np.asarray(reference.get_latent_representation(), dtype=np.float32)[known_N]
    z_query_NL = np.asarray(map_query(fold, reference).get_latent_representation(), dtype=np.float32)
    latent = sc.AnnData((z_NL - z_NL.mean(axis=0)) / z_NL.std(axis=0), obs=train.obs)
    penalty = choose_penalty(inner_parts(latent, lambda rest, out: (rest.X, out.X)), None)
    model = logistic(penalty, None).fit(latent.X, labels_of(latent))
    scaled_query_NL = (z_query_NL - z_NL.mean(axis=0)) / z_NL.std(axis=0)
    return Prediction(model.predict(scaled_query_NL), {"C": penalty})


def scanvi(fold: Fold) -> Prediction:
    """The label of scANVI (started from scVI) after mapping the query by scArches."""
    import scvi

    model = scvi.model.SCANVI.from_scvi_model(reference_scvi(fold), unlabeled_category=MISSING)
    model.train(RECIPE.scanvi_epochs, n_samples_per_label=100, **QUIET)
    return Prediction(np.asarray(map_query(fold, model).predict(), dtype=str))
