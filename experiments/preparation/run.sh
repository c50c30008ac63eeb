#!/usr/bin/env bash
# A corpus of textbook pages is prepared whole, then again with kill -9 at random moments, and the files are compared.
#   experiments/preparation/run.sh PAGES [WORK] [KILLS]     PAGES: folder with {train,val}.{jsonl.xz,tar}
set -euo pipefail
pages=$1 work=${2:-$(mktemp -d)} kills=${3:-12}
out=$(dirname "$0")/results
mkdir -p "$work" "$out"
RANDOM=1
prepare() { moma prepare data=openstax256 folder="$pages" tokenizer=small workers=2 corpora="$work/$1" "${@:2}"; }
hashes() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum); }
finished() { find "$1" -path '*/.progress/*' -name '*-*.json' 2>/dev/null | wc -l; }

start=$(date +%s.%N)
prepare whole 2>"$work/whole.log"
seconds=$(python -c "print(round($(date +%s.%N) - $start))")

echo "kill,after_shards,and_seconds,finished_shards" >"$out/kills.csv"
target=0
for kill in $(seq "$kills"); do
  setsid moma prepare data=openstax256 folder="$pages" tokenizer=small workers=2 corpora="$work/killed" 2>>"$work/killed.log" &
  pid=$!
  # some tenths of a second after so many shards are finished
  while [ "$(finished "$work/killed")" -lt "$target" ]; do sleep 0.1; done
  after=$((RANDOM % 30))
  sleep $((after / 10)).$((after % 10))
  kill -9 -- "-$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  echo "$kill,$target,$((after / 10)).$((after % 10)),$(finished "$work/killed")" >>"$out/kills.csv"
  target=$((target + RANDOM % 34))
done
prepare killed 2>>"$work/killed.log"

hashes "$work/whole/openstax256" >"$work/whole.sha256"
hashes "$work/killed/openstax256" >"$work/killed.sha256"
cmp "$work/whole.sha256" "$work/killed.sha256"
prepare near near_duplicates=drop 2>"$work/near.log"
cp "$work/near/openstax256/skipped.jsonl" "$out/near_duplicates.jsonl"
sed -i "s#$pages/##g" "$out/near_duplicates.jsonl"

python - "$work" "$seconds" "$kills" >"$out/preparation.json" <<'PY'
import hashlib, json, os, sys
from pathlib import Path
work, seconds, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
manifest = json.loads((work / "whole/openstax256/manifest.json").read_text())
hashes = (work / "whole.sha256").read_bytes()
totals = {
    split: {name: {key: entry[key] for key in ("documents", "images", "tokens")} | {"shards": len(entry["shards"])}
            for name, entry in sources.items()}
    for split, sources in manifest["splits"].items()
}
print(json.dumps({
    "cores": len(os.sched_getaffinity(0)), "load_at_end": [round(x, 1) for x in os.getloadavg()], "wall_s": seconds,
    "kills": kills, "files_equal": len(hashes.splitlines()), "sha256_of_hashes": hashlib.sha256(hashes).hexdigest(),
    "vocab_hash": manifest["vocab_hash"], "libraries": manifest["libraries"], "skipped": manifest["skipped"],
    "near_duplicates": json.loads((work / "near/openstax256/manifest.json").read_text())["skipped"], "splits": totals,
}, indent=1))
PY
