#!/usr/bin/env bash
# Evaluates a run, the scans shared among its tasks, one for each GPU. From the root:
#   sbatch slurm/evaluate.sh --model runs/x --data shards --split test --out evaluation
#   sbatch -N2 --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh ...
#SBATCH --job-name=medblip-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

source slurm/env.sh
[ -n "${SLURM_JOB_ID:-}" ] || exec sbatch "${MEDBLIP_CLUSTER[@]}" "$0" "$@"

MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 "${medblip_in[@]}" medblip evaluate "$@"
