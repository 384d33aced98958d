"""A small sample to try the page with, drawn from the model itself: no patient's, and with the model's own genes.

Axes: N cells, K latent, H hidden, G genes, L label sets.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from carvae.data.atomic import replacing_file
from carvae.data.hdf5 import write_anndata
from carvae.model.bundle import Bundle

PATIENTS, DAYS = ("P1", "P2"), (0, 28)
CELLS = 300
"""Cells per sample."""
MEDIAN_COUNTS = 3000.0
SPREAD = 0.35
"""Standard deviation of the log of counts per cell."""
SHIFT = 0.4
"""How far the mean of a sample lies from that of the prior, in standard deviations of the prior."""


def write_sample(bundle: Bundle, path: Path, seed: int = 0) -> None:
    """Draw two patients at two time points and write them as .h5ad; the same seed gives the same cells."""
    bundle.refuse_without_decoder("drawing a sample")
    rng = np.random.default_rng(seed)
    samples = [(patient, day) for patient in PATIENTS for day in DAYS]
    counts = sp.vstack([_draw(bundle, rng) for _ in samples], format="csr")
    letters = rng.choice(list("ACGT"), size=(counts.shape[0], 16))
    obs = pd.DataFrame(
        {
            "sample": pd.Categorical([f"demo_{p}_day{d}" for p, d in samples for _ in range(CELLS)]),
            "patient": pd.Categorical([f"demo_{p}" for p, _ in samples for _ in range(CELLS)]),
            "timepoint_days": np.repeat([day for _, day in samples], CELLS),
        },
        index=pd.Index([f"{''.join(row)}-{n // CELLS + 1}" for n, row in enumerate(letters)], dtype=object),
    )
    var = pd.DataFrame(index=pd.Index(bundle.genes, dtype=object))
    sample = ad.AnnData(X=counts, obs=obs, var=var, uns={"title": "simulated by the model; no patient's cells"})
    with replacing_file(path) as scratch:
        write_anndata(sample, scratch)


@torch.inference_mode()
def _draw(bundle: Bundle, rng: np.random.Generator) -> sp.csr_matrix:
    """Cells of one sample: latent places, decoded without a batch, and negative binomial counts [N, G]."""
    vae = bundle.network.vae
    z_NK, device = _places(bundle, rng).astype(np.float32), vae.device
    no_batch = torch.full((CELLS, len(vae.decoder.tables)), -1, device=device)
    hidden_NH = vae.decoder.hidden(torch.from_numpy(z_NK).to(device), no_batch)
    share_NG = vae.decoder.scale(hidden_NH).softmax(1).double().cpu().numpy()
    theta_G = vae.log_theta_G.exp().double().cpu().numpy()
    mean_NG = share_NG * (MEDIAN_COUNTS * rng.lognormal(0, SPREAD, CELLS))[:, None]
    counts_NG = rng.poisson(rng.gamma(theta_G, mean_NG / theta_G))
    if vae.decoder.zero is not None:
        counts_NG[rng.random(counts_NG.shape) < vae.decoder.zero(hidden_NH).sigmoid().cpu().numpy()] = 0
    return sp.csr_matrix(counts_NG.astype(np.int32))


def _places(bundle: Bundle, rng: np.random.Generator) -> NDArray[np.float64]:
    """Latent places of one sample's cells, [N, K].

    Of a model that knows where its labels lie, in the encoder's last hidden layer, about those in shares that differ
    between samples; of any other, about the prior.
    """
    if bundle.trust is None:
        n_latent = bundle.config.n_latent
        return rng.normal(rng.normal(0, SHIFT, n_latent), 1.0, (CELLS, n_latent))
    reference = bundle.trust.reference
    n_labels, n_hidden = reference.mean_LH.shape
    label_N = rng.choice(n_labels, size=CELLS, p=rng.dirichlet(np.full(n_labels, 2.0)))
    scatter_HH = np.linalg.pinv(reference.within_HH.astype(np.float64), hermitian=True)
    values, vectors = np.linalg.eigh(scatter_HH)
    noise_NH = rng.normal(size=(CELLS, n_hidden)) * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    hidden_NH = torch.from_numpy((reference.mean_LH[label_N] + noise_NH).astype(np.float32))
    mean = bundle.network.vae.encoder.mean
    return np.asarray(mean(hidden_NH.to(mean.weight.device)).double().cpu().numpy())
