"""Weights to and from scvi-tools: what comes back is the same model, and what does not fit is refused by name."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR
from carvae.errors import BundleError, GeneError
from carvae.labels.signatures import Signatures
from carvae.model import scvi_bridge
from carvae.model.bundle import Bundle, Provenance
from carvae.model.network import Network
from carvae.model.scvi_bridge import UNKNOWN, Converted, from_scvi, to_scvi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing scvi-tools warns of what it imports itself
    import scvi

GENES = (
    "CCR7",
    "CD27",
    "CD4",
    "CD8A",
    "GNLY",
    "GZMB",
    "HAVCR2",
    "IL7R",
    "LAG3",
    "MKI67",
    "PDCD1",
    "SELL",
    "TCF7",
    "TOX",
)
FITTING: dict[str, Any] = {
    "n_hidden": 12,
    "n_latent": 4,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "deeply_inject_covariates": False,
    "gene_likelihood": "nb",
}


def a_bundle(n_categories: dict[str, int], **settings: Any) -> Bundle:
    """A bundle whose every weight is random."""
    config = ModelConfig(**{"n_latent": 4, "n_hidden": 12, "covariates": tuple(n_categories), **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Network(len(GENES), n_categories, {}, config)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.4)
    provenance = Provenance("0", 0, "", 0, 0, 0, False, {})
    return Bundle(network.eval(), GENES, None, Signatures(items=()), config, n_categories, (), provenance)


def some_cells(n: int = 40, genes: tuple[str, ...] = GENES) -> ad.AnnData:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(1.0, 2.0, (n, len(genes)))).astype(np.float32) + np.eye(n, len(genes)))
    obs = pd.DataFrame(
        {
            "donor_code": np.arange(n) % 3,
            "assay_code": np.arange(n) // 5 % 2,
            "site_code": np.zeros(n, np.int64),
            "group": pd.Categorical(np.where(np.arange(n) < n // 2, "a", "b")),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return ad.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(genes)))


def codes_of(adata: ad.AnnData, *columns: str) -> torch.Tensor:
    return torch.from_numpy(adata.obs[list(columns)].to_numpy(np.int64))


def our_expression(network: Network, adata: ad.AnnData, covariate_NC: torch.Tensor) -> np.ndarray[Any, Any]:
    """Shares of the genes at the posterior's mean."""
    with torch.inference_mode():
        z_NK = network.vae.encoder(CountsCSR.from_scipy(sp.csr_matrix(adata.X))).mean_NK
        return network.vae.decoder.scale(network.vae.decoder.hidden(z_NK, covariate_NC)).softmax(1).numpy()


