#!/usr/bin/env bash
# Trains on several nodes, one task for each GPU, and carries on after preemption, time limits and dead nodes.
#   bash slurm/pretrain.sh --preset tiny --data shards --run runs/x        account, nodes and GPUs as in slurm/env.sh
#   sbatch -N4 --ntasks-per-node=8 --gpus-per-node=8 slurm/pretrain.sh --preset tiny --data shards --run runs/x
# From any folder; relative paths count from there. Each rank writes RUN/logs/JOB-rankN.log.
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
# USR1 goes to the tasks two minutes before the time limit, TERM when the job is preempted: train.py saves and ends
# with 85. 86: a rank died or hangs, and the others ended for it. Above 128: a signal ended a task.
set -euo pipefail
trap : TERM USR1 # this shell outlives the signal, to see how the training ended

# Slurm runs a copy of this script; where the original lies, it knows.
if [ -z "${SLURM_JOB_ID:-}" ]; then
    root=$(dirname "$0")/..
else
    root=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(/.*\)/slurm/pretrain\.sh.*|\1|p')
    root=${root:-$SLURM_SUBMIT_DIR}
fi
source "$root/slurm/env.sh"
if [ -z "${SLURM_JOB_ID:-}" ]; then
    exec sbatch "${MEDBLIP_CLUSTER[@]}" "${MEDBLIP_SIZE[@]}" "$0" "$@"
fi

# The last value of an option, as train.py takes it.
value_of() {
    local option=$1 value=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$option") value=${2:-} ;;
            "$option"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}
run=$(value_of --run "$@")
data=$(value_of --data "$@")
if [ -z "$run" ] || [ -z "$data" ]; then
    echo "pretrain.sh: --run and --data are needed; the options are those of train.py" >&2
    exit 2
fi
logs=$run/logs
mkdir -p "$logs"

# Each start of this job leaves a line: the checkpoint that it found. Those at the end that are alike led to nothing.
newest_checkpoint() { cat "$run/latest" 2>/dev/null || echo none; }
found=$(newest_checkpoint)
echo "$found" >>"$logs/$SLURM_JOB_ID.starts"
stuck=$(tac "$logs/$SLURM_JOB_ID.starts" | awk -v found="$found" '$0 != found { exit } { n++ } END { print n }')
echo "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, newest checkpoint: $found"
give_up() {
    echo "$1 starts in a row without a new checkpoint (newest: $found): not queued again. See $logs; where starts are" \
        "cut short, a smaller --checkpoint-every helps. The same command goes on." >&2
    exit "$2"
}
# Slurm itself queued it again, after it died with its node or its grace time.
[ "$stuck" -le "$MEDBLIP_MAX_STUCK" ] || give_up $((stuck - 1)) 1

MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT

status=0
options=("$@")
if [ -n "$MEDBLIP_STAGE" ] && [[ $data != *://* ]]; then
    staged=$MEDBLIP_STAGE/medblip-$(realpath "$data" | cksum | cut -d ' ' -f 1)
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash "$root/slurm/stage.sh" "$data" "$staged" || status=$?
    if [ "$status" -eq 0 ]; then
        options+=(--data "$staged")
    elif [ "$status" -lt 128 ]; then
        echo "not staged: the shards are read from $data" >&2
        status=0
    fi
fi

# --wait and not --kill-on-bad-exit: that would kill the other tasks at the first 85, and srun would return 143.
if [ "$status" -eq 0 ]; then
    srun --kill-on-bad-exit=0 --wait=60 --output="$logs/%j-rank%t.log" --open-mode=append \
        "${medblip_in[@]}" python "$root/train.py" \
        --deepspeed_config "${DEEPSPEED_CONFIG:-$root/ds_configs/zero2.json}" "${options[@]}" || status=$?
    tail -n 3 "$logs/$SLURM_JOB_ID-rank0.log" || true
fi

if [ "$status" -ne 85 ] && [ "$status" -ne 86 ] && [ "$status" -le 128 ]; then
    exit "$status"
fi
# Only what was written in this start counts: ranks that are stopped before they have met leave the old status.json.
status_says() { [ "$run/status.json" -nt "$logs/$SLURM_JOB_ID.starts" ] && grep -q "$1" "$run/status.json"; }
if status_says '"the stop file"'; then
    echo "stopped by the file $run/stop, newest checkpoint: $(newest_checkpoint). The same command goes on."
    exit 0
fi
if status_says '"state": "done"'; then
    exit 0 # a signal came after the last step
fi
if ! scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "ended with $status by Slurm, newest checkpoint: $(newest_checkpoint)"
    exit "$status" # scancel or scontrol requeue: what follows is decided
fi
if [ "$(newest_checkpoint)" = "$found" ] && [ "$stuck" -ge "$MEDBLIP_MAX_STUCK" ]; then
    give_up "$stuck" "$status"
fi
echo "ended early with $status, newest checkpoint: $(newest_checkpoint); back into the queue"
scontrol requeue "$SLURM_JOB_ID" || exit "$status"
