# Sourced by the scripts beside it, in the project's root: flags, commands that --dry-run only
# prints, and the words for slices of TPUs.
# shellcheck shell=bash
source launch/environment.sh

dry_run=''
rest=() # what follows --: the flags of `calm train`

# Prints the head of the script that runs.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "launch/$(basename "$0")"
}

# parse_flags "NAME …" "SWITCH …" ARGUMENT …: each --a-name=value becomes the variable a_name, each
# --a-switch sets its own to yes, and --help ends the script.
parse_flags() {
  local names=" $1 " switches=" $2 dry-run " flag key
  shift 2
  while (($#)); do
    flag=$1
    shift
    key=${flag%%=*}
    key=${key#--}
    if [[ $flag == --help ]]; then
      usage
      exit
    elif [[ $flag == -- ]]; then
      rest=("$@")
      return
    elif [[ $flag == --*=?* && $names == *" $key "* ]]; then
      printf -v "${key//-/_}" %s "${flag#*=}"
    elif [[ $flag == --* && $names == *" $key "* ]]; then
      fail "--$key has no value; write --$key=VALUE"
    elif [[ $flag == "--$key" && $switches == *" $key "* ]]; then
      printf -v "${key//-/_}" yes
    else
      fail "unknown flag $flag; --help lists them, and those of \`calm train\` follow --"
    fi
  done
}

# require NAME …: each flag was given.
require() {
  local key variable
  for key; do
    variable=${key//-/_}
    [[ ${!variable} ]] || fail "--$key is missing; --help says what it is"
  done
}

# require_run WORKDIR_PATTERN HINT: the flags of `calm train` name a config and a directory.
require_run() {
  local flag config='' workdir=''
  for flag in ${rest[@]+"${rest[@]}"}; do
    case $flag in
      --config=?*) config=$flag ;;
      --workdir=?*) workdir=${flag#*=} ;;
    esac
  done
  [[ $config ]] || fail "--config=FILE, a flag of \`calm train\`, is missing after --"
  [[ $workdir ]] || fail "--workdir=DIR, a flag of \`calm train\`, is missing after --"
  # shellcheck disable=SC2053 # a pattern
  [[ $workdir == $1 ]] || fail "--workdir=$workdir: $2"
}

# Prints words as a shell would take them.
quoted() {
  local word flag line=''
  for word; do
    flag=''
    if [[ $word =~ ^--[A-Za-z0-9_.-]+= ]]; then
      flag=${BASH_REMATCH[0]}
      word=${word#"$flag"}
    fi
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $flag$word"
  done
  echo "${line:1}"
}

# Runs a command; with --dry-run prints it.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# split_topology v5e:4x8*2: sets chip, shape, chips (of one slice) and slices. The words are those of
# `calm plan`, which also knows what shapes there are.
# shellcheck disable=SC2034 # for the scripts
split_topology() {
  [[ $1 =~ ^(v5e|v6e):([0-9]+x[0-9]+)(\*([1-9][0-9]*))?$ ||
    $1 =~ ^(v5p):([0-9]+x[0-9]+x[0-9]+)(\*([1-9][0-9]*))?$ ]] ||
    fail "--topology=$1 is not of the form v5e:4x8, v6e:4x8, v5p:2x4x4 or, two slices, v5e:4x8*2"
  chip=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]} slices=${BASH_REMATCH[4]:-1}
  chips=$((${shape//x/*}))
}
