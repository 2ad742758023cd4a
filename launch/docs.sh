#!/usr/bin/env bash
# Builds the documentation as a site, build/site/index.html; every warning is an error. Makes .venv
# if need be.
#
#   bash launch/docs.sh

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  --help) usage && exit ;;
  ?*) fail "unknown argument $1; there is none but --help" ;;
esac
prepare docs
.venv/bin/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/site
echo "build/site/index.html"
