"""Weights to and from scvi-tools, whose methods (differential expression, normalised expression, ...) then serve.

Axes: N cells, G genes, H hidden, K latent, C categories of one covariate.

`CellVAE` is ``scvi.module.VAE`` with LayerNorm in encoder and decoder, no BatchNorm, observed library, per-gene
dispersion, and covariates in the decoder's first layer. scvi-tools one-hot encodes the covariates beside z, so a
table of ours stands, transposed, to the right of the decoder's first weight [H, K]. A covariate with one category
has no column there: its row goes into the bias. scvi-tools is imported by the functions, since that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carvae.config import ModelConfig, PredictConfig
from carvae.data.genes import GeneTable
from carvae.data.readers import open_source
from carvae.errors import BundleError, join_problems
from carvae.model.bundle import Bundle
from carvae.model.network import Network
from carvae.model.vae import CellVAE

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.model import SCVI

PREFIX = "carvae_"
"""Before a covariate's name in the ``obs`` of a converted model."""
UNKNOWN = "unknown"
"""Category of the cells whose batch the model has not seen; it has the mean of the table."""
REMEDY = (
    "this SCVI model does not fit carvae; train one with scvi.model.SCVI(adata, use_layer_norm='both', "
    "use_batch_norm='none', deeply_inject_covariates=False, gene_likelihood='nb')"
)


@dataclass(frozen=True, slots=True)
class Converted:
    """A network made of an SCVI model."""

    network: Network
    """In evaluation mode, without label axes."""
    genes: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    """Covariate -> its categories, in the order of the rows of its table."""
    config: ModelConfig


def to_scvi(bundle: Bundle, adata: AnnData, covariates: Mapping[str, str] | None = None) -> SCVI:
    """A trained ``scvi.model.SCVI`` with the bundle's weights, set up on the cells of ``adata``.

    Parameters
    ----------
    bundle
        The model.
    adata
        Cells with raw counts, any gene order, symbols or Ensembl ids; not changed. The returned model's own
        ``adata`` holds them over the bundle's genes.
    covariates
        Covariate of the model -> column of ``adata.obs`` that holds its category: an integer code from 0, or -1
        where unknown; or a pandas Categorical with exactly the model's categories in their training order (sorted by
        name, if training read them from names), NaN where unknown. A bundle keeps no names of categories. Cells are
        of unknown category in covariates that are not given. `Bundle.rows_of` gives the codes of what was mapped.

    Returns
    -------
    SCVI
        On the CPU. Its first covariate is scvi's batch, the others are categorical covariates; the columns are
        called ``carvae_`` and the covariate's name.

    Raises
    ------
    BundleError
        The columns do not fit the model's covariates, all problems at once; or the model was shared without its
        decoder.
    GeneError, CountsError
        The cells do not fit; see `carvae.predict`.
    """
    bundle.refuse_without_decoder("scvi-tools")
    columns = _category_columns(bundle.n_rows, adata.obs, covariates or {})
    from scvi.model import SCVI

    cells = _panel_cells(bundle, adata, columns)
    keys = [PREFIX + name for name in columns]
    config = bundle.config
    with torch.random.fork_rng(devices=[]):  # the start is overwritten, so it draws on nobody's generator
        SCVI.setup_anndata(cells, batch_key=keys[0] if keys else None, categorical_covariate_keys=keys[1:] or None)
        model = SCVI(
            cells,
            n_hidden=config.n_hidden,
            n_latent=config.n_latent,
            n_layers=config.n_layers,
            dropout_rate=config.dropout_rate,
            gene_likelihood=config.gene_likelihood,
            use_layer_norm="both",
            use_batch_norm="none",
            deeply_inject_covariates=False,
        )
    tables = _tables(bundle.network.vae, {name: UNKNOWN in column.categories for name, column in columns.items()})
    state = {name: torch.zeros_like(tensor) for name, tensor in model.module.state_dict().items()}
    given = dict(scvi_state(bundle.network.vae, tables))
    assert given.keys() <= state.keys(), given.keys() - state.keys()
    model.module.load_state_dict(state | given)  # what is zero is unused: library encoder, dispersion per cell
    model.module.eval()
    model.is_trained_ = True
    return model


