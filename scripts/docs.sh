#!/usr/bin/env bash
# The documentation as web pages in docs/_build/html, warnings as errors: bash scripts/docs.sh [arguments for sphinx-build]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

sphinx-build --fail-on-warning --keep-going --quiet "$@" docs docs/_build/html </dev/null
say "carvae: the documentation is in $PWD/docs/_build/html/index.html"
