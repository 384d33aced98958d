"""Weights & Biases: what of a run is shown, under names by which its page puts panels into sections.

W&B makes a section of all that stands before the first slash of a name, and a panel of each name: so a run has the same
layout on every account, with nothing to load. Of studies, patients and samples no name goes there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from carvae.config import Config
from carvae.model.metrics import AxisScores

SECTIONS = {"loss": "min", "states": "max", "recall": "max", "studies": "min", "terms": "min"}
"""Section -> which of its values is the run's: the least or the greatest."""
RULES: tuple[tuple[str, str], ...] = (
    (r"train_loss", "loss/training"),
    (r"val_loss", "loss/held_out"),
    (r"val_elbo/study_(\d+)", r"studies/held_out_loss_of_study_\1"),
    (r"val_(.+)_recall/(.+)", r"recall/\1: \2"),
    (r"val_(.+)_(macro_f1|ece)", r"states/\1_\2"),
    (r"val_(.+)", r"terms/held_out_\1"),
    (r"(reconstruction|kl|gap|label_.+)", r"terms/training_\1"),
)
"""Name in the table of a run -> name of its panel; the first rule that fits."""
STUDY = re.compile(r"val_elbo/study_(\d+)")


def panel_of(name: str) -> str:
    """Section and panel of a metric; what no rule knows keeps its name."""
    for pattern, panel in RULES:
        if found := re.fullmatch(pattern, name):
            return found.expand(panel)
    return name


class Dashboard(WandbLogger):
    """A W&B run with the settings, but without study paths, patient names or what the machine is called.

    Parameters
    ----------
    folder
        Of the stage of training, after which the run is called; its table of metrics is in ``log/metrics.csv``.
    config
        All settings.
    mode
        ``online`` or ``offline``.
    """

    def __init__(self, folder: Path, config: Config, mode: str) -> None:
        self.table = folder / "log" / "metrics.csv"
        run = wandb.init(
            project="carvae",
            name=folder.name,
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=config.model_dump(mode="json", include={"seed", "labels", "model", "train"}),
            settings=wandb.Settings(
                x_disable_meta=True, disable_git=True, disable_code=True, console="off", silent=True
            ),
        )
        for section, best in SECTIONS.items():
            run.define_metric(f"{section}/*", step_metric="epoch", summary=best)
        super().__init__(experiment=run)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under the names of panels."""
        super().log_metrics({panel_of(name): value for name, value in metrics.items()}, step)

    def show_map(self, picture: Path, epoch: int) -> None:
        """Add a map of cells; W&B shows all of them with a slider."""
        self.experiment.log({"maps/cells": wandb.Image(str(picture)), "epoch": epoch})

    def end(self, scores: Mapping[str, AxisScores]) -> None:
        """Add the confusion matrices of the last held-out pass and the losses of studies in one picture, and close."""
        for axis, score in scores.items():
            self.experiment.log({f"confusion/{axis}": _confusion(axis, score)})
        with self.table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if (chart := _studies(rows)) is not None:
            self.experiment.log({"studies/all": chart})
        self.experiment.finish()


def _confusion(axis: str, score: AxisScores) -> Any:
    """W&B's own picture of a confusion matrix."""
    cells: list[Any] = [
        [true, called, int(n)]
        for true, *row in score.confusion_rows()
        for called, n in zip(score.leaves, row, strict=True)
    ]
    fields = {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"}
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=list(fields), data=cells),
        fields,
        {"title": f"Held-out cells, {axis}: author's label and the model's"},
    )


def _studies(rows: Sequence[Mapping[str, str]]) -> Any | None:
    """Held-out loss of every study over the epochs; None where no study was told apart."""
    known = {name: found[1] for name in (rows[0] if rows else {}) if (found := STUDY.fullmatch(name))}
    if not known:
        return None
    told = [row for row in rows if all(row[name] for name in known)]
    epochs = [int(row["epoch"]) for row in told]
    return wandb.plot.line_series(
        xs=epochs,
        ys=[[float(row[name]) for row in told] for name in known],
        keys=[f"study {number}" for number in known.values()],
        title="Held-out loss (nats per cell) of each study, in the order of the config",
        xname="epoch",
    )
