#!/usr/bin/env bash
# Packs a manifest into shards on one node. A job that was stopped goes on when it runs again. From the root:
#   sbatch slurm/build_shards.sh --manifest manifest.csv --out shards
#SBATCH --job-name=medblip-shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

source slurm/env.sh
export OMP_NUM_THREADS=1 # the workers are the parallelism

srun python -m sharding.build --workers "$SLURM_CPUS_PER_TASK" "$@"
