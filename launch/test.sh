#!/usr/bin/env bash
# Makes an environment and runs every test. Arguments go to pytest: -m "not ray" for the fast ones.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
raymaml_install "[test]"
python -m pytest "$@"
