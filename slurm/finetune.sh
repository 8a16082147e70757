#!/bin/bash
# One task for each GPU, started by srun; every rank finds its place in srun's own variables.
#
#     sbatch -N 4 slurm/finetune.sh configs/finetune.yaml run.output_dir=/shared/runs/chat
#
# Set the account, partition and time of your cluster here or on sbatch's command line.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
# Slurm runs a copy of this script, so the repository is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the repository}"

# A rank that fails ends the job instead of leaving the others to wait for it.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python megatrain/finetune.py "$@"
