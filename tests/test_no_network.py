"""No verb asks the network: whatever this process connects to, or looks a name up for, is this machine.

The whole suite without a network: ``scripts/no_network.sh``.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from trained import World, carvae, settings, write_config

OUTGOING = {
    "socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
    "http.client.connect",
}  # fmt: skip
HERE = {"127.0.0.1", "::1", "localhost", None, ""}
_heard: list[tuple[str, object]] = []


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event in OUTGOING:
        address = arguments[1] if event in {"socket.connect", "socket.sendto"} else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        own = event == "socket.connect" and isinstance(address, str | bytes)  # a socket in the file system
        if not own and host not in HERE:
            _heard.append((event, address))


sys.addaudithook(_listen)  # for the whole process: a hook cannot be taken away


@pytest.fixture
def heard() -> Iterator[list[tuple[str, object]]]:
    """What was asked of other machines since the test began."""
    _heard.clear()
    yield _heard
    _heard.clear()


def test_what_goes_out_is_heard(heard: list[tuple[str, object]]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        with suppress(OSError):  # where no network is
            asked.connect(("192.0.2.1", 9))  # of a net for examples; a datagram's connect sends nothing
        asked.connect(("127.0.0.1", 9))
    assert heard == [("socket.connect", ("192.0.2.1", 9))]


def test_a_study_goes_from_ingest_to_its_report_without_a_network(
    world: World, tmp_path: Path, heard: list[tuple[str, object]]
) -> None:
    train = {"max_epochs": 1, "min_steps": 0, "wandb": "offline"}
    config = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m", train=train))
    asked = (world.query_path, "--model", tmp_path / "m")
    for command in (
        ("train", config),
        ("annotate", *asked, "--out", tmp_path / "A.h5ad", "--report", tmp_path / "A.html", "report.max_cells=100"),
        ("embed", *asked, "--out", tmp_path / "E.csv"),
        ("export", tmp_path / "m", "--share", "--out", tmp_path / "s"),
        ("hub", "export", tmp_path / "m", "--out", tmp_path / "repo", "--licence", "mit"),
        ("studies", "list"),
        ("doctor",),
    ):
        answer = carvae(*command)
        assert answer.code == 0, answer.err
    assert heard == []
