# The part shared by pretrain.sh and finetune.sh, which runs on the first node: checks the config, starts
# the ranks and requeues the job before its time limit. Ranks read their numbers from srun's variables.
set -euo pipefail
command=$1
shift
PYTHON=${PYTHON:-.venv/bin/python}

attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
# Each attempt uses another port, because the previous one may still be in use.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + attempt) % 12000))
# shellcheck disable=SC1091
[ ! -f slurm/site.env ] || source slurm/site.env
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt $attempt, $(date --iso-8601=seconds)"

# USR1 is sent by Slurm before the time limit (--signal), or by `scancel --batch --signal=USR1 JOB`.
# Ranks save after the current step and exit; then the job is requeued. TERM of scancel reaches the
# ranks directly, and this script waits for them.
requeue=no
ask_ranks_to_save() {
  requeue=yes
  scancel --signal=USR1 "$SLURM_JOB_ID" || true # no ranks may have started yet
}
trap ask_ranks_to_save USR1

# The check runs once, before the ranks: an error costs a few seconds of one core.
if [ "$attempt" = 1 ]; then
  device=
  [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] || device=--cpu
  "$PYTHON" -m megatrain check "$@" --verb "$command" --nodes "$SLURM_JOB_NUM_NODES" \
    --gpus-per-node $((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) $device
fi

trap : TERM

code=0
if [ "$requeue" = no ]; then
  # The failure of a rank ends the job; otherwise the others would wait for it.
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$PYTHON" "megatrain/$command.py" "$@" &
  ranks=$!
  # A signal interrupts bash's `wait` and runs the trap; the ranks continue.
  while :; do
    code=0
    wait "$ranks" || code=$?
    kill -0 "$ranks" 2>/dev/null || break
  done
fi

if [ "$requeue" = yes ]; then
  echo "job $SLURM_JOB_ID is requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
