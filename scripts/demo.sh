#!/usr/bin/env bash
# The whole job on simulated studies, on a fresh machine too: bash scripts/demo.sh [section.key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

output=demo
for argument in "$@"; do
    case "$argument" in output=*) output="${argument#output=}" ;; esac
done
carvae demo "$@" </dev/null
for page in "$output"/index.*; do
    say "carvae: the demo took $SECONDS s with set-up; look at $(cd "$output" && pwd)/${page##*/}"
done
