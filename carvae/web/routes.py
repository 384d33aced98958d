"""What the page asks of the server, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from carvae.errors import CarvaeError
from carvae.web.guard import Guard, Refusal, Site
from carvae.web.job import ENDED, Job, Jobs, State, Upload
from carvae.web.limits import MIB, size_text
from carvae.web.workers import Workers

ASSETS = Path(__file__).parent / "assets"
KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
REPORT_CSP = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""It has no origin, so no cookie and nothing of this page; its own policy names its one script by its hash."""
NO_JOB = "There is no such job here: it was removed, or carvae app was started again since."


@dataclass(slots=True)
class Desk:
    """What the routes share."""

    site: Site
    jobs: Jobs
    workers: Workers
    about: dict[str, Any]
    """What the page says of itself and of the models."""
    receiving: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        """Make room for uploads."""
        self.receiving = asyncio.Semaphore(self.site.limits.parallel_uploads)

    def job(self, request: Request) -> Job:
        """The job that a request names; who knows its name may see it."""
        job = self.jobs.by_id.get(str(request.path_params["job"]))
        if job is None:
            raise Refusal(404, NO_JOB)
        return job

    def told(self, job: Job) -> JSONResponse:
        """A job for the page."""
        return JSONResponse(job.to_dict(self.workers.ahead(job)))


def application(site: Site, jobs: Jobs, workers: Workers, about: dict[str, Any]) -> Guard:
    """The page as an ASGI application."""
    desk = Desk(site, jobs, workers, about)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await workers.start()
        yield
        await workers.close()

    def route(path: str, method: str, do: Callable[[Desk, Request], Awaitable[Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await do(desk, request)
            except CarvaeError as error:
                raise Refusal(400, str(error)) from None

        return Route(path, endpoint, methods=[method])

    routes = [
        route("/", "GET", page),
        route("/assets/{name}", "GET", asset),
        route("/api/about", "GET", tell_about),
        route("/api/jobs", "GET", list_jobs),
        route("/api/jobs", "POST", add_job),
        route("/api/jobs/{job}", "GET", tell_job),
        route("/api/jobs/{job}", "DELETE", remove_job),
        route("/api/jobs/{job}/files/{number}", "PUT", receive_file),
        route("/api/jobs/{job}/start", "POST", start_job),
        route("/api/jobs/{job}/cancel", "POST", cancel_job),
        route("/jobs/{job}/report", "GET", show_report),
        route("/jobs/{job}/files/{key}", "GET", download),
    ]
    handlers = {404: _not_found, 405: _not_found, Refusal: _refused, Exception: _fault}
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), site)


async def page(desk: Desk, request: Request) -> Response:
    """The page; with the token in the address, and a session for who has none yet."""
    response = FileResponse(ASSETS / "index.html", media_type=KINDS[".html"])
    if session := request.state.new_session:
        response.set_cookie(desk.site.cookie, session, httponly=True, samesite="strict")
    return response


async def asset(desk: Desk, request: Request) -> Response:
    """A script or a style; only what was built is there to be had."""
    name = str(request.path_params["name"])
    built = {path.name: path for path in ASSETS.iterdir() if path.suffix in KINDS}
    if name not in built:
        raise Refusal(404, "There is no such file.")
    return FileResponse(built[name], media_type=KINDS[built[name].suffix])


async def tell_about(desk: Desk, request: Request) -> Response:
    """Models, version and limits."""
    return JSONResponse(desk.about)


async def list_jobs(desk: Desk, request: Request) -> Response:
    """The jobs that this browser began."""
    own = [job for job in desk.jobs.by_id.values() if job.owner == request.state.session]
    shown = ("id", "name", "state", "created", "error")
    told = [job.to_dict(desk.workers.ahead(job)) for job in own]
    return JSONResponse({"jobs": [{key: job[key] for key in shown} for job in told]})


async def add_job(desk: Desk, request: Request) -> Response:
    """Announce files, or ask for the demo."""
    wanted = await _json(request)
    model = wanted.get("model") or next(iter(desk.workers.models))
    if not isinstance(model, str) or model not in desk.workers.models:
        raise Refusal(400, "There is no such model here; choose one of the list.")
    files = [] if wanted.get("demo") is True else _files(wanted.get("files"))
    job = desk.jobs.add(request.state.session, model, files)
    if job.demo:
        desk.workers.look(job)
    return desk.told(job)


async def tell_job(desk: Desk, request: Request) -> Response:
    """How far a job is."""
    return desk.told(desk.job(request))


async def remove_job(desk: Desk, request: Request) -> Response:
    """Forget a job and its files."""
    job = desk.job(request)
    if job.state not in ENDED:
        await desk.workers.cancel(job)
    desk.jobs.remove(job)
    return JSONResponse({})


async def start_job(desk: Desk, request: Request) -> Response:
    """Label the cells of a job that was looked at."""
    job = desk.job(request)
    if job.state is not State.READY:
        raise Refusal(409, f"This job is {job.state}, so it cannot be started.")
    desk.workers.run(job)
    return desk.told(job)


async def cancel_job(desk: Desk, request: Request) -> Response:
    """End a job."""
    job = desk.job(request)
    if job.state not in ENDED:
        await desk.workers.cancel(job)
    return desk.told(job)


async def receive_file(desk: Desk, request: Request) -> Response:
    """Take in the bytes of one announced file."""
    job, given = desk.job(request), str(request.path_params["number"])
    number = int(given) if re.fullmatch("[0-9]{1,6}", given) else len(job.uploads)
    if job.state is not State.UPLOADING or number >= len(job.uploads) or job.uploads[number].received:
        raise Refusal(409, "This file is not awaited here.")
    upload, limits = job.uploads[number], desk.site.limits
    if request.headers.get("content-length", str(upload.size)) != str(upload.size):
        raise Refusal(413, f"{upload.given} was announced with {size_text(upload.size)}, and is of another size.")
    desk.jobs.need_room(upload.size)
    try:
        await asyncio.wait_for(desk.receiving.acquire(), limits.upload_wait_s)
    except TimeoutError:
        raise Refusal(503, "Others are uploading at the moment; try again in a minute.") from None
    try:
        await _receive(desk, request, upload)
    except (ClientDisconnect, Refusal, OSError) as error:
        broken = (
            f"The upload of {upload.given} broke off after {size_text(upload.received)} of {size_text(upload.size)}"
        )
        reason = error.strerror if isinstance(error, OSError) and error.strerror else ""
        if job.state is State.UPLOADING:
            job.end(State.FAILED, f"{broken}{f' ({reason})' if reason else ''}; give the file again.")
        raise error if isinstance(error, Refusal) else Refusal(400, job.error) from None
    finally:
        desk.receiving.release()
    if job.state is State.UPLOADING and all(upload.sha256 for upload in job.uploads):
        desk.workers.look(job)
    return desk.told(job)


async def _receive(desk: Desk, request: Request, upload: Upload) -> None:
    """Write a body to its place as it comes: no more than was announced, and not too slowly."""
    limits, begun, digest, waiting = desk.site.limits, time.monotonic(), hashlib.sha256(), bytearray()
    upload.target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with upload.target.open("xb") as file:
        async for block in request.stream():
            upload.received += len(block)
            if upload.received > upload.size:
                raise Refusal(413, f"{upload.given} is larger than was announced.")
            passed = time.monotonic() - begun
            if passed > limits.grace_s and upload.received < limits.least_rate * (passed - limits.grace_s):
                raise Refusal(408, f"{upload.given} came too slowly; try again.")
            waiting += block
            if len(waiting) >= MIB:
                await asyncio.to_thread(_store, file.write, digest.update, bytes(waiting))
                waiting.clear()
        _store(file.write, digest.update, bytes(waiting))
    if upload.received != upload.size:
        raise ClientDisconnect
    upload.sha256 = digest.hexdigest()


def _store(write: Callable[[bytes], object], update: Callable[[bytes], object], block: bytes) -> None:
    write(block)
    update(block)


async def show_report(desk: Desk, request: Request) -> Response:
    """The report, without any right on this page."""
    path = _result(desk, request, "report")
    headers = {"content-security-policy": REPORT_CSP, "x-frame-options": "SAMEORIGIN"}
    return FileResponse(path, media_type=KINDS[".html"], headers=headers)


async def download(desk: Desk, request: Request) -> Response:
    """A result to keep."""
    path = _result(desk, request, str(request.path_params["key"]))
    headers = {"content-security-policy": "sandbox; default-src 'none'"}
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers=headers)


