#!/usr/bin/env bash
# Makes .venv if need be and runs the tests; arguments go to pytest: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

prepare test
.venv/bin/python -m pytest "$@"
