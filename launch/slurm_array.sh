#!/usr/bin/env bash
# Submits the commands of an experiment to SLURM: for each group an array, which waits for the one
# before it. Each command is one process on one node. It saves before its time is up, or when it is
# preempted, and then queues itself again. The project is installed in .venv, on a disk that all nodes
# share.
#
#   calm experiment --config=FILE --workdir=DIR --commands > commands.txt
#   bash launch/slurm_array.sh --gpus=N [FLAG …] -- commands.txt
#
#   --gpus=N            for each command
#   --cpus=N            for each command; default 8
#   --time=LIMIT        of each command, as sbatch takes it; default: the partition's
#   --partition=NAME    default: SLURM's
#   --account=NAME      default: SLURM's
#   --name=NAME         of the arrays, and of their logs, NAME-ARRAY_NUMBER.log; default calm
#   --dry-run           prints every command, those of the first job of each array too

set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
source launch/shared.sh

gpus='' cpus=8 time='' partition='' account='' name=calm
parse_flags "gpus cpus time partition account name" "" "$@"
require gpus
require_numbers gpus cpus
file=$(commands_file "$here")

after=''
for ((group = 1; group <= $(groups_in "$file"); group++)); do
  count=$(commands_of_group "$file" "$group" | wc -l)
  # A command whose models were not made fails at once, and the others of its group still run.
  command=(sbatch --parsable "--job-name=$name" "--array=1-$count" --nodes=1 --ntasks=1
    "--gpus-per-node=$gpus" "--cpus-per-task=$cpus"
    ${after:+"--dependency=afterany:$after"} ${time:+"--time=$time"}
    ${partition:+"--partition=$partition"} ${account:+"--account=$account"}
    --signal=TERM@120 --requeue --open-mode=append --output=%x-%A_%a.log
    launch/slurm_array_job.sh "$file" "$group")
  if [[ $dry_run ]]; then
    run "${command[@]}"
    SLURM_ARRAY_TASK_ID=1 SLURM_CPUS_PER_TASK=$cpus bash launch/slurm_array_job.sh --dry-run \
      "$file" "$group"
    after=ARRAY_$group
  else
    after=$("${command[@]}")
    echo "group $group: $count commands, array $after"
  fi
done
