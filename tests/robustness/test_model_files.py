"""Cases A and F01 to F04: model files that are hostile, damaged, or of something else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Says, Small
from test_bad_input import assert_refused
from trained import carvae, sha256

from carvae.errors import BundleError
from carvae.model.bundle import load
from carvae.model.bundle_files import FILES, NO_HASH


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def rehashed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Make all hashes right, as somebody could who wants a changed bundle to pass."""
    file = folder / "model.json"
    spec = json.loads(file.read_text())
    spec["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    spec["sha256"] = NO_HASH
    change(spec)
    text = json.dumps(spec, indent=1)
    file.write_text(text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1))


@pytest.mark.case("A01", "A02", "A03")
@pytest.mark.parametrize("place", ["weights.safetensors", "metrics.json", "card.md", "model.json"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_any_file_of_a_model_is_never_run(
    small: Small, model: Path, tmp_path: Path, place: str, form: str, says: Says
) -> None:
    payload = io.BytesIO()
    (torch.save if form == "torch" else pickle.dump)(Bomb(tmp_path / "canary"), payload)
    (model / place).write_bytes(payload.getvalue())
    if place != "model.json":
        rehashed(model)
    answers = [
        small.annotate(small.query_path, tmp_path / "A.h5ad", model=model),
        carvae("map", small.query_path, "--model", model, "--out", tmp_path / "B"),
    ]
    for answer in answers:
        assert_refused(answer, str(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # no canary, no output
    says(answers[0].err)


@pytest.mark.case("A04")
def test_a_model_is_never_fetched(small: Small, tmp_path: Path, says: Says) -> None:
    answer = carvae("annotate", small.query_path, "--model", "http://127.0.0.1:9/m", "--out", tmp_path / "A.csv")
    assert_refused(answer, "is no model bundle", "carvae train")
    says(answer.err)


@pytest.mark.case("A10")
def test_a_model_of_scvi_tools_is_told_apart(small: Small, tmp_path: Path, says: Says) -> None:
    (tmp_path / "scvi").mkdir()
    torch.save({"model_state_dict": {}, "attr_dict": {"registry_": {}}}, tmp_path / "scvi" / "model.pt")
    answer = small.annotate(small.query_path, tmp_path / "A.csv", model=tmp_path / "scvi")
    assert_refused(answer, "is no model bundle", "no model.json in it")
    says(answer.err)


@pytest.mark.case("A11")
def test_genes_put_into_another_order_by_hand(small: Small, model: Path, tmp_path: Path, says: Says) -> None:
    file = model / "model.json"
    first, second = (json.dumps(gene) for gene in json.loads(file.read_text())["genes"][:2])
    text = file.read_text()
    file.write_text(text.replace(first, "?", 1).replace(second, first, 1).replace("?", second, 1))
    answer = small.annotate(small.query_path, tmp_path / "A.csv", model=model)
    assert_refused(answer, "model.json was changed after the model was saved", "copy the folder again")
    says(answer.err)


def hostile_headers(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Weights whose header lies."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")

    def with_header(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    yield from {"nothing": b"", "seven bytes": content[:7], "cut": content[:-1]}.items()
    yield "a header of 2^63", (2**63).to_bytes(8, "little") + content[8:]
    yield "a header longer than the file", (2 * len(content)).to_bytes(8, "little") + content[8:]
    yield "more behind it", content + b"PK\x05\x06" + bytes(18)
    yield "another tensor", with_header(header | {"../x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    for what, change in {
        "overlap": {"data_offsets": [0, 8]},
        "negative": {"data_offsets": [-8, 0]},
        "beyond the file": {"data_offsets": [0, 1 << 40]},
        "a shape of a terabyte": {"shape": [1 << 40]},
        "a shape that overflows": {"shape": [1 << 33, 1 << 33]},
        "a negative shape": {"shape": [-1]},
        "an unknown type": {"dtype": "F128"},
        "another type": {"dtype": "I64"},
    }.items():
        yield what, with_header(header | {name: header[name] | change})


@pytest.mark.case("A14")
def test_weights_that_lie_about_themselves_take_no_memory(model: Path, says: Says) -> None:
    good = (model / "weights.safetensors").read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = []
    for what, bad in hostile_headers(good):
        (model / "weights.safetensors").write_bytes(bad)
        rehashed(model)
        with pytest.raises(BundleError) as caught:
            load(model)
        assert "\n" not in str(caught.value), what
        refused.append(what)
    with (model / "weights.safetensors").open("wb") as file:
        file.truncate(5 << 30)  # five gigabytes that take no room on the disk
        file.truncate(64 << 20)
    with pytest.raises(BundleError, match="was changed after the model was saved"):
        load(model)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert peak < 200, f"{peak} MB"
    says(f"{len(refused)} lying headers refused, peak memory +{peak} MB; the last: {caught.value}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", b"[]"),
        ("metrics.json", b"[" * 200_000),
        ("metrics.json", b'{"a": 1, "a": 2}'),
        ("metrics.json", b'{"a": ' + b"9" * 10_000 + b"}"),
        ("card.md", b"\xff\xfe"),
        ("model.json", b"[" + b"[]," * 6_000_000 + b"[]]"),
    ],
)
def test_texts_of_a_model_that_are_none(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    if name != "model.json":
        rehashed(model)
    with pytest.raises(BundleError):
        load(model)


@pytest.mark.case("F04")
def test_a_key_that_is_there_twice_is_not_read_in_two_ways(model: Path, says: Says) -> None:
    file = model / "model.json"
    text = file.read_text().replace('"format"', '"genes": ["EVIL"],\n "format"', 1)
    own = json.loads(text)["sha256"]
    text = text.replace(own, NO_HASH, 1)
    file.write_text(text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1))
    with pytest.raises(BundleError, match="is no model description") as caught:
        load(model)
    says(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(model: Path, kind: str) -> None:
    for name in ("weights.safetensors", "model.json"):
        kept = (model / name).read_bytes()
        (model / name).unlink()
        if kind == "fifo":
            os.mkfifo(model / name)
        elif kind == "device":
            (model / name).symlink_to("/dev/zero")
        else:
            (model / name).mkdir()
        with pytest.raises(BundleError, match=r"missing|no model bundle"):
            load(model)
        (model / name).rmdir() if kind == "folder" else (model / name).unlink()
        (model / name).write_bytes(kept)
    load(model)


def zip_slip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("model.json", "../../escaped", "/escaped", "a\\..\\..\\escaped"):
            archive.writestr(name, "{}")


def zip_link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, str(path.parent))
        archive.writestr("link/escaped", "x")


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model.json", "w") as file:
        for _ in range(200):
            file.write(bytes(1 << 20))


def tar_slip(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))


@pytest.mark.case("F01", "F02", "F03")
@pytest.mark.parametrize("build", [zip_slip, zip_link, zip_bomb, tar_slip])
def test_archives_are_never_unpacked(small: Small, tmp_path: Path, build: Callable[[Path], None], says: Says) -> None:
    build(tmp_path / "b.zip")
    before = sha256(tmp_path)
    answer = small.annotate(small.query_path, tmp_path / "A.csv", model=tmp_path / "b.zip")
    assert_refused(answer, "b.zip is no model bundle")
    query = carvae("annotate", tmp_path / "b.zip", "--model", small.model, "--out", tmp_path / "A.csv")
    assert_refused(query, "b.zip")
    assert sha256(tmp_path) == before
    says(answer.err)


@pytest.mark.case("A13", "D14")
def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(small: Small, tmp_path: Path, says: Says) -> None:
    victim, out = tmp_path / "victim.txt", tmp_path / "model"
    victim.write_text("precious")
    out.mkdir()
    (out / "weights.safetensors").symlink_to(victim)
    load(small.model).save(out)
    assert victim.read_text() == "precious"
    assert not (out / "weights.safetensors").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "victim.txt"]
    load(out)
    says("the folder is replaced as a whole; the file that the link pointed to is untouched")
