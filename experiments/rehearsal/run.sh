#!/usr/bin/env bash
# The study in small: dense, 8x, 4t4i, expert threshold; three paired seeds (same data order, same shared parameters),
# 480 steps of 1,024 tokens each; causal routers trained after (and, for 4t4i, along); evaluation; report.
#   experiments/rehearsal/run.sh [CORPUS] [OUT] [JOBS]         the same command again goes on where it was stopped
set -uo pipefail
corpus=${1:-corpora/openstax} out=${2:-runs/rehearsal} jobs=${3:-2}
export corpus out
mkdir -p "$out"

one() {  # NAME SEED OVERRIDES...: train, then evaluate
  name=$1 seed=$2; shift 2
  run="$out/$name-s$seed"
  moma train data.corpus="$corpus" data.images=5 parallel.threads=1 seed.data="$seed" seed.init="$seed" \
    duration.tokens=491520 eval.interval.percent=25 "run_dir=$run" "$@" > "$run.log" 2>&1 || { echo "failed: $run"; return 1; }
  case "$*" in  # a model's causal routers need their base run's overrides beside init_from
    *aux_routers*|*dense*|*threshold*|*aux_weight*) ;;
    *) one "$name-aux" "$seed" "$@" objective=aux_routers optim=aux_routers init_from="$run" duration.tokens=147456 ;;
  esac
  [ -f "$run/eval.json" ] || moma evaluate run="$run" batches=24 "error_rates=[0.0, 0.005, 0.02, 0.1]" > "$run.eval.log" 2>&1 || echo "failed: evaluation of $run"
}
export -f one

for seed in 0 1 2; do
  printf '%s\0' "dense $seed feed_forward=dense" "moe_4t4i $seed feed_forward=moe_4t4i" \
    "moe_8x $seed feed_forward=moe_8x" "threshold $seed feed_forward=moe_4t4i_threshold" \
    "moe_4t4i-joint $seed feed_forward=moe_4t4i objective.aux_weight=1.0"
done | xargs -0 -P "$jobs" -I{} bash -c 'one {}' && : || status=1

runs=$(printf '%s,' "$out"/{dense,moe_8x-aux,moe_4t4i-aux,threshold}-s{0,1,2})
moma report "runs=[${runs%,}]" out="$out/report" || status=1
exit "${status:-0}"
