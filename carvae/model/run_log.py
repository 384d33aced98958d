"""What a run that goes on keeps of its log, and how public the log may be."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

WANDB_MODES = ("online", "offline", "disabled")
"""From the most public to the least."""


def wandb_mode(setting: str, environment: str) -> str:
    """Return the less public of the setting and the environment's WANDB_MODE; a mode of another name says nothing."""
    wanted = {"dryrun": "offline"}.get(environment, environment)
    return max((setting, wanted if wanted in WANDB_MODES else setting), key=WANDB_MODES.index)


def rows_before(checkpoint: Path, table: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV log that were written before a checkpoint; none where either file is missing."""
    if not checkpoint.exists() or not table.exists():
        return []
    n_steps = int(torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"])
    with table.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and int(row["step"]) < n_steps]
