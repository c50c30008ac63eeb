#!/usr/bin/env bash
# The study in small: dense, 8x, 4t4i, expert threshold; three paired seeds (same data order, same shared parameters),
# 480 steps of 1,024 tokens each; causal routers trained after (and, for 4t4i, along); evaluation; report.
#   experiments/rehearsal/run.sh [CORPUS] [OUT] [JOBS]         the same command again goes on where it was stopped
set -uo pipefail
corpus=${1:-corpora/openstax} out=${2:-runs/rehearsal} jobs=${3:-2}
export corpus out
mkdir -p "$out"

train() {  # RUN SEED OVERRIDES...
  local run="$out/$1-s$2" seed=$2
  shift 2
  moma train data.corpus="$corpus" data.images=5 parallel.threads=1 seed.data="$seed" seed.init="$seed" \
    eval.interval.percent=25 "run_dir=$run" duration.tokens=491520 "$@" > "$run.log" 2>&1 || { echo "failed: $run"; return 1; }
}

evaluate() {  # RUN SEED OVERRIDES...
  local run="$out/$1-s$2"
  shift 2
  [ -f "$run/eval.json" ] || moma evaluate run="$run" batches=24 "$@" > "$run.eval.log" 2>&1 ||
    { echo "failed: evaluation of $run"; return 1; }
}

one() {  # NAME SEED OVERRIDES...: train, its causal routers where it needs some, evaluate
  local name=$1 seed=$2
  train "$@" || return 1
  case "$name" in
    dense) evaluate "$name" "$seed" ;;
    moe_4t4i | moe_8x)
      shift 2
      train "$name-aux" "$seed" "$@" objective=aux_routers optim=aux_routers init_from="$out/$name-s$seed" duration.tokens=147456 || return 1
      evaluate "$name-aux" "$seed" "error_rates=[0.0, 0.005, 0.02, 0.1]" ;;
    *) evaluate "$name" "$seed" "error_rates=[0.0, 0.005, 0.02, 0.1]" ;;
  esac
}
export -f train evaluate one

for seed in 0 1 2; do
  printf '%s\0' "dense $seed feed_forward=dense" "moe_4t4i $seed feed_forward=moe_4t4i" \
    "moe_8x $seed feed_forward=moe_8x" "threshold $seed feed_forward=moe_4t4i_threshold feed_forward.selection.cutoff_decay=0.99" \
    "moe_4t4i-joint $seed feed_forward=moe_4t4i objective.aux_weight=1.0"
done | xargs -0 -P "$jobs" -I{} bash -c 'one {}' && : || status=1

runs=$(printf '%s,' "$out"/{dense,moe_8x-aux,moe_4t4i-aux,moe_4t4i-joint,threshold}-s{0,1,2})
moma report "runs=[${runs%,}]" out="$out/report" || status=1
exit "${status:-0}"
