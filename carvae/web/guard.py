"""What stands before every request: the right host, the right origin, a known browser, bounds of size and time.

A page in another tab, another site that points its name to this machine, and another user of it must get nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carvae.web.limits import Limits

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
SAFE, CHANGING = frozenset({"GET", "HEAD"}), frozenset({"POST", "PUT", "DELETE"})
ENTRANCE = (
    "This page needs the address that `carvae app` printed when it was started, with its token. Copy the whole line, "
    "or start carvae app again."
)


class Refusal(Exception):
    """A request that is not served; the sentence says why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(slots=True)
class Site:
    """Who may talk to this page, and by which names it goes."""

    token: str
    hosts: frozenset[str]
    """``host:port``, in small letters."""
    limits: Limits
    cookie: str = "carvae"
    sessions: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Browsers that showed the token, and when they were seen last."""

    def enter(self, token: str) -> str | None:
        """A new session for who has the token."""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return None
        session = secrets.token_urlsafe(24)
        self.sessions[session] = time.monotonic()
        while len(self.sessions) > self.limits.max_sessions:
            self.sessions.popitem(last=False)
        return session

    def session_of(self, headers: dict[str, str]) -> str | None:
        """The session of a request."""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return None
        if morsel is None or morsel.value not in self.sessions:
            return None
        self.sessions.move_to_end(morsel.value)
        return morsel.value


class Guard:
    """Middleware: `Site` applied to every request."""

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self.app, self.site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, self._bounded(scope, receive), guarded)
        except Refusal as refusal:
            if not started:
                await refuse(guarded, refusal)

    def _admit(self, scope: Scope) -> None:
        """Look at what a request says of itself, and note its session; raises Refusal."""
        names = [name.decode("latin-1").lower() for name, _ in scope["headers"]]
        headers = {name: value.decode("latin-1") for name, (_, value) in zip(names, scope["headers"], strict=True)}
        if names.count("host") != 1 or headers["host"].lower() not in self.site.hosts:
            raise Refusal(421, "This page answers only to the address that `carvae app` printed.")
        method, path = scope["method"], scope["path"]
        if method not in SAFE | CHANGING:
            raise Refusal(405, f"{method} is not used here.")
        entering = path == "/" and method == "GET"
        if method in CHANGING and headers.get("origin", "").lower() not in {f"http://{h}" for h in self.site.hosts}:
            raise Refusal(403, "Another site's page asked for this, and was refused.")
        if not entering and headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            raise Refusal(403, "Another site's page asked for this, and was refused.")
        session, new = self.site.session_of(headers), None
        if entering and session is None:
            tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
            session = new = self.site.enter(tokens[0])
        if session is None and not path.startswith("/assets/"):
            raise Refusal(403, ENTRANCE)
        scope["state"] = {**scope.get("state", {}), "session": session, "new_session": new}

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """The body, which may neither fall silent nor, but for uploads, be large or dawdle."""
        limits, most, begun = self.site.limits, self.site.limits.max_body, time.monotonic()
        upload, received, whole = scope["method"] == "PUT", 0, False

        async def bounded() -> Message:
            nonlocal received, whole
            passed = 0.0 if upload or whole else time.monotonic() - begun
            try:
                message = await asyncio.wait_for(receive(), max(limits.silence_s - passed, 0.001))
            except TimeoutError:
                raise Refusal(408, f"Not all came within {limits.silence_s:.0f} seconds; try again.") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if not upload and received > most:
                raise Refusal(413, "This request is larger than any of this page's.")
            return message

        return bounded


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer with the sentence, for scripts and people alike."""
    body = json.dumps({"error": refusal.sentence}).encode()
    kind = b"application/json"
    if refusal.sentence == ENTRANCE:
        kind, body = b"text/plain; charset=utf-8", f"carvae: {ENTRANCE}\n".encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
