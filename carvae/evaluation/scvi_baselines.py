"""scVI with logistic regression, and scANVI: a reference per fold, and the asked cells mapped onto it by scArches.

Axes: N cells, K latent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np

from carvae.errors import EvaluateError
from carvae.evaluation.baselines import choose_penalty, inner_parts, labels_of, logistic, variable_genes
from carvae.evaluation.cells import MISSING, Point, Rows
from carvae.evaluation.task import Fitted, Floats, Said, Task, unsure


@dataclass(frozen=True, slots=True)
class ScviRecipe:
    """The tuned recipe measured on CARPALL (lr 4e-3, warm-up 20, 50 epochs) with scArches' layer settings."""

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


def reference_scvi(task: Task) -> Any:
    """An SCVI on the training cells, labelled or not; kept in the task's folder for both its users."""
    import scvi

    scvi.settings.verbosity = logging.ERROR  # else a coloured line per query stands in the log
    scvi.settings.seed = task.seed
    folder = task.folder / f"scvi-{task.stamp[:12]}"
    if folder.exists():
        return scvi.model.SCVI.load(str(folder), accelerator="cpu")
    train = task.train()
    train = train[:, variable_genes(train)].copy()
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


def _mapped(task: Task, reference: Any) -> Any:
    """The reference with new columns for the query's samples, trained alone, as in the scArches tutorial."""
    model_class, query = type(reference), task.query(task.fold.query)
    model_class.prepare_query_anndata(query, reference)
    mapped = model_class.load_query_data(query, reference, accelerator="cpu")
    mapped.train(RECIPE.query_epochs, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    return mapped


def scvi_logistic(task: Task) -> Fitted:
    """Logistic regression on scVI's latent, standardised; C by leaving training patients out."""
    reference = reference_scvi(task)
    known_N = labels_of(reference.adata) != MISSING
    z_NK = np.asarray(reference.get_latent_representation(), dtype=np.float32)
    mean_K, scale_K = z_NK[known_N].mean(axis=0), z_NK[known_N].std(axis=0)
    latent = ad.AnnData((z_NK[known_N] - mean_K) / scale_K, obs=reference.adata[known_N].obs.copy())
    penalty = choose_penalty(inner_parts(latent, lambda rest, out: (rest.X, out.X)), None)
    model = logistic(penalty, None).fit(latent.X, labels_of(latent))
    coordinates = _coordinates(task, z_NK, _mapped(task, reference))

    def says(rows: Rows, point: Point) -> Said:
        _only_whole(point)
        x = (coordinates(rows) - mean_K) / scale_K
        found = task.spread(model.predict_proba(x), model.classes_)
        return Said(found, unsure(found))

    return Fitted(says, {"C": penalty}, coordinates)


def scanvi(task: Task) -> Fitted:
    """The label of scANVI (started from scVI) after mapping the query by scArches."""
    import scvi

    model = scvi.model.SCANVI.from_scvi_model(reference_scvi(task), unlabeled_category=MISSING)
    model.train(RECIPE.scanvi_epochs, n_samples_per_label=100, **QUIET)
    z_NK = np.asarray(model.get_latent_representation(), dtype=np.float32)
    mapped = _mapped(task, model)
    table = mapped.predict(soft=True)

    def says(rows: Rows, point: Point) -> Said:
        _only_whole(point)
        asked = table.loc[rows.astype(str)]
        found = task.spread(asked.to_numpy(np.float32), asked.columns.to_numpy(dtype=object))
        return Said(found, unsure(found))

    return Fitted(says, {}, _coordinates(task, z_NK, mapped))


def _coordinates(task: Task, train_NK: Floats, mapped: Any) -> Callable[[Rows], Floats]:
    """Coordinates of training cells from the reference, of the others from the mapped query."""
    rows = np.concatenate([task.fold.train, task.fold.query])
    z_NK = np.concatenate([train_NK, np.asarray(mapped.get_latent_representation(), dtype=np.float32)])
    order = np.argsort(rows)
    return lambda wanted: z_NK[order[np.searchsorted(rows[order], wanted)]]


def _only_whole(point: Point) -> None:
    if point.kind != "whole":
        raise EvaluateError("scVI and scANVI must be mapped anew for every query, so they have no sweeps")
