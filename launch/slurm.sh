#!/usr/bin/env bash
# A raymaml command as a Slurm job: one Ray node on each of its nodes, started and ended with it.
#
#   sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh train configs/mini-imagenet/convnet4-5way-1shot-reproduce.yaml \
#       run_dir=/shared/runs data.bank=/shared/bank data.shards=/shared/episodes
#
# Submit it from a folder that all nodes see; `raymaml` and `ray` must be on the PATH there (activate
# your environment first: sbatch takes it along). Two minutes before the time limit the run stops at an
# outer step, saves, and is queued again; so is a job that Slurm preempts with requeueing. `scancel` ends it, and
# the same sbatch goes on from the last checkpoint.
# Ray listens on the nodes' addresses with the token of ~/.ray/auth_token (made here, read through the
# shared home); its dashboard on the first node's loopback: ssh -L 8265:127.0.0.1:PORT NODE, both printed.
# Tested: a run under Slurm 22.05, two nodes on one machine, no GPU; the signal before the time limit and the
# second start by a stand-in for srun and scontrol.
# Not: several machines, GPUs, scancel, preemption, requeueing by Slurm itself.
#SBATCH --job-name=raymaml
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^#SBATCH/{/^# /s/^# //p}' "$0" >&2; exit 2; }

# Jobs that share a node share its ports: ten of its own for each of a thousand jobs in turn.
base=$((20000 + SLURM_JOB_ID % 1000 * 10))
head=$(hostname -I | cut -d' ' -f1)
export RAY_ADDRESS=$head:$base RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824
(umask 077 && ray get-auth-token --generate >/dev/null) # for this user's eyes alone
[ ! -f ~/.ray/auth_token ] || chmod 600 ~/.ray/auth_token # made without a umask before

# shellcheck disable=SC2317,SC2329  # called by srun
ray_node() { # on each node of the job; the first is the head
    options=(--block "--num-cpus=$SLURM_CPUS_ON_NODE" --dashboard-agent-listen-port=0
        --min-worker-port=0 --max-worker-port=0)
    if [ "$SLURM_PROCID" = 0 ]; then
        exec ray start --head "--node-ip-address=$head" "--port=$base" "${options[@]}" \
            "--dashboard-port=$((base + 1))" "--ray-client-server-port=$((base + 2))" \
            "--temp-dir=/tmp/ray-$SLURM_JOB_ID"
    fi
    until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 1; done
    exec ray start "--address=$RAY_ADDRESS" "${options[@]}"
}

all_there() { # asks the head how many nodes it has
    python - "$SLURM_NNODES" 2>/dev/null <<'END'
import sys, ray
ray.init(logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
END
}

set -m # jobs in the background keep their SIGINT
export -f ray_node
export base head
srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --mem=0 \
    bash -c ray_node >"ray-$SLURM_JOB_ID.log" 2>&1 &
nodes=$!
echo "Ray: head $head, dashboard on its loopback at port $((base + 1)), its output in ray-$SLURM_JOB_ID.log"
until ray health-check >/dev/null 2>&1 && all_there; do
    kill -0 $nodes # no longer: see its output
    sleep 1
done

raymaml "$@" &
run=$!
requeue=
trap 'requeue=yes; kill -INT $run' USR1
trap 'kill -INT $run' TERM
while true; do # a signal ends `wait`, not the run
    code=0
    wait $run || code=$?
    kill -0 $run 2>/dev/null || break
done
[ -z "$requeue" ] || [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code" # and Slurm ends Ray's nodes with the job