def from_scvi(model: SCVI) -> Converted:
    """The network of an SCVI model whose architecture carvae has.

    Raises
    ------
    BundleError
        The architecture is another one; the message names all that does not fit.
    """
    from scvi.model import SCVI

    if type(model) is not SCVI:
        raise BundleError(f"a {type(model).__name__} model was given; only scvi.model.SCVI can be converted")
    module = model.module
    categories = _scvi_categories(model)
    if problems := _misfits(model, categories):
        raise BundleError(join_problems(REMEDY, problems))
    config = ModelConfig(
        n_latent=module.n_latent,
        n_hidden=module.n_hidden,
        n_layers=module.n_layers,
        dropout_rate=next((m.p for m in module.z_encoder.modules() if isinstance(m, nn.Dropout)), 0.0),
        gene_likelihood=module.gene_likelihood,
        covariates=tuple(categories),
    )
    n_categories = {name: len(names) for name, names in categories.items()}
    with torch.random.fork_rng(devices=[]):
        network = Network(module.n_input, n_categories, {}, config)
    try:
        network.vae.load_state_dict(carvae_state(module.state_dict(), n_categories, config))
    except (KeyError, RuntimeError) as error:  # layers changed by extra_encoder_kwargs or extra_decoder_kwargs
        raise BundleError(join_problems(REMEDY, [f"its layers are of another shape ({error})"])) from None
    genes = tuple(str(gene) for gene in model.adata.var_names)
    return Converted(network.eval(), genes, categories, config)


