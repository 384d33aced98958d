# Sourced by demo.sh and test.sh: goes to the repository's root, makes .venv there or brings it up to date,
# and puts its commands first on PATH. Needs bash and Python 3.11 to 3.14 (CARVAE_PYTHON names one).
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
stop() { say "carvae: $*" >&2; exit 1; }

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-1}" MPLBACKEND=Agg
if [ ! -t 1 ]; then
    export NO_COLOR=1
    unset FORCE_COLOR CLICOLOR_FORCE PY_COLORS MYPY_FORCE_COLOR
fi

# Sets $python and $version to the first Python that can do the job, or stops with the reason.
find_python() {
    local name reason="no Python was found"
    for name in ${CARVAE_PYTHON:+"$CARVAE_PYTHON"} python3.11 python3.12 python3.13 python3.14 python3; do
        # A command may exist and not run, as pyenv's shims do.
        version="$("$name" -c 'import platform; print(platform.python_version())' </dev/null 2>/dev/null)" || continue
        if ! "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' </dev/null; then
            reason="$name is Python $version"
        elif ! "$name" -c 'import ensurepip, venv' </dev/null 2>/dev/null; then
            reason="$name is Python $version without its venv module (Debian, Ubuntu: apt install python${version%.*}-venv)"
        else
            python="$name"
            return
        fi
    done
    stop "Python 3.11 to 3.14 with venv is needed, but $reason; install one, or name it in CARVAE_PYTHON."
}

install() {
    local log=.venv/install.log note=""
    case "$version" in 3.11.*) ;; *) note=", which are tested on Python 3.11 only" ;; esac
    say "[3/3] installing carvae and its libraries in the versions of constraints.txt$note (minutes at first; log in $log)"
    if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c constraints.txt -e '.[test]' </dev/null >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        stop "the installation failed; the whole log is in $PWD/$log."
    fi
}

prepare() {
    local home wanted
    find_python
    home="Python $version in $PWD"
    wanted="$home, $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat .venv/carvae-stamp 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' </dev/null 2>/dev/null; then
        say "carvae: .venv is up to date (Python $version)"
        return
    fi
    say "[1/3] Python $version ($(command -v "$python"))"
    # What another Python made, or what was moved from another folder, is made anew.
    if [ "$(cat .venv/carvae-home 2>/dev/null)" = "$home" ] && .venv/bin/python -m pip --version </dev/null >/dev/null 2>&1; then
        say "[2/3] keeping .venv, which is out of date"
        rm -f .venv/carvae-stamp
    else
        say "[2/3] making .venv"
        "$python" -m venv --clear .venv </dev/null || stop "$python could not make a virtual environment in $PWD/.venv."
        printf '%s\n' "$home" >.venv/carvae-home
    fi
    install
    printf '%s\n' "$wanted" >.venv/carvae-stamp
}

prepare
export PATH="$PWD/.venv/bin:$PATH"
