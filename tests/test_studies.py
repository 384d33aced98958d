"""The catalogue is in order and marked, and downloads are whole or not there, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from trained import carvae

from carvae import studies
from carvae.config import Config, packaged
from carvae.data import catalogue
from carvae.data.catalogue import Study, StudyFile, entries, find, geo_files
from carvae.errors import CatalogueError

CONTENT = bytes(range(256)) * 1000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
CUT = 6 * studies.CHUNK


@dataclass
class Server:
    """Serves one file, and misbehaves as it is told."""

    url: str = ""
    cuts: int = 0
    """Answers that stop at `CUT` bytes."""
    mark: str | None = '"one"'
    status: int = 200
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    takes_ranges: bool = True
    content: bytes = CONTENT


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            same = self.headers.get("If-Range") == state.mark
            start = int(asked[6:-1]) if asked and state.takes_ranges and same else 0
            body, total = state.content[start:], len(state.content)
            if state.status != 200:
                self.send_error(state.status)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if state.mark:
                self.send_header("ETag", state.mark)
            self.end_headers()
            if state.cuts:
                state.cuts -= 1
                self.wfile.write(body[:CUT])
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/counts.tar"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch, server: Server) -> Any:
    """Makes a catalogue of one study with the server's file."""

    def make(checksum: str | None = SHA256, **more: Any) -> None:
        file = StudyFile(name="counts.tar", url=server.url, checksum=checksum)
        known: dict[str, Any] = {"reference": "r", "disease": "d", "target": "t", "product": "p"}
        known |= {"checked": "seen", "files": (file,)}
        monkeypatch.setattr(catalogue, "entries", lambda: {"some_2020": Study(**(known | more))})

    make()
    return make


def test_the_catalogue_is_in_order_and_nothing_unverified_has_an_accession() -> None:
    known = entries()
    assert len(known) > 45
    of = [accession for study in known.values() for accession in study.accessions]
    assert len(of) == len(set(of))
    form = r"GSE\d{5,6}|phs\d{6}|EGA[RS]\d{11}|PRJNA\d+|E-MTAB-\d+|zenodo\.\d+|10\.\S+|(github\.com|purl\.)\S+"
    assert [a for a in of if not re.fullmatch(form, a)] == []
    assert [name for name, s in known.items() if s.checked == "unverified" and s.accessions] == []
    for name, study in known.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        if study.study:  # a reader can put it into a config
            Config.parse({"ingest": {"studies": {name: {"path": "x"} | study.study}}})


def test_the_list_of_the_peers_is_all_there(request: pytest.FixtureRequest) -> None:
    listed = request.config.rootpath.parent / "shared" / "peers" / "cart_studies.md"
    if not listed.exists():
        pytest.skip(f"{listed} is not here")
    text = listed.read_text(encoding="utf-8").split("# Knowledge of the field")[0]
    of = {a for study in entries().values() for a in study.accessions}
    assert set(re.findall(r"GSE\d+|phs\d+|E-MTAB-\d+", text)) <= of


def test_the_list_needs_no_heavy_library_and_shows_what_is_unverified() -> None:
    code = "import sys; from carvae.studies import table; print(table())"
    code += "; print([m for m in ('torch', 'numpy', 'pooch') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"
    (line,) = [line for line in said.splitlines() if line.startswith("bai_2021")]
    assert "unverified" in line
    assert max(map(len, said.splitlines())) < 220


def test_a_study_is_found_by_name_or_accession_and_a_wrong_name_gets_the_nearest() -> None:
    assert find("GSE151511")[0] == find("Deng_2020")[0] == "deng_2020"
    answer = carvae("studies", "show", "deng2020")
    assert answer.code == 1
    assert answer.err.strip() == (
        "carvae: the catalogue has no study 'deng2020'; the nearest is 'deng_2020'; `carvae studies list` shows all"
    )


def test_the_shell_completes_verbs_and_studies() -> None:
    for typed, offered in (("carvae ann", ["annotate"]), ("carvae studies show deng", ["deng_2020"])):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_CARVAE_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-m", "carvae"], env=os.environ | words, capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == offered


def test_what_is_shown_can_be_put_into_a_config() -> None:
    shown = carvae("studies", "show", "anderson_2023").out
    config = Config.parse(yaml.safe_load(shown.split("for your config:")[1]))
    assert config.ingest.studies["anderson_2023"].mapping == "carpall"
    assert "UNVERIFIED" in carvae("studies", "show", "bai_2021").out
    controlled = carvae("studies", "show", "haradhvala_2022").out
    assert "controlled access" in controlled
    assert "dbgap.ncbi.nlm.nih.gov" in controlled