def scvi_state(vae: CellVAE, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of ``scvi.module.VAE`` that equal this model, by their names there.

    Parameters
    ----------
    vae
        The model.
    tables
        Covariate -> rows [C, H] to take for those of the model.
    """
    own = {name: tensor.detach().cpu() for name, tensor in vae.state_dict().items()}
    if tables is None:
        tables = _tables(vae, {})
    state = {theirs: own[ours] for ours, theirs in _same(vae.encoder.layers, vae.decoder.zero is not None)}
    state[_encoder_layer(0, "weight")] = own["encoder.first.weight_GH"].t().contiguous()
    columns = [own["decoder.first.weight"], *(table.t() for table in tables.values() if len(table) > 1)]
    state[_decoder_layer(0, "weight")] = torch.cat(columns, 1)
    folded = [table[0] for table in tables.values() if len(table) == 1]
    state[_decoder_layer(0, "bias")] = torch.stack([own["decoder.first.bias"], *folded]).sum(0)
    return state


def carvae_state(
    state: Mapping[str, Tensor], n_categories: Mapping[str, int], config: ModelConfig
) -> dict[str, Tensor]:
    """The tensors of `CellVAE` that equal a ``scvi.module.VAE``, which must have its architecture.

    Parameters
    ----------
    state
        scvi-tools' tensors by name.
    n_categories
        Covariate -> number of categories, in scvi's order; a single category gets a row of zeros.
    config
        Sizes and likelihood.
    """
    pairs = _same(range(config.n_layers - 1), config.gene_likelihood == "zinb")
    own = {ours: state[theirs] for ours, theirs in pairs}
    own["encoder.first.weight_GH"] = state[_encoder_layer(0, "weight")].t()
    own["decoder.first.bias"] = state[_decoder_layer(0, "bias")]
    weight = state[_decoder_layer(0, "weight")]
    widths = [n if n > 1 else 0 for n in n_categories.values()]
    own["decoder.first.weight"], *columns = torch.split(weight, [config.n_latent, *widths], 1)
    for name, column in zip(n_categories, columns, strict=True):
        row = weight.new_zeros(1, weight.shape[0])
        own[f"decoder.tables.{name}.weight"] = column.t() if column.numel() else row
    return {name: tensor.detach().cpu() for name, tensor in own.items()}


def _encoder_layer(i: int, kind: str) -> str:
    return f"z_encoder.encoder.fc_layers.Layer {i}.0.{kind}"


def _decoder_layer(i: int, kind: str) -> str:
    return f"decoder.px_decoder.fc_layers.Layer {i}.0.{kind}"


def _same(layers: nn.ModuleList | range, zinb: bool) -> Iterator[tuple[str, str]]:
    """Names, here and in scvi-tools, of the tensors that are the same in both."""
    yield "log_theta_G", "px_r"
    yield "encoder.first.bias_H", _encoder_layer(0, "bias")
    for kind in ("weight", "bias"):
        for i in range(len(layers)):
            yield f"encoder.layers.{i}.{kind}", _encoder_layer(i + 1, kind)
            yield f"decoder.layers.{i}.{kind}", _decoder_layer(i + 1, kind)
        yield f"encoder.mean.{kind}", f"z_encoder.mean_encoder.{kind}"
        yield f"encoder.log_variance.{kind}", f"z_encoder.var_encoder.{kind}"
        yield f"decoder.scale.{kind}", f"decoder.px_scale_decoder.0.{kind}"
        if zinb:
            yield f"decoder.zero.{kind}", f"decoder.px_dropout_decoder.{kind}"


def _tables(vae: CellVAE, with_unknown: Mapping[str, bool]) -> dict[str, Tensor]:
    """Rows of each covariate, with their mean below them where cells of unknown category need it."""
    tables = {}
    for name, table_CH in vae.decoder.rows().items():
        rows_CH, mean_H = table_CH.detach().cpu(), vae.decoder.mean_row(name).detach().cpu()
        tables[name] = torch.cat([rows_CH, mean_H[None]]) if with_unknown.get(name) else rows_CH
    return tables


def _category_columns(
    n_categories: Mapping[str, int], obs: pd.DataFrame, covariates: Mapping[str, str]
) -> dict[str, pd.Categorical[str]]:
    """Each covariate's category per cell, with all of the model's categories in their order."""
    problems = [
        f"the model has no covariate {name!r}; it has {', '.join(n_categories) or 'none'}"
        for name in covariates
        if name not in n_categories
    ]
    columns = {}
    for name, n in n_categories.items():
        column = covariates.get(name)
        if column is None:
            columns[name] = _named(np.full(len(obs), -1), [str(i) for i in range(n)])
        elif column not in obs:
            problems.append(f"obs[{column!r}] is missing; the columns are {', '.join(map(str, obs.columns))}")
        elif isinstance(problem := _codes(obs[column], n), str):
            problems.append(f"obs[{column!r}] {problem}")
        else:
            columns[name] = problem
    if problems:
        raise BundleError(join_problems("the covariates do not fit the model", problems))
    return columns


def _codes(column: pd.Series[Any], n: int) -> pd.Categorical[str] | str:
    """The column as a Categorical of the model's ``n`` categories, or what is wrong with it."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = [str(name) for name in column.cat.categories]
        if len(names) != n or UNKNOWN in names:
            return (
                f"has {len(names)} categories and the model {n}; give integer codes of the model's categories, "
                "or -1 for cells from batches that it has not seen"
            )
        return _named(column.cat.codes.to_numpy(np.int64), names)
    if not pd.api.types.is_integer_dtype(column.dtype) or column.isna().any():
        return (
            f"is of type {column.dtype}; give integer codes of the model's categories (-1 where unknown), "
            "or a pandas Categorical whose categories stand in the order of training"
        )
    codes = column.to_numpy(np.int64)
    if codes.min(initial=0) < -1 or codes.max(initial=0) >= n:
        return f"holds codes from {codes.min()} to {codes.max()}; the model's go from 0 to {n - 1}, -1 means unknown"
    return _named(codes, [str(i) for i in range(n)])


def _named(codes: NDArray[np.integer[Any]], names: list[str]) -> pd.Categorical[str]:
    if (codes < 0).any():
        codes, names = np.where(codes < 0, len(names), codes), [*names, UNKNOWN]
    return pd.Categorical.from_codes(codes, categories=pd.Index(names))


def _panel_cells(bundle: Bundle, adata: AnnData, columns: Mapping[str, pd.Categorical[str]]) -> AnnData:
    """A new AnnData with counts over the bundle's genes and the covariates' columns."""
    from anndata import AnnData

    source = open_source(adata)
    resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
    aligned = bundle.align(resolved, PredictConfig().min_overlap)
    counts = sp.vstack([aligned.apply(chunk) for chunk in source.chunks()]).tocsr().astype(np.float32)
    obs = adata.obs.assign(**{PREFIX + name: column for name, column in columns.items()})
    uns = {"carvae": {"bundle": bundle.bundle_id, "genes": aligned.receipt.to_dict()}}
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=list(bundle.genes)), uns=uns)


