#!/bin/bash
# Finetune on a Slurm cluster, one task for each GPU:
#
#     sbatch -N 1 slurm/finetune.sh configs/finetune_lora_llama3_8b.yaml run.output_dir=/shared/runs/lora
#
# Partition, account and time are options of sbatch; slurm/site.env is for other settings of your site.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository}" || exit 1
exec bash slurm/job.sh finetune "$@"
