"""`carvae report`: complete, harmless, offline; in a browser the map can be coloured, chosen from and saved."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained import World, carvae

from carvae import report
from carvae.errors import ConfigError, GeneError, ReadError
from carvae.page import cellmap, certainty, clonal, evidence, inputs, outcomes, quality, verdicts
from carvae.page.annotated import Annotated
from carvae.page.blocks import Absent, Grid, Lights, Map, Picture, Section
from carvae.page.downloads import harmless
from carvae.page.facts import Facts
from carvae.page.layout import KEEP, stratified
from carvae.page.render import ASSETS, cell
from carvae.section_report import ReportConfig

SCRIPT, FORMULA, DOLLARS = "<script>alert(1)</script>", '=HYPERLINK("http://x.y","z")', "$a_{$ </style>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MB = 1 << 20
TITLES = 12


@dataclass(frozen=True)
class Written:
    """An annotated file whose samples have awkward names, and its report."""

    annotated: Path
    page: Path
    facts: Facts


@pytest.fixture(scope="module")
def written(world: World, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    query = world.query.copy()
    names = sorted(query.obs["library_id"].astype(str).unique())
    awkward = dict(zip(names, (SCRIPT, FORMULA, DOLLARS), strict=False))
    query.obs["library_id"] = query.obs["library_id"].astype(str).replace(awkward)
    query.obs_names = [f"=cmd|'/C calc'!A{i}" if i < 5 else f"cell-{i}" for i in range(query.n_obs)]
    query.obs["clone_id"] = [f"c{i % 7}" if i % 3 else "" for i in range(query.n_obs)]
    query.write_h5ad(folder / "query.h5ad")
    out = folder / "A.h5ad"
    answer = carvae("annotate", folder / "query.h5ad", "--model", world.bundle, "--out", out)
    assert answer.code == 0, answer.err
    table = pd.read_csv(folder / "A.samples.csv")
    table["verdict"] = [("in range", "with care", "out of range")[i % 3] for i in range(len(table))]
    table["verdict_reason"] = ["" if v == "in range" else f"too {SCRIPT}" for v in table["verdict"]]
    table = table.assign(mean_novelty=0.5, fraction_unknown=0.1, batch_distance=2.0)
    table.to_csv(folder / "A.samples.csv", index=False)
    kept: list[Facts] = []
    sections = report.SECTIONS

    def keep(facts: Facts) -> Section:
        kept.append(facts)
        return sections[0](facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SECTIONS", (keep, *sections[1:]))
        answer = carvae(
            "report", out, "--model", world.bundle, "--out", folder / "r.html", "report.genes=[CD28]", "seed=3"
        )
    assert answer.code == 0, answer.err
    return Written(out, folder / "r.html", kept[0])


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.page.read_text(encoding="utf-8"))


def test_the_page_is_complete_and_prints_no_nan(written: Written, page: Page) -> None:
    text = " ".join(page.words)
    for number in range(1, TITLES + 1):
        assert f"{number}. " in text
    assert sum(tag == "section" for tag, _ in page.tags) == TITLES
    assert not re.search(r"\b(nan|NaN|None|NaT|<NA>|inf)\b", text), "a missing value is a dash, or not there"
    assert written.page.stat().st_size < 15 * MB
    pictures = {attributes["data-name"] for tag, attributes in page.tags if tag == "img"}
    assert pictures >= {
        "quality",
        "range",
        "map",
        "states",
        "shares",
        "confidence",
        "markers",
        "receptors",
        "signatures",
    }
    assert {"clones", "tracking", "flow"} <= pictures


def test_no_name_becomes_markup_and_no_address_leads_out(written: Written, page: Page) -> None:
    text = "".join(page.words)
    for name in (SCRIPT, FORMULA, DOLLARS):
        assert name in text
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [script.get("type") for script in scripts] == ["application/json", "text/plain", None]
    for tag, attributes in page.tags:
        assert "style" not in attributes, f"{tag}: the policy would drop it"
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            if address := attributes.get(name):
                assert address.startswith(("data:", "#")), f"{tag} {name}"


def test_the_policy_lets_this_script_and_style_run_and_nothing_reach_a_network(written: Written) -> None:
    html = written.page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy[1].replace("&#39;", "'").split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:", "blob:"]
    assert "connect-src" not in rules
    for kind, tag in (("script-src", "<script>"), ("style-src", "<style>")):
        inside = html.split(tag)[1].split(tag.replace("<", "</"))[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[kind][0] == f"'sha256-{digest}'"
    assert "'unsafe-inline'" not in policy[1]
    code = {page: (ASSETS / f"{page}.js").read_text(encoding="utf-8") for page in ("report", "app")}
    writes = {page: re.findall(r"\beval\(|\bFunction\b[.(]\w*", text) for page, text in code.items()}
    assert writes == {"report": ["Function.apply"], "app": []}, "regl alone writes code, and in the report alone"


def test_equal_input_gives_an_equal_page(written: Written, world: World, tmp_path: Path) -> None:
    again = report.run(
        written.annotated, tmp_path / "r.html", model=world.bundle, config=written.facts.config, seed=3,
        command=written.facts.command,
    )  # fmt: skip
    assert again.read_bytes() == written.page.read_bytes()


def packed(block: Map) -> tuple[dict[str, Any], bytes]:
    return json.loads(block.header), gzip.decompress(base64.b64decode(block.values))


def column(header: dict[str, Any], values: bytes, name: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    (spec,) = [c for c in header["columns"] if c["name"] == name]
    kind = {8: "u1", 16: "<u2", 32: "<i4"}[spec.get("bits", 16)]
    return spec, np.frombuffer(values, kind, header["n"], spec["offset"])


def test_the_map_carries_the_values_of_the_file(written: Written) -> None:
    (block,) = [b for b in cellmap.section(written.facts).blocks if isinstance(b, Map)]
    header, values = packed(block)
    obs = written.facts.cells.obs
    assert header["n"] == len(obs)
    spec, code = column(header, values, "confidence")
    np.testing.assert_allclose(
        spec["low"] + code / 65534 * (spec["high"] - spec["low"]), obs["carvae_confidence"], atol=2e-5
    )
    spec, code = column(header, values, "state")
    assert [spec["categories"][c] for c in code] == obs["carvae_state"].astype(str).tolist()
    assert len(set(spec["colours"])) == len(spec["categories"])
    _, size = column(header, values, "clone size")
    known = obs["clone_size"].notna().to_numpy()
    np.testing.assert_array_equal(size[known], obs["clone_size"][known])
    assert (size[~known] == -(1 << 31)).all()
    barcodes = header["barcodes"]
    names = values[barcodes["offset"] : barcodes["offset"] + barcodes["length"]].decode().split("\n")
    assert names == list(obs.index)
    assert written.facts.expression is not None
    spec, code = column(header, values, "CD28")
    total = written.facts.expression.total_N
    expected = np.log1p(written.facts.expression.of("CD28") / total * 1e4)
    np.testing.assert_allclose(code / 254 * spec["high"], expected, atol=spec["high"] / 400)


def test_layouts_keep_their_shape(written: Written) -> None:
    (block,) = [b for b in cellmap.section(written.facts).blocks if isinstance(b, Map)]
    header, values = packed(block)
    for entry in header["layouts"]:
        place = np.frombuffer(values, "<u2", 2 * header["n"], entry["offset"]).reshape(2, -1).T.astype(float)
        true = written.facts.layout.places[entry["name"]]
        ratio = np.ptp(place, axis=0) / np.ptp(true, axis=0)
        assert ratio[0] == pytest.approx(ratio[1], rel=1e-3), "both directions have one scale"


def blocks(section: Section, kind: type) -> list[Any]:
    return [block for block in section.blocks if isinstance(block, kind)]


def without(facts: Facts, *columns: str) -> Facts:
    return replace(facts, cells=replace(facts.cells, obs=facts.cells.obs.drop(columns=list(columns))))


def test_the_worst_verdict_is_first_and_its_reason_is_said(written: Written) -> None:
    (lights,) = blocks(verdicts.section(written.facts), Lights)
    order = [light.verdict for light in lights.items]
    assert order == sorted(order, key=verdicts.WORST_FIRST.index)
    assert all(light.reason for light in lights.items)
    assert {light.sample for light in lights.items} == set(written.facts.cells.sample_names)


def test_what_a_file_lacks_is_one_sentence_and_no_picture(written: Written) -> None:
    facts = written.facts
    bare = clonal.section(without(facts, "clone_id", "clone_size"))
    assert any("No receptors were given" in b.text and "--clones" in b.text for b in blocks(bare, Absent))
    assert {picture.name for picture in blocks(bare, Picture)} == {"flow"}, "states over time need no clones"
    alone = replace(facts.cells, about=facts.cells.about[["sample"]])
    timeless = clonal.section(
        replace(without(facts, "clone_id"), cells=replace(alone, obs=without(facts, "clone_id").cells.obs))
    )
    assert not blocks(timeless, Picture)
    no_counts = replace(facts, expression=None, no_expression="There are no counts.")
    found = evidence.section(no_counts)
    assert "There are no counts." in [b.text for b in blocks(found, Absent)]
    assert {picture.name for picture in blocks(found, Picture)} <= {"signatures", "author"}
    no_table = replace(facts, cells=replace(facts.cells, samples=None))
    assert "No table of samples" in blocks(verdicts.section(no_table), Absent)[0].text
    assert blocks(quality.section(no_table), Absent)
    assert "no sets" in blocks(certainty.section(facts), Absent)[0].text.lower()
    assert "learned none" in blocks(outcomes.section(facts), Absent)[0].text
    assert "--model" in blocks(outcomes.section(replace(facts, no_outcomes=report.NO_MODEL)), Absent)[0].text


def test_missing_markers_are_named(written: Written) -> None:
    facts = written.facts
    assert facts.expression is not None
    assert facts.expression.missing, "the query lacks a tenth of the genes"
    said = " ".join(
        item for block in inputs.section(facts).blocks if hasattr(block, "items") for item in map(str, block.items)
    )
    for gene in facts.expression.missing[:5]:
        assert gene in said


def test_inhibitory_receptors_are_counted_together(written: Written) -> None:
    facts, expression = written.facts, written.facts.expression
    assert expression is not None
    (grid,) = [g for g in blocks(evidence.section(facts), Grid) if "by sample" in g.title]
    there = [g for g in ("LAG3", "PDCD1", "HAVCR2") if g not in expression.missing]
    every = np.all([expression.of(gene) > 0 for gene in there], axis=0)
    for sample, row in grid.frame.iterrows():
        own = facts.cells.sample_N == sample
        assert row.iloc[-1] == f"{every[own].mean():.1%}"


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=2, max_size=3), min_size=1))
def test_no_cell_of_a_table_is_a_formula(rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    read = list(csv.reader(io.StringIO(harmless(text.getvalue()))))
    assert [[value.lstrip("'") for value in row] for row in read] == [[v.lstrip("'") for v in row] for row in rows]
    for value in (value for row in read for value in row if value[:1] in "=+-@" and value):
        float(value)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=400),
    st.integers(1, 200),
    st.integers(0, 5),
)
def test_the_shown_cells_are_of_every_state_and_sample(cells: list[tuple[str, str]], most: int, seed: int) -> None:
    names = np.array(cells, dtype=object)
    given_cells = cast(Annotated, SimpleNamespace(n_cells=len(cells), sample_N=names[:, 0], state_N=names[:, 1]))
    shown, again = (stratified(given_cells, most, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(shown, again)
    assert (np.diff(shown) > 0).all()
    count, kept = pd.Series(cells).value_counts(), pd.Series([cells[i] for i in shown]).value_counts()
    if len(cells) <= most:
        assert len(shown) == len(cells)
        return
    for stratum, size in count.items():
        assert kept[stratum] == max(min(size, KEEP), int(size * most / len(cells)))


def test_table_values_are_text_without_nan() -> None:
    assert [cell(v) for v in (None, pd.NA, np.nan, np.inf, 0.12345, 3.0, 1234, np.int64(5), True, "x")] == [
        "–", "–", "–", "–", "0.123", "3", "1,234", "5", "True", "x",
    ]  # fmt: skip


def test_what_cannot_be_reported_on_is_one_sentence(written: Written, world: World, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="holds no labels of carvae; run `carvae annotate"):
        report.run(world.query_path, tmp_path / "r.html")
    with pytest.raises(ReadError, match="does not exist"):
        report.run(tmp_path / "no.h5ad", tmp_path / "r.html")
    with pytest.raises(ReadError, match=r"is no \.h5ad"):
        report.run(world.config, tmp_path / "r.html")
    with pytest.raises(ConfigError, match=r"end it in \.html"):
        report.run(written.annotated, tmp_path / "r.pdf")
    with pytest.raises(ReadError, match=r"no column 'nobody' for report\.label"):
        report.run(written.annotated, tmp_path / "r.html", config=ReportConfig(label="nobody"))
    with pytest.raises(GeneError, match=r"report\.genes names 'NOGENE'"):
        report.run(written.annotated, tmp_path / "r.html", config=ReportConfig(genes=("NOGENE",)))
    other = tmp_path / "other.h5ad"
    changed = ad.read_h5ad(written.annotated)
    changed.uns["carvae"]["bundle_id"] = "0123456789ab"
    changed.write_h5ad(other)
    with pytest.raises(ConfigError, match="was annotated by the model 0123456789ab"):
        report.run(other, tmp_path / "r.html", model=world.bundle)
    answer = carvae("report", world.query_path, "--out", tmp_path / "r.html")
    assert answer.code == 1
    assert answer.err.startswith("carvae: ")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


ARGUMENTS = (
    "--no-sandbox --disable-gpu-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, written: Written, **options: Any) -> Iterator[Any]:
    """The page in a browser without a network; whatever goes wrong, or is asked for, fails at the end."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True, **options)
    tab, wrong = context.new_page(), list[str]()
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
    tab.goto(written.page.as_uri())
    tab.wait_for_selector("#cellmap[data-drawn='UMAP/state']", timeout=120_000)
    yield tab
    assert not wrong, wrong
    context.close()


