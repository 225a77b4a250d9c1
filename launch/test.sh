#!/usr/bin/env bash
# Makes an environment and runs all tests, file by file, by two processes, each with a Ray cluster.
# Arguments go to pytest: -m "not ray and not slow" runs the fast ones.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
raymaml_install "[test]"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
