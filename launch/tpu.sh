#!/usr/bin/env bash
# Cloud TPU slices, from nothing to a trained bridge. Needs gcloud, logged in.
#
#   bash launch/tpu.sh COMMAND --name=NAME --zone=ZONE [FLAG …] [-- FLAG OF calm train …]
#
#   create    asks for the slices and waits until they are there
#   install   copies this checkout to every worker and installs it
#   train     starts `calm train` on every worker; it goes on when this machine is gone
#   logs      follows what one worker says
#   status    prints the state of the slices, and of the training on every worker
#   stop      lets the training save and end; a resume that runs starts it again
#   resume    sees the training through: creates, installs and trains where that was not done, and
#             again after every preemption, until it has ended
#   delete    deletes the slices
#
#   --name=NAME          of the slice, or of the request for slices
#   --zone=ZONE          such as us-central1-a
#   --topology=T         what to ask for, as in `calm plan`: v5e:16x16, v5p:2x4x4, v6e:4x8; two
#                        slices: 'v5e:16x16*2' (create, resume; the others: when several)
#   --project=PROJECT    other than gcloud's own
#   --queued             wait in the queue of Google Cloud for them; several slices always do. Of
#                        slices that were asked for so, status, resume and delete need the flag
#   --spot               cheaper, and may be taken away at any time
#   --runtime=VERSION    the machines' software, other than the chip's usual one
#   --service-account=A  that the machines act as, such as one that may write to the bucket
#   --worker=N           whose log, of the first slice; default 0
#   --poll=SECONDS       between two looks at the state; default 60
#   --retries=N          how often in a row resume tries again what failed; default 3. A training
#                        that was told to save and end, or whose slices were taken, did not fail
#   --dry-run            prints every command instead; of resume, what a preemption is followed by

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/shared.sh

name='' zone='' topology='' project='' queued='' spot='' runtime='' service_account=''
worker=0 poll=60 retries=3
command=${1:-}
case $command in
  create | install | train | logs | status | stop | resume | delete) shift ;;
  --help | '') usage && exit ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
parse_flags "name zone topology project runtime service-account worker poll retries" "queued spot" \
  "$@"
require name zone
require_numbers worker poll retries
case $command in create | resume) require topology ;; esac
case $command in train | resume) require_run 'gs://*' "workers share no disk; name a bucket, gs://…" ;; esac
[[ $command != resume ]] || require_continuing
slices=1
[[ ! $topology ]] || split_topology "$topology"

tpus=(gcloud compute tpus)
place=("--zone=$zone" ${project:+"--project=$project"} --quiet)
if ((slices > 1)); then
  queued=yes nodes=()
  for ((node = 0; node < slices; node++)); do nodes+=("$name-$node"); done
else
  nodes=("$name")
fi
if [[ $queued ]]; then
  describe=("${tpus[@]}" queued-resources describe "$name" "${place[@]}" "--format=value(state.state)")
else
  describe=("${tpus[@]}" tpu-vm describe "$name" "${place[@]}" "--format=value(state)")
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Prints the state of the slices; ABSENT if there are none, UNKNOWN if nobody answers.
state() {
  if "${describe[@]}" 2>"$scratch/error"; then
    return
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo ABSENT
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

# on_slices COMMAND WORD …: on all slices at once; {} stands for a slice's name.
on_slices() {
  local node process processes=() status=0
  for node in "${nodes[@]}"; do
    if [[ $dry_run ]]; then
      quoted "${@//\{\}/$node}"
    else
      "${@//\{\}/$node}" </dev/null &
      processes+=("$!")
    fi
  done
  for process in ${processes[@]+"${processes[@]}"}; do
    wait "$process" || status=1
  done
  return "$status"
}

# on_workers COMMAND: in a shell on every worker of every slice.
on_workers() {
  on_slices "${tpus[@]}" tpu-vm ssh {} "${place[@]}" --worker=all "--command=$1"
}

# Asks for the slices, without waiting for those that are queued.
request() {
  local accelerator version
  case $chip in
    v5e) accelerator=v5litepod-$chips version=v2-alpha-tpuv5-lite ;;
    v5p) accelerator=v5p-$((2 * chips)) version=v2-alpha-tpuv5 ;; # counted in cores, two a chip
    v6e) accelerator=v6e-$chips version=v2-alpha-tpuv6e ;;
  esac
  version=${runtime:-$version}
  local options=(
    "--accelerator-type=$accelerator" ${spot:+--spot}
    ${service_account:+"--service-account=$service_account"} --scopes=cloud-platform
  )
  if ((slices > 1)); then
    options+=("--node-count=$slices" "--node-prefix=$name")
  elif [[ $queued ]]; then
    options+=("--node-id=$name")
  fi
  if [[ $queued ]]; then
    run "${tpus[@]}" queued-resources create "$name" "${place[@]}" "--runtime-version=$version" \
      "${options[@]}"
  else
    run "${tpus[@]}" tpu-vm create "$name" "${place[@]}" "--version=$version" "${options[@]}"
  fi
}

