"""`CellVAE` against ``scvi.module.VAE`` with equal weights and equal noise, and what makes it differ from peers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from carvae.config import ModelConfig
from carvae.data.sparse import CountsCSR, GeneSums
from carvae.model.scvi_bridge import carvae_state, scvi_state
from carvae.model.vae import CellVAE, Posterior

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing scvi-tools warns of what it imports itself
    from scvi.module import VAE

N_GENES = 40
COVARIATES = {"sample": 4, "assay": 3, "site": 2}
SMALL = ModelConfig(n_latent=5, n_hidden=16, n_layers=1, dropout_rate=0.0)


def some_counts(n: int, seed: int = 0, largest: int = 65_535) -> CountsCSR:
    """Cells of very different depth, the first of them with one large count."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.3, 3.0, (n, N_GENES)) * np.geomspace(0.2, 20, n)[:, None]
    x = rng.poisson(rate).astype(np.float32)
    x[x.sum(1) == 0, 0] = 1
    x[0, 3] = largest
    return CountsCSR.from_scipy(sp.csr_matrix(x))


def a_vae(config: ModelConfig = SMALL, n_categories: dict[str, int] | None = None, seed: int = 0) -> CellVAE:
    """A model whose every parameter is random, biases and dispersion too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = CellVAE(N_GENES, COVARIATES if n_categories is None else n_categories, config)
        for parameter in vae.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 0.8)
    return vae.eval()


def codes(n: int, n_categories: dict[str, int], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(0, c, n) for c in n_categories.values()] or [np.zeros(n)], 1)).long()


@dataclass(frozen=True)
class Precision:
    """Arithmetic of both models, what to compare them on and how closely."""

    ours: torch.dtype
    theirs: torch.dtype
    largest: int
    tolerance: float


DOUBLE = Precision(torch.float64, torch.float64, 65_535, 1e-9)
SINGLE = Precision(torch.float32, torch.float64, 65_535, 1e-5)
BOTH_SINGLE = Precision(torch.float32, torch.float32, 20, 1e-5)
"""Above some hundred counts, scvi-tools' own float32 is further than this from its float64."""


@dataclass
class Compared:
    """One minibatch through both models."""

    elbo: dict[str, tuple[Tensor, Tensor]]
    gradients: dict[str, tuple[Tensor, Tensor]]

    def worst(self) -> tuple[float, str]:
        """Greatest difference of any tensor, relative to its greatest value, and its name."""
        pairs = self.elbo | self.gradients
        errors = {
            name: (ours.double() - theirs).abs().max() / theirs.abs().max() for name, (ours, theirs) in pairs.items()
        }
        return max((float(error.detach()), name) for name, error in errors.items())


def scvi_module(vae: CellVAE, config: ModelConfig, n_categories: dict[str, int], dtype: torch.dtype) -> VAE:
    sizes = [*n_categories.values()]
    module = VAE(
        n_input=N_GENES,
        n_batch=sizes[0],
        n_cats_per_cov=sizes[1:],
        n_hidden=config.n_hidden,
        n_latent=config.n_latent,
        n_layers=config.n_layers,
        dropout_rate=config.dropout_rate,
        gene_likelihood=config.gene_likelihood,
        use_layer_norm="both",
        use_batch_norm="none",
        deeply_inject_covariates=False,
    ).to(dtype)
    result = module.load_state_dict(scvi_state(vae), strict=False)
    unused = ("l_encoder.", "decoder.px_r_decoder.", "decoder.px_dropout_decoder.")
    assert not result.unexpected_keys
    assert all(key.startswith(unused) for key in result.missing_keys), result.missing_keys
    return module


def compare(
    config: ModelConfig, n_categories: dict[str, int], precision: Precision, kl_weight: float = 0.7
) -> Compared:
    n = 32
    vae = a_vae(config, n_categories).to(precision.ours)
    counts, covariate_NC = some_counts(n, largest=precision.largest), codes(n, n_categories)
    counts = CountsCSR(counts.indptr_N, counts.gene_M, counts.count_M.to(precision.ours), N_GENES)
    noise_NK = torch.randn(n, config.n_latent, generator=torch.Generator().manual_seed(5))

    posterior = vae.encoder(counts)
    elbo = vae.elbo(counts, posterior, posterior.mean_NK + posterior.variance_NK.sqrt() * noise_NK, covariate_NC)
    elbo.loss(kl_weight).backward()

    module = scvi_module(vae, config, n_categories, precision.theirs)
    x = torch.from_numpy(counts.to_scipy().toarray()).to(precision.theirs)
    inferred = module.inference(x, covariate_NC[:, :1])
    inferred["z"] = inferred["qz"].loc + inferred["qz"].scale * noise_NK
    rest = covariate_NC[:, 1:] if len(n_categories) > 1 else None
    generated = module.generative(inferred["z"], inferred["library"], covariate_NC[:, :1], cat_covs=rest)
    theirs = module.loss({"X": x}, inferred, generated, kl_weight=kl_weight)
    theirs.loss.backward()

    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    expected = carvae_state(named, n_categories, config)
    own = {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}
    assert own.keys() == expected.keys() == dict(vae.named_parameters()).keys()
    return Compared(
        {
            "loss": (elbo.loss(kl_weight), theirs.loss),
            "reconstruction": (elbo.reconstruction_N, theirs.reconstruction_loss["reconstruction_loss"]),
            "kl": (elbo.kl_N, theirs.kl_local["kl_divergence_z"]),
            "mean": (posterior.mean_NK, inferred["qz"].loc),
            "variance": (posterior.variance_NK, inferred["qz"].variance),
        },
        {name: (own[name], expected[name]) for name in own},
    )


