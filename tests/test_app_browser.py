"""The web page in a browser, as people use it: every way ends in results or in a clear message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from app_server import PATIENCE_S, Started, started
from trained import World

from carvae.model.bundle import load

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'carvae[test]')")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a browser at {CHROMIUM}"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
LIMIT = 3 << 20
EVIL = ("<script>window.hacked = 1</script>", '"><img src=x onerror="top.hacked = 1">')
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def page_server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with started(world.bundle, tmp_path_factory.mktemp("tmp"), "--max-upload", "3MB") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def user(browser: Any, page_server: Started) -> Iterator[Any]:
    yield from a_user(browser, page_server)


def a_user(browser: Any, server: Started) -> Iterator[Any]:
    """A browser of its own, with the page open; what its scripts complain of is a failure."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    context.set_default_timeout(PATIENCE_S * 1000)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: faults.append(told.text) if "Content Security Policy" in told.text else None)
    page.goto(server.url)
    page.wait_for_selector("h1")
    assert "token" not in page.url
    yield page
    assert not faults
    context.close()


def give(page: Any, *paths: Path) -> None:
    """Choose files as the dialogue would."""
    page.get_by_role("link", name="carvae").first.click()
    page.wait_for_selector("input[type=file]")
    page.set_input_files("input[type=file]", [str(path) for path in paths])


def alert(page: Any) -> str:
    """What the page complains of."""
    page.wait_for_selector(".alert:not([hidden])")
    text: str = page.inner_text(".alert:not([hidden])")
    return text


def fits(page: Any) -> None:
    """Nothing is wider than a phone."""
    size = page.viewport_size
    page.set_viewport_size(PHONE)
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size(size)
    assert width <= PHONE["width"]


@pytest.fixture(scope="module")
def evil(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    query = world.query.copy()
    query.obs["library_id"] = pd.Categorical(np.where(np.arange(query.n_obs) % 2, *EVIL))
    path = tmp_path_factory.mktemp("evil") / "evil.h5ad"
    query.write_h5ad(path)
    return path


def test_a_file_becomes_a_report_and_a_reload_loses_nothing(
    user: Any, browser: Any, page_server: Started, evil: Path, tmp_path: Path
) -> None:
    give(user, evil)
    user.wait_for_selector(".chip.ready")
    found = user.inner_text("main")
    for words in ("What was found", "Raw counts", "found in X", "Missing markers", "160", "of the model's", *EVIL):
        assert words in found
    fits(user)
    user.get_by_role("button", name="Label 160 cells").click()
    user.wait_for_selector(".chip.running, .chip.done")
    address = user.url
    user.reload()
    user.wait_for_selector(".chip.done")
    assert user.url == address
    assert EVIL[0] in user.inner_text("main")
    fits(user)
    report = user.frame_locator("iframe")
    report.locator("h1").first.wait_for()
    assert EVIL[0] in report.locator("body").inner_text()
    for frame in user.frames:
        assert frame.evaluate("typeof window.hacked") == "undefined"
    assert user.evaluate("document.querySelector('iframe').contentDocument") is None, "the report has no origin"
    with user.expect_download() as started_download:
        user.get_by_role("link", name="evil_carvae.samples.csv").click()
    started_download.value.save_as(tmp_path / "samples.csv")
    assert set(pd.read_csv(tmp_path / "samples.csv")["sample"]) >= {EVIL[0]}
    for other in a_user(browser, page_server):
        assert "evil.h5ad" not in other.inner_text("main"), "another user sees it without the link"
        other.goto(address)
        other.wait_for_selector(".chip.done")
    user.get_by_role("link", name="All samples").click()
    assert "evil.h5ad" in user.inner_text(".jobs")
    user.get_by_role("button", name="Remove evil.h5ad").click()
    user.wait_for_selector(".job", state="detached")
    user.goto(address)
    assert "no such job" in alert(user)


def test_wrong_and_large_files_are_refused_before_they_are_sent(user: Any, tmp_path: Path) -> None:
    (tmp_path / "object.rds").write_bytes(b"RDX3")
    give(user, tmp_path / "object.rds")
    assert "object.rds is an R object; write it as .h5ad" in alert(user)
    (tmp_path / "large.h5ad").write_bytes(bytes(LIMIT * 3 // 2))
    give(user, tmp_path / "large.h5ad")
    assert "large.h5ad has 4.5 MB, and this page takes 3 MB" in alert(user)
    assert user.query_selector("input[type=file]"), "another file can be given at once"
    fits(user)


def test_a_truncated_file_and_one_that_is_none_end_in_a_sentence(user: Any, world: World, tmp_path: Path) -> None:
    whole = world.query_path.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    give(user, tmp_path / "cut.h5ad")
    user.wait_for_selector(".chip.failed")
    assert "cut.h5ad" in alert(user)
    assert "Traceback" not in user.inner_text("main")
    user.get_by_role("link", name="Give another file").click()
    user.wait_for_selector("input[type=file]")


def test_missing_genes_are_told_before_anything_runs(user: Any, world: World, tmp_path: Path) -> None:
    panel = set(load(world.bundle).genes)
    query = world.query
    known = np.array([name in panel for name in query.var_names])
    for kept, name in ((0.43, "few.h5ad"), (0.3, "fewer.h5ad")):
        wanted = int(kept * len(panel))
        genes = [*query.var_names[known][:wanted], *query.var_names[~known]]
        query[:, genes].write_h5ad(tmp_path / name)
    give(user, tmp_path / "few.h5ad")
    user.wait_for_selector(".chip.ready")
    told = user.inner_text("main")
    assert "of the model's genes are missing, so labels will be less sure" in told
    assert "Missing genes" in told
    assert user.get_by_role("button", name="Label").is_visible()
    give(user, tmp_path / "fewer.h5ad")
    user.wait_for_selector(".chip.failed")
    assert "of the model's" in alert(user)
    assert "genes are in the query" in alert(user)


def test_the_demo_by_keyboard_and_cancel(user: Any) -> None:
    for _ in range(12):
        if user.evaluate("document.activeElement.textContent") == "Try the demo":
            break
        user.keyboard.press("Tab")
    user.keyboard.press("Enter")
    user.wait_for_selector(".chip.waiting, .chip.checking")
    assert user.evaluate("document.activeElement.tagName") == "H1"
    user.wait_for_selector(".chip.ready")
    user.get_by_role("button", name="Label").click()
    user.wait_for_selector(".chip.running")
    user.get_by_role("button", name="Cancel").click()
    user.wait_for_selector(".chip.cancelled")
    assert "was cancelled, and its files are removed" in alert(user)
    assert "cancelled" in user.inner_text("#live", timeout=1000) or user.text_content("#live")


def test_the_page_without_its_token_says_where_to_find_it(browser: Any, page_server: Started) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(page_server.base)
        assert "carvae app` printed" in page.inner_text("body")


def test_everything_that_can_be_used_has_a_name(user: Any) -> None:
    nameless = user.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, iframe, progress, meter")].filter((e) =>
            !(e.textContent.trim() || e.labels?.length || e.title || e.ariaLabel || e.getAttribute("aria-labelledby"))
        ).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert user.evaluate("document.documentElement.lang") == "en"
