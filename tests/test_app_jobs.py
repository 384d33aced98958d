"""``carvae app`` as people use it: jobs in processes of their own, over HTTP and in a browser.

Every way ends in results or in a clear message. One file is labelled to the end, with samples of hostile names.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pytest
from trained import World

from carvae.model.bundle import load

PATIENCE_S = 300
"""A shared machine is no clock: this only ends a test that would hang."""
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
LIMIT = 3 << 20
SCRIPTS = (
    "<script>window.hacked=1</script>",
    '"><img src=x onerror=window.hacked=1>',
    "</script><script>window.hacked=1</script>",
    "{{7*7}}",
    "${7*7}",
    "javascript:window.hacked=1",
    "<svg/onload=window.hacked=1>",
    "' onmouseover='window.hacked=1",
    "\u202egnp.exe",
    "a\r\nSet-Cookie: x=1",
    "]]><script>window.hacked=1</script>",
)
FORMULAS = (
    '=HYPERLINK("http://127.0.0.1/?"&A1)',
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=2",
    "\r=1",
    "=cmd|' /C calc'!A0",
    ";=1",
    "\uff1d1+1",
)
HOSTILE = (*SCRIPTS, *FORMULAS)
"""Names of samples; by another project's list of what goes wrong in reports and tables."""
CELLS = 1
"""Of each of those samples: of so few cells in all, the report has no UMAP, which every process compiles for itself."""
PHONE = {"width": 390, "height": 800}
pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Served:
    """The page as a user starts it."""

    process: subprocess.Popen[str]
    url: str
    """With the token."""
    client: httpx.Client
    folder: Path
    """In which its private folder is made."""

    @property
    def base(self) -> str:
        """The page's address without the token."""
        return self.url.partition("/?")[0]

    def give(self, path: Path, name: str | None = None) -> str:
        """Upload a file; returns the job's id."""
        content = path.read_bytes()
        files = [{"name": name or path.name, "size": len(content)}]
        job: str = self.client.post("/api/jobs", json={"files": files}).json()["id"]
        assert self.client.put(f"/api/jobs/{job}/files/0", content=content).status_code == 200
        return job

    def until(self, job: str, *states: str) -> dict[str, Any]:
        """What is told of a job once it is in one of the states."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            told: dict[str, Any] = self.client.get(f"/api/jobs/{job}").json()
            if told["state"] in states:
                return told
            assert told["state"] not in ("failed", "done", "cancelled"), told
            assert time.monotonic() < deadline, told
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It must end well at SIGTERM, and leave nothing."""
    folder = tmp_path_factory.mktemp("tmp")
    command = [sys.executable, "-m", "carvae", "app", "--model", str(world.bundle), "--port", "0", "--no-browser", "-q"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        [*command, "--max-upload", "3MB"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            base = url.partition("/?")[0]
            with httpx.Client(base_url=base, headers={"origin": base}, timeout=PATIENCE_S) as client:
                assert client.get(url).status_code == 200
                yield Served(process, url, client, folder)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
    assert not list(folder.glob("carvae-app-*")), "files are left behind"


@pytest.fixture(scope="module")
def done(served: Served, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is told of a job that was labelled to the end."""
    query = world.query[: CELLS * len(HOSTILE)].copy()
    query.obs["library_id"] = pd.Categorical(np.repeat(np.array(HOSTILE, dtype=object), CELLS))
    path = tmp_path_factory.mktemp("evil") / "evil.h5ad"
    query.write_h5ad(path)
    job = served.give(path)
    found = served.until(job, "ready")["found"]
    assert found["samples"] == {name.strip(): CELLS for name in HOSTILE}
    assert found["query"] == "evil.h5ad"
    assert served.client.post(f"/api/jobs/{job}/start", json={}).status_code == 200
    return served.until(job, "done")


def test_what_was_labelled_can_be_taken_home(served: Served, done: dict[str, Any], tmp_path: Path) -> None:
    assert [row["n_cells"] for row in done["samples"]] == [CELLS] * len(HOSTILE)
    assert {name for name in SCRIPTS if "\r" not in name} <= {row["sample"] for row in done["samples"]}
    assert set(done["downloads"]) == {"annotated", "cells", "samples", "report", "script"}
    for key, told in done["downloads"].items():
        answer = served.client.get(f"/jobs/{done['id']}/files/{key}")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert len(answer.content) == told["size"]
        (tmp_path / told["name"]).write_bytes(answer.content)
    annotated = ad.read_h5ad(tmp_path / "evil_carvae.h5ad")
    cells = pd.read_csv(tmp_path / "evil_carvae.cells.csv.gz")
    assert list(cells["carvae_state"]) == list(annotated.obs["carvae_state"].astype(str))
    for table in ("evil_carvae.samples.csv", "evil_carvae.cells.csv.gz"):
        names = pd.read_csv(tmp_path / table, dtype=str, na_filter=False)["sample"]
        assert names.nunique() == len(HOSTILE)
        assert not names.str.match(r"\s*[=+@;\uff1d-]").any(), "a formula is alive in a table"
    assert "carvae annotate evil.h5ad" in (tmp_path / "evil_repeat.sh").read_text()


def test_the_report_has_no_rights_and_tells_no_paths(served: Served, done: dict[str, Any]) -> None:
    report = served.client.get(f"/jobs/{done['id']}/report")
    assert "sandbox allow-scripts" in report.headers["content-security-policy"]
    assert "allow-same-origin" not in report.headers["content-security-policy"]
    assert str(served.folder) not in report.text
    assert str(served.folder) not in json.dumps(done)
    assert served.client.get(f"/jobs/{done['id']}/files/..%2Fheld").status_code == 404


def test_bad_files_end_in_the_sentence_of_the_command_line(served: Served, world: World, tmp_path: Path) -> None:
    whole = world.query_path.read_bytes()
    (tmp_path / "text.h5ad").write_text("<html>not found</html>")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as packed:
        packed.writestr("../../slipped.h5ad", whole)
    jobs = {name: served.give(tmp_path / name) for name in ("text.h5ad", "out.zip")}
    said = {name: served.until(job, "failed")["error"] for name, job in jobs.items()}
    assert "text.h5ad is a web page, not data" in said["text.h5ad"]
    assert "points out of its folder" in said["out.zip"]
    assert not list(served.folder.rglob("slipped*"))


def _children(parent: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return {int(word) for word in found.stdout.split()}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes as Linux has them")
def test_a_job_that_dies_or_is_cancelled_takes_nothing_with_it(served: Served, world: World) -> None:
    first, second = (served.give(world.query_path, f"{n}.h5ad") for n in range(2))
    for job in (first, second):
        served.until(job, "ready")
        served.client.post(f"/api/jobs/{job}/start", json={})
    served.until(first, "running")
    assert served.client.get(f"/api/jobs/{second}").json()["ahead"] == 1
    assert served.client.post(f"/api/jobs/{first}/cancel", json={}).json()["state"] == "cancelled"
    served.until(second, "running")
    for child in _children(served.process.pid):
        os.kill(child, signal.SIGKILL)
    assert "more memory than this machine has free" in served.until(second, "failed")["error"]
    third = served.give(world.query_path, "again.h5ad")
    assert served.until(third, "ready")["found"]["cells"] == world.query.n_obs
    assert served.client.delete(f"/api/jobs/{third}").status_code == 200
    assert not list(served.folder.glob("carvae-app-*/*/query/again*"))


def test_a_connection_that_is_no_http_does_not_matter(served: Served) -> None:
    port = served.client.base_url.port
    assert port is not None
    for noise in (b"\x16\x03\x01\x02\x00", os.urandom(2000), b"GET /" + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(noise)
    connection_of = http.client.HTTPConnection("127.0.0.1", port)
    connection_of.request("GET", "/", headers={"cookie": "carvae=" + "x" * 5000})
    assert connection_of.getresponse().status == 403
    connection_of.close()
    assert served.client.get("/api/about").status_code == 200


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'carvae[test]')")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def at_the_page(browser: Any, served: Served) -> Iterator[Any]:
    """A browser of its own, with the page open; what its scripts complain of is a failure."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    context.set_default_timeout(PATIENCE_S * 1000)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: faults.append(told.text) if "Content Security Policy" in told.text else None)
    page.goto(served.url)
    page.wait_for_selector("h1")
    assert "token" not in page.url
    yield page
    context.close()
    assert not faults


@pytest.fixture
def user(browser: Any, served: Served) -> Iterator[Any]:
    with at_the_page(browser, served) as page:
        yield page


def give(page: Any, path: Path) -> None:
    """Choose a file as the dialogue would."""
    page.get_by_role("link", name="carvae").first.click()
    page.wait_for_selector("input[type=file]")
    page.set_input_files("input[type=file]", str(path))


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


def test_results_are_shown_and_hostile_names_are_only_text(
    user: Any, served: Served, done: dict[str, Any], tmp_path: Path
) -> None:
    assert "evil.h5ad" not in user.inner_text("main"), "another user sees it without the link"
    user.goto(f"{served.base}/#job/{done['id']}")
    user.wait_for_selector(".chip.done")
    for name in SCRIPTS:
        assert name.split("\r", maxsplit=1)[0] in user.inner_text("main")
    fits(user)
    report = user.frame_locator("iframe")
    report.locator("canvas").first.wait_for()
    assert SCRIPTS[0] in report.locator("body").inner_text()
    for place in user.locator("tbody th").all():
        place.hover()
    for frame in user.frames:
        assert frame.evaluate("typeof window.hacked") == "undefined"
    assert user.evaluate("document.querySelector('iframe').contentDocument") is None, "the report has no origin"
    with user.expect_download() as begun:
        user.get_by_role("link", name="evil_carvae.samples.csv").click()
    begun.value.save_as(tmp_path / "samples.csv")
    assert SCRIPTS[0] in set(pd.read_csv(tmp_path / "samples.csv")["sample"])
    with user.expect_download() as begun:
        report.get_by_role("button", name="CSV of all cells").click()
    assert begun.value.suggested_filename.endswith(".csv")


def test_a_reload_loses_nothing_cancel_ends_it_and_it_can_be_removed(user: Any, world: World) -> None:
    give(user, world.query_path)
    user.wait_for_selector(".chip.ready")
    found = user.inner_text("main")
    for words in ("What was found", "Raw counts", "found in X", "Missing markers", "of the model's", "Takes about"):
        assert words in found
    fits(user)
    user.get_by_role("button", name="Label 160 cells").click()
    user.wait_for_selector(".chip.running")
    address = user.url
    user.reload()
    user.wait_for_selector(".chip.running")
    assert user.url == address
    user.get_by_role("button", name="Cancel").click()
    user.wait_for_selector(".chip.cancelled")
    assert "was cancelled, and its files are removed" in alert(user)
    assert "cancelled" in user.text_content("#live")
    user.get_by_role("link", name="All samples").click()
    user.get_by_role("button", name=f"Remove {world.query_path.name}").click()
    user.wait_for_selector(".job", state="detached")
    user.goto(address)
    assert "no such job" in alert(user)


def test_two_users_at_once_see_each_their_own(browser: Any, served: Served, world: World, tmp_path: Path) -> None:
    half = world.query.n_obs // 2
    parts = {"first.h5ad": world.query[:half], "second.h5ad": world.query[half:]}
    for name, cells in parts.items():
        cells.write_h5ad(tmp_path / name)
    with at_the_page(browser, served) as first, at_the_page(browser, served) as second:
        for page, name in zip((first, second), parts, strict=True):
            give(page, tmp_path / name)
        for page, (name, cells), other in zip((first, second), parts.items(), reversed(parts), strict=True):
            page.wait_for_selector(".chip.ready")
            assert name in page.inner_text("main")
            assert page.get_by_role("button", name=f"Label {cells.n_obs} cells").is_visible()
            page.get_by_role("link", name="All samples").click()
            page.wait_for_selector(".job")
            assert other not in page.inner_text("main")
            page.get_by_role("button", name=f"Remove {name}").click()
            page.wait_for_selector(".job", state="detached")


def test_wrong_and_large_files_are_refused_before_they_are_sent(user: Any, tmp_path: Path) -> None:
    (tmp_path / "object.rds").write_bytes(b"RDX3")
    give(user, tmp_path / "object.rds")
    assert "object.rds is an R object; write it as .h5ad" in alert(user)
    (tmp_path / "large.h5ad").write_bytes(bytes(LIMIT * 3 // 2))
    give(user, tmp_path / "large.h5ad")
    user.wait_for_selector(".alert:has-text('large.h5ad')")
    assert "large.h5ad has 4.5 MB, and this page takes 3 MB" in alert(user)
    assert user.query_selector("input[type=file]"), "another file can be given at once"
    fits(user)


def test_a_truncated_file_ends_in_a_sentence(user: Any, world: World, tmp_path: Path) -> None:
    whole = world.query_path.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    give(user, tmp_path / "cut.h5ad")
    user.wait_for_selector(".chip.failed")
    assert "cut.h5ad" in alert(user)
    assert "Traceback" not in user.inner_text("main")
    user.get_by_role("link", name="Give another file").click()
    user.wait_for_selector("input[type=file]")


def test_missing_genes_are_told_before_anything_runs(user: Any, world: World, tmp_path: Path) -> None:
    """Of 60% missing genes the page warns; of more than ``predict.min_overlap`` allows it says that it cannot."""
    panel = set(load(world.bundle).genes)
    query = world.query
    known = np.array([name in panel for name in query.var_names])
    for kept, name in ((0.4, "few.h5ad"), (0.3, "fewer.h5ad")):
        wanted = int(np.ceil(kept * len(panel)))
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


def test_the_demo_by_keyboard(user: Any) -> None:
    for _ in range(12):
        if user.evaluate("document.activeElement.textContent") == "Try the demo":
            break
        user.keyboard.press("Tab")
    user.keyboard.press("Enter")
    user.wait_for_selector(".chip")
    user.wait_for_selector("h1:focus")
    user.wait_for_selector(".chip.ready")
    assert "1,200" in user.inner_text(".facts")
    user.get_by_role("button", name="Cancel").press("Enter")
    user.wait_for_selector(".chip.cancelled")


def test_the_page_without_its_token_says_where_to_find_it(browser: Any, served: Served) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.base)
        assert "carvae app` printed" in page.inner_text("body")


def test_everything_that_can_be_used_has_a_name(user: Any) -> None:
    nameless = user.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, iframe, progress, meter")].filter((e) =>
            !(e.textContent.trim() || e.labels?.length || e.title || e.ariaLabel || e.getAttribute("aria-labelledby"))
        ).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert user.evaluate("document.documentElement.lang") == "en"