@pytest.mark.parametrize("n_covariates", [1, 2, 3])
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("precision", [DOUBLE, SINGLE, BOTH_SINGLE], ids=["double", "single", "both_single"])
def test_elbo_and_every_gradient_equal_scvi(
    gene_likelihood: str, n_layers: int, n_covariates: int, precision: Precision
) -> None:
    config = SMALL.model_copy(update={"gene_likelihood": gene_likelihood, "n_layers": n_layers})
    n_categories = dict(list(COVARIATES.items())[:n_covariates])
    worst, name = compare(config, n_categories, precision).worst()
    assert worst < precision.tolerance, name


def test_a_covariate_with_one_category_equals_scvi_which_has_no_column_for_it() -> None:
    vae, counts = a_vae(n_categories={"sample": 1, "assay": 3, "site": 1}), some_counts(8)
    covariate_NC = codes(8, {"sample": 1, "assay": 3, "site": 1})
    module = scvi_module(vae, SMALL, {"sample": 1, "assay": 3, "site": 1}, torch.float64)
    assert module.decoder.px_decoder.fc_layers[0][0].weight.shape[1] == SMALL.n_latent + 3
    posterior = vae.encoder(counts)
    z_NK, library_N1 = posterior.mean_NK.double(), counts.library_N().double().log()[:, None]
    px = module.generative(z_NK, library_N1, covariate_NC[:, :1], cat_covs=covariate_NC[:, 1:])["px"]
    ours = vae.elbo(counts, posterior, posterior.mean_NK, covariate_NC).reconstruction_N
    theirs = -px.log_prob(torch.from_numpy(counts.to_scipy().toarray())).sum(1)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


def test_an_unknown_category_has_the_mean_of_the_table() -> None:
    vae = a_vae(n_categories={"sample": 3, "assay": 2})
    z_NK = torch.randn(4, SMALL.n_latent)
    covariate_NC = torch.tensor([[0, 1], [-1, 1], [2, -1], [-1, -1]])
    found = vae.decoder.hidden(z_NK, covariate_NC)
    sample, assay = (table.get_parameter("weight") for table in vae.decoder.tables.values())
    added = torch.stack(
        [sample[0] + assay[1], sample.mean(0) + assay[1], sample[2] + assay.mean(0), sample.mean(0) + assay.mean(0)]
    )
    hidden = vae.decoder.first(z_NK) + added
    expected = nn.functional.layer_norm(hidden, (SMALL.n_hidden,)).relu()
    torch.testing.assert_close(found, expected)


def test_a_category_that_does_not_exist_is_no_cell() -> None:
    vae = a_vae(n_categories={"sample": 3})
    with pytest.raises(IndexError):
        vae.decoder.hidden(torch.randn(1, SMALL.n_latent), torch.tensor([[3]]))


