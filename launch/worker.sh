#!/usr/bin/env bash
# On a worker of a TPU slice: one training at a time, which outlives the ssh that started it.
# launch/tpu.sh calls it.
#
#   bash launch/worker.sh install           installs the checkout that it lies in
#   bash launch/worker.sh start FLAG …      starts `calm train`; what it says goes to ~/calm.log
#   bash launch/worker.sh status            prints "none", "running" or "exit STATUS"
#   bash launch/worker.sh stop              lets the training save and end

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

# Outside the checkout, which an installation replaces.
environment=$HOME/calm_env log=$HOME/calm.log lock=$HOME/calm.lock
exit_status=$HOME/calm.exit process=$HOME/calm.pid

command=${1:-}
shift || true
case $command in
  install)
    # The system's Python on TPU VMs is older than what JAX runs on.
    [[ -x $HOME/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
    "$HOME/.local/bin/uv" venv --quiet --python=3.12 --allow-existing "$environment"
    "$HOME/.local/bin/uv" pip install --quiet --python="$environment/bin/python" ".[tpu]"
    ;;
  start)
    # The training inherits the open file, and with it the lock: held until the last process ends.
    exec 9>>"$lock"
    flock --nonblock 9 || fail "a training is running on this worker"
    rm -f "$exit_status"
    setsid nohup bash launch/worker.sh run "$@" >>"$log" 2>&1 </dev/null &
    echo "$!" >"$process"
    ;;
  run)
    trap : TERM # the training's to act on; this shell waits for its status
    status=0
    "$environment/bin/calm" train "$@" || status=$?
    echo "$status" >"$exit_status.new"
    mv "$exit_status.new" "$exit_status"
    ;;
  status)
    if [[ -e $lock ]] && ! flock --nonblock "$lock" true; then
      echo running
    elif [[ -e $exit_status ]]; then
      echo "exit $(<"$exit_status")"
    else
      echo none
    fi
    ;;
  stop)
    kill -TERM -- "-$(<"$process")"
    ;;
  --help | '') usage ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
