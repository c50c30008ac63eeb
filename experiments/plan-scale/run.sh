#!/usr/bin/env bash
# Plans and iterates a whole pass over synthetic indices of 100,000 and 1,000,000 documents: CPU seconds, peak memory, micro-batches.
#   experiments/plan-scale/run.sh [REPETITIONS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) repetitions=${1:-3} made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
cat > "$made/plan.py" <<'PY'
import json, resource, sys, time
from pathlib import Path

import numpy as np

from moma.data.plan import Plan, PlanShape
from moma.data.shards import open_corpus, source_record, write_manifest


def shards(folder, tokens_of, images_of, random, n, per_shard=50_000):
    """Shards with an index of n documents; their token files are holes of the right size."""
    folder.mkdir(parents=True)
    records = []
    for number in range(-(-n // per_shard)):
        documents = min(per_shard, n - number * per_shard)
        counts = images_of(random, documents)  # segments: one for each picture, or one of text
        segments = np.maximum(counts, 1)
        lengths = tokens_of(random, int(segments.sum()))
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        ends = np.concatenate([[0], np.cumsum(segments)])
        images = np.repeat(np.minimum(counts, 1), segments).astype(np.int32)
        stem = f"shard-{number:05d}"
        np.savez(folder / f"{stem}.index.npz", doc_offset=bounds[ends], segment_offset=bounds, segment_images=images)
        with open(folder / f"{stem}.tokens.bin", "wb") as file:
            file.truncate(2 * int(bounds[-1]))
        records.append({"file": f"{stem}.tokens.bin", "tokens": int(bounds[-1]), "documents": documents,
                        "images": int(images.sum()), "sha256": "", "bytes": 2 * int(bounds[-1]), "index_sha256": "",
                        "mask": False})
    return records


def make(corpus, n):
    random = np.random.default_rng(0)
    kinds = {
        "pairs": (lambda r, k: 258 + r.integers(20, 300, k), lambda r, k: np.ones(k, np.int64), 4 * n // 10),
        "pages": (lambda r, k: 258 + r.integers(20, 900, k), lambda r, k: r.integers(1, 6, k), n // 10),
        "text": (lambda r, k: r.integers(50, 1500, k), lambda r, k: np.zeros(k, np.int64), 5 * n // 10),
    }
    train = {name: source_record("text", shards(corpus / "train" / name, *kind[:2], random, kind[2]))
             for name, kind in kinds.items()}
    write_manifest(corpus, {"vocab_hash": "synthetic", "tokenizer": "none", "token_dtype": "uint16",
                            "splits": {"train": train, "val": {}}})


what, corpus, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if what == "make":
    make(corpus, n)
else:
    start = time.process_time()
    plan = Plan(open_corpus(corpus, "train", "synthetic"), PlanShape(rows=4, row_length=4096, images=16), seed=0)
    opened = time.process_time()
    batches = 0
    for batch, state in plan.run():
        assert batch.exact
        batches += 1
        if min(state["pass"].values()):  # every source was passed at least once
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"documents": n, "open_s": round(opened - start, 2), "plan_s": round(time.process_time() - opened, 2),
                      "peak_mb": round(peak), "micro_batches": batches, "tokens": sum(state["tokens"].values()),
                      "passes": state["pass"]}))
PY
for n in 100000 1000000; do python "$made/plan.py" make "$made/$n" "$n"; done
for _ in $(seq "$repetitions"); do
  for n in 100000 1000000; do python "$made/plan.py" run "$made/$n" "$n"; done  # interleaved
done | tee "$here/results/plan.jsonl"
