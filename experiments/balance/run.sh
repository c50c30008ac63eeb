#!/usr/bin/env bash
# Straggler cost of an uneven share of images: simulated (part 1) and on two processes (part 2); five minutes on two idle cores.
#   experiments/balance/run.sh [CORPUS [TOKENIZER]]       more options: run.py --help
# Part 1 draws counts from CORPUS (default corpora/openstax256; corpora/emoji small with --tokens-per-image 128 does as
# well), part 2 trains on corpora/emoji. Old results are replaced.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) corpus=${1:-corpora/openstax256} tokenizer=${2:-openstax16k}
rm -f "$here"/results/*.json
OMP_NUM_THREADS=1 python "$here/run.py" --corpus "$corpus" --tokenizer "$tokenizer" "${@:3}"
