#!/usr/bin/env bash
# The job that launch/slurm.sh submits, run by SLURM in the project's root. JAX finds the other
# processes by what SLURM says, and gives each process the GPU of its number: all must see all.

set -euo pipefail
source launch/shared.sh

[[ ${1:-} != --help ]] || { usage && exit; }
[[ ${SLURM_CPUS_PER_TASK:-} ]] || fail "SLURM runs this; bash launch/slurm.sh submits it"
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9

# A process that has ended must not keep the others from saving.
status=0
run srun --kill-on-bad-exit=0 --gpu-bind=none "--cpus-per-task=$SLURM_CPUS_PER_TASK" \
  .venv/bin/calm train "$@" || status=$?
if [[ $dry_run ]]; then
  echo "# after exit status 75:"
  status=75
fi
if ((status == 75)); then
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif ((status)); then
  exit "$status"
fi
