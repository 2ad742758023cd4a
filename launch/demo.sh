#!/usr/bin/env bash
# The key-value experiment from nothing to a page: trains the augment and the anchor side by side,
# then the bridge between them, scores all three, and prints a table. Goes on where it stopped.
#
#   bash launch/demo.sh [FOLDER]      FOLDER defaults to runs/demo

set -euo pipefail
SECONDS=0
runs=$(realpath -m -- "${1:-runs/demo}")
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  --help) usage && exit ;;
  -*) fail "unknown flag $1; --help says what there is" ;;
esac
prepare ""
mkdir -p "$runs"
export PYTHONUNBUFFERED=1
echo "Runs in $runs. Three trainings follow, then their evaluation."

# calm NAME COMMAND …: runs a command, each line of its output behind the run's name; a progress bar,
# which would be one endless line, becomes several.
calm() {
  local name=$1
  shift
  .venv/bin/python -m calm_jax "$@" 2>&1 |
    stdbuf -o0 tr '\r' '\n' |
    sed -u "s/^/$(printf '%-9s' "$name")/"
}

# parent NAME: trains and scores one of the two models.
parent() {
  calm "$1" train --config="configs/kv_$1.py" --workdir="$runs/$1"
  calm "$1" evaluate --workdir="$runs/$1"
}

stop_children() {
  local group
  for group in $(jobs -p); do
    kill -- "-$group" 2>/dev/null || true
  done
}
trap stop_children EXIT

set -m # each in its process group, so that stopping one stops all that it started
parent augment &
parent anchor &
set +m
wait -n || fail "one of the trainings failed; see above"
wait -n || fail "one of the trainings failed; see above"

calm composed train --config=configs/kv_compose.py --workdir="$runs/composed" \
  --config.anchor="$runs/anchor/frozen" --config.augments="('$runs/augment/frozen',)"
calm composed evaluate --workdir="$runs/composed"
.venv/bin/python -m calm_jax report --experiment="$runs"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s."
