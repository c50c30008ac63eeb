"""Final losses of bf16 minus fp32 reduction, paired by seed, with 95 % intervals: summary.py FOLDER OUT.json"""

import json
import sys
from pathlib import Path

from moma.analysis.speedup import interval

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
result: dict = {}
for kind in ("dense", "moe_4t4i"):
    lines = {
        (dtype, seed): [json.loads(line) for line in open(folder / f"runs/{kind}-{dtype}-s{seed}/metrics.jsonl")]
        for dtype in ("fp32", "bf16")
        for seed in (0, 1, 2)
    }
    for metric in ("val_loss", "val_loss_text", "val_loss_image"):
        last = {key: [row[metric] for row in rows if metric in row][-1] for key, rows in lines.items()}
        found = interval([last["bf16", seed] - last["fp32", seed] for seed in (0, 1, 2)])
        result[f"{kind} {metric}"] = {
            "fp32": [last["fp32", seed] for seed in (0, 1, 2)],
            "bf16 minus fp32": [found.mean, found.low, found.high],
        }
    result[f"{kind} steps"] = lines["fp32", 0][-1]["step"]
out.write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
