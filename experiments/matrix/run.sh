#!/usr/bin/env bash
# The whole family at equal training FLOPs, three paired seeds: every model is trained and evaluated in its routing modes
# (causal without further training: `threshold`, or the rule itself), then compared.
#   experiments/matrix/run.sh CORPUS OUT [JOBS] [SEEDS]
#   SIZE=90m FLOPS=3e15 DATA="data.rows=16 data.row_length=1024 data.images=80" experiments/matrix/run.sh ...
# SIZE needs its SIZE_mod beside it. The same command again goes on where it was stopped; a failed run is named, the
# others go on, and the end is not 0.
set -uo pipefail
corpus=$1 out=$2 jobs=${3:-1} seeds=${4:-"0 1 2"}
SIZE=${SIZE:-90m} FLOPS=${FLOPS:-3e15} SEED_FLOPS=${SEED_FLOPS:-3e14} DATA=${DATA:-"data.rows=16 data.row_length=1024 data.images=80"}
MORE=${MORE:-"optim.lr=1e-3 optim.warmup.percent=2"}
export corpus out SIZE FLOPS SEED_FLOPS DATA MORE
mkdir -p "$out"

family="dense                 feed_forward=dense
moe_1t1i              feed_forward=moe_1t1i
moe_8x                feed_forward=moe_8x
moe_4t4i              feed_forward=moe_4t4i
moe_7t1i              feed_forward=moe_7t1i
moe_8x_token_choice   feed_forward=moe_8x_token_choice
moe_4t4i_token_choice feed_forward=moe_4t4i_token_choice
moe_4t4i_threshold    feed_forward=moe_4t4i_threshold
mot                   feed_forward=moe_1t1i attention=untied
mod                   feed_forward=moe_4t4i depth=mod model=${SIZE}_mod
mod_quota             feed_forward=moe_4t4i depth=mod_quota model=${SIZE}_mod
upcycled              feed_forward=moe_4t4i feed_forward.noise=upcycled"

run() {  # NAME SEED VERB OVERRIDES...
  local name=$1 seed=$2 verb=$3
  shift 3
  # shellcheck disable=SC2086
  moma "$verb" model="$SIZE" data.corpus="$corpus" $DATA optim=paper $MORE seed.data="$seed" seed.init="$seed" \
    checkpoint.interval.percent=25 eval.interval.percent=10 run_dir="$out/$name-s$seed" "$@" >> "$out/$name-s$seed.log" 2>&1
}

one() {  # SEED NAME OVERRIDES...
  local seed=$1 name=$2
  shift 2
  if [ "$name" = upcycled ]; then  # a tenth of the FLOPs as 1t1i, the rest as 4t4i, on new data
    run upcycling-seed "$seed" train feed_forward=moe_1t1i "duration.flops=$SEED_FLOPS" &&
      { [ -d "$out/$name-s$seed/checkpoints" ] ||
        run "$name" "$seed" upcycle "$@" seed_run="$out/upcycling-seed-s$seed" "duration.flops=$(python -c "print($FLOPS - $SEED_FLOPS)")"; } &&
      run "$name" "$seed" train "$@" "duration.flops=$(python -c "print($FLOPS - $SEED_FLOPS)")"
  else
    run "$name" "$seed" train "$@" "duration.flops=$FLOPS"
  fi || { echo "failed: $name-s$seed, see $out/$name-s$seed.log"; return 1; }
  [ -f "$out/$name-s$seed/eval.json" ] || moma evaluate run="$out/$name-s$seed" batches=32 >> "$out/$name-s$seed.log" 2>&1 ||
    { echo "failed: evaluation of $name-s$seed"; return 1; }
}
export -f run one

status=0
for seed in $seeds; do
  while IFS= read -r line; do printf '%s\0' "$seed $line"; done <<< "$family"
done | xargs -0 -P "$jobs" -I{} bash -c 'one {}' || status=1

found=$(for seed in $seeds; do while read -r name _; do
  [ -f "$out/$name-s$seed/eval.json" ] && printf '%s,' "$out/$name-s$seed"; done <<< "$family"; done)
moma report "runs=[${found%,}]" out="$out/report" || status=1
exit $status
