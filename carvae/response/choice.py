"""Which method is used: the head only where it does better than every baseline in the inner folds."""

from __future__ import annotations

from collections.abc import Mapping

from carvae.response.methods import Choice

CHOSEN, HEAD, ATTENTION_PCA = "carvae", "head", "attention_pca"
UNDELIVERED = frozenset({"majority", ATTENTION_PCA})
"""Never used themselves: the trivial answer, and the other way to pool, which is here to be compared."""


def chosen(found: Mapping[str, Choice]) -> Choice:
    """The head where it beats every baseline in the inner folds, else the best baseline."""
    others = [choice for name, choice in found.items() if name != HEAD]
    usable = [choice for choice in others if choice.method.name not in UNDELIVERED]
    head = found.get(HEAD)
    if head is not None and all(head.inner > choice.inner for choice in others):
        return head
    return max(usable, key=lambda choice: choice.inner) if usable else head or found["majority"]
