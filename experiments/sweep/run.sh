#!/usr/bin/env bash
# A sweep of six trainings in which one job is killed (kill -9), the same command again, and the comparison of the runs.
#   experiments/sweep/run.sh [CORPUS] [OUT] [TOKENS]
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
corpus=$(realpath "${1:-$root/corpora/emoji}") out=${2:-runs/sweep} tokens=${3:-3e5}
mkdir -p "$out" && out=$(realpath "$out") && cd "$out" || exit 1
record=$out/sweeps/six
command=(moma train -m feed_forward=dense,moe_8x,moe_4t4i seed=0,1 "data.corpus=$corpus" "duration.tokens=$tokens"
  checkpoint.interval.percent=20 eval.interval.percent=20 parallel.threads=1 "hydra.sweep.dir=$record"
  'run_dir=runs/${hydra:runtime.choices.feed_forward}-s${seed.init}')
rm -rf "$record" runs straight

"${command[@]}" > first.txt 2>&1 &
sweep=$!
# job 3 is moe_8x, seed 1: killed once its second checkpoint is there
until ls runs/moe_8x-s1/checkpoints/step-* 2> /dev/null | grep -c . | grep -q '[2-9]'; do
  kill -0 $sweep 2> /dev/null || { echo "the sweep ended too early"; cat first.txt; exit 1; }
  sleep 0.2
done
kill -9 "$(python -c "import json; print(json.load(open('$record/3/job.json'))['pid'])")"
wait $sweep
first=$?
cp "$record/sweep.json" first.json
"${command[@]}" > second.txt 2>&1
second=$?
moma train feed_forward=moe_8x seed=1 "data.corpus=$corpus" "duration.tokens=$tokens" checkpoint.interval.percent=20 \
  eval.interval.percent=20 parallel.threads=1 run_dir=straight > straight.txt 2>&1
moma compare runs/* out=comparison > compare.txt 2>&1
compared=$?
python - "$record" "$first" "$second" "$compared" << 'END'
import json, sys
from moma.log import MEASURED
record, *statuses = sys.argv[1:]
jobs = [json.load(open(path))["jobs"] for path in ("first.json", f"{record}/sweep.json")]
runs = [
    [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in open(f"{run}/metrics.jsonl")]
    for run in ("runs/moe_8x-s1", "straight")
]
result = {
    "exit statuses (sweep, again, compare)": [int(status) for status in statuses],
    "first": {job["shown"]: [job["status"], job["ended"]] for job in jobs[0]},
    "again": {job["shown"]: [job["status"], job["ended"]] for job in jobs[1]},
    "the killed run logged what an undisturbed one does": runs[0] == runs[1],
}
print(json.dumps(result, indent=1))
json.dump(result, open("sweep.json", "w"), indent=1)
assert result["exit statuses (sweep, again, compare)"] == [1, 0, 0], "see *.txt"
assert result["the killed run logged what an undisturbed one does"]
END
