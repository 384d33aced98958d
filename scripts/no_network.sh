#!/usr/bin/env bash
# The tests where no network is: bash scripts/no_network.sh [arguments for pytest]
# In a network namespace of their own they have the loopback and nothing else; what wants more fails. Linux; without root
# the namespace takes one of users beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
users=()
if [ "$(id -u)" -ne 0 ]; then users=(--user --map-root-user); fi
exec unshare --net "${users[@]}" bash -c '
    ip link set lo up
    [ "$(ip -o link | wc -l)" -eq 1 ] || { echo "there is more than the loopback here" >&2; exit 1; }
    exec python -m pytest "$@"
' bash "$@"