def test_geo_and_zenodo_say_themselves_where_files_are(
    server: Server, monkeypatch: pytest.MonkeyPatch, lists: Any, tmp_path: Path
) -> None:
    (file,) = geo_files("GSE151511")
    assert file.url == "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE151nnn/GSE151511/suppl/GSE151511_RAW.tar"
    assert geo_files("phs002922") == ()
    listing = f'{{"files": [{{"key": "a.h5ad", "checksum": "{MD5}", "links": {{"self": "{server.url}"}}}}]}}'
    monkeypatch.setattr(studies, "ZENODO_API", server.url + "?")
    server.content = listing.encode()
    assert studies._zenodo("1")[0] == StudyFile(name="a.h5ad", url=server.url, checksum=MD5)
    server.content = listing.replace("a.h5ad", "../../a.h5ad").encode()
    with pytest.raises(CatalogueError, match="does not list files as Zenodo does"):
        studies._zenodo("1")


@pytest.mark.parametrize("checksum", [SHA256, MD5, None])
def test_a_file_comes_whole_and_once(server: Server, lists: Any, tmp_path: Path, checksum: str | None) -> None:
    lists(checksum)
    (fetched,) = studies.fetch("some_2020", tmp_path)
    assert fetched.file.read_bytes() == CONTENT
    assert f"sha256:{fetched.sha256}" == SHA256
    assert fetched.known == (checksum is not None)
    studies.fetch("some_2020", tmp_path)
    assert len(server.ranges) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["counts.tar"]


@pytest.mark.usefixtures("lists")
def test_a_cut_connection_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cuts = 2
    (fetched,) = studies.fetch("some_2020", tmp_path)
    assert fetched.file.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["counts.tar"]


@pytest.mark.usefixtures("lists")
def test_after_too_many_cuts_a_second_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.cuts, server.content = 3, CONTENT * 2
    with pytest.raises(CatalogueError, match=rf"3 tries \(.*\); {3 * CUT:,} bytes are kept: run the same again"):
        studies.fetch("some_2020", tmp_path)
    assert not (tmp_path / "counts.tar").exists()
    with pytest.raises(CatalogueError, match="does not have the checksum"):  # all of it comes, but it is another file
        studies.fetch("some_2020", tmp_path)
    assert server.ranges[-1] == f"bytes={3 * CUT}-"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("lists")
def test_a_file_that_changed_in_between_is_read_anew(server: Server, tmp_path: Path) -> None:
    server.cuts, server.content = 3, bytes(len(CONTENT))
    with pytest.raises(CatalogueError):
        studies.fetch("some_2020", tmp_path)
    server.content, server.mark = CONTENT, '"two"'
    assert studies.fetch("some_2020", tmp_path)[0].file.read_bytes() == CONTENT


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("how", ["no ranges", "no mark"])
def test_a_server_that_cannot_go_on_is_asked_anew(server: Server, tmp_path: Path, how: str) -> None:
    server.cuts, server.takes_ranges, server.mark = 1, how != "no ranges", None if how == "no mark" else '"one"'
    assert studies.fetch("some_2020", tmp_path)[0].file.read_bytes() == CONTENT


@pytest.mark.usefixtures("lists")
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, part: Path) -> bool:
        part.write_bytes(CONTENT[:CUT])
        raise OSError(errno.ENOSPC, "No space left on device", str(part))

    with monkeypatch.context() as patched:
        patched.setattr(studies, "_receive", full)
        with pytest.raises(CatalogueError, match=r"no space is left on the disk of .* 98,304 bytes of counts"):
            studies.fetch("some_2020", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".counts.tar.part"]
    assert studies.fetch("some_2020", tmp_path)[0].file.read_bytes() == CONTENT


@pytest.mark.usefixtures("lists")
def test_an_old_file_stays_where_the_new_one_is_wrong(server: Server, tmp_path: Path) -> None:
    (tmp_path / "counts.tar").write_bytes(b"old")
    server.content = b"altered"
    with pytest.raises(CatalogueError, match="does not have the checksum sha256:"):
        studies.fetch("some_2020", tmp_path)
    assert (tmp_path / "counts.tar").read_bytes() == b"old"


@pytest.mark.usefixtures("lists")
def test_an_answer_of_error_and_no_answer_are_one_sentence(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(CatalogueError, match=r"answers 404 Not Found"):
        studies.fetch("some_2020", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_controlled_or_unknown_says_what_it_needs(lists: Any, tmp_path: Path) -> None:
    lists(files=(), accessions=("phs002931",))
    with pytest.raises(CatalogueError, match=r"nothing of 'some_2020' can be fetched.*eRA Commons"):
        studies.fetch("some_2020", tmp_path / "new")
    lists(files=())
    with pytest.raises(CatalogueError, match="it has no accession here"):
        studies.fetch("some_2020", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_wrong_entry_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = packaged("studies/deng_2020.yaml").read_text(encoding="utf-8")
    (tmp_path / "a.yaml").write_text(text.replace("checked: seen", "checked: perhaps"))
    (tmp_path / "b.yaml").write_text(text + "patient: 3\n")
    monkeypatch.setattr(catalogue, "_folder", lambda: tmp_path)
    with pytest.raises(CatalogueError, match=r"(?s)2 problems.*a\.yaml: checked.*b\.yaml: patient is not a key"):
        entries()
