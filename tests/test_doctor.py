"""What `carvae doctor` says of a machine, and of what is not there."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from trained import carvae

from carvae import __version__, doctor


def found() -> dict[str, doctor.Finding]:
    return {f.what: f for f in doctor.examine()}


def test_the_report_and_its_json_say_the_same() -> None:
    said = carvae("doctor")
    assert said.code == 0
    facts = json.loads(carvae("doctor", "--json").out)
    assert facts["carvae"].startswith(__version__)
    assert facts["torch"] == importlib.metadata.version("torch")
    for what, text in facts.items():
        if what != "kernel cache":  # it grows while others compile
            assert any(line.split("  ")[0] == what and text in line for line in said.out.splitlines()), what


def test_what_is_absent_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in {"zarr", "captum"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = found()
    assert (findings["zarr"].found, findings["torch"].remedy) == ("not installed", "")
    assert "pip install zarr" in findings["zarr"].remedy
    if "extra explain" in findings:  # the metadata of an older installation may not know it
        assert findings["extra explain"].found == "captum not installed"
        assert "carvae[explain]" in findings["extra explain"].remedy


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("dask>=2025.1; extra == 'scale'", "dask"), ("carvae[scale]; extra == 'all'", ""), ("a-b (>=2)", "a-b")],
)
def test_names_of_requirements(requirement: str, name: str) -> None:
    assert doctor._name(requirement) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU hears")
@pytest.mark.parametrize("built", [None, "12.8"])
def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, built: str | None) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    gpu = found()["GPU"]
    assert ("CPU build" in gpu.found) == (built is None)
    assert gpu.remedy


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "absent" / "deeper"))
    assert "cannot be written" in found()["kernel cache"].found
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert found()["kernel cache"].remedy == ""
