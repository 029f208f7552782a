#!/bin/sh
# Everything that is to be known of a GPU, in 8 minutes and one json: tools/gpu_check.sh gpu.json [key=value ...]
# What was measured is in the json even if this is ended early.
set -eu
if [ $# -eq 0 ]; then
    echo "usage: tools/gpu_check.sh FILE.json [bccd=FOLDER] [weights=FILE] [key=value ...]" >&2
    exit 2
fi
file=$1
shift
exec python "$(dirname "$0")/benchmark.py" work=gpu "figures=$file" "$@"
