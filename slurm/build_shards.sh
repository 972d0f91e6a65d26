#!/usr/bin/env bash
# Packs a manifest into shards, on one node or on several at once. A job that was stopped goes on when it runs again.
# From the root:
#   sbatch slurm/build_shards.sh --manifest manifest.csv --out shards
#   sbatch --array=1-4 slurm/build_shards.sh --manifest manifest.csv --out shards
# Each task of an array packs its share of the shards, and the one that ends last writes the tables and index.json.
#SBATCH --job-name=medblip-shards
#SBATCH --array=1-1
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

source slurm/env.sh
[ -n "${SLURM_JOB_ID:-}" ] || exec sbatch "${MEDBLIP_CLUSTER[@]}" "$0" "$@"
export OMP_NUM_THREADS=1 # the workers are the parallelism

# The tasks of --array=0-3, 1-4 and 1-7:2 are all parts 1 to 4 of 4.
task=$(((${SLURM_ARRAY_TASK_ID:-1} - ${SLURM_ARRAY_TASK_MIN:-1}) / ${SLURM_ARRAY_TASK_STEP:-1} + 1))
part=$task/${SLURM_ARRAY_TASK_COUNT:-1}

srun "${medblip_in[@]}" python -m sharding.build --workers "$SLURM_CPUS_PER_TASK" --part "$part" "$@"
