"""carvae: one latent space and one set of cell states over many CAR-T single-cell studies.

The verbs of the command line are functions here: :func:`ingest`, :func:`train`, :func:`load`, :func:`embed`,
:func:`annotate` and :func:`map_query`, with :class:`Config` for their settings. Each is imported on first use, so that
``import carvae`` is instant and loads no torch.

``carvae.train`` and ``carvae.ingest`` are always the functions, although modules of the same names exist;
from those modules import what you need: ``from carvae.train import fit``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from carvae.errors import CarvaeError

if TYPE_CHECKING:
    from carvae.config import Config
    from carvae.ingest import run as ingest
    from carvae.map import map_query
    from carvae.model.bundle import load
    from carvae.predict import annotate, embed
    from carvae.train import run as train

__version__ = "0.1.0"
__all__ = ["CarvaeError", "Config", "__version__", "annotate", "embed", "ingest", "load", "map_query", "train"]

_ON_FIRST_USE = {
    "Config": ("carvae.config", "Config"),
    "annotate": ("carvae.predict", "annotate"),
    "embed": ("carvae.predict", "embed"),
    "ingest": ("carvae.ingest", "run"),
    "load": ("carvae.model.bundle", "load"),
    "map_query": ("carvae.map", "map_query"),
    "train": ("carvae.train", "run"),
}


class _Package(ModuleType):
    """The package itself, whose verbs are not replaced by submodules of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # Importing carvae.train would set the attribute `train` to the module and so hide the function.
        if not (name in _ON_FIRST_USE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ON_FIRST_USE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
