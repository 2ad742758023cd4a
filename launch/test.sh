#!/usr/bin/env bash
# Makes .venv if need be and runs the tests.
#
#   bash launch/test.sh [ARGUMENT …]      they go to pytest, such as -m slow, or tests/launch

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

[[ ${1:-} != --help ]] || { usage && exit; }
prepare test
# A file's tests share models, so they stay in one process. A process that crashes ends the run:
# pytest-xdist waits forever for the one that takes its place.
.venv/bin/python -m pytest -n auto --maxprocesses=8 --dist=loadfile --max-worker-restart=0 "$@"
