#!/usr/bin/env bash
# The whole job on simulated studies, on a fresh machine too: bash scripts/demo.sh [arguments for carvae demo]
# Relative paths among the arguments are taken from the repository's root.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out=demo previous=""
for argument in "$@"; do
    case "$argument" in --out=*) out="${argument#--out=}" ;; esac
    if [ "$previous" = --out ]; then out="$argument"; fi
    previous="$argument"
done
carvae demo "$@" </dev/null
if [ -e "$out/index.html" ]; then
    say "carvae: the demo took $SECONDS s with set-up; look at $(cd "$out" && pwd)/index.html"
fi
