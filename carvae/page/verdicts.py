"""Section 1: can these samples be believed, one by one, and why."""

from __future__ import annotations

import pandas as pd

from carvae.model.verdict import IN_RANGE, OUT_OF_RANGE, WITH_CARE
from carvae.page.blocks import Absent, Block, Light, Lights, Section, Text
from carvae.page.facts import Facts, percent, several

LEVELS = {IN_RANGE: "good", WITH_CARE: "care", OUT_OF_RANGE: "out"}
NO_VERDICT = "no verdict"
WORST_FIRST = (OUT_OF_RANGE, WITH_CARE, IN_RANGE, NO_VERDICT)
MOST_LIGHTS = 60
COMMONEST = 3


def section(facts: Facts) -> Section:
    """The verdict on each sample, the worst first."""
    table = facts.cells.samples
    blocks: list[Block] = []
    if table is None:
        blocks.append(
            Absent(
                "No table of samples lies beside the file, so no sample has a verdict; annotate on the command line, "
                "or "
                "copy the .samples.csv along."
            )
        )
    elif "verdict" not in table:
        blocks.append(
            Absent(
                "The model was trained without patients held out to learn how far samples may differ, so no sample "
                "has a "
                "verdict; train it with train.calibration_folds."
            )
        )
    lights = sorted(
        (_light(facts, sample, table) for sample in facts.cells.sample_names),
        key=lambda light: (WORST_FIRST.index(light.verdict), light.sample),
    )
    count = pd.Series([light.verdict for light in lights]).value_counts()
    said = [f"{count[name]:,} {name}" for name in WORST_FIRST[:3] if name in count]
    if said:
        blocks.append(
            Text(
                f"Of {several(len(lights), 'sample')}: {', '.join(said)}. In range means that the sample differs "
                "from the labelled training samples no more than nine in ten of them differed from the others when "
                "they were held out; out of range means twice as far from their middle. The verdict is on the data, "
                "not on the patient."
            )
        )
    blocks.append(Lights(tuple(lights[:MOST_LIGHTS])))
    if len(lights) > MOST_LIGHTS:
        blocks.append(Text(f"{len(lights) - MOST_LIGHTS:,} more samples are in the table of samples, at the end."))
    return Section("verdict", "Verdict per sample", tuple(blocks))


def _light(facts: Facts, sample: str, table: pd.DataFrame | None) -> Light:
    own = facts.cells.sample_N == sample
    verdict, reason = NO_VERDICT, ""
    if table is not None and "verdict" in table and sample in table.index:
        row = table.loc[sample]
        verdict = str(row["verdict"]) if row["verdict"] in LEVELS else NO_VERDICT
        reason = str(row["verdict_reason"]) if isinstance(row["verdict_reason"], str) else ""
    counts = facts.cells.obs["carvae_n_counts"].to_numpy()[own]
    state = pd.Series(facts.cells.state_N[own & ~facts.unknown_N]).value_counts(normalize=True)[:COMMONEST]
    said = [
        *_about(facts, sample),
        ("cells", f"{int(own.sum()):,}, {percent(float(facts.unknown_N[own].mean()))} unknown"),
        ("median counts", f"{float(pd.Series(counts).median()):,.0f}"),
        ("commonest states", ", ".join(f"{name} {percent(float(share))}" for name, share in state.items()) or "none"),
    ]
    if not reason:
        reason = {IN_RANGE: "Within the range of the training samples in every figure.", NO_VERDICT: ""}.get(
            verdict, ""
        )
    return Light(sample, verdict, LEVELS.get(verdict, "none"), reason, tuple(said))


def _about(facts: Facts, sample: str) -> list[tuple[str, str]]:
    """Patient, time point and tissue where all cells of the sample agree."""
    own, said = facts.cells.sample_N == sample, []
    for name, word in (
        ("patient", "patient"),
        ("timepoint", "time point"),
        ("timepoint_days", "day"),
        ("tissue", "tissue"),
    ):
        column = facts.cells.known(name)
        values = [] if column is None else column[own].dropna().unique().tolist()
        if len(values) == 1:
            said.append((word, f"{values[0]:g}" if isinstance(values[0], float) else str(values[0])))
    return said
