#!/usr/bin/env bash
# Every suite of `moma bench` at the sizes of the 90M model on a CPU, one thread: the CPU goals.
#   experiments/speed-cpu/run.sh [suite ...]       default: all, about 45 minutes; needs 16 GiB
# Peers beside transformers: pip install --no-deps st-moe-pytorch==0.1.8 torchtitan==0.3.0 cut-cross-entropy==25.1.1 and what
# they import, without letting pip change torch (say where by PYTHONPATH if they lie apart).
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
export OMP_NUM_THREADS=1
one() { moma bench model=90m "${@:2}" "out=results/$1.json" | tee "results/$1.txt"; }
for suite in "${@:-layer head attention step decode data checkpoint}"; do
  for each in $suite; do
    case $each in
      layer)
        for precision in bf16 fp32; do
          for compile in on off; do
            one "layer-$precision-compile-$compile" suite=layer "precision=$precision" "compile=$compile" 'variants=[dense,moe_1t1i,moe_4t4i,moe_8x]'
          done
        done ;;
      head) one head-bf16 suite=head precision=bf16 rounds=7 warmup=1 ;;
      attention) for precision in bf16 fp32; do one "attention-$precision" suite=attention "precision=$precision"; done ;;
      step) one step-bf16 suite=step precision=bf16 micro_batches=1 rounds=7 warmup=1 ;;
      decode) for precision in bf16; do one "decode-$precision" suite=decode "precision=$precision" new_tokens=256 rounds=7 'variants=[dense,moe_4t4i]'; done ;;
      data) one data suite=data rows=6 threads=2 ;;
      checkpoint) one checkpoint suite=checkpoint 'variants=[dense]' ;;
    esac
  done
done
