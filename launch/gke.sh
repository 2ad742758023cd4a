#!/usr/bin/env bash
# Trains on TPU slices in Google Kubernetes Engine. Needs kubectl for a cluster with JobSet, docker and
# gcloud. Preempted slices are replaced and the training goes on by itself.
#
#   bash launch/gke.sh COMMAND [FLAG …] [-- FLAG OF calm train …]
#
#   image    builds the image of this checkout and pushes it        (--image)
#   pools    makes the node pools, one a slice (--name, --cluster, --location, --topology, --spot)
#   render   prints the manifest              (--name, --image, --topology, and flags of calm train)
#   train    applies it                                                         (the flags of render)
#   experiment  trains and scores the arms of an experiment, a group after another: after -- follows
#            the file that `calm experiment … --commands` has printed           (the flags of render)
#   logs     follows what the first worker says                                 (--name)
#   delete   deletes the training                                               (--name)
#
#   --name=NAME            of the training
#   --image=IMAGE          such as us-docker.pkg.dev/PROJECT/REPOSITORY/calm_jax
#   --topology=T           as in `calm plan`: v5e:16x16, v5p:2x4x4, v6e:4x8; two: 'v5e:16x16*2'
#   --cluster=NAME         the cluster that gets the pools
#   --location=PLACE       its region or zone
#   --spot                 nodes that are cheaper, and may be taken away at any time
#   --service-account=A    of Kubernetes, one that may write to the bucket; default: default
#   --retries=N            how often a training that broke off is started again; default 3
#   --dry-run              prints every command instead

# shellcheck disable=SC2034 # render reads variables by name
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
source launch/shared.sh

name='' image='' topology='' cluster='' location='' spot='' service_account=default retries=3
command=${1:-}
case $command in
  image | pools | render | train | experiment | logs | delete) shift ;;
  --help | '') usage && exit ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
parse_flags "name image topology cluster location service-account retries" "spot" "$@"

# slice_shape: how GKE calls the slices of --topology, and their hosts, of four chips each.
slice_shape() {
  split_topology "$topology"
  case $chip in
    v5e) accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu ;;
    v5p) accelerator=tpu-v5p-slice machine=ct5p-hightpu ;;
    v6e) accelerator=tpu-v6e-slice machine=ct6e-standard ;;
  esac
  chips_per_worker=$((chips < 4 ? chips : 4))
  workers=$((chips / chips_per_worker))
}

# Prints words as a list of JSON, which is one of YAML.
json_list() {
  local word list=''
  for word; do
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  echo "[${list:2}]"
}

# render WORD …: the manifest of one command of `calm`.
render() {
  local manifest variable arguments
  arguments=$(json_list "$@")
  manifest=$(<launch/jobset.yaml)
  [[ $spot ]] || manifest=$(grep -v gke-spot: <<<"$manifest")
  # The arguments come last: they may hold anything.
  for variable in name image retries slices workers shape chips_per_worker accelerator \
    service_account arguments; do
    manifest=${manifest//"\${$variable}"/"${!variable}"}
  done
  echo "$manifest"
}

# apply WORD …: starts a command of `calm`.
apply() {
  if [[ $dry_run ]]; then
    quoted kubectl apply --filename=-
    render "$@"
  else
    render "$@" | kubectl apply --filename=-
  fi
}

require_name() {
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: Kubernetes wants a-z, 0-9 and -, from a letter on, at most 40 characters"
}

case $command in
  image)
    require image
    run docker build --file=launch/Dockerfile --build-arg=EXTRA=tpu "--tag=$image" .
    run docker push "$image"
    ;;
  pools)
    require name cluster location topology
    slice_shape
    for ((slice = 0; slice < slices; slice++)); do
      run gcloud container node-pools create "$name-$slice" "--cluster=$cluster" \
        "--location=$location" "--machine-type=$machine-${chips_per_worker}t" \
        "--tpu-topology=$shape" "--num-nodes=$workers" --scopes=cloud-platform ${spot:+--spot}
    done
    ;;
  render | train)
    require name image topology
    require_name
    require_numbers retries
    require_run 'gs://*' "pods share no disk; name a bucket, gs://…"
    require_continuing
    slice_shape
    if [[ $command == render ]]; then
      render train "${rest[@]}"
    else
      apply train "${rest[@]}"
    fi
    ;;
  experiment)
    require name image topology
    require_numbers retries
    slice_shape
    ((slices * workers == 1)) ||
      fail "--topology=$topology: an evaluation runs on one host, such as v5e:2x2"
    file=$(commands_file "$here")
    grep -q -- ' --workdir=gs://' "$file" || fail "$file: pods share no disk; name a bucket as --workdir"
    prefix=$name
    for ((group = 1; group <= $(groups_in "$file"); group++)); do
      started=()
      while IFS= read -r line; do
        words=()
        eval "words=($line)" # as a shell would read it
        name=$prefix-$group-$((${#started[@]} + 1))
        require_name
        apply "${words[@]:1}"
        started+=("jobset/$name")
      done < <(commands_of_group "$file" "$group")
      # Those that failed end too; what needs them then fails at once.
      run kubectl wait "--for=jsonpath={.status.terminalState}" --timeout=-1s "${started[@]}"
    done
    ;;
  logs)
    require name
    run kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete)
    require name
    run kubectl delete jobset "$name"
    ;;
esac
