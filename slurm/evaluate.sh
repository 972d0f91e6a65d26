#!/usr/bin/env bash
# Evaluates a run on one GPU. From the root:
#   sbatch slurm/evaluate.sh --model runs/x --data shards --split test --out evaluation
#SBATCH --job-name=medblip-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

source slurm/env.sh

srun medblip evaluate "$@"
