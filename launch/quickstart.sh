#!/usr/bin/env bash
# From a fresh clone to a report: makes an environment, then imports, samples, trains, tests.
# Run again, it goes on from where it was. Arguments are overrides: outer.num_steps=100
#
#   bash launch/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
raymaml_install ""

config=configs/glyphs/quickstart.yaml
raymaml data import "$config" "$@"
raymaml data sample "$config" "$@"
raymaml train "$config" "$@"
raymaml test "$config" "$@"
