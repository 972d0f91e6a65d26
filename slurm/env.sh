# shellcheck shell=bash disable=SC2034
# What the jobs need to know about your cluster: the one file here that you edit. The scripts beside it source it.
# What is written as ${NAME:-...} may also be set in the shell that submits, for one job.

# --- Where the job runs -------------------------------------------------------------------------------------------
# `bash slurm/pretrain.sh ...` gives itself to sbatch with these (so do evaluate.sh and build_shards.sh).
# `sbatch slurm/pretrain.sh ...` does not read them: there you type them, before the script's name.
MEDBLIP_CLUSTER=(
    # --account=my-project
    # --partition=gpu
    # --qos=normal
    # --constraint=a100
)
# Nodes and GPUs of pretrain.sh, one task a GPU. Without them: its own #SBATCH lines.
MEDBLIP_SIZE=(
    # --nodes=4
    # --ntasks-per-node=8
    # --gpus-per-node=8
    # --cpus-per-task=8
    # --time=24:00:00
)

# --- What the job runs in -----------------------------------------------------------------------------------------
# module load cuda

# An Apptainer image (slurm/medblip.def builds one). Empty: the virtual environment below.
MEDBLIP_CONTAINER=${MEDBLIP_CONTAINER:-}
# Folders that the container must see besides $HOME, /tmp and the one you submit from: data, run, MEDBLIP_HOME, stage.
# export APPTAINER_BIND=/scratch,/local

# A virtual environment on a disk that every node sees; .venv of the repository if empty.
MEDBLIP_VENV=${MEDBLIP_VENV:-}

# Where `medblip fetch` put the weights: a disk that every node sees. ~/.cache/medblip if not set.
# export MEDBLIP_HOME=/shared/medblip
# Compute nodes often have no internet: a job never asks the network.
export HF_HUB_OFFLINE=1

# --- The data -----------------------------------------------------------------------------------------------------
# A disk of each node itself, such as /local/scratch: pretrain.sh copies the shards there first, once a node. Empty:
# they are read where they lie. Take it where the shared disk is slow (`data_wait_fraction` in metrics.jsonl).
MEDBLIP_STAGE=${MEDBLIP_STAGE:-}

# --- Going on by itself -------------------------------------------------------------------------------------------
# Starts in a row that may end without a new checkpoint; the job is then not queued again. Others have no limit.
MEDBLIP_MAX_STUCK=${MEDBLIP_MAX_STUCK:-3}

# --- NCCL: how GPUs talk ------------------------------------------------------------------------------------------
# WARN names a fault of the network; INFO also shows which network was chosen ("NET/IB" is InfiniBand, "NET/Socket"
# is plain Ethernet, ten times slower or more).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The first meeting goes over Ethernet or IPoIB. If NCCL or gloo picks a network that does not lead to the other
# nodes (docker0, a management network), name the right one; see `ip link`.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# InfiniBand cards to use; see `ibstat`.
# export NCCL_IB_HCA=mlx5
# A busy fabric: the time-out of one packet is 4 us x 2^N.
# export NCCL_IB_TIMEOUT=22
# To find out whether InfiniBand or NVLink is what fails: switch one off, and see whether training starts.
# export NCCL_IB_DISABLE=1 NCCL_P2P_DISABLE=1

# --- Nothing to edit below ----------------------------------------------------------------------------------------
# Threads of each task; more than its share of cores makes tasks wait for each other.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# srun does not take --cpus-per-task over from sbatch by itself (Slurm 22.05 and later).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Log lines appear when they are written.
export PYTHONUNBUFFERED=1

# Put before each command of ours: nothing, or the container. --nv lends it the node's NVIDIA driver.
medblip_in=()
if [ -n "$MEDBLIP_CONTAINER" ]; then
    medblip_in=(apptainer exec --nv "$MEDBLIP_CONTAINER")
else
    # shellcheck disable=SC1091
    source "${MEDBLIP_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/activate"
fi
