"""The model that the robustness suite asks, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anndata import AnnData
from trained import Answer, carvae, sha256

KEPT = Path(__file__).resolve().parents[1] / "bundles" / "0.1.0-layout4"
Says = Callable[[object], None]


@dataclass(frozen=True, slots=True)
class Small:
    """A model, a query of a study that it never saw, and the state that each of its cells was simulated in."""

    model: Path
    query: AnnData
    query_path: Path

    def annotate(self, query: Path, out: Path, *more: object, model: Path | None = None) -> Answer:
        """Annotate; whatever comes of it, neither query nor model are changed."""
        model = model or self.model
        before = sha256(query), sha256(model)
        answer = carvae("annotate", query, "--model", model, "--out", out, *more)
        assert (sha256(query), sha256(model)) == before
        return answer
