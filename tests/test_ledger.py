"""The log of evaluations: counted, chained, and refused once a line was altered or taken out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.errors import EvaluateError
from carvae.evaluation.ledger import FIRST, NAME, check, record


def log_of(folder: Path, n: int = 4) -> Path:
    for number in range(n):
        record(folder / f"run{number}", "data", "patient", {"lr": number % 2}, {"accuracy": 0.5 + number / 100})
    return folder / NAME


def test_evaluations_of_the_same_data_and_their_settings_are_counted(tmp_path: Path) -> None:
    log_of(tmp_path)
    record(tmp_path / "x", "data", "study", {"lr": 7}, {})
    record(tmp_path / "x", "other", "patient", {"lr": 8}, {})
    found = record(tmp_path / "x", "data", "patient", {"lr": 1}, {})
    assert (found.evaluations, found.settings) == (5, 2)
    assert "evaluation 5 of these data, 2 different settings" in found.sentence
    assert record(tmp_path / "x", "new", "patient", {}, {}).sentence.startswith(
        "evaluation 1 of these data, 1 setting "
    )


def test_every_line_names_the_one_before(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in log_of(tmp_path).read_text().splitlines()]
    assert [line["previous"] for line in lines] == [FIRST, *(line["hash"] for line in lines[:-1])]
    assert [line["headline"]["accuracy"] for line in lines] == [0.5, 0.51, 0.52, 0.53]
    check(tmp_path / "run0")


def test_no_log_is_no_fault_and_nothing_is_made_by_looking(tmp_path: Path) -> None:
    check(tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())


@given(st.data())
def test_any_altered_byte_or_missing_line_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = log_of(tmp_path_factory.mktemp("log"), 3)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    if data.draw(st.booleans()):
        gone = data.draw(st.integers(0, 1))  # the last can be taken out unnoticed by the file alone
        changed = "".join(lines[:gone] + lines[gone + 1 :])
    else:
        at = data.draw(st.sampled_from([i for i, letter in enumerate(text) if letter.isalnum()]))
        changed = text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
    path.write_text(changed)
    with pytest.raises(EvaluateError, match=r"line \d of .*evaluations.jsonl was altered"):
        record(path.parent / "run", "data", "patient", {}, {})
    assert path.read_text() == changed
