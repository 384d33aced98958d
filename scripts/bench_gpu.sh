#!/usr/bin/env bash
# Measures carvae on one NVIDIA GPU, unattended, in under 8 minutes: bash scripts/bench_gpu.sh [FOLDER OF WHEELS]
# It needs the repository and either a folder of wheels (carvae's libraries with a CUDA build of torch, and pytest and
# hypothesis; nothing is downloaded) or a Python that has them already: CARVAE_PYTHON, or python3.
# Triton wants a C compiler (gcc) on its first call. The table comes last, then one line of JSON;
# more arguments go to scripts/bench_gpu.py: CARVAE_BENCH="--device cpu --cells 3000 --seconds 1" tries it out.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stop() { printf 'carvae: %s\n' "$*" >&2; exit 1; }

python="${CARVAE_PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || stop "$python is not Python 3.11 or later; name one in CARVAE_PYTHON."
if [ $# -gt 0 ]; then
    [ -d "$1" ] || stop "$1 is not a folder of wheels."
    env="$(mktemp -d)"
    trap 'rm -rf "$env"' EXIT
    "$python" -m venv "$env"
    python="$env/bin/python"
    "$python" -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tests = [need for need in project["optional-dependencies"]["test"] if need.startswith(("pytest", "hypothesis"))]
print("\n".join(project["dependencies"] + tests))' >"$env/needed.txt"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$1" -r "$env/needed.txt" ||
        stop "the wheels in $1 do not suffice."
fi
export PYTHONPATH="$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" MPLBACKEND=Agg WANDB_MODE=offline
"$python" -c 'import carvae, torch, scvi, lightning, pytest, hypothesis' ||
    stop "$python lacks libraries of carvae; give a folder of wheels, or name another Python in CARVAE_PYTHON."
# shellcheck disable=SC2086 # several arguments
timeout 600 "$python" scripts/bench_gpu.py ${CARVAE_BENCH:-}
