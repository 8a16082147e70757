# What pretrain.sh and finetune.sh do once they run on the first node: check, start the ranks, and hand the job back before
# its time is over. Ranks find their places in srun's variables.
set -euo pipefail
verb=$1
shift
PYTHON=${PYTHON:-.venv/bin/python}

attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
# Another port at each attempt: the last one's may still be taken.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + attempt) % 12000))
# shellcheck disable=SC1091
[ ! -f slurm/site.env ] || source slurm/site.env
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt $attempt, $(date --iso-8601=seconds)"

# USR1 comes from --signal before the time is over, or from `scancel --batch --signal=USR1 JOB`. Ranks save after their step and
# end, then the job goes back into the queue. scancel's TERM reaches the ranks by itself, and this script waits for them.
requeue=no
ask_ranks_to_save() {
  requeue=yes
  scancel --signal=USR1 "$SLURM_JOB_ID" || true # there may be no ranks yet
}
trap ask_ranks_to_save USR1

# Said once and before all ranks: a mistake costs seconds of one core.
if [ "$attempt" = 1 ]; then
  device=
  [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] || device=--cpu
  "$PYTHON" -m megatrain check "$@" --verb "$verb" --nodes "$SLURM_JOB_NUM_NODES" --gpus-per-node $((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) $device
fi

trap : TERM

code=0
if [ "$requeue" = no ]; then
  # A rank that fails ends the job instead of leaving the others to wait for it.
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$PYTHON" "megatrain/$verb.py" "$@" &
  ranks=$!
  # A signal ends bash's `wait`, and its trap runs; the ranks go on.
  while :; do
    code=0
    wait "$ranks" || code=$?
    kill -0 "$ranks" 2>/dev/null || break
  done
fi

if [ "$requeue" = yes ]; then
  echo "job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
