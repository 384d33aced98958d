"""The web page's server: who may talk to it, and what it takes. What becomes of jobs is in ``test_app_jobs.py``."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from trained import World

from carvae.app import Address, run
from carvae.config import Config
from carvae.errors import ConfigError
from carvae.web.guard import Refusal, Site
from carvae.web.job import Jobs, State, Upload
from carvae.web.limits import Limits
from carvae.web.routes import Desk, _receive, application
from carvae.web.server import listen, names_of, private_folder, server_of
from carvae.web.workers import Workers

LIMITS = Limits(
    max_upload=100_000, header_s=0.5, silence_s=0.5, parallel_uploads=1, upload_wait_s=0.3, max_body=2000, grace_s=60
)
PATIENCE_S = 120
PATHS = [
    "/",
    "/api/about",
    "/api/jobs",
    "/api/jobs/none",
    "/assets/app.js",
    "/assets/none",
    "/nothing",
    "/jobs/x/report",
]


class Idle(Workers):
    """Queues, and nobody who serves them."""

    async def start(self) -> None:
        """Nothing begins."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server in a thread."""

    site: Site
    jobs: Jobs
    base: str
    port: int

    @contextmanager
    def browser(self, *, token: bool = True) -> Iterator[httpx.Client]:
        """A client that behaves as a browser with this page open."""
        with httpx.Client(base_url=self.base, headers={"origin": self.base}, timeout=PATIENCE_S) as client:
            if token:
                assert client.get("/", params={"token": self.site.token}).status_code == 200
            yield client

    def announce(self, client: httpx.Client, size: int = 10, name: str = "a.h5ad") -> dict[str, Any]:
        """A new job that awaits one file."""
        answer = client.post("/api/jobs", json={"files": [{"name": name, "size": size}]})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def raw(self, text: bytes) -> bytes:
        """What comes back for bytes as they are, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(text)
            answer = b""
            while block := connection.recv(65536):
                answer += block
        return answer


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    listening = listen("127.0.0.1", 0, expose=False)
    port = listening.getsockname()[1]
    site = Site("the-token", names_of("127.0.0.1", port), LIMITS, f"carvae_{port}")
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), LIMITS)
    workers = Idle({"model": Path("model")}, {}, LIMITS)
    server = server_of(application(site, jobs, workers, {"models": []}), LIMITS)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Running(site, jobs, f"http://127.0.0.1:{port}", port)
    server.should_exit = True
    thread.join()


# --- who may talk to it ---


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith("/assets")])
def test_nothing_is_told_without_the_token(page: Running, path: str) -> None:
    with page.browser(token=False) as client:
        for query in ({}, {"token": ""}, {"token": "the-toke"}, {"token": "ü"}):
            answer = client.get(path, params=query)
            assert answer.status_code == 403
            assert "carvae app" in answer.text
            assert not answer.cookies


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_gets(page: Running) -> None:
    with page.browser(token=False) as client:
        cookie = client.get("/", params={"token": page.site.token}).headers["set-cookie"]
        assert cookie.startswith(f"carvae_{page.port}=")
        assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
        assert page.site.token not in cookie
        assert client.get("/api/about").status_code == 200
        client.cookies.clear()
        assert client.get("/api/about", headers={"cookie": f"carvae_{page.port}=made-up"}).status_code == 403


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [True, False])
def test_every_answer_bears_the_headers_of_caution(page: Running, path: str, token: bool) -> None:
    with page.browser(token=token) as client:
        headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_a_name_that_was_pointed_here_gets_nothing(page: Running, host: str) -> None:
    with page.browser() as client:
        assert client.get("/api/about", headers={"host": host.format(port=page.port)}).status_code in (400, 421)
        assert client.get("/api/about", headers={"host": f"LOCALHOST:{page.port}"}).status_code == 200


def test_two_hosts_are_none(page: Running) -> None:
    host = f"host: 127.0.0.1:{page.port}\r\n".encode()
    answer = page.raw(b"GET /?token=the-token HTTP/1.1\r\n" + host + b"host: evil.example\r\n\r\n")
    assert answer.split()[1] in (b"400", b"421")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", None])
def test_a_page_of_another_site_changes_nothing(page: Running, origin: str | None) -> None:
    with page.browser() as client:
        job = page.announce(client)
        del client.headers["origin"]
        headers = {} if origin is None else {"origin": origin}
        for method, path in [
            ("POST", "/api/jobs"),
            ("POST", f"/api/jobs/{job['id']}/cancel"),
            ("DELETE", f"/api/jobs/{job['id']}"),
            ("PUT", f"/api/jobs/{job['id']}/files/0"),
        ]:
            assert client.request(method, path, headers=headers, json={}).status_code == 403
        assert page.jobs.by_id[job["id"]].state is State.UPLOADING
        for site in ("cross-site", "same-site"):
            assert client.get("/api/jobs", headers={"sec-fetch-site": site}).status_code == 403


@pytest.mark.parametrize("method", ["PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_refused(page: Running, method: str) -> None:
    with page.browser() as client:
        assert client.request(method, "/api/jobs").status_code in (400, 405)


@pytest.mark.parametrize("name", ["..%2Fguard.py", "%2e%2e/guard.py", "..%5Cguard.py", ".%00", "app.js/../../guard.py"])
def test_only_what_was_built_is_given_out(page: Running, name: str) -> None:
    with page.browser() as client:
        assert client.get("/assets/app.js").status_code == 200
    host = f"host: 127.0.0.1:{page.port}\r\nconnection: close\r\n".encode()
    answer = page.raw(f"GET /assets/{name} HTTP/1.1\r\n".encode() + host + b"\r\n")
    assert answer.split()[1] in (b"400", b"403", b"404")
    assert b"class Guard" not in answer


ODD = {
    "NUL": b"%00", "NUL twice": b"a%00b%00", "no UTF-8": b"%ff%fe%80", "half a pair": b"%ed%a0%80", "a sign": b"%",
    "line": b"%0d%0ax-evil:%201", "overlong": b"%c0%af", "right to left": b"%e2%80%ae", "digits": b"9" * 5000,
    "minus": b"-1", "raw": b"\xff\x00\x80", "bell": b"\x07",
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "line",
    [
        b"GET /?token=%s HTTP/1.1",
        b"GET /?%s HTTP/1.1",
        b"GET /api/about?%s=1 HTTP/1.1",
        b"GET /api/jobs/%s HTTP/1.1",
        b"GET /jobs/%s/report HTTP/1.1",
        b"GET /assets/%s HTTP/1.1",
        b"PUT /api/jobs/x/files/%s HTTP/1.1",
        b"GET /api/about HTTP/1.1\r\ncookie: %s",
    ],
    ids=lambda line: line.decode().split()[1],
)
def test_odd_bytes_in_an_address_or_a_header_are_no_fault(page: Running, line: bytes, odd: bytes) -> None:
    own = f"host: 127.0.0.1:{page.port}\r\norigin: {page.base}\r\n".encode()
    cookie = b"" if b"cookie" in line else f"cookie: carvae_{page.port}={page.site.enter('the-token')}\r\n".encode()
    end = b"content-length: 0\r\nconnection: close\r\n\r\n"
    head, _, _ = page.raw(line % odd + b"\r\n" + own + cookie + end).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"200", b"400", b"403", b"404", b"409"), head
    assert b"x-evil" not in head.lower()
    with page.browser() as client:
        assert client.get("/api/about").status_code == 200, "alive"


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("a\0.h5ad", 400, "NUL"),
        ("a.h5ad\0.zip", 400, "NUL"),
        ("\ud800.h5ad", 200, ""),
        ("\udfff/\ud83d.h5ad", 200, ""),
        ("\u202egnp.h5ad", 200, ""),
        ("\r\nx-evil: 1.h5ad", 200, ""),
        ("\x1b[2J\x7f.h5ad", 200, ""),
        ("\ufffe\uffff.h5ad", 200, ""),
        ("e" * 1025 + ".h5ad", 400, "more than 1,024 letters"),
        (".h5ad", 400, "a hidden file is no query"),
    ],
    ids="NUL at-end half halves right-to-left line escape no-characters long hidden".split(),
)
def test_odd_letters_in_the_name_of_a_file_are_no_part_of_a_path(
    page: Running, name: str, status: int, said: str
) -> None:
    content = json.dumps({"files": [{"name": name, "size": 4}]}).encode()
    with page.browser() as client:
        answer = client.post("/api/jobs", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        assert said in answer.json().get("error", "")
        if status == 200:
            job = answer.json()["id"]
            told = client.put(f"/api/jobs/{job}/files/0", content=b"HDF\n").json()
            assert told["state"] == "waiting"
            own = page.jobs.by_id[job]
            (file,) = [path for path in own.folder.rglob("*") if path.is_file()]
            assert str(file.relative_to(own.folder)).isprintable()
            assert file.read_bytes() == b"HDF\n"
            assert client.get("/api/jobs").status_code == 200
            assert client.delete(f"/api/jobs/{job}").status_code == 200


def test_two_browsers_see_each_their_own_jobs_and_the_others_only_by_the_link(page: Running) -> None:
    with page.browser() as one, page.browser() as two:
        job = page.announce(one, name="mine.h5ad")
        assert job["id"] in [told["id"] for told in one.get("/api/jobs").json()["jobs"]]
        assert job["id"] not in two.get("/api/jobs").text
        assert two.get(f"/api/jobs/{job['id']}").json()["name"] == "mine.h5ad"
        assert two.get(f"/api/jobs/{job['id'][:-1]}").status_code == 404


# --- what it takes ---


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 1900, "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"files": []}', "application/json", 400),
        (b'{"files": [{"name": 1, "size": 2}]}', "application/json", 400),
        (b'{"files": [{"name": "a.h5ad", "size": -1}]}', "application/json", 400),
        (b'{"files": [{"name": "a.h5ad", "size": true}]}', "application/json", 400),
        (b'{"model": "other", "demo": true}', "application/json", 400),
        (b'{"model": ["model"], "demo": true}', "application/json", 400),
        (b'{"model": {}, "files": {"name": "a"}}', "application/json", 400),
        (b'{"files": [{"name": "a.h5ad", "size": 1e999}]}', "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        (b'{"files": ' + b"9" * 1900 + b"}", "application/json", 400),
        (b'{"files": [{"name": "../../a.h5ad", "size": 5}]}', "application/json", 400),
        (b'{"files": [{"name": "a.h5ad", "size": 150000}]}', "application/json", 400),
        (b'{"demo": true}', "text/plain", 415),
        (b'{"x": "' + b"y" * 3000 + b'"}', "application/json", 413),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(page: Running, content: bytes, kind: str, status: int) -> None:
    before = set(page.jobs.by_id)
    with page.browser() as client:
        answer = client.post("/api/jobs", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]
    assert set(page.jobs.by_id) == before


def test_a_file_arrives_whole_and_is_queued(page: Running) -> None:
    with page.browser() as client:
        job = page.announce(client, 50_000)
        content = os.urandom(50_000)
        told = client.put(f"/api/jobs/{job['id']}/files/0", content=content).json()
        assert told["state"] == "waiting"
        own = page.jobs.by_id[job["id"]]
        assert own.query.read_bytes() == content
        assert own.query.stat().st_mode & 0o077 == 0 or own.folder.stat().st_mode & 0o077 == 0
        assert client.put(f"/api/jobs/{job['id']}/files/0", content=content).status_code == 409
        assert client.post(f"/api/jobs/{job['id']}/start", json={}).status_code == 409
        assert client.post(f"/api/jobs/{job['id']}/cancel", json={}).json()["state"] == "cancelled"
        assert not own.query.exists()
        assert client.delete(f"/api/jobs/{job['id']}").status_code == 200
        assert not own.folder.exists()
        assert client.get(f"/api/jobs/{job['id']}").status_code == 404


def test_a_file_of_one_and_a_half_times_the_limit_is_refused_before_it_is_sent(page: Running) -> None:
    with page.browser() as client:
        answer = client.post("/api/jobs", json={"files": [{"name": "big.h5ad", "size": 150_000}]})
    assert answer.status_code == 400
    assert "big.h5ad has 146.5 KB, and this page takes 97.7 KB" in answer.json()["error"]
    assert "--max-upload" in answer.json()["error"]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_more_than_was_announced_is_not_stored(page: Running, framing: str) -> None:
    with page.browser() as client:
        job = page.announce(client, 1000)
        content = bytes(90_000) if framing == "length" else iter([bytes(10_000)] * 9)
        try:
            assert client.put(f"/api/jobs/{job['id']}/files/0", content=content).status_code == 413
        except httpx.TransportError:
            pass  # the server may hang up while the rest is on its way
        own = page.jobs.by_id[job["id"]]
        assert sum(p.stat().st_size for p in own.folder.rglob("*") if p.is_file()) <= 1000
        if framing == "chunked":
            assert client.get(f"/api/jobs/{job['id']}").json()["state"] == "failed"


def _begin_upload(page: Running, client: httpx.Client, size: int) -> tuple[str, socket.socket]:
    """An upload of which only the headers and some bytes were sent."""
    job = page.announce(client, size)["id"]
    connection = socket.create_connection(("127.0.0.1", page.port), timeout=PATIENCE_S)
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    lines = [
        f"PUT /api/jobs/{job}/files/0 HTTP/1.1",
        f"host: 127.0.0.1:{page.port}",
        f"origin: {page.base}",
        f"cookie: {cookie}",
        f"content-length: {size}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + b"x" * 100)
    return job, connection


def _until(client: httpx.Client, job: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        told: dict[str, Any] = client.get(f"/api/jobs/{job}").json()
        if told["state"] in states:
            return told
        assert told["state"] not in ("failed", "done", "cancelled"), told
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def test_an_upload_that_breaks_off_says_so(page: Running) -> None:
    with page.browser() as client:
        job, connection = _begin_upload(page, client, 5000)
        connection.close()
        told = _until(client, job, "failed")
        assert "broke off after" in told["error"]
        assert "give the file again" in told["error"]


def test_a_body_that_falls_silent_and_headers_that_never_end_are_hung_up_on(page: Running) -> None:
    with page.browser() as client:
        job, connection = _begin_upload(page, client, 5000)
        answer = b""
        with connection:
            while block := connection.recv(65536):
                answer += block
        assert b"408" in answer.split(b"\r\n")[0]
        assert _until(client, job, "failed")["error"]
    assert page.raw(b"") == b""
    assert page.raw(b"GET / HTTP/1.1\r\nhost: 127") == b""
    first = f"GET /assets/app.css HTTP/1.1\r\nhost: 127.0.0.1:{page.port}\r\n\r\nGET /slow".encode()
    assert page.raw(first).startswith(b"HTTP/1.1 200"), "a second request on the same connection dawdles too"


def test_a_small_body_that_drips_is_hung_up_on(page: Running) -> None:
    lines = [b"POST /api/jobs HTTP/1.1", f"host: 127.0.0.1:{page.port}\r\norigin: {page.base}".encode()]
    lines += [f"cookie: carvae_{page.port}={page.site.enter('the-token')}".encode()]
    lines += [b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n"]
    with socket.create_connection(("127.0.0.1", page.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"\r\n".join(lines))
        connection.settimeout(0.1)
        answer, sent = b"", 0
        while not answer and sent < 900:  # a hundred seconds, were nobody to end it
            with suppress(TimeoutError):
                answer = connection.recv(65536)
            with suppress(OSError):
                connection.sendall(b" ")
                sent += 1
    assert answer.startswith(b"HTTP/1.1 408"), (answer, sent)


def test_an_upload_that_drips_is_hung_up_on(tmp_path: Path) -> None:
    upload = Upload("a.h5ad", tmp_path / "a.h5ad", 10**6)
    site = Site("t", frozenset(), replace(LIMITS, grace_s=0.0, least_rate=10**9))
    desk = Desk(site, Jobs(tmp_path, LIMITS), Idle({}, {}, LIMITS), {})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Refusal, match=r"a\.h5ad came too slowly"):
        asyncio.run(_receive(desk, Request({"type": "http", "method": "PUT", "headers": []}, receive), upload))
    assert upload.received < 10


def test_uploads_wait_for_their_turn_and_are_told_where_it_does_not_come(page: Running) -> None:
    with page.browser() as client:
        job, connection = _begin_upload(page, client, 5000)
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                connection.sendall(b"y")

        dripping = threading.Thread(target=drip)
        dripping.start()
        other = page.announce(client, 10)["id"]
        busy = client.put(f"/api/jobs/{other}/files/0", content=b"0123456789")
        stop.set()
        dripping.join()
        connection.close()
        assert busy.status_code == 503
        assert "try again" in busy.json()["error"]
        _until(client, job, "failed")
        assert client.put(f"/api/jobs/{other}/files/0", content=b"0123456789").status_code == 200


# --- how it is started ---


def test_another_host_is_refused_with_the_reason(world: World) -> None:
    with pytest.raises(ConfigError, match=r"unencrypted.*ssh -L"):
        run([world.bundle], Address("0.0.0.0", 0), Limits(), Config())
    with pytest.raises(ConfigError, match="nothing can listen at 192"):
        run([world.bundle], Address("192.0.2.1", 0, expose=True), Limits(), Config())


def test_a_port_that_is_taken_is_told(world: World, page: Running) -> None:
    with pytest.raises(ConfigError, match=r"nothing can listen at 127.0.0.1:\d+ .*--port"):
        run([world.bundle], Address(port=page.port), Limits(), Config())


def test_without_the_extra_one_sentence_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"pip install 'carvae\[web\]'"):
        run([world.bundle], Address(), Limits(), Config())


def test_a_folder_of_a_killed_server_goes_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / "carvae-app-dead"
    dead.mkdir()
    (dead / "held").touch()
    (tmp_path / "carvae-app-link").symlink_to(tmp_path)
    with private_folder() as one, private_folder() as two:
        assert not dead.exists()
        assert one.exists()
        assert two.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in tmp_path.iterdir()] == ["carvae-app-link"]


def test_who_calls_before_the_server_runs_is_not_refused() -> None:
    """The address is printed, and a browser opened, before the first request can be answered."""
    with listen("127.0.0.1", 0, expose=False) as listening:
        socket.create_connection(listening.getsockname(), timeout=60).close()
