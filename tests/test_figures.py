"""Every figure of the README and of a model card is kept with how it was made."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from carvae.model.bundle import Bundle
from carvae.model.card import UNDECODED
from carvae.model.share import shareable

ROOT = Path(__file__).resolve().parents[1]
CARD = "Novelty without the decoder"
CONSTANTS = (0.9, 0.95, 0.5)
"""Coverage of the sets and of intervals, and what an attack that tells nothing has."""


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))
    return found


def test_every_figure_of_the_readme_is_kept_with_how_it_was_made(figures: ModuleType, kept: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.check(readme, kept) == [], "edit, then: python scripts/figures.py --accept"
    assert sum(len(block["figures"]) for block in kept.values()) > 100
    for name, block in kept.items():
        assert block["command"], name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", block["date"]), name
        assert re.fullmatch("[0-9a-f]{7,12}", block["commit"]), name
        assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in (block["data"] or {}).values())


README = """# x

## Measured

Real data.

**One** (`bench_12.py`; 2,000 genes): carvae 0.66, the other 5.1% [+0.1, 0.3].

| method | F1 |
|---|---|
| mine 9 | **0.7** / 0.8 |

## Then 7
"""


def test_a_figure_that_is_new_changed_or_gone_is_found(figures: ModuleType) -> None:
    values = [figure.value for text in figures.blocks(README).values() for figure in figures.figures(text)]
    assert values == ["2,000", "0.66", "5.1%", "+0.1", "0.3", "0.7", "0.8"]
    kept = figures.accept(README, {})
    assert set(kept) == {"One"}
    assert figures.check(README, kept) == []
    for changed, said in (
        (README.replace("0.66", "0.67"), "0.67 (after"),
        (README.replace("0.7**", "0.9**"), "'One': 0.9"),
        (README.replace(" [+0.1, 0.3]", ""), "no longer said"),
        (README.replace("**One**", "**Two**"), "'Two' has 7 figures and is not in the file"),
    ):
        assert any(said in line for line in figures.check(changed, kept)), changed
    del kept["One"]["patients"]
    assert figures.check(README, kept) == ["'One' does not say its patients"]
    again = figures.accept(
        README.replace("0.66", "0.68"), {"One": kept["One"] | {"command": "x", "date": "2020-01-01"}}
    )
    assert again["One"]["command"] == "x"
    assert again["One"]["date"] > "2020-01-01"


def test_what_a_bench_prints_is_compared_to_the_last_place(figures: ModuleType) -> None:
    printed = [0.66049, 1117.58, 12000.0, 0.0462]
    assert all(figures.comes_out(text, printed) for text in ("0.660", "1117.6", "12,000", "4.6%"))
    assert not any(figures.comes_out(text, printed) for text in ("0.661", "1117.5", "12,001", "4.7%"))


def test_a_command_is_run_on_the_same_data_alone(figures: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(figures, "RUNS", tmp_path / "runs")
    (tmp_path / "d.csv").write_text("1")
    sha = figures._sha256(tmp_path / "d.csv")
    block = {"command": f"{sys.executable} -c 'print(0.6604)'", "data": {"d.csv": sha}, "figures": []}
    block["figures"] = [{"of": "a", "value": "0.660"}, {"of": "b", "value": "0.8"}]
    assert figures.again("one", block, tmp_path) == "one: 1 of 2 figures come out again; not 0.8"
    (tmp_path / "d.csv").write_text("2")
    assert "nothing was run" in figures.again("one", block, tmp_path)
    assert "exit code 3" in figures.again(
        "one", block | {"command": f"{sys.executable} -c 'exit(3)'", "data": {}}, tmp_path
    )


def test_the_cards_fixed_figures_are_kept(figures: ModuleType, kept: dict[str, Any]) -> None:
    held = [figure["value"] for figure in kept[CARD]["figures"]]
    assert [figure.value for figure in figures.figures(UNDECODED)] == held


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner)
            yield from numbers(key)
    elif isinstance(value, list):
        yield float(len(value))
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, str):
        yield from (float(text) for text in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.parametrize("share", [False, True])
def test_every_figure_of_a_card_is_in_the_models_own_files(
    figures: ModuleType, kept: dict[str, Any], sure: Bundle, share: bool, tmp_path: Path
) -> None:
    folder = (shareable(sure) if share else sure).save(tmp_path / "model")
    card = (folder / "card.md").read_text(encoding="utf-8")
    files = [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("metrics.json", "model.json")]
    known = [*numbers(files), *CONSTANTS, *(figures.value_of(f["value"])[0] for f in kept[CARD]["figures"])]
    confusion = files[0]["held_out"]["state"].get("confusion", [])
    known += [float(sum(row)) for row in confusion]
    said = [f.value for f in figures.figures(card.replace(json.dumps(sure.provenance.carvae_version).strip('"'), ""))]
    assert len(said) > 20
    assert [value for value in said if not figures.comes_out(value, known)] == []