create() {
  local now
  request
  if [[ $dry_run ]]; then
    quoted "${describe[@]}"
    return
  fi
  while now=$(state) && [[ $now != READY && $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | PREEMPTED | TERMINATED) fail "$name is $now; delete it and ask again" ;;
    esac
    echo "$name: $now"
    sleep "$poll"
  done
  echo "$name: $now"
}

install() {
  local archive=$scratch/calm_jax.tar.gz
  [[ ! $dry_run ]] || archive=calm_jax.tar.gz
  run bash -c "git ls-files -z --cached --others --exclude-standard | tar -czf $archive --null -T -" &&
    on_slices "${tpus[@]}" tpu-vm scp "$archive" {}: "${place[@]}" --worker=all &&
    on_workers "rm -rf calm_jax && mkdir calm_jax && tar -xzf calm_jax.tar.gz -C calm_jax && bash calm_jax/launch/worker.sh install"
}

train() {
  on_workers "bash calm_jax/launch/worker.sh start $(quoted "${rest[@]}")"
}

statuses() {
  on_workers "bash calm_jax/launch/worker.sh status 2>/dev/null || echo none"
}

# Prints what the training needs next: wait, install, train, or nothing once it is finished;
# "refused" if it cannot run so, "broken" otherwise. It runs as long as one worker's does.
needs() {
  local found
  if ! found=$(statuses | grep -Ex 'none|running|exit [0-9]+') || [[ $found == *running* ]]; then
    echo wait # nobody answers while slices are being taken away
  elif [[ $found == *none* ]]; then
    echo install
  elif grep -qx 'exit 2' <<<"$found"; then
    echo refused
  elif grep -qx 'exit 75' <<<"$found"; then
    echo train
  elif grep -qvx 'exit 0' <<<"$found"; then
    echo broken
  else
    echo nothing
  fi
}

delete() {
  if [[ $queued ]]; then
    run "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force
  else
    run "${tpus[@]}" tpu-vm delete "$name" "${place[@]}"
  fi
}

resume() {
  local now next failures=0
  if [[ $dry_run ]]; then
    quoted "${describe[@]}"
    delete
    request
    install
    train
    statuses
    return
  fi
  while true; do
    now=$(state) next=''
    case $now in
      READY | ACTIVE) next=$(needs) ;;
      ABSENT) next=request ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) next=replace ;;
    esac
    echo "$name: $now${next:+, $next}"
    case $next in
      wait) failures=0 ;;
      request) request ;;
      replace) delete && request ;;
      install) install && train ;;
      train) train ;;
      nothing)
        echo "$name: the training is finished; the slices are still there, and cost"
        return
        ;;
      refused) fail "the training cannot run so; bash launch/tpu.sh logs says why" ;;
      broken) train && false ;;
    esac || ((++failures <= retries)) || fail "$name: $next, $failures times in a row; see above"
    sleep "$poll"
  done
}

case $command in
  logs)
    run "${tpus[@]}" tpu-vm ssh "${nodes[0]}" "${place[@]}" "--worker=$worker" \
      "--command=tail -n 100 -F calm.log"
    ;;
  status) run "${describe[@]}" && statuses ;;
  stop) on_workers "bash calm_jax/launch/worker.sh stop" ;;
  *) "$command" ;;
esac
