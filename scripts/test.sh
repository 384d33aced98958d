#!/usr/bin/env bash
# Every check, on a fresh machine too: bash scripts/test.sh [arguments for pytest]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

failed=()
check() {
    say "== $*"
    "$@" </dev/null || failed+=("$*")
}
check ruff check
check ruff format --check
check mypy carvae
check bash scripts/docs.sh
check pytest -n 2 --dist loadfile "$@"  # a file at a time, since fixtures of a module are dear

if [ ${#failed[@]} -gt 0 ]; then
    stop "FAILED after $SECONDS s: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')."
fi
say "carvae: all checks passed in $SECONDS s."
