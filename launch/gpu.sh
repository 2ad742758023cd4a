#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process. Makes .venv and installs into it if need be.
# SIGTERM lets it save; it then ends with status 75, and the same command goes on.
#
#   bash launch/gpu.sh -- FLAG OF calm train …
#
#   --install     installs alone
#   --dry-run     prints every command instead

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/shared.sh

install=''
parse_flags "" "install" "$@"
[[ $install ]] || require_run '*' ''

prepare cuda
if [[ ! $install ]]; then
  # The rest is the driver's and the libraries'; JAX alone would take three quarters.
  run exec env XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 .venv/bin/calm train "${rest[@]}"
fi