def saved(tab: Any, button: str) -> bytes:
    """What a button downloads."""
    with tab.expect_download() as download:
        tab.locator(button).first.click()
    return Path(download.value.path()).read_bytes()


@pytest.mark.slow
def test_in_a_browser_cells_are_coloured_chosen_and_saved(browser: Any, written: Written) -> None:
    with opened(browser, written) as tab:
        for control, choice, drawn in (
            ("#colour", "confidence", "UMAP/confidence"),
            ("#layout", "principal components", "principal components/confidence"),
            ("#colour", "CD28", "principal components/CD28"),
            ("#colour", "state", "principal components/state"),
        ):
            tab.select_option(control, label=choice)
            tab.wait_for_selector(f"#cellmap[data-drawn='{drawn}']")
            assert tab.locator("#legend .scale").count() == (choice != "state")
        legend = tab.locator("#legend .count").all_text_contents()
        assert sum(int(n.replace(",", "")) for n in legend) == written.facts.cells.n_cells
        tab.click("#lasso")
        _lasso_all(tab)
        tab.wait_for_selector("#chosen h4")
        n_chosen = int(tab.locator("#chosen h4").inner_text().split()[0])
        assert 0 < n_chosen <= written.facts.cells.n_cells
        shown = list(map(int, tab.locator("#chosen tr td:nth-child(2)").all_text_contents()))
        assert sum(shown) == n_chosen
        rows = list(csv.reader(io.StringIO(saved(tab, "#csvChosen").decode())))
        assert len(rows) == n_chosen + 1
        assert not any(value[:1] in ("=", "+", "@") for row in rows for value in row if value)
        states = pd.Series([row[rows[0].index("state")] for row in rows[1:]]).value_counts()
        assert sorted(states) == sorted(shown)
        tab.click("#clear")
        tab.wait_for_selector("#chosen h4", state="detached")
        assert tab.locator("#csvChosen").is_disabled()
        tab.mouse.down()
        tab.wait_for_timeout(1200)  # a long press starts nothing that the policy refuses
        tab.mouse.up()
        every = saved(tab, "#csv").decode()
        assert len(list(csv.reader(io.StringIO(every)))) == written.facts.cells.n_cells + 1


