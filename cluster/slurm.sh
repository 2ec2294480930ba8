#!/usr/bin/env bash
# One run on a Slurm allocation, of one node or of many. What follows the script goes to `popmtl train`:
#
#     sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh my_problem.yaml --storage /shared/runs --run-name first
#     sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh --resume /shared/runs/first
#
# Activate PopMTL's environment before; sbatch takes it along. It, your home, the working directory and the storage must
# be on file systems that all nodes share.
#
# What a run costs, in GPUs: nodes × GPUs of a node; one actor per GPU. N ≤ GPUs subproblems have one each; more of them
# share. An actor takes a CPU, too: --cpus-per-task is to be at least the GPUs of a node.
#SBATCH --job-name=popmtl
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=popmtl-%j.log
# Two minutes before the time is up the run is told to end. Its last checkpoint is there to go on from.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch [--nodes=N] [--gpus-per-node=G] $0 CONFIG [key.path=value …] [options of popmtl train]" >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}" # sbatch runs this script there
# The address by which the other nodes reach this one. POPMTL_HEAD_IP says it where a node has several networks.
ip="${POPMTL_HEAD_IP:-$(python -c 'import ray.util; print(ray.util.get_node_ip_address())')}"
# By the number of the job, so that two jobs on one node do not meet.
port="$((20000 + SLURM_JOB_ID % 10000))"
address="$ip:$port"
wait_seconds="${POPMTL_START_SECONDS:-300}" # for Ray to start, and then for all nodes to join

# Whoever reaches Ray's ports can run code as you, and on a shared machine all its users reach them. So Ray asks for a
# token: a new one for each job, in a file that only you can read and that goes with the job. It is on no command line.
token="$HOME/.popmtl/slurm-$SLURM_JOB_ID.token"
(
    umask 077 # for these two, and not for what the run writes
    mkdir -p "$HOME/.popmtl"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
unset RAY_AUTH_TOKEN # would go before the file
# Ray's workers would run at niceness 15.
export RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"

steps=() run=""
# shellcheck disable=SC2329  # by the trap, below
end() {
    local pid
    for pid in "$@"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "$@"; do wait "$pid" 2>/dev/null || true; done
}
# `ray stop` would end every Ray of yours on the node, that of another job too: what ends is what was started here. The
# run goes first, as it has things to say to Ray.
# shellcheck disable=SC2329
finish() {
    local code=$?
    trap - EXIT
    trap '' TERM INT
    end ${run:+"$run"}
    end ${steps[@]+"${steps[@]}"}
    rm -f -- "$token"
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# Since Slurm 22.05, srun does not take this over from sbatch. Ray would count the cores of the whole node.
cpus="${SLURM_CPUS_PER_TASK:-1}"
step=(srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0)
# No dashboard, and so no port for jobs: the run is started here. GPUs are those that Slurm shows to the step.
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$ip" --port="$port" --num-cpus="$cpus" --include-dashboard=false \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats --block &
steps+=($!)

listening() { (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null; }
until listening; do
    if ! kill -0 "${steps[0]}" 2>/dev/null || ((SECONDS > wait_seconds)); then
        echo "slurm.sh: Ray did not start on $head" >&2
        exit 1
    fi
    sleep 1
done

others=("${nodes[@]:1}")
if ((${#others[@]} > 0)); then
    "${step[@]}" --nodes="${#others[@]}" --ntasks="${#others[@]}" --nodelist="$(IFS=,; echo "${others[*]}")" \
        ray start --address="$address" --num-cpus="$cpus" --disable-usage-stats --block &
    steps+=($!)
fi

# A run is planned for the nodes that are there when it starts.
python - "$address" "${#nodes[@]}" "$wait_seconds" <<'PYTHON'
import sys
import time

import ray

address, expected, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + seconds
while (there := sum(node["Alive"] for node in ray.nodes())) < expected:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {there} of {expected} nodes joined within {seconds:g} s")
    time.sleep(1)
print(f"Ray on {there} nodes: {ray.cluster_resources().get('GPU', 0):g} GPU", flush=True)
PYTHON

# In the background, as bash hears a signal while it waits, and not while a command in the foreground runs.
python -m popmtl train "$@" --address "$address" &
run=$!
code=0
wait "$run" || code=$?
run=""
exit "$code"
