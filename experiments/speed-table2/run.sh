#!/usr/bin/env bash
# Table 2 of the paper on this machine: the whole step of every variant against dense, side by side in one process; the
# mixture-of-depths variants in a second one, since all of them at once would need the memory of seven models.
#   experiments/speed-table2/run.sh [MODEL] [ROWS] [further overrides of moma bench]       e.g. run.sh 435m 6 on a GPU
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-90m} rows=${2:-1}
mkdir -p "$here/results"
measure() {
  moma bench suite=step "model=$model" "rows=$rows" row_length=4096 micro_batches=1 "${@:2}" "out=$here/results/step-$model-$rows-$1.json"
}
measure experts 'variants=[dense,moe_8x,moe_1t1i,moe_4t4i]' "${@:3}"
measure depth 'variants=[dense,mod_moe_1t1i,mod_moe_4t4i]' peers=false "${@:3}"
python "$here/figure.py" "$here/figure.png" "$here"/results/step-*.json
