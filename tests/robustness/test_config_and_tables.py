"""Cases F05, F06, F08 and E08: configs that are hostile, and tables that a spreadsheet opens."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
from small import Says, Small
from test_bad_input import assert_refused, write
from trained import carvae

CODE = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system",
    "output: !!python/object/apply:subprocess.Popen [['touch', '{canary}']]",
]
LAUGHS = "a: &a [" + ",".join(["lol"] * 10) + "]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [" + ",".join([f"*{chr(97 + i)}"] * 10) + "]\n" for i in range(9)
)  # fmt: skip
BOMBS = {
    "billion laughs": LAUGHS,
    "billion laughs as a value": LAUGHS + "output: *j\n",
    "nested": "[" * 20_000 + "]" * 20_000,
    "nested in a section": "ingest: " + "{a: " * 20_000,
    "a list": "- 1\n",
    "not text": "\x00\x01",
}
FORMULAS = ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", "=cmd|' /C'!A0", ";=1", "＝1"]


@pytest.mark.case("F05")
@pytest.mark.parametrize("text", CODE)
@pytest.mark.parametrize("where", ["config", "override", "tree", "signatures"])
def test_yaml_runs_no_code(tmp_path: Path, text: str, where: str, says: Says) -> None:
    hostile = tmp_path / "c.yaml"
    hostile.write_text(text.format(canary=tmp_path / "canary"), encoding="utf-8")
    config = tmp_path / "plain.yaml"
    config.write_text(f"output: {tmp_path}/m\ningest: {{studies: {{s: {{path: none.h5ad, label: x}}}}}}\n")
    arguments: list[object] = {
        "config": [hostile],
        "override": [config, f"model.n_latent={text.format(canary=tmp_path / 'canary')}"],
        "tree": [config, f"labels.tree={hostile}"],
        "signatures": [config, f"labels.signatures={hostile}"],
    }[where]
    answer = carvae("train", *arguments)
    assert_refused(answer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml", "plain.yaml"]
    says(answer.err)


@pytest.mark.case("F06")
@pytest.mark.parametrize("what", BOMBS)
def test_yaml_that_explodes_is_refused_at_once(tmp_path: Path, what: str, says: Says) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(BOMBS[what], encoding="utf-8")
    start = time.process_time()
    answer = carvae("train", config)
    assert_refused(answer, "c.yaml")
    assert len(answer.err) < 2000
    assert time.process_time() - start < 10  # of the processor, and ten times what it takes
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
    says(f"{what}: {answer.err}")


@pytest.mark.case("E08", "F08")
def test_no_name_is_a_formula_in_a_table(small: Small, tmp_path: Path, says: Says) -> None:
    query = small.query.copy()
    query.obs_names = [f"{FORMULAS[i % len(FORMULAS)]}{i}" for i in range(query.n_obs)]
    query.obs["sample_id"] = [FORMULAS[i % len(FORMULAS)] for i in range(query.n_obs)]
    answer = small.annotate(write(query, tmp_path / "Q.h5ad"), tmp_path / "A.csv")
    assert answer.code == 0, answer.err
    n_cells = 0
    for name in ("A.csv", "A.samples.csv"):
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert {len(row) for row in rows} == {len(rows[0])}
        n_cells += sum(len(row) for row in rows)
        for text in (text for row in rows for text in row):
            if text.lstrip()[:1] in set("=+-@;＝"):
                float(text)  # a number, or this fails
    says(f"0 of {n_cells} cells of the two tables are formulas; names that begin like one get an apostrophe")
