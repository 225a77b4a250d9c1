#!/usr/bin/env bash
# Runs a raymaml command on a Ray cluster, as a job, with the code of this folder.
#
#   bash launch/submit.sh ADDRESS COMMAND [ARGUMENTS ...]
#   bash launch/submit.sh http://127.0.0.1:8265 train configs/omniglot/5way-1shot.yaml \
#       run_dir=s3://BUCKET/runs data.bank=s3://BUCKET/bank data.shards=s3://BUCKET/episodes
#
# ADDRESS is the cluster's dashboard, which `ray start --head` prints. Another network's is reached
# through a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD), Kubernetes' by `kubectl port-forward`.
# launch/runtime_env.yaml says what travels and is installed: code, no data. Bank, shards and run_dir
# are URIs, or absolute paths that every node sees alike. A cluster that asks for a token takes it
# from ~/.ray/auth_token or RAY_AUTH_TOKEN.
#
# The script shows the job's output and ends with it (exit code 1 when the job failed). Ctrl-C ends
# the showing, not the job: `ray job stop --address ADDRESS ID` has that stop at the next outer step
# and save, and the same command submitted again goes on. More of `ray job submit`'s options, such as
# --no-wait or --submission-id, go into RAYMAML_SUBMIT.
# Tested: against a head of one machine, with a token. Not: a cluster of several machines.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
address=$1
shift
if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -f ~/.ray/auth_token ]; then
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # Ray sends a token only when told to
fi
checksum=$(cksum setup.cfg)
# shellcheck disable=SC2086  # several words on purpose
exec ray job submit --address "$address" --working-dir . \
    --runtime-env <(sed "s/# setup\.cfg\"/# $checksum\"/" launch/runtime_env.yaml) \
    ${RAYMAML_SUBMIT:-} -- raymaml "$@"
