#!/usr/bin/env bash
# Trainings killed again and again; the same command goes on where it was stopped.
#   experiments/torture/run.sh [KILLS] [IN_SAVE] [STEPS] [WORK] [RESULTS]      run.sh 10 4 60 is a try-out of two minutes
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=$(realpath -m "${5:-$here/results}")
work=$(realpath -m "${4:-$here/../../runs/torture}")
OMP_NUM_THREADS=1 python "$here/torture.py" "$work" "$results" --kills "${1:-120}" --in-save "${2:-40}" --steps "${3:-120}"