def their_expression(model: Any) -> np.ndarray[Any, Any]:
    """The same of an SCVI model, by its own generative pass over its own cells."""
    shares = []
    with torch.inference_mode():
        for tensors in model._make_data_loader(model.adata, batch_size=16):
            inferred = model.module.inference(**model.module._get_inference_input(tensors))
            inferred["z"] = inferred["qz"].loc
            generated = model.module.generative(**model.module._get_generative_input(tensors, inferred))
            shares.append(generated["px"].scale.numpy())
    return np.concatenate(shares)


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize(
    "covariates", [{}, {"donor": 3}, {"donor": 3, "assay": 2}, {"site": 1, "donor": 3, "assay": 2}]
)
def test_scvi_gives_the_same_latent_space_and_expression(
    covariates: dict[str, int], n_layers: int, gene_likelihood: str
) -> None:
    bundle, adata = a_bundle(covariates, n_layers=n_layers, gene_likelihood=gene_likelihood), some_cells()
    model = to_scvi(bundle, adata, {name: f"{name}_code" for name in covariates})
    assert isinstance(model, scvi.model.SCVI)
    assert model.is_trained_
    latent = bundle.get_latent_representation(adata)
    np.testing.assert_allclose(model.get_latent_representation(), latent, rtol=1e-5, atol=1e-5)
    covariate_NC = codes_of(adata, *(f"{name}_code" for name in covariates))
    np.testing.assert_allclose(
        their_expression(model), our_expression(bundle.network, adata, covariate_NC), rtol=2e-5, atol=1e-7
    )
    back = from_scvi(model)
    assert back.config == bundle.config.model_copy(
        update={"covariates": tuple(f"carvae_{name}" for name in covariates)}
    )
    if 1 not in covariates.values():
        theirs = {name.replace("carvae_", ""): tensor for name, tensor in back.network.state_dict().items()}
        assert theirs.keys() == bundle.network.state_dict().keys()
        for name, tensor in bundle.network.state_dict().items():
            assert torch.equal(theirs[name], tensor), name


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # pandas' quantiles in scvi
def test_scvis_methods_run_on_a_converted_model(tmp_path: Path) -> None:
    adata = some_cells()
    model = to_scvi(a_bundle({"donor": 3, "assay": 2}), adata, {"donor": "donor_code", "assay": "assay_code"})
    before = [dict(adata.obs.dtypes), [*adata.uns], adata.X.copy()]
    expression = model.get_normalized_expression(transform_batch="1")
    assert expression.shape == adata.shape
    np.testing.assert_allclose(expression.sum(axis=1), 1, rtol=1e-5)
    table = model.differential_expression(groupby="group", group1="a", group2="b", mode="change", silent=True)
    assert set(table.index) == set(GENES)
    assert np.isfinite(table["lfc_mean"]).all()
    assert np.isfinite(model.get_elbo())
    model.save(str(tmp_path / "model"), save_anndata=True)
    again = scvi.model.SCVI.load(str(tmp_path / "model"), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    assert [dict(adata.obs.dtypes), [*adata.uns]] == before[:2]
    assert (adata.X != before[2]).nnz == 0


def test_cells_of_unknown_batches_have_the_mean_of_the_rows() -> None:
    bundle, adata = a_bundle({"donor": 3, "site": 1}), some_cells()
    adata.obs["donor_code"] = np.where(np.arange(40) % 4 == 0, -1, adata.obs["donor_code"])
    model = to_scvi(bundle, adata, {"donor": "donor_code"})
    assert list(model.adata.obs["carvae_donor"].cat.categories) == ["0", "1", "2", UNKNOWN]
    unknown_site = torch.full((40, 1), -1)
    expected = our_expression(bundle.network, adata, torch.cat([codes_of(adata, "donor_code"), unknown_site], 1))
    np.testing.assert_allclose(their_expression(model), expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(our_expression_of(from_scvi(model), model), expected, rtol=2e-5, atol=1e-7)


def our_expression_of(converted: Converted, model: Any) -> np.ndarray[Any, Any]:
    codes = [model.adata.obs[name].cat.codes.to_numpy(np.int64) for name in converted.categories]
    return our_expression(converted.network, model.adata, torch.from_numpy(np.stack(codes, 1)))


def test_batches_not_named_are_unknown_to_the_model() -> None:
    bundle, adata = a_bundle({"donor": 3}), some_cells()
    model = to_scvi(bundle, adata)
    expected = our_expression(bundle.network, adata, torch.full((40, 1), -1))
    np.testing.assert_allclose(their_expression(model), expected, rtol=2e-5, atol=1e-7)


def test_categories_keep_their_names_and_their_order() -> None:
    bundle, adata = a_bundle({"donor": 3}), some_cells()
    order = ["zoe", "ann", "max"]
    adata.obs["who"] = pd.Categorical.from_codes(adata.obs["donor_code"], categories=order)
    named, coded = (to_scvi(bundle, adata, {"donor": column}) for column in ("who", "donor_code"))
    np.testing.assert_array_equal(their_expression(named), their_expression(coded))
    assert from_scvi(named).categories == {"carvae_donor": ("zoe", "ann", "max")}
    assert named.get_normalized_expression(transform_batch="zoe").shape == adata.shape


def test_categories_without_a_cell_keep_their_place() -> None:
    bundle, adata = a_bundle({"donor": 3, "assay": 2}), some_cells()
    last = adata[(adata.obs["donor_code"] == 2) & (adata.obs["assay_code"] == 1)].copy()
    assert last.n_obs >= 3
    model = to_scvi(bundle, last, {"donor": "donor_code", "assay": "assay_code"})
    assert model.module.n_batch == 3
    expected = our_expression(bundle.network, last, codes_of(last, "donor_code", "assay_code"))
    np.testing.assert_allclose(their_expression(model), expected, rtol=2e-5, atol=1e-7)


def test_genes_are_matched_by_name() -> None:
    bundle, adata = a_bundle({}), some_cells()
    shuffled = adata[:, ::-1].copy()
    shuffled.var_names = ["CD62L" if name == "SELL" else name for name in shuffled.var_names]
    model = to_scvi(bundle, shuffled)
    assert tuple(model.adata.var_names) == GENES
    np.testing.assert_allclose(
        model.get_latent_representation(), bundle.get_latent_representation(adata), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(GeneError):
        to_scvi(bundle, adata[:, :3].copy())


def test_conversion_draws_on_nobodys_random_numbers_and_always_gives_the_same() -> None:
    bundle, adata = a_bundle({"donor": 3}), some_cells()
    state = torch.get_rng_state()
    first, second = (to_scvi(bundle, adata).module.state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("covariates", "message"),
    [
        ({"lab": "donor_code"}, "no covariate 'lab'; it has donor"),
        ({"donor": "nowhere"}, r"obs\['nowhere'\] is missing; the columns are donor_code, "),
        ({"donor": "group"}, r"obs\['group'\] has 2 categories and the model 3; give integer codes"),
        ({"donor": "name"}, r"obs\['name'\] is of type (object|str); give integer codes"),
        ({"donor": "high"}, r"obs\['high'\] holds codes from 0 to 3; the model's go from 0 to 2"),
        ({"donor": "low"}, r"obs\['low'\] holds codes from -2 to 0"),
        ({"donor": "share"}, r"obs\['share'\] is of type float64"),
    ],
)
def test_columns_that_do_not_fit_are_refused(covariates: dict[str, str], message: str) -> None:
    adata = some_cells()
    adata.obs["name"] = np.array(["x"] * 40, dtype=object)
    adata.obs["high"] = np.arange(40) % 4
    adata.obs["low"] = -(np.arange(40) % 3)
    adata.obs["share"] = 0.5
    with pytest.raises(BundleError, match=message):
        to_scvi(a_bundle({"donor": 3}), adata, covariates)


def test_all_wrong_columns_are_named_at_once() -> None:
    with pytest.raises(BundleError, match="2 problems") as refusal:
        to_scvi(a_bundle({"donor": 3, "assay": 2}), some_cells(), {"donor": "nowhere", "assay": "donor_code"})
    assert "nowhere" in str(refusal.value)
    assert "from 0 to 1" in str(refusal.value)


def an_scvi(setup: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An SCVI model with random weights in the architecture that fits, but for ``settings``."""
    adata = some_cells()
    adata.obs["type"] = adata.obs["group"]
    adata.obs["age"] = 1.0
    adata.obs["size"] = 100.0
    scvi.model.SCVI.setup_anndata(adata, **({"batch_key": "donor_code"} if setup is None else setup))
    torch.manual_seed(4)
    model = scvi.model.SCVI(adata, **(FITTING | settings))
    model.module.eval()
    model.is_trained_ = True
    return model


@pytest.mark.parametrize(
    "setup", [{}, {"batch_key": "donor_code", "categorical_covariate_keys": ["assay_code", "site_code"]}]
)
@pytest.mark.parametrize("settings", [{}, {"n_layers": 3, "gene_likelihood": "zinb", "dropout_rate": 0.3}])
def test_an_scvi_model_becomes_a_network(setup: dict[str, Any], settings: dict[str, Any]) -> None:
    model = an_scvi(setup, **settings)
    converted = from_scvi(model)
    assert converted.genes == GENES
    assert converted.config.dropout_rate == settings.get("dropout_rate", 0.1)
    wanted = {"donor_code": ("0", "1", "2"), "assay_code": ("0", "1"), "site_code": ("0",)} if setup else {}
    assert converted.categories == wanted
    latent = converted.network.predict(sp.csr_matrix(model.adata.X)).latent_NK
    np.testing.assert_allclose(latent, model.get_latent_representation(), rtol=1e-5, atol=1e-5)
    covariate_NC = codes_of(model.adata, *converted.categories)
    np.testing.assert_allclose(
        their_expression(model), our_expression(converted.network, model.adata, covariate_NC), rtol=2e-5, atol=1e-7
    )
    with torch.no_grad():
        model.module.px_r.zero_()
    assert converted.network.vae.log_theta_G.count_nonzero()  # a copy


@pytest.mark.parametrize(
    ("settings", "setup", "named"),
    [
        ({"use_batch_norm": "both"}, None, ["the encoder has BatchNorm", "the decoder has BatchNorm", "2 problems"]),
        ({"use_batch_norm": "decoder"}, None, ["the decoder has BatchNorm"]),
        ({"use_layer_norm": "none"}, None, ["the encoder lacks LayerNorm", "the decoder lacks LayerNorm"]),
        ({"deeply_inject_covariates": True, "n_layers": 2}, None, ["every layer of the decoder"]),
        ({"encode_covariates": True}, None, ["the encoder sees the covariates"]),
        ({"use_observed_lib_size": False}, None, ["the library size is inferred (use_observed_lib_size)"]),
        ({"dispersion": "gene-batch"}, None, ["dispersion is 'gene-batch', not 'gene'"]),
        ({"gene_likelihood": "poisson"}, None, ["gene_likelihood is 'poisson', not 'nb' or 'zinb'"]),
        ({"latent_distribution": "ln"}, None, ["latent_distribution is 'ln'"]),
        ({"log_variational": False}, None, ["log_variational is False"]),
        ({"batch_representation": "embedding"}, None, ["batch_representation is 'embedding'"]),
        ({"var_activation": nn.Softplus()}, None, ["var_activation is not exp"]),
        ({"n_latent": 1}, None, ["n_latent is 1, the least is 2"]),
        ({"extra_encoder_kwargs": {"activation_fn": nn.GELU}}, None, ["the encoder has another activation than ReLU"]),
        ({"extra_decoder_kwargs": {"bias": False}}, None, ["its layers are of another shape"]),
        ({}, {"size_factor_key": "size"}, ["the library size is a column of its own (size_factor_key)"]),
        ({}, {"continuous_covariate_keys": ["age"]}, ["continuous covariates (age)"]),
        ({}, {"batch_key": "type"}, ["covariate 'type' bears a name that torch cannot take"]),
    ],
)
def test_another_architecture_is_refused_by_name(
    settings: dict[str, Any], setup: dict[str, Any] | None, named: list[str]
) -> None:
    model = an_scvi(setup, **settings)
    with pytest.raises(BundleError, match="this SCVI model does not fit carvae; train one with") as refusal:
        from_scvi(model)
    for words in named:
        assert words in str(refusal.value)


def test_deep_injection_without_a_second_layer_changes_nothing() -> None:
    assert from_scvi(an_scvi(deeply_inject_covariates=True)).categories == {"donor_code": ("0", "1", "2")}


def test_another_kind_of_model_is_refused() -> None:
    adata = some_cells()
    scvi.model.LinearSCVI.setup_anndata(adata)
    with pytest.raises(BundleError, match=r"a LinearSCVI model was given; only scvi\.model\.SCVI"):
        from_scvi(scvi.model.LinearSCVI(adata, n_latent=3))


def test_importing_the_bridge_does_not_import_scvi() -> None:
    module = ast.parse(Path(scvi_bridge.__file__).read_text(encoding="utf-8"))
    at_once = [
        name
        for node in module.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ast.unparse(node).split()
    ]
    assert "numpy" in at_once
    assert not [name for name in at_once if name.startswith("scvi")]
