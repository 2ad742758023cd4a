#!/usr/bin/env bash
# Every table of the key-value task in little, from nothing to a page: baselines, controls, ablations
# and the share of keys in the bridge's training. About eleven minutes on two idle CPU cores. Goes on
# where it stopped.
#
#   bash launch/small.sh [FOLDER]      FOLDER defaults to runs/small

set -euo pipefail
runs=$(realpath -m -- "${1:-runs/small}")
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  --help) usage && exit ;;
  -*) fail "unknown flag $1; --help says what there is" ;;
esac
prepare ""
.venv/bin/python -m calm_jax experiment --config=configs/kv_small.py --workdir="$runs"
