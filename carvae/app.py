"""A web page on this machine: drop a file, see what it holds, have it labelled, look at the report, take it home."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carvae import __version__
from carvae.config import Config
from carvae.errors import BundleError, ConfigError
from carvae.web.limits import Limits

if TYPE_CHECKING:
    from carvae.model.bundle import Bundle

log = logging.getLogger(__name__)

NEEDED = ("starlette", "uvicorn")
PORT = 8765


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is to be had."""

    host: str = "127.0.0.1"
    port: int = PORT
    """0 takes any free one."""
    expose: bool = False
    """Whether another host than this machine itself may be given."""
    browse: bool = False
    """Whether a browser is to be opened."""


def run(models: Sequence[Path], address: Address, limits: Limits, config: Config) -> None:
    """Serve the page until it is stopped.

    Raises
    ------
    CarvaeError
        A model cannot be used, the address neither, or the extra ``web`` is not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"carvae app needs {' and '.join(missing)}, which is not installed: pip install 'carvae[web]'"
        )
    if config.predict.dask is not None:
        raise ConfigError("predict.dask is not for the page, which labels one query at a time; leave it out")
    from carvae.web.guard import Site
    from carvae.web.job import Jobs
    from carvae.web.routes import application
    from carvae.web.server import listen, names_of, private_folder, serve, server_of
    from carvae.web.workers import Workers

    named = _named(models)
    with private_folder() as folder, listen(address.host, address.port, expose=address.expose) as listening:
        about = {"version": __version__, "max_upload": limits.max_upload, "models": _about(named)}
        port = listening.getsockname()[1]
        site = Site(secrets.token_urlsafe(32), names_of(address.host, port), limits, f"carvae_{port}")
        workers = Workers(named, config.model_dump(mode="json", exclude_defaults=True), limits)
        _say(address, port, site.token)
        page = application(site, Jobs(folder, limits), workers, about)
        serve(server_of(page, limits), listening)


def _say(address: Address, port: int, token: str) -> None:
    """Print the page's address, the one thing that this command writes to its output."""
    host = address.host if address.host not in ("0.0.0.0", "::") else "127.0.0.1"
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}"
    print(where, flush=True)
    log.info("open this address in a browser; it is for you alone. Ctrl+C ends the page and removes all its files")
    if address.browse and sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.get("DISPLAY")):
        webbrowser.open(where)


def _named(models: Sequence[Path]) -> dict[str, Path]:
    """The models by the names of their folders."""
    named: dict[str, Path] = {}
    for model in (model.resolve() for model in models):
        if model.name in named and named[model.name] != model:
            raise ConfigError(f"two models are called {model.name!r}; rename the folder of one")
        named[model.name] = model
    return named


def _about(models: dict[str, Path]) -> list[dict[str, Any]]:
    """What the page says of each model; opening them shows now what would fail later."""
    from carvae.model.bundle import load

    bundles = {name: load(path, device="cpu") for name, path in models.items()}
    if unlabelled := [name for name, bundle in bundles.items() if bundle.tree is None]:
        raise BundleError(
            f"{', '.join(unlabelled)} was trained without labels, and the page labels cells; give another model"
        )
    return [_of(name, bundle) for name, bundle in bundles.items()]


def _of(name: str, bundle: Bundle) -> dict[str, Any]:
    assert bundle.tree is not None
    origin = bundle.provenance
    return {
        "name": name,
        "id": bundle.bundle_id,
        "cells": origin.n_cells,
        "patients": origin.n_patients,
        "studies": origin.n_studies,
        "genes": len(bundle.genes),
        "weak": origin.weak_labels,
        "judges": bundle.trust is not None,
        "states": [state for axis in bundle.axes[:1] for state in bundle.tree[axis].leaves],
    }
