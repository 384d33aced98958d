"""The core tests under other versions: ``python scripts/matrix.py [CASE ...] [--torch 2.13.0] [--keep FOLDER]``.

A case is a version of Python and of the direct dependencies: ``lowest`` that pyproject.toml allows, or ``highest`` that
the registry has. Each gets an environment of its own under FOLDER; a Python that is not on this machine is skipped.
``uv`` resolves (``pip install uv``), pip installs. ``--torch`` holds torch, whose builds take gigabytes. The last line
of each case says what came of it; the exit code is 1 where tests failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "lowest-3.11": ("3.11", "lowest-direct"),
    "highest-3.11": ("3.11", "highest"),
    "highest-3.12": ("3.12", "highest"),
    "highest-3.13": ("3.13", "highest"),
    "highest-3.14": ("3.14", "highest"),
}
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "bundle",
        "config",
        "counts",
        "genes",
        "kept_bundles",
        "pipeline",
        "predict",
        "readers",
        "store",
        "vae",
    )
)
OF_TORCH = ("cuda-", "nvidia-", "triton==")
"""Starts of the names of what a CUDA build of torch wants."""
TOOLS = ("hypothesis", "pytest", "pytest-xdist")


def interpreter(version: str) -> str | None:
    """A Python of this version, on the path or kept by pyenv."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


def run(*command: object) -> None:
    """Run a command; raises CalledProcessError."""
    subprocess.run([*map(str, command)], cwd=ROOT, check=True)


def environment(folder: Path, python: str, version: str, resolution: str, torch: str) -> Path:
    """An environment with the dependencies of a case; returns its Python."""
    held = folder / "torch.txt"
    held.parent.mkdir(parents=True, exist_ok=True)
    held.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
    listed = folder / "requirements.txt"
    uv = shutil.which("uv") or sys.exit("uv is not here; pip install uv")
    wanted = ("--resolution", resolution, "--python-version", version, "-c", held)
    run(uv, "pip", "compile", "pyproject.toml", *wanted, "-q", "--no-header", "--no-annotate", "-o", listed)
    if not (folder / "bin" / "python").exists():
        run(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    if torch:  # its build brings what it needs of these, a CPU build nothing
        lines = listed.read_text(encoding="utf-8").splitlines(keepends=True)
        listed.write_text("".join(line for line in lines if not line.startswith(OF_TORCH)), encoding="utf-8")
    run(own, "-m", "pip", "install", "-q", "-r", listed, *TOOLS)
    return own


def case(name: str, keep: Path, torch: str) -> str:
    """Make the environment of a case, run the tests, and say what came of it."""
    version, resolution = CASES[name]
    python = interpreter(version)
    if python is None:
        return f"skipped: no Python {version} here"
    own = environment(keep / name, python, version, resolution, torch)
    command = [str(own), "-m", "pytest", "-q", "-n0", "-W", "default", *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    (keep / f"{name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    return f"{'passed' if done.returncode == 0 else 'FAILED'}: {last}"


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--torch", default="", help="version of torch, by default as resolved")
    parser.add_argument("--keep", type=Path, help="folder of the environments; by default a temporary one")
    given = parser.parse_args()
    if unknown := sorted(set(given.cases) - set(CASES)):
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.cases or CASES:
            try:
                said = case(name, given.keep or Path(scratch), given.torch)
            except subprocess.CalledProcessError as error:
                said = f"FAILED: {' '.join(error.cmd[:6])} ... ended with {error.returncode}"
            failed |= said.startswith("FAILED")
            print(f"{name}: {said}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
