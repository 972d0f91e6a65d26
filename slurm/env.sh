# The environment of every job: sourced by the scripts beside it, from the repository's root.
# Put what your cluster needs here, for example `module load cuda`.
# shellcheck shell=bash

# The virtual environment, on a disk that every node sees.
# shellcheck disable=SC1091
source "${MEDBLIP_VENV:-.venv}/bin/activate"

# Compute nodes often have no internet: fetch weights beforehand with `medblip fetch`.
export HF_HUB_OFFLINE=1

# Where the tiny preset and other made weights are kept; must be on a disk that every node sees.
# export MEDBLIP_HOME=/path/on/a/shared/disk

# Threads of each task; more than its share of cores makes tasks wait for each other.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# srun no longer takes --cpus-per-task over from sbatch by itself (Slurm 22.05 and later).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Log lines appear when they are written.
export PYTHONUNBUFFERED=1

# NCCL between nodes. WARN names a network fault; INFO shows which network it chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# If it chose the wrong one, name the right one (see `ip link` and `ibstat`):
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
