#!/usr/bin/env bash
# Submits a training on nodes of GPUs to SLURM, one process a GPU. It saves before its time is up, or
# when it is preempted, and then queues itself again. The project is installed in .venv, on a disk that
# all nodes share: `bash launch/gpu.sh --install`.
#
#   bash launch/slurm.sh --nodes=N --gpus=N [FLAG …] -- FLAG OF calm train …
#
#   --nodes=N           number of nodes
#   --gpus=N            on each node
#   --cpus=N            for each GPU; default 8
#   --time=LIMIT        as sbatch takes it, such as 12:00:00; default: the partition's
#   --partition=NAME    default: SLURM's
#   --account=NAME      default: SLURM's
#   --name=NAME         of the job, and of its log, NAME-JOB.log; default calm
#   --dry-run           prints every command, the job's own too

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/shared.sh

nodes='' gpus='' cpus=8 time='' partition='' account='' name=calm
parse_flags "nodes gpus cpus time partition account name" "" "$@"
require nodes gpus
for flag in nodes gpus cpus; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag} is not a number of $flag"
done
[[ ! $time || $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
  fail "--time=$time is neither minutes nor of a form such as 12:00:00 or 2-12:00:00"
require_run '*' ''
require_continuing

# The signal goes to the steps alone, so the script that waits for them hears nothing of it.
run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
  "--cpus-per-task=$cpus" \
  ${time:+"--time=$time"} ${partition:+"--partition=$partition"} ${account:+"--account=$account"} \
  --signal=TERM@120 --requeue --open-mode=append --output=%x-%j.log launch/slurm_job.sh "${rest[@]}"
if [[ $dry_run ]]; then
  SLURM_CPUS_PER_TASK=$cpus bash launch/slurm_job.sh --dry-run "${rest[@]}"
fi
