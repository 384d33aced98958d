"""The lists of cases and goals name tests that are there, and leave no case to nobody."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def listed(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def test_every_test_that_is_named_exists() -> None:
    named = [test for row in (*listed("cases.yaml"), *listed("goals.yaml").values()) for test in row.get("tests", ())]
    assert named
    for test in named:
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_every_case_is_decided_by_a_test_or_said_to_be_open() -> None:
    cases = {case["case"]: case for case in listed("cases.yaml")}
    own = {
        name
        for file in HERE.glob("test_*.py")
        for marker in re.findall(r"mark\.case\(([^)]*)\)", file.read_text(encoding="utf-8"))
        for name in re.findall(r"[A-G]\d\d", marker)
    }
    assert own <= set(cases)
    undecided = [name for name, case in cases.items() if not {"tests", "open"} & set(case) and name not in own]
    assert not undecided
