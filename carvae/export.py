"""A model to give away: a checked copy, or with ``share`` one without the decoder."""

from __future__ import annotations

import logging
from pathlib import Path

from carvae.model.bundle import load
from carvae.model.bundle_files import check_outside, check_place
from carvae.model.hub import from_folder
from carvae.model.share import shareable

log = logging.getLogger(__name__)


def run(model: Path, out: Path, *, share: bool) -> Path:
    """Write a model to ``out``, every hash checked, and return its path; the model stays as it is.

    Parameters
    ----------
    share
        Without the decoder, and without all that is of single training samples (`carvae.model.share`).

    Raises
    ------
    BundleError
        The model is no bundle, ``out`` holds something else, or the model cannot be shared without its decoder.
    ConfigError
        ``out`` is the model itself, or lies in it.
    """
    check_place(out)
    check_outside(out, model)
    if not share:
        from_folder(model, out)
        log.info("wrote %s", out)
        return out
    shareable(load(model, "cpu")).save(out)
    log.info("wrote %s, without the decoder: it embeds and labels, and can no longer be mapped", out)
    return out