def _scvi_categories(model: SCVI) -> dict[str, tuple[str, ...]]:
    """Covariate -> categories: the batch if a column was given for it, then the categorical covariates."""
    from scvi import REGISTRY_KEYS

    manager = model.adata_manager
    setup = model.registry["setup_args"]
    found = {}
    if setup["batch_key"] is not None:
        found[setup["batch_key"]] = manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
    if setup["categorical_covariate_keys"]:
        registry = manager.get_state_registry(REGISTRY_KEYS.CAT_COVS_KEY)
        found |= {name: registry.mappings[name] for name in registry.field_keys}  # the mappings' own order is another
    return {str(name): tuple(str(category) for category in names) for name, names in found.items()}


def _misfits(model: SCVI, categories: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What about the model carvae's network has no place for."""
    module = model.module
    wanted = {
        "dispersion": ("gene",),
        "gene_likelihood": ("nb", "zinb"),
        "latent_distribution": ("normal",),
        "log_variational": (True,),
        "batch_representation": ("one-hot",),
    }
    given = {name: getattr(module, name) for name in wanted}
    found = [
        f"{name} is {given[name]!r}, not {' or '.join(map(repr, allowed))}"
        for name, allowed in wanted.items()
        if given[name] not in allowed
    ]
    found += [f"{name} is 1, the least is 2" for name in ("n_latent", "n_hidden") if getattr(module, name) == 1]
    found += _layer_misfits("encoder", module.z_encoder.encoder.fc_layers)
    found += _layer_misfits("decoder", module.decoder.px_decoder.fc_layers)
    if not module.use_observed_lib_size:
        found.append("the library size is inferred (use_observed_lib_size)")
    if module.use_size_factor_key:
        found.append("the library size is a column of its own (size_factor_key)")
    if module.encode_covariates and categories:
        found.append("the encoder sees the covariates (encode_covariates)")
    if module.decoder.px_decoder.inject_covariates and module.n_layers > 1 and categories:
        found.append("covariates enter every layer of the decoder (deeply_inject_covariates)")
    if continuous := model.registry["setup_args"]["continuous_covariate_keys"]:
        found.append(f"it has continuous covariates ({', '.join(continuous)})")
    # torch keeps modules by name, beside its own attributes
    impossible = [name for name in categories if "." in name or hasattr(nn.ModuleDict(), name)]
    found += [f"covariate {name!r} bears a name that torch cannot take; rename the column" for name in impossible]
    if module.z_encoder.var_activation is not torch.exp:
        found.append("var_activation is not exp")
    return found


def _layer_misfits(place: str, blocks: Iterable[Iterable[nn.Module | None]]) -> Iterator[str]:
    kinds = [{type(layer) for layer in block if layer is not None} for block in blocks]
    if any(nn.BatchNorm1d in kind for kind in kinds):
        yield f"the {place} has BatchNorm (use_batch_norm)"
    if not all(nn.LayerNorm in kind for kind in kinds):
        yield f"the {place} lacks LayerNorm (use_layer_norm)"
    if not all(nn.ReLU in kind for kind in kinds):
        yield f"the {place} has another activation than ReLU (activation_fn)"
