# Sourced by the scripts beside it, in the project's root: help, errors, commands that --dry-run only
# prints, and .venv, into which it installs.
# shellcheck shell=bash

dry_run=''

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the head of the script that runs.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "launch/$(basename "$0")"
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

# Prints the first Python that will do.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer: neither python3.11, python3.12, python3 nor python is one"
}

# prepare EXTRA: makes .venv hold the project with one of its extras; "" is none. What is installed
# follows from setup.py alone, as the project is installed in place: the stamp, written last, is its
# hash, so an installation that was interrupted is done again.
prepare() {
  local extra=$1 python wanted stamp
  local project=calm_jax${extra:+[$extra]}
  wanted=$(sha256sum setup.py | cut -d' ' -f1)
  stamp=.venv/installed${extra:+-$extra}
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    [[ ! $dry_run ]] || echo "# .venv holds $project already"
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "${dry_run:+# }Making .venv with $("$python" --version) …"
    run "$python" -m venv --clear .venv ||
      fail "$python cannot make a virtual environment; on Debian: apt install python3-venv"
  fi
  echo "${dry_run:+# }Installing $project into .venv, a minute or two …"
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".${extra:+[$extra]}"
  [[ ! $dry_run ]] || return 0
  echo "$wanted" >.venv/installed  # every extra holds the project itself
  echo "$wanted" >"$stamp"
}
