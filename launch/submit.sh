#!/usr/bin/env bash
# Runs a raymaml command on a Ray cluster, as a job, with the code of this folder.
#
#   bash launch/submit.sh ADDRESS COMMAND [ARGUMENTS ...]
#   bash launch/submit.sh http://127.0.0.1:8265 train configs/omniglot/5way-1shot.yaml \
#       run_dir=/shared/runs data.bank=/shared/bank data.shards=/shared/episodes
#
# ADDRESS is the cluster's dashboard, which `ray start --head` prints. Another network's is reached
# through a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD), Kubernetes' by `kubectl port-forward`.
# Python, Ray and raymaml's dependencies must be installed on the nodes. Bank, shards and run_dir
# are absolute paths that every node sees alike; no data travels with the code. A cluster that asks
# for a token takes it from ~/.ray/auth_token or RAY_AUTH_TOKEN.
#
# The script shows the job's output and ends with it (exit code 1 when the job failed). Ctrl-C ends
# the showing, not the job: `ray job stop --address ADDRESS ID` stops that, and the same command
# submitted again goes on. Stopping sends SIGTERM, at which raymaml saves after the outer step at hand,
# and 3 s later SIGKILL, after which the last checkpoint counts: where a step takes longer, start the
# head with RAY_JOB_STOP_WAIT_TIME_S=30 in its environment. More of `ray job submit`'s options, such as
# --no-wait or --submission-id, go into RAYMAML_SUBMIT.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
address=$1
shift
if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -f ~/.ray/auth_token ]; then
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # Ray sends a token only when told to
fi
# /data/ is not to be confused with raymaml/data/, which is code. The allocator settings are those of
# a Ray that raymaml starts itself (raymaml/training/process.py).
runtime_env='{
  "excludes": ["/data/", "/runs/", "/tests/", ".*/", "*.arrow", "*.pt"],
  "env_vars": {
    "PYTHONUNBUFFERED": "1",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_ARENA_MAX": "1"
  }
}'
# shellcheck disable=SC2086  # several words on purpose
exec ray job submit --address "$address" --working-dir . --runtime-env-json "$runtime_env" \
    ${RAYMAML_SUBMIT:-} -- python -m raymaml "$@"
