"""A model on the machine's device, with as many threads as the settings say."""

from __future__ import annotations

from pathlib import Path

import numba
import torch

from carvae.config import PredictConfig
from carvae.errors import ConfigError
from carvae.model.bundle import Bundle, load


def load_on(model: Path | str, config: PredictConfig) -> Bundle:
    """Return the bundle in a folder, on the device and with the threads of the settings.

    Raises
    ------
    ConfigError
        There is no such device.
    BundleError
        The folder is no bundle that can be read; see `carvae.model.bundle.load`.
    """
    kind, _, number = config.device.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise ConfigError(
            f"predict.device is {config.device}, but torch finds {found} CUDA devices here; "
            "set predict.device=auto, or see `carvae doctor`"
        )
    if config.threads:
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        numba.set_num_threads(min(config.threads, most))
        torch.set_num_threads(config.threads)  # after numba, which sets torch's threads too
    return load(model, config.device)
