"""Which method is used: the head only where it does better than every baseline in the inner folds."""

from __future__ import annotations

from collections.abc import Mapping

from carvae.response.methods import Choice

CHOSEN, HEAD, ATTENTION_PCA = "carvae", "head", "attention_pca"
UNDELIVERED = frozenset({"majority", ATTENTION_PCA})
"""Never used themselves: the trivial answer, and the same pooling of other coordinates, which is there to compare."""


def chosen(found: Mapping[str, Choice]) -> Choice:
    """The head where it beats the best baseline in the inner folds, else that baseline."""
    usable = [choice for name, choice in found.items() if name not in UNDELIVERED | {HEAD}]
    head = found.get(HEAD)
    if not usable:
        return head or found["majority"]
    best = max(usable, key=lambda choice: choice.inner)
    return head if head is not None and head.inner > best.inner else best