@pytest.mark.slow
def test_in_a_browser_pictures_tables_and_print_come_out(browser: Any, written: Written, tmp_path: Path) -> None:
    with opened(browser, written, color_scheme="dark") as tab:
        assert saved(tab, "#states [data-save=png]").startswith(b"\x89PNG")
        svg = saved(tab, "#states [data-save=svg]")
        assert svg.startswith(b"<svg")
        assert b"var(--" not in svg
        assert saved(tab, "#png").startswith(b"\x89PNG")
        rows = list(csv.reader(io.StringIO(saved(tab, "#input [data-table]").decode())))
        assert {row[0] for row in rows[1:]} == {"'" * (n[0] == "=") + n for n in written.facts.cells.sample_names}
        samples = saved(tab, "#downloads a[download='samples.csv']").decode()
        assert len(list(csv.reader(io.StringIO(samples)))) == len(written.facts.cells.sample_names) + 1
        tab.pdf(path=tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").stat().st_size > 50_000


def _lasso_all(tab: Any) -> None:
    """Draw a loop about the whole canvas."""
    tab.locator("#frame").scroll_into_view_if_needed()
    box = tab.locator("#canvas").bounding_box()
    x, y, w, h = box["x"], box["y"], box["width"], box["height"]
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.1)]
    tab.mouse.move(x + corners[0][0] * w, y + corners[0][1] * h)
    tab.mouse.down()
    for right, down in corners[1:]:
        tab.mouse.move(x + right * w, y + down * h, steps=12)
        tab.wait_for_timeout(30)
    tab.mouse.up()


@pytest.mark.slow
def test_without_webgl_the_picture_stands_in_for_the_map(browser: Any, written: Written) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    tab = context.new_page()
    tab.goto(written.page.as_uri())
    assert tab.locator("#nomap").is_visible()
    assert tab.locator("img[data-name=map]").is_visible()
    assert not tab.locator("#cellmap").is_visible()
    context.close()
