#!/usr/bin/env bash
# Gradients that travel in bf16 against fp32: three paired seeds on two processes, moe_4t4i and dense.
#   experiments/reduce-dtype/run.sh [CORPUS] [OUT] [TOKENS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
corpus=$(realpath "${1:-$here/../../corpora/emoji}") out=${2:-runs/reduce-dtype} tokens=${3:-4e5}
mkdir -p "$out" && cd "$out"
moma train -m feed_forward=dense,moe_4t4i parallel.reduce_dtype=fp32,bf16 seed=0,1,2 "data.corpus=$corpus" "duration.tokens=$tokens" \
  data.rows=1 data.images=4 data.accumulation=2 parallel.processes=2 parallel.shard=true parallel.threads=1 \
  eval.interval.percent=50 eval.batches=32 hydra.sweep.dir=sweep \
  'run_dir=runs/${hydra:runtime.choices.feed_forward}-${parallel.reduce_dtype}-s${seed.init}'
python "$here/summary.py" . "$here/results.json"
