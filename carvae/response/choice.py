"""Which method is used: the head only where it does better than every baseline in the inner folds."""

from __future__ import annotations

from collections.abc import Mapping

from carvae.response.methods import Choice

CHOSEN, HEAD = "carvae", "head"
NOT_CHOSEN = frozenset({"majority", "attention_pca"})
"""Never delivered: the trivial answer, and the other way to pool, which is here to be compared."""


def chosen(found: Mapping[str, Choice]) -> Choice:
    """The head where it beats the best baseline in the inner folds, else that baseline."""
    others = [choice for name, choice in found.items() if name not in NOT_CHOSEN | {HEAD}]
    if not others:
        return found.get(HEAD, found["majority"])
    best = max(others, key=lambda choice: choice.inner)
    head = found.get(HEAD)
    return head if head is not None and head.inner > best.inner else best
