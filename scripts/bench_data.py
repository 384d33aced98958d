"""Data of the benchmarks: real CARPALL counts, or simulated ones of the same shape, and the door to carvae."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from carvae.config import Config
from carvae.data.genes import GeneTable
from carvae.data.store import CellStore
from carvae.ingest import run as ingest
from carvae.model.cohort import Cohort

CARPALL = Path("../shared/data/carpall_cart.h5ad")


def carpall(path: Path) -> ad.AnnData:
    """CARPALL's cells over the genes that have one HGNC symbol; ``obs`` holds sample and patient."""
    adata = ad.read_h5ad(path)
    resolved = GeneTable.default().resolve(list(adata.var_names), list(adata.var["gene_ids"]))
    adata.var_names = resolved.symbols.astype(str)
    return adata[:, ~adata.var_names.duplicated(keep=False)].copy()


def most_variable(adata: ad.AnnData, n_genes: int) -> ad.AnnData:
    """The cells over their most variable genes (``adata`` loses genes in fewer than three cells)."""
    sc.pp.filter_genes(adata, min_cells=3)  # as ingest does
    sc.pp.highly_variable_genes(adata, n_top_genes=n_genes, flavor="seurat_v3")
    return adata[:, adata.var["highly_variable"]].copy()


def simulated(n_cells: int, n_genes: int, seed: int = 0) -> ad.AnnData:
    """NB counts around eight programmes in four samples, about 8% of them not zero."""
    rng = np.random.default_rng(seed)
    programmes = rng.normal(size=(8, n_genes)) * 0.7
    base_G = rng.normal(-1.3, 1.6, n_genes)
    blocks = [sp.csr_matrix((0, n_genes), dtype=np.float32)]
    for start in range(0, n_cells, 4096):
        n = min(4096, n_cells - start)
        share = np.exp(base_G + rng.normal(size=(n, 8)) @ programmes * 0.5)
        depth = rng.lognormal(np.log(700), 0.4, n)[:, None]
        mean = share / share.sum(1, keepdims=True) * depth
        blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)))
    sample = pd.Categorical(rng.integers(0, 4, n_cells).astype(str))
    obs = pd.DataFrame({"sample": sample, "patient": sample}, index=[f"cell{i}" for i in range(n_cells)])
    genes = sorted(GeneTable.default().symbols)[:n_genes]  # names that ingest knows
    return ad.AnnData(sp.vstack(blocks, format="csr"), obs, pd.DataFrame(index=genes))


def cohort_of(adata: ad.AnnData, config: Config, folder: Path) -> Cohort:
    """The cells as carvae takes them: through a file, ingest and a store, all genes kept."""
    file = folder / "cells.h5ad"
    adata.write_h5ad(file)
    study = {"path": file, "obs": {"sample": "sample", "patient": "patient"}}
    section = {"studies": {"study": study}, "n_top_genes": adata.n_vars, "exclude_genes": []}
    config = Config.parse(config.model_dump() | {"ingest": section, "output": folder / "bundle"})
    return Cohort.assemble(CellStore(ingest(config)), config)
