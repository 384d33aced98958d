# Sourced by demo.sh and test.sh: goes to the repository's root, makes .venv there or brings it up to date,
# and puts its commands first on PATH. Needs bash and Python 3.11 or newer (CARVAE_PYTHON names one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
stop() { say "carvae: $*" >&2; exit 1; }

unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-1}" MPLBACKEND=Agg
if [ ! -t 1 ]; then
    export NO_COLOR=1
    unset FORCE_COLOR CLICOLOR_FORCE PY_COLORS MYPY_FORCE_COLOR
fi

# Sets $python and $version to the first Python that can do the job, or stops with the reason.
find_python() {
    local name reason="no Python was found"
    for name in ${CARVAE_PYTHON:+"$CARVAE_PYTHON"} python3.11 python3.12 python3.13 python3; do
        # A command may exist and not run, as pyenv's shims do.
        version="$("$name" -c 'import platform; print(platform.python_version())' </dev/null 2>/dev/null)" || continue
        if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null; then
            reason="$name is Python $version"
        elif ! "$name" -c 'import ensurepip, venv' </dev/null 2>/dev/null; then
            reason="$name is Python $version without its venv module (Debian, Ubuntu: apt install python${version%.*}-venv)"
        else
            python="$name"
            return
        fi
    done
    stop "Python 3.11 or newer with venv is needed, but $reason; install one, or name it in CARVAE_PYTHON."
}

# Exact versions are known for Python 3.11; elsewhere only torch's is held, lest a larger build replace it.
write_constraints() {
    case "$version" in
        3.11.*) cp constraints.txt "$1" ;;
        *) grep '^torch==' constraints.txt >"$1" ;;
    esac
}

install() {
    local known="exact versions of constraints.txt" log=.venv/install.log
    case "$version" in 3.11.*) ;; *) known="newest versions that fit, as constraints.txt is for Python 3.11" ;; esac
    say "[3/3] installing carvae and its libraries, $known (minutes at first; log in $log)"
    write_constraints .venv/constraints.txt
    if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c .venv/constraints.txt -e '.[test]' </dev/null >"$log" 2>&1; then
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
