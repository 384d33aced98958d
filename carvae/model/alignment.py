"""A state at one place in the latent space, whatever the batch: a penalty on how far its batches lie apart.

The decoder is told the batch, so that z need not hold it; nothing forces z not to. Pulling whole batches together would
mix states wherever their shares differ. So each state's cells are compared with its own, a state being what the head
calls it, with which unlabelled batches are aligned too.

Axes: N cells, K latent, S leaves, B batches.
"""

from __future__ import annotations

from torch import Tensor

MIN_CELLS = 3.0
"""Expected cells of a state in a batch, below which their mean is too uncertain to be pulled."""
LEAST_VARIANCE = 1e-6


def state_gap(z_NK: Tensor, probability_NS: Tensor, batch_N: Tensor, n_batches: int) -> Tensor:
    """Mean squared distance of each batch's mean of a state from the mean of its batches, in units of z's variance.

    A cell counts for every state by its probability, which gets no gradient: cells are moved, not renamed. A state that
    a minibatch has in one batch alone adds nothing.

    Parameters
    ----------
    z_NK
        Posterior means.
    probability_NS
        Of the states, from the head.
    batch_N
        Category of each cell, -1 where unknown (such cells add nothing).
    n_batches
        Number of categories.

    Returns
    -------
    Scalar without unit; zero where no state is in two batches.
    """
    share_NS = probability_NS.detach() * (batch_N >= 0)[:, None]
    code_N = batch_N.clamp(min=0)
    cells_BS = share_NS.new_zeros(n_batches, share_NS.shape[1]).index_add(0, code_N, share_NS)
    weighted_NSK = share_NS[:, :, None] * z_NK[:, None, :]
    sum_BSK = z_NK.new_zeros(n_batches, *weighted_NSK.shape[1:]).index_add(0, code_N, weighted_NSK)
    enough_BS = (cells_BS >= MIN_CELLS).to(z_NK.dtype)
    mean_BSK = sum_BSK / cells_BS.clamp(min=MIN_CELLS)[:, :, None]
    n_S = enough_BS.sum(0)
    centre_SK = (mean_BSK * enough_BS[:, :, None]).sum(0) / n_S.clamp(min=1)[:, None]
    variance = z_NK.detach().var(0, correction=0).sum().clamp(min=LEAST_VARIANCE)
    gap_BS = (mean_BSK - centre_SK).square().sum(2) / variance
    weight_BS = cells_BS * enough_BS * (n_S > 1)
    return (gap_BS * weight_BS).sum() / weight_BS.sum().clamp(min=1)