def _result(desk: Desk, request: Request, key: str) -> Path:
    path = desk.job(request).results.get(key)
    if path is None or not path.is_file():
        raise Refusal(404, "There is no such result; is the job done?")
    return path


def _files(given: object) -> list[tuple[str, int]]:
    """Names and sizes of the files that a client announces."""
    files = given if isinstance(given, list) and given else None
    if files is None or not all(isinstance(f, dict) for f in files):
        raise Refusal(400, "No file was given.")
    named = [(f.get("name"), f.get("size")) for f in files]
    if not all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in named):
        raise Refusal(400, "A file was announced without its name or size.")
    # half of a surrogate pair, as a name on Windows may hold, can be told to nobody
    return [(str(name).encode("utf-8", "replace").decode(), int(size)) for name, size in named]


async def _json(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal(415, "This page takes JSON.")
    try:
        wanted = await request.json()
    except (ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict):
        raise Refusal(400, "This request cannot be read.")
    return wanted


async def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "There is nothing here."}, status_code=404)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"error": error.sentence}, status_code=error.status, headers={"connection": "close"})


async def _fault(request: Request, error: Exception) -> Response:
    sentence = "The page failed; that is a fault of carvae, and what it says in its terminal tells more."
    return JSONResponse({"error": sentence}, status_code=500, headers={"connection": "close"})
