"""TRIPOD+AI and PROBAST+AI are answered in full, and what the answers point to is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "reporting.yaml"
PARTS = {"3": "abc", "5": "ab", "6": "abc", "8": "abc", "9": "abc", "12": "abcdefg", "18": "abcdef", "20": "abc"}
PARTS |= {"23": "ab", "27": "abc"}
TRIPOD = [f"{n}{part}" for n in range(1, 28) for part in PARTS.get(str(n), [""])]
DOMAINS = ["participants_and_data_sources", "predictors", "outcome", "analysis"]
ANSWERS = {True, False, "in part", "user"}  # YAML reads yes and no as truth values


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def rows(answers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from answers["tripod_ai"].items()
    for part, domains in answers["probast_ai"].items():
        yield from ((f"{part}/{name}", row) for name, row in domains.items())


def missing(place: str) -> str:
    """Why a place is not there; empty where it is."""
    name, _, part = place.partition("#")
    path = ROOT / name
    if not path.exists():
        return f"{name} is not there"
    text = path.read_text(encoding="utf-8") if part else ""
    if name.endswith(".md") and part:
        return "" if part in {line.lstrip("# ") for line in text.splitlines() if line.startswith("#")} else "no heading"
    if part:
        return (
            "" if part in {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)} else "no test"
        )
    return ""


def test_every_item_is_answered_once(answers: dict[str, Any]) -> None:
    assert list(answers["tripod_ai"]) == TRIPOD
    assert len(TRIPOD) == 52
    assert {part: list(domains) for part, domains in answers["probast_ai"].items()} == {
        "development": DOMAINS, "evaluation": DOMAINS, "applicability": DOMAINS[:3]
    }  # fmt: skip


def test_every_answer_points_to_what_is_there_or_says_why_there_is_none(answers: dict[str, Any]) -> None:
    for name, row in rows(answers):
        assert row["answer"] in ANSWERS, name
        assert row.get("where") or row.get("note"), f"{name} says yes to nothing"
        if row["answer"] in (False, "in part", "user"):
            assert row.get("note") or row.get("why") or row.get("where"), name
        for place in row.get("where", ()):
            assert not missing(place), f"{name}: {place}: {missing(place)}"


def test_a_place_that_is_not_there_is_found() -> None:
    assert missing("README.md#Measured") == ""
    assert missing("README.md#Nowhere")
    assert missing("tests/test_reporting.py#test_nothing")
    assert missing("docs/nothing.md")
