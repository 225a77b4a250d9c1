#!/usr/bin/env bash
# Makes an environment and runs all tests, file by file, by two processes, each with a Ray cluster.
# Arguments go to pytest: -m "not ray and not slow" runs the fast ones.
#
#   bash launch/test.sh [--nightly] [pytest arguments]
#
# --nightly adds a hundred random kills, thousands of random hostile inputs (those that failed
# before come first, from .hypothesis/nightly), and what stands in for Slurm, EC2 and Google.
#
# Run the tests marked "ray" on the oldest and on the newest Ray of the range in setup.cfg:
#
#   RAYMAML_RAY=2.56.0 RAYMAML_VENV=.venv-oldest bash launch/test.sh -m ray
#   RAYMAML_RAY=2.60.0 bash launch/test.sh -m ray
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
raymaml_install "[test]"
# A test that hangs ends its process (pytest-timeout); xdist would wait for ever for the rest of its file.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
