#!/usr/bin/env bash
# Copies a folder of shards to a disk of this node, for pretrain.sh: stage.sh FROM TO. What is there already, of the
# right size and under the same index.json, stays; so a job that is queued again finds it.
set -euo pipefail
from=$1 to=$2

mkdir -p "$to"
exec 9>"$to/.lock"
flock 9 # one copy a node, whoever else wants it
cmp -s "$from/index.json" "$to/index.json" || find "$to" -type f ! -name .lock -delete

sizes() { (cd "$1" && find . -type f ! -name .lock ! -name '*.unfinished' -printf '%s %P\n' | sort); }
missing() { comm -23 <(sizes "$from") <(sizes "$to"); }

needed_bytes=$(missing | awk '{ sum += $1 } END { printf "%d", sum }')
free_bytes=$(df --output=avail -B1 "$to" | tail -n 1)
if [ "$needed_bytes" -gt "$free_bytes" ]; then
    echo "stage.sh: $(hostname): $to has room for $free_bytes bytes, $needed_bytes are needed" >&2
    exit 1
fi
# Under another name until it is whole; index.json last.
copy() {
    mkdir -p "$(dirname "$to/$1")"
    cp "$from/$1" "$to/$1.unfinished" && mv "$to/$1.unfinished" "$to/$1"
}
export -f copy
export from to
# shellcheck disable=SC2016 # $1 is the shell's that xargs starts
missing | cut -d ' ' -f 2- | grep -vx index.json | tr '\n' '\0' | xargs -0 -r -P 4 -n 1 bash -c 'copy "$1"' _ || true
copy index.json

if [ -n "$(missing)" ]; then
    echo "stage.sh: $(hostname): missing or of another size in $to: $(missing | cut -d ' ' -f 2- | head -n 5)" >&2
    exit 1
fi
echo "$(hostname): $needed_bytes bytes copied to $to"
