#!/usr/bin/env bash
# Makes .venv if need be and runs the tests; arguments go to pytest: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

prepare test
# A file's tests share models, so they stay in one process.
.venv/bin/python -m pytest -n auto --maxprocesses=8 --dist=loadfile "$@"
