#!/usr/bin/env bash
# Mutated inputs for every source, more than the suite runs: experiments/fuzz/run.sh [CASES] [SEED] [RESULTS.json]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
results=$(realpath -m "${3:-$root/experiments/fuzz/results/sources.json}")
mkdir -p "$(dirname "$results")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
PYTHONPATH="$root" python "$root/tests/data/test_fuzz.py" "${1:-2000}" "${2:-1000}" "$results"
