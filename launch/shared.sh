# Sourced by the scripts beside it, in the project's root: flags, and the words for slices of TPUs.
# shellcheck shell=bash
source launch/environment.sh

rest=() # what follows --: the flags of `calm train`

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

# require_numbers NAME …: the value of each flag is one.
require_numbers() {
  local key variable
  for key; do
    variable=${key//-/_}
    [[ ${!variable} =~ ^[0-9]+$ ]] || fail "--$key=${!variable} is not a number"
  done
}

# require_run WORKDIR_PATTERN HINT: the flags of `calm train` name a config and a directory.
require_run() {
  local flag config='' workdir=''
  for flag in ${rest[@]+"${rest[@]}"}; do
    case $flag in
      --config=?*) config=${flag#*=} ;;
      --workdir=?*) workdir=${flag#*=} ;;
    esac
  done
  [[ $config ]] || fail "--config=FILE, a flag of \`calm train\`, is missing after --"
  [[ $workdir ]] || fail "--workdir=DIR, a flag of \`calm train\`, is missing after --"
  # shellcheck disable=SC2053 # a pattern
  [[ $workdir == $1 ]] || fail "--workdir=$workdir: $2"
  [[ -f $config ]] || fail "--config=$config: there is no such file in $PWD"
  [[ $1 == '*' || $config != @(/|..)* ]] ||
    fail "--config=$config: name it from $PWD on, the checkout that is copied"
}

# require_continuing: what starts a training again by itself must not remove what that has saved.
require_continuing() {
  local flag
  for flag in ${rest[@]+"${rest[@]}"}; do
    case $flag in
      -overwrite | --overwrite | -overwrite=[tTyY1]* | --overwrite=[tTyY1]*)
        fail "$flag: a training that is started again would begin anew; remove its --workdir first"
        ;;
    esac
  done
}

# commands_file FOLDER: the one file after --, named from FOLDER on.
commands_file() {
  local file=${rest[0]:-}
  ((${#rest[@]} == 1)) || fail "one file follows --: what \`calm experiment … --commands\` prints"
  [[ $file == /* ]] || file=$1/$file
  [[ -f $file ]] || fail "$file: there is no such file"
  grep -q '^# group 1$' "$file" || fail "$file is not what \`calm experiment … --commands\` prints"
  echo "$file"
}

# groups_in FILE: the number of its groups.
groups_in() {
  grep -c '^# group ' "$1"
}

# commands_of_group FILE GROUP: its commands, one a line.
commands_of_group() {
  awk -v group="$2" '/^# group / { now = $3; next } now == group' "$1"
}

# split_topology v5e:4x8*2: sets chip, shape, chips (of one slice) and slices. Words and shapes are
# those of `calm plan`; a shape of two sides is of v5e and v6e, one of three of v5p.
# shellcheck disable=SC2034 # for the scripts
split_topology() {
  local known sides=2
  [[ $1 =~ ^(v5e|v6e):([0-9]+x[0-9]+)(\*([1-9][0-9]*))?$ ||
    $1 =~ ^(v5p):([0-9]+x[0-9]+x[0-9]+)(\*([1-9][0-9]*))?$ ]] ||
    fail "--topology=$1 is not of the form v5e:4x8, v6e:4x8, v5p:2x4x4 or, two slices, v5e:4x8*2"
  chip=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]} slices=${BASH_REMATCH[4]:-1}
  [[ $chip != v5p ]] || sides=3
  known=$(grep -oE "\"[0-9]+(x[0-9]+){$((sides - 1))}\"" calm_jax/planning/topologies.py |
    tr -s '"\n' ' ')
  [[ $known == *" $shape "* ]] || fail "--topology=$1: no such slice; of $chip there are${known% }"
  chips=$((${shape//x/*}))
}
