# Sourced by the scripts beside it, in the project's root: makes .venv and installs into it.
# shellcheck shell=bash

fail() {
  echo "error: $*" >&2
  exit 2
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
  wanted=$(sha256sum setup.py | cut -d' ' -f1)
  stamp=.venv/installed${extra:+-$extra}
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version) …"
    "$python" -m venv --clear .venv ||
      fail "$python cannot make a virtual environment; on Debian: apt install python3-venv"
  fi
  echo "Installing calm_jax${extra:+[$extra]} into .venv, a minute or two …"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  echo "$wanted" >.venv/installed  # every extra holds the project itself
  echo "$wanted" >"$stamp"
}
