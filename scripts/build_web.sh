#!/usr/bin/env bash
# Builds the web assets from carvae/web/src into carvae/web/assets, which are committed. Needs Node 20 and npm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../carvae/web"
npm ci --no-audit --no-fund
npm run --silent check
npm run --silent build
ls -l assets
