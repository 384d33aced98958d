"""Own UCell scores against pyucell's, number for number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from pyucell import compute_scores_from_ranks, get_rankings

from carvae.labels.ucell import TABLE, ucell


def by_pyucell(counts: sp.csr_matrix, up: list[list[int]], down: list[list[int]], max_rank: int) -> np.ndarray:
    genes = [f"g{i}" for i in range(counts.shape[1])]
    shell = AnnData(
        obs=pd.DataFrame(index=[str(i) for i in range(counts.shape[0])]), var=pd.DataFrame(index=pd.Index(genes))
    )
    lists = {
        f"s{c}": [f"{genes[g]}+" for g in high] + [f"{genes[g]}-" for g in low]
        for c, (high, low) in enumerate(zip(up, down, strict=True))
    }
    ranks = get_rankings(counts, max_rank=max_rank)
    compute_scores_from_ranks(shell, ranks, lists, max_rank=max_rank, missing_genes="skip", suffix="")
    return shell.obs[list(lists)].to_numpy(np.float32)


@settings(max_examples=60)
@given(st.data())
def test_scores_are_pyucells_to_the_last_bit(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    n_cells, n_genes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 80))
    largest = data.draw(st.sampled_from([1, 3, 40, TABLE - 1, TABLE, 3 * TABLE]), label="largest count")
    dense = rng.integers(0, largest + 1, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.4)
    counts = sp.csr_matrix(dense.astype(data.draw(st.sampled_from([np.int32, np.float32]))))
    draw_genes = st.lists(st.integers(0, n_genes - 1), unique=True, max_size=n_genes)
    lists = data.draw(st.lists(st.tuples(draw_genes, draw_genes), min_size=1, max_size=4), label="signatures")
    up, down = [high for high, _ in lists], [low for _, low in lists]
    max_rank = data.draw(st.integers(1, n_genes), label="max_rank")
    np.testing.assert_array_equal(
        ucell(counts, np.arange(n_genes), up, down, max_rank), by_pyucell(counts, up, down, max_rank)
    )


def test_ranks_of_a_whole_transcriptome_are_capped_as_pyucells() -> None:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.3, 2.0, (40, 6000))).astype(np.int32))
    counts.data[rng.integers(0, counts.nnz, 5)] = 2 * TABLE
    up = [list(rng.choice(6000, n, replace=False)) for n in (1, 10, 300)]
    down = [[], list(rng.choice(6000, 5, replace=False)), []]
    scores = ucell(counts, np.arange(6000), up, down, 1500)
    np.testing.assert_array_equal(scores, by_pyucell(counts, up, down, 1500))
    assert scores.std(axis=0).min() > 0