def test_a_model_without_covariates_is_a_vae() -> None:
    vae, counts = a_vae(n_categories={}), some_counts(6)
    posterior = vae.encoder(counts)
    elbo = vae.elbo(counts, posterior, posterior.mean_NK, torch.zeros((6, 0), dtype=torch.int64))
    assert elbo.loss().isfinite()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_an_embedding_does_not_depend_on_the_cells_beside_it(training: bool, n_layers: int) -> None:
    vae = a_vae(SMALL.model_copy(update={"n_layers": n_layers})).train(training)
    counts = some_counts(12)
    whole = vae.encoder(counts)
    for rows in ([5], [11, 5], [5, 0, 0, 3, 5], [*range(12)][::-1]):
        part = vae.encoder(CountsCSR.from_scipy(counts.to_scipy()[rows]))
        torch.testing.assert_close(part.mean_NK, whole.mean_NK[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part.variance_NK, whole.variance_NK[rows], rtol=1e-5, atol=1e-6)


def test_the_encoder_never_sees_the_covariates() -> None:
    alike = [a_vae(n_categories=n) for n in ({}, {"sample": 9})]
    alike[1].encoder.load_state_dict(alike[0].encoder.state_dict())
    posteriors = [vae.encoder(some_counts(5)) for vae in alike]
    assert torch.equal(posteriors[0].mean_NK, posteriors[1].mean_NK)


def test_new_rows_leave_the_embedding_and_the_old_batches_as_they_were() -> None:
    """A new batch adds a row to its covariate's table; in scvi-tools the other covariates' columns move."""
    old, new = a_vae(n_categories={"sample": 3, "assay": 2}), a_vae(n_categories={"sample": 5, "assay": 2}, seed=1)
    state = old.state_dict()
    sample = "decoder.tables.sample.weight"
    state[sample] = torch.cat([state[sample], torch.randn(2, SMALL.n_hidden)])
    new.load_state_dict(state)
    counts, covariate_NC = some_counts(6), codes(6, {"sample": 3, "assay": 2})
    results = []
    for vae in (old, new):
        posterior = vae.encoder(counts)
        results.append(
            (posterior.mean_NK, vae.elbo(counts, posterior, posterior.mean_NK, covariate_NC).reconstruction_N)
        )
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_unmeasured_genes_equal_a_model_of_the_measured_genes() -> None:
    vae, counts = a_vae(), some_counts(7)
    unmeasured_G = torch.rand(N_GENES, generator=torch.Generator().manual_seed(0)) < 0.4
    dense = counts.to_scipy().toarray()
    dense[:, unmeasured_G.numpy()] = 0
    dense[:, (~unmeasured_G).nonzero()[0]] += 1
    whole = CountsCSR.from_scipy(sp.csr_matrix(dense))
    part = CountsCSR.from_scipy(sp.csr_matrix(dense[:, ~unmeasured_G.numpy()]))
    kept = CellVAE(part.n_genes, COVARIATES, SMALL).eval()
    state = vae.state_dict()
    for name in ("encoder.first.weight_GH", "decoder.scale.weight", "decoder.scale.bias", "log_theta_G"):
        state[name] = state[name][~unmeasured_G]
    kept.load_state_dict(state)
    covariate_NC = codes(7, COVARIATES)
    losses = []
    for model, cells, mask in ((vae, whole, unmeasured_G.expand(7, -1)), (kept, part, None)):
        posterior = model.encoder(cells)
        losses.append(model.elbo(cells, posterior, posterior.mean_NK, covariate_NC, mask).reconstruction_N)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)


def test_the_posterior_is_sampled_with_its_own_mean_and_variance() -> None:
    posterior = Posterior(torch.tensor([[1.0, -2.0]]).expand(40_000, 2), torch.tensor([[4.0, 0.25]]).expand(40_000, 2))
    z_NK = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(z_NK.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(z_NK.var(0), torch.tensor([4.0, 0.25]), rtol=0.03, atol=0)
    assert torch.equal(z_NK, posterior.sample(torch.Generator().manual_seed(0)))


def test_the_posterior_and_the_loss_are_float32_under_autocast() -> None:
    vae, counts = a_vae(), some_counts(6)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encoder(counts)
        elbo = vae.elbo(counts, posterior, posterior.mean_NK, codes(6, COVARIATES))
    assert posterior.mean_NK.dtype == posterior.variance_NK.dtype == torch.float32
    assert elbo.reconstruction_N.dtype == elbo.kl_N.dtype == torch.float32
    exact = vae.elbo(counts, vae.encoder(counts), posterior.mean_NK, codes(6, COVARIATES))
    assert torch.equal(elbo.kl_N, exact.kl_N)  # small products are float32 on a CPU
    assert not torch.equal(elbo.reconstruction_N, exact.reconstruction_N)
    torch.testing.assert_close(elbo.reconstruction_N, exact.reconstruction_N, rtol=0.02, atol=0.5)


def test_dropout_is_for_training_alone() -> None:
    vae, counts = a_vae(SMALL.model_copy(update={"dropout_rate": 0.5})), some_counts(6)
    assert torch.equal(vae.encoder(counts).mean_NK, vae.encoder(counts).mean_NK)
    vae.train()
    assert not torch.equal(vae.encoder(counts).mean_NK, vae.encoder(counts).mean_NK)


def test_the_start_is_the_mean_and_dispersion_of_the_data() -> None:
    vae, counts = a_vae(), some_counts(50)
    share_G, theta_G = GeneSums.of([counts], counts.n_genes).moments()
    vae.start_from_moments(share_G, theta_G)
    nn.init.zeros_(vae.decoder.scale.weight)
    logits_NG = vae.decoder.scale(vae.decoder.hidden(torch.randn(3, SMALL.n_latent), codes(3, COVARIATES)))
    torch.testing.assert_close(logits_NG.softmax(1), share_G.expand(3, -1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(vae.log_theta_G.detach(), theta_G.clamp(0.05, 50.0).log())
