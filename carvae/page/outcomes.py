"""Section 8: the outcome of each patient with its interval, or why none is said."""

from __future__ import annotations

import numpy as np
import pandas as pd

from carvae.page.blocks import Absent, Block, Grid, Section, Text
from carvae.page.facts import Facts, several


def section(facts: Facts) -> Section:
    """What `carvae respond` says, only where the model has learned outcomes."""
    title = "Outcomes of patients"
    if facts.outcomes is None:
        return Section("response", title, (Absent(facts.no_outcomes),))
    responder = None if facts.bundle is None else facts.bundle.responder
    assert responder is not None
    inner = ", ".join(f"{name} {value:.2f}" for name, value in responder.inner.items())
    blocks: list[Block] = [
        Text(
            f"For research only. Predicted by {responder.method}, learned from "
            f"{several(responder.n_patients, 'patient')} "
            f"of {several(responder.n_studies, 'study', 'studies')}. Concordance in the folds by which it was "
            "chosen, and "
            f"so too good: {inner}. carvae evaluate with the design response gives an honest figure."
        ),
        Grid("Patients", _rounded(facts.outcomes), "The interval is of refits on drawn training patients, at 95%."),
    ]
    if len(facts.outcomes) == 1:
        blocks.append(Text("One patient: whether the prediction is right cannot be told from one."))
    return Section("response", title, tuple(blocks))


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    shown = table.set_index("patient").copy()
    for name in shown:
        if pd.api.types.is_float_dtype(shown[name]):
            shown[name] = [f"{v:.3f}" if np.isfinite(v) else "–" for v in shown[name]]
    return shown
