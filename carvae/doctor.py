"""What this machine has, for a report of a fault and for who wonders which parts of carvae will run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from carvae import __version__

LIBRARIES = ("torch", "scvi-tools", "lightning", "anndata", "scanpy", "numpy", "scipy", "numba", "zarr", "wandb")
GIB = 1 << 30
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    remedy: str = ""
    """What to do about it; empty where all is well."""


def examine() -> list[Finding]:
    """Look at Python, libraries, processor, memory, GPU and caches; nothing is changed."""
    return [
        Finding("carvae", f"{__version__} in {Path(__file__).parent}"),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        *_processor(),
        *map(_library, LIBRARIES),
        *_extras(),
        *_gpu(),
        _numba_cache(),
        _space(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as text, with remedies below their lines."""
    width = max(len(f.what) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.what.ljust(width)}  {f.found}")
        if f.remedy:
            lines.append(f"{' ' * width}  -> {f.remedy}")
    return "\n".join(lines)


def _processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = ", ".join(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ)
    found = [Finding("cores", f"{cores} usable{f' ({said})' if said else ''}")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found.append(Finding("memory", f"{memory / GIB:.1f} GiB"))
    return found


def _library(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}; carvae needs it")


def _extras() -> list[Finding]:
    """The optional parts, by what carvae's metadata says of them."""
    try:
        known = importlib.metadata.metadata("carvae")
    except importlib.metadata.PackageNotFoundError:
        return [Finding("extras", "carvae itself is not installed", "pip install -e . in its folder")]
    found = []
    needed = importlib.metadata.requires("carvae") or []
    for extra in known.get_all("Provides-Extra") or []:
        if extra in {"all", "test", "docs"}:
            continue
        names = [_name(line) for line in needed if f"extra == '{extra}'" in line.replace('"', "'")]
        absent = [name for name in names if name and not _is_there(name)]
        remedy = f"pip install 'carvae[{extra}]' if you need it" if absent else ""
        found.append(Finding(f"extra {extra}", f"{', '.join(absent)} not installed" if absent else "ready", remedy))
    return found


def _name(requirement: str) -> str:
    """``dask`` of ``dask>=2025.1; extra == "scale"``; empty where the requirement is a set of extras of carvae."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = match[0] if match else ""
    return "" if name == "carvae" else name


def _is_there(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpu() -> list[Finding]:
    if not _is_there("torch"):
        return []
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return [Finding("GPU", "none for torch, which is a CPU build", "install a CUDA build where there is a GPU")]
        return [Finding("GPU", f"none that torch sees (built for CUDA {built})", "look at nvidia-smi and its driver")]
    from carvae.model.fused import has_compiler

    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        text = f"{device.name}, {device.total_memory / GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
        found.append(Finding(f"GPU {i}", f"{text} (CUDA {torch.version.cuda})"))
    has_triton = importlib.util.find_spec("triton") is not None
    if not (has_triton and has_compiler()):
        needs = "a C compiler" if has_triton else "triton and a C compiler"
        found.append(Finding("kernels", "the plain torch path on GPUs", f"install {needs} for the compiled kernels"))
    return found


def _numba_cache() -> Finding:
    """Where compiled kernels are kept: beside the package, else where numba is told, else in the user's folder."""
    told = os.environ.get("NUMBA_CACHE_DIR")
    place = Path(told) if told else Path(__file__).parent / "model" / "__pycache__"
    if os.access(place if place.exists() else place.parent, os.W_OK):
        kept = sum(file.stat().st_size for file in place.rglob("*.nbc")) if place.exists() else 0
        return Finding("kernel cache", f"{place} ({kept / 1e6:.1f} MB)")
    return Finding(
        "kernel cache", f"{place} cannot be written", "numba then uses your home folder; else set NUMBA_CACHE_DIR"
    )


def _space() -> Finding:
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    return Finding("scratch", f"{place}, {free / GIB:.0f} GiB free", "" if free > GIB else "make room there")
