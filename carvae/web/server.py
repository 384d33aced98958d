"""The server's frame: a private folder that is gone with it, a socket, and requests that may not dawdle."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from carvae.errors import ConfigError
from carvae.web.limits import Limits

PREFIX, HELD = "carvae-app-", "held"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
EXPOSED = (
    "--host {host} would let other machines reach this page, and what they send and get, patients' data and the token "
    "among it, would travel unencrypted; keep the default and reach it from elsewhere through `ssh -L {port}:127.0.0.1:"
    "{port} THIS_MACHINE`, or add --expose if the network is yours alone"
)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for this process alone, gone in the end; what a killed server left behind goes first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if left.stat().st_uid == os.getuid() and not left.is_symlink():
                _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    lock = os.open(folder / HELD, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def listen(host: str, port: int, *, expose: bool) -> socket.socket:
    """A socket at an address of this machine; raises ConfigError where that cannot or should not be."""
    if host not in LOOPBACK and not expose:
        raise ConfigError(EXPOSED.format(host=host, port=port))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()  # the address is told before the server runs: who is quick waits and is not refused
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"nothing can listen at {host}:{port} ({error.strerror or error}); choose another --port, or 0 for any"
        ) from None
    return listening


def names_of(host: str, port: int) -> frozenset[str]:
    """The ``host:port`` by which a browser may call this page."""
    names = {"127.0.0.1", "localhost", "[::1]", host if ":" not in host else f"[{host}]"}
    if host not in LOOPBACK:
        own = socket.gethostname()
        names |= {own, socket.getfqdn()}
        with suppress(OSError):
            names |= {str(found[4][0]) for found in socket.getaddrinfo(own, None, socket.AF_INET)}
    return frozenset(f"{name}:{port}".lower() for name in names)


class TimedProtocol(H11Protocol):
    """Closes a connection whose request's headers take too long; uvicorn itself would wait for ever."""

    header_s = Limits().header_s
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self.timer = self.loop.call_later(self.header_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Stop the clock where the headers are complete, and start it where the next ones have begun."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self.timer is None and not self.transport.is_closing():
            self.timer = self.loop.call_later(self.header_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def server_of(application: ASGIApp, limits: Limits) -> uvicorn.Server:
    """A server of the page, to be run on a socket."""
    return uvicorn.Server(
        uvicorn.Config(
            application,
            http=type("Protocol", (TimedProtocol,), {"header_s": limits.header_s}),
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
        )
    )


def serve(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; returns then, or with SystemExit, so that what is open is closed."""
    # uvicorn ends in good order at SIGTERM and then raises it anew, which would leave the folder behind.
    before = {sign: signal.signal(sign, _exit) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with suppress(KeyboardInterrupt):
            server.run([listening])
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _exit(number: int, _: FrameType | None) -> None:
    if number == signal.SIGHUP:  # which uvicorn does not know
        os.kill(os.getpid(), signal.SIGTERM)
        return
    sys.exit(0)
