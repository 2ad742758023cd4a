#!/usr/bin/env bash
# One job of an array that launch/slurm_array.sh submits, run by SLURM in the project's root: the command
# of its number in a group of the file that `calm experiment … --commands` has printed.

set -euo pipefail
source launch/shared.sh

[[ ${1:-} != --help ]] || { usage && exit; }
[[ ${SLURM_ARRAY_TASK_ID:-} ]] || fail "SLURM runs this; bash launch/slurm_array.sh submits it"
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
line=$(commands_of_group "$1" "$2" | sed -n "${SLURM_ARRAY_TASK_ID}p")
words=()
eval "words=($line)" # as a shell would read it

status=0
run srun "--cpus-per-task=$SLURM_CPUS_PER_TASK" .venv/bin/calm "${words[@]:1}" || status=$?
if [[ $dry_run ]]; then
  echo "# after exit status 75, or 143 of an evaluation that was preempted:"
  status=75
fi
if ((status == 75 || status == 143)); then
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif ((status)); then
  exit "$status"
fi
