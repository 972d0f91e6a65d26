#!/usr/bin/env bash
# Trains on several nodes, one task for each GPU, and carries on after preemption and time limits. From the root:
#   sbatch slurm/pretrain.sh --preset tiny --data shards --run runs/x
#   sbatch -N4 --ntasks-per-node=8 --gpus-per-node=8 slurm/pretrain.sh ...
#SBATCH --job-name=medblip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
# USR1 goes to the tasks two minutes before the time limit, TERM when the job is preempted: train.py saves and leaves
# with 85, "run me again". 86: a rank died or hung, and the others ended for it; that is queued again too.
set -euo pipefail
trap : TERM USR1 # this shell outlives the signal, to see how the training ended

source slurm/env.sh
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT

# --wait and not --kill-on-bad-exit: that would kill the other tasks at the first 85, and srun would return 143.
status=0
srun --kill-on-bad-exit=0 --wait=60 \
    python train.py --deepspeed_config "${DEEPSPEED_CONFIG:-ds_configs/zero2.json}" "$@" || status=$?

restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=${MEDBLIP_MAX_RESTARTS:-100}
if [ "$status" -eq 85 ] || [ "$status" -eq 86 ]; then # 86: a rank died or hung
    if [ "$restarts" -lt "$max_restarts" ]; then
        echo "ended early with $status: back into the queue (restart $((restarts + 1)) of at most $max_restarts)"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    echo "ended early with $status, but already restarted $restarts times: sbatch it again to go on" >&2
fi
exit "$status"
