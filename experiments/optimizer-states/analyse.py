"""Losses of bf16 minus fp32 optimizer states, paired by seed, with 95 % intervals: analyse.py FOLDER OUT.json PNG"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

from moma.analysis.speedup import interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (0, 1, 2)
folder, out, figure = (Path(argument) for argument in sys.argv[1:])
result: dict = {}
_, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, height_ratios=(2, 1), constrained_layout=True)
for column, kind in enumerate(("dense", "moe_4t4i")):
    lines = {
        (dtype, seed): [json.loads(line) for line in open(folder / f"runs/{kind}-{dtype}-s{seed}/metrics.jsonl")]
        for dtype in ("fp32", "bf16")
        for seed in SEEDS
    }
    for metric in ("val_loss", "val_loss_text", "val_loss_image"):
        last = {key: [row[metric] for row in rows if metric in row][-1] for key, rows in lines.items()}
        found = interval([last["bf16", seed] - last["fp32", seed] for seed in SEEDS])
        result[f"{kind} {metric}"] = {
            "fp32": [last["fp32", seed] for seed in SEEDS],
            "bf16 minus fp32": [found.mean, found.low, found.high],
        }
    steps = [row["step"] for row in lines["fp32", 0] if "loss" in row]
    loss = {key: np.array([row["loss"] for row in rows if "loss" in row]) for key, rows in lines.items()}
    gaps = np.array([loss["bf16", seed] - loss["fp32", seed] for seed in SEEDS])
    late = gaps[:, len(steps) // 2 :].mean(1)
    found = interval(late.tolist())
    result[f"{kind} training loss of the second half, bf16 minus fp32"] = [found.mean, found.low, found.high]
    result[f"{kind} steps"] = steps[-1]
    for dtype, colour in (("fp32", "black"), ("bf16", "tab:orange")):
        for seed in SEEDS:
            axes[0, column].plot(steps, loss[dtype, seed], color=colour, lw=0.8, label=None if seed else dtype)
    axes[0, column].set(title=kind, ylabel="training loss (nats)", yscale="log")
    axes[0, column].legend()
    axes[1, column].plot(steps, gaps.T, color="grey", lw=0.6)
    axes[1, column].plot(steps, gaps.mean(0), color="tab:orange")
    axes[1, column].axhline(0, color="black", lw=0.6)
    axes[1, column].set(xlabel="step", ylabel="bf16 - fp32", ylim=(-0.2, 0.2))
out.write_text(json.dumps(result, indent=1) + "\n")
plt.savefig(figure, dpi=110)
print(json.dumps(result, indent=1))
