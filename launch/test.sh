#!/usr/bin/env bash
# Makes an environment and runs every test. Arguments go to pytest: -n 2 -m "not ray and not slow"
# runs the fast ones by two processes.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
raymaml_install "[test]"
python -m pytest "$@"
