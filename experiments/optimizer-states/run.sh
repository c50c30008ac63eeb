#!/usr/bin/env bash
# AdamW's moments and the gradients in bf16 against fp32: three paired seeds, dense and moe_4t4i, at the quick start's scale.
#   experiments/optimizer-states/run.sh [CORPUS] [OUT] [TOKENS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
corpus=$(realpath "${1:-$here/../../corpora/emoji}") out=${2:-runs/optimizer-states} tokens=${3:-9.6e5}
mkdir -p "$out" && cd "$out"
for dtype in fp32 bf16; do
  moma train -m feed_forward=dense,moe_4t4i seed=0,1,2 "optim.state_dtype=$dtype" "optim.grad_dtype=$dtype" "data.corpus=$corpus" \
    "duration.tokens=$tokens" parallel.threads=1 eval.interval.percent=25 eval.batches=32 "hydra.sweep.dir=sweep-$dtype" \
    'run_dir=runs/${hydra:runtime.choices.feed_forward}-${optim.state_dtype}-s${seed.init}'
done
python "$here/analyse.py" . "$here/results.json" "$here/figure.png"
