"""A made-up study on disk, as the verbs write it: a dense and a sparse run, its routers' run, generations.

The sparse run has experts in every layer and a depth router in every second one.

Curves have a planted speed-up: sparse(F) = dense(ETA F) on both modalities.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

ETA = 2.0
TOKENS_PER_STEP, FLOPS_PER_TOKEN = 2048, 3.0e7
PROMPTS = ("red apple", "full moon", '<b>not bold</b> & "quoted"', "snail", "umbrella with rain drops", "key")


def loss_at(flops: np.ndarray, total: float, floor: float, scale: float) -> np.ndarray:
    return floor + scale * (flops / total + 0.01) ** -0.35


def write_run(
    folder: Path, experts: dict[str, int] | None, seed: int = 0, lines: int = 60, noise: float = 0.01,
    objective: str = "next_token", init_from: Path | None = None, speed: float | None = None,
    shape: tuple[int, int] = (256, 6), cost: float = FLOPS_PER_TOKEN, above: float = 0.0, causal: float | None = None,
    draw: int | None = None,
) -> Path:  # fmt: skip
    """metrics.jsonl and one checkpoint's meta.json. `shape`: width and layers; `cost`: FLOPs per token; `above`: added
    to the losses; `causal`: what moving cut-offs lose to the training rule, logged where it is given; `draw`:
    seed of the noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed + (100 if experts else 0) if draw is None else draw)
    step = 10 * np.arange(1, lines + 1)
    flops = step * TOKENS_PER_STEP * cost
    speed = speed or (ETA if experts else 1.0)
    text = loss_at(speed * flops, flops[-1], 2.6 + above, 0.9) + rng.normal(0, noise, lines)
    image = loss_at(speed * flops, flops[-1], 3.6 + above, 0.6) + rng.normal(0, noise, lines)
    rows = []
    for i in range(lines):
        if objective == "aux_routers":
            rows.append({"step": int(step[i]), "aux_loss": 0.6 - 0.2 * i / lines, "flops": float(flops[i])})
            continue
        row: dict[str, Any] = {
            "step": int(step[i]), "loss": (text[i] + image[i]) / 2, "loss_text": text[i], "loss_image": image[i],
            "tokens": int(step[i] * TOKENS_PER_STEP), "flops": float(flops[i]), "lr": 1e-3, "grad_norm": 1.0,
            "tokens_per_second": 4000.0 - (500 if experts else 0), "data_wait_s": 0.01,
        }  # fmt: skip
        rows.append(row)
        if (i + 1) % (lines // 6) == 0:
            rows.append(
                {"step": int(step[i]), "val_loss": (text[i] + image[i]) / 2 + 0.1, "val_loss_text": text[i] + 0.1,
                 "val_loss_image": image[i] + 0.1}
            )  # fmt: skip
            if causal is not None:
                held = {name: rows[-1][f"val_{name}"] + causal for name in ("loss", "loss_text", "loss_image")}
                rows.append({"step": int(step[i])} | {f"val_threshold_{name}": loss for name, loss in held.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = folder / "checkpoints" / f"step-{step[-1]:08d}"
    checkpoint.mkdir(parents=True)
    meta = {
        "format": 1,
        "step": int(step[-1]),
        "config": {
            "model": {"dim": shape[0], "n_layers": shape[1], "n_heads": 4},
            "feed_forward": {"kind": "sparse", "experts": experts} if experts else {"kind": "dense"},
            "objective": {"kind": objective},
            "seed": {"data": seed, "init": seed},
            "data": {
                "corpus": "corpora/emoji",
                "rows": 4,
                "row_length": 512,
                "images": 16,
                "accumulation": 1,
            },
            "tokenizer": "small",
            "precision": "bf16",
            "optim": {"kind": "adamw", "lr": 1e-3},
            "vocab_hash": "0123456789abcdef",
            "plan": f"plan of seed {seed}",
            "init_from": str(init_from) if init_from else None,
        },
        "git": {"commit": "0123456789abcdef", "clean": True},
        "precision": "bf16",
        "threads": 2,
        "torch": "2.13.0",
        "meter": {
            "tokens": int(step[-1] * TOKENS_PER_STEP),
            "flops": float(flops[-1]),
            "seconds": {"train": 700.0, "eval": 20.0, "data_wait": 1.0, "compile": 0.0, "checkpoint": 2.0},
        },
        "total_steps": int(step[-1]),
        "init_step": newest_step(init_from) if init_from else None,
    }
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    return folder


def newest_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def losses(text: float, image: float) -> dict[str, float]:
    return {
        "loss": (text + image) / 2, "loss_text": text, "loss_text_plain": text + 0.2, "loss_image": image,
        "targets": 90000.0,
    }  # fmt: skip


CAUSAL = {"aux": 0.07, "aux_calibrated": 0.05, "threshold": 0.02}  # what each mode loses


def write_eval(folder: Path, run: Path, experts: dict[str, int] | None, layers: int = 6, seed: int = 0) -> None:
    """eval.json of a model: dense (`causal`), or sparse with trained routers (`train`, causal modes, maps)."""
    rng = np.random.default_rng(seed)
    text, image = (3.5, 4.22) if experts is None else (3.3, 3.95)
    sparse = {"train": losses(text, image)}
    sparse |= {mode: losses(text + lost - 0.01, image + lost + 0.01) for mode, lost in CAUSAL.items()}
    result: dict[str, Any] = {
        "run": str(run), "model": "tiny", "feed_forward": "moe_4t4i" if experts else "dense", "step": newest_step(run),
        "tokens": 1228800, "flops": 3.69e13, "corpus": "corpora/emoji", "split": "val", "micro_batches": 24,
        "precision": "bf16", "params_total": 2.2e7 if experts else 7.4e6, "params_active": 7.4e6,
        "flops_per_token_forward": 1.0e7, "flops_per_token_train": 3.0e7,
        "loss": {"causal": losses(text, image)} if experts is None else sparse,
        "baselines": {"text_bigram": 4.37, "text_unigram": 6.1, "image_position_unigram": 4.93},
        "pictures": {
            "generated": {"kid": 0.061, "se": 0.004}, "unigram": {"kid": 0.31, "se": 0.006},
            "training": {"kid": 0.011, "se": 0.002}, "network": "efficientnet-lite0", "n": 200,
            "mode": "aux" if experts else "causal",
        },
    }  # fmt: skip
    if experts:
        result |= _routers(experts, layers, rng)
        result["error_injection"] = {
            "depth": [
                {"sigma": s, "realised_rate": s, **losses(text + 20 * s, image + 10 * s)} for s in (0.0, 0.005, 0.02)
            ]
        }
    (folder / "eval.json").write_text(json.dumps(result))


def _routers(experts: dict[str, int], layers: int, rng: np.random.Generator) -> dict[str, Any]:
    names = [f"{m} {e}" for m, n in experts.items() for e in range(n)]
    y, x = np.mgrid[0:8, 0:8] / 7
    words = ["the", " Lord", "<boi>", " face", "\n", " of", " light", " skin", "<script>", " king", ",", " flag"]
    routers: dict[str, Any] = {}
    for layer in range(layers):
        if layer % 2 == 0:
            share = {mode: [[0.2 + 0.05 * layer, 0.3 - 0.02 * layer]] for mode in ("train", *CAUSAL)}
            around = np.clip(np.hypot(y - 0.5, x - 0.5), 0, 1).ravel().round(4).tolist()
            routers[f"{layer}.depth"] = {
                "columns": ["depth"], "expected": [0.25], "share": share,
                "image_position": dict.fromkeys(share, [around]), "score": dict.fromkeys(share, [0.5]),
                "top_tokens": [[[" the", 1.5]]],
            }  # fmt: skip
        share, place, top, grids = {}, {}, [], []
        for m, n in experts.items():
            for e in range(n):
                angle = 2 * math.pi * (e / n) + 0.7 * layer
                cy, cx = 0.5 + 0.42 * math.sin(angle), 0.5 + 0.42 * math.cos(angle)
                far = (y - cy) ** 2 + (x - cx) ** 2
                grids.append(np.exp(-far / (0.05 + 0.03 * layer)) + 0.05 if m == "image" else np.zeros((8, 8)))
                listed = [[words[(e * 3 + i + layer) % 12], 3.9 - 0.3 * i] for i in range(12)]
                top.append(listed if m == "text" else [])
        total = np.maximum(sum(grids), 1e-9)
        for mode in ("train", *CAUSAL):
            jitter, noise = (0, 0.02) if mode == "train" else (CAUSAL[mode], 0.06)
            share[mode] = [
                [float(max(0, 1 / n + rng.normal(0, jitter))) * (m == k) for k in experts]
                for m, n in experts.items() for _ in range(n)
            ]  # fmt: skip
            place[mode] = [
                np.clip(g / total + rng.normal(0, noise, (8, 8)) * (g.max() > 0), 0, 1).ravel().round(4).tolist()
                for g in grids
            ]
        routers[str(layer)] = {
            "columns": names, "expected": [1 / n for n in experts.values() for _ in range(n)], "share": share,
            "image_position": place, "score": {mode: rng.uniform(0.4, 0.9, len(names)).tolist() for mode in share},
            "top_tokens": top,
        }  # fmt: skip

    def entry(name: str, drop: float) -> dict[str, Any]:
        i, true = int(name.split(".")[0]), 0.25 if "depth" in name else 1.0
        return {
            "accuracy": 0.93 - 0.01 * i - drop, "majority": 0.75, "auc": 0.97 - 0.012 * i - drop, "precision": 0.8,
            "recall": 0.78, "experts_true": true, "experts_predicted": true * (0.97 - 2 * drop), "tie_share": 0.012,
        }  # fmt: skip

    modality = {"none": 0.31, "one": 0.44, "several": 0.25, "load": [0.25] * 8, "load_entropy": 0.998}
    told = {"token_information": 0.42, "token_information_by_chance": 0.01}
    return {
        "maps": {"modalities": list(experts), "grid": [8, 8], "routers": routers},
        "routing": {
            states: {name: {mode: entry(name, lost + extra) for mode, lost in CAUSAL.items()} for name in routers}
            for states, extra in (("training", 0.0), ("free_running", 0.03))
        },
        "diagnostics": {
            "train": {n: {"text": modality | told, "image": modality | {"dropped": 0.03}} for n in routers}
        },
        "specialisation": {str(layer): {"text": 0.31, "image": 0.2} for layer in range(layers)},
    }


def drawing(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        a, b = rng.integers(4, 60, 2), rng.integers(4, 60, 2)
        box = [int(min(a[0], b[0])), int(min(a[1], b[1])), int(max(a[0], b[0])) + 3, int(max(a[1], b[1])) + 3]
        draw.ellipse(box, fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def write_generations(folder: Path, run: Path, label: str, seed: int = 0, samples: int = 3) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for number, prompt in enumerate(PROMPTS):
        real = f"real-{number}.png"
        drawing(number).save(folder / real)
        for sample in range(samples):
            file = f"picture-{number}-{sample}.png"
            drawing(1000 + 100 * seed + 10 * number + sample).save(folder / file)
            entries.append({"kind": "picture", "prompt": prompt, "sample": sample, "file": file, "real": real})
        caption = f"a {prompt} by {label}"
        entries.append({"kind": "caption", "prompt": prompt, "sample": 0, "text": caption, "real": real})
    mode = "causal" if label == "dense" else "aux"
    record = {"run": str(run), "feed_forward": label, "mode": mode, "generations": entries}
    (folder / "generations.json").write_text(json.dumps(record))
    return folder


def write_study(
    root: Path, seeds: tuple[int, ...] = (0,), lines: int = 60, layers: int = 6, samples: int = 3
) -> dict[str, list[Path]]:
    """Runs and generation folders of a whole study: `runs`, `generations`."""
    experts, runs = {"text": 4, "image": 4}, []
    for seed in seeds:
        dense = write_run(root / f"runs/tiny-dense-s{seed}", None, seed, lines)
        sparse = write_run(root / f"runs/tiny-moe_4t4i-s{seed}", experts, seed, lines)
        aux = write_run(root / f"runs/tiny-moe_4t4i-aux_routers-s{seed}", experts, seed, 12, 0, "aux_routers", sparse)
        write_eval(dense, dense, None, layers, seed)
        write_eval(aux, aux, experts, layers, seed)
        runs += [dense, sparse, aux]
    generations = [
        write_generations(root / "generations/dense", runs[0], "dense", 1, samples),
        write_generations(root / "generations/moe_4t4i", runs[2], "moe_4t4i", 2, samples),
    ]
    return {"runs": runs, "generations": generations}


SIZES = {(128, 4): 1.0e7, (192, 4): 3.0e7, (256, 6): 1.0e8}  # width and layers: FLOPs per token
LAW = (0.4, 0.16)  # a and b: what is above the largest size, over compute relative to its own
VARIANTS = {
    "dense": (None, 1.0), "moe_1t1i": ({"text": 1, "image": 1}, 1.3), "moe_2t2i": ({"text": 2, "image": 2}, 1.6),
    "moe_4t4i": ({"text": 4, "image": 4}, 2.0), "moe_8x": ({"all": 8}, 1.8),
}  # fmt: skip


def write_sweep(
    root: Path, variants: Sequence[str] = tuple(VARIANTS), seeds: Sequence[int] = (0, 1, 2),
    sizes: Sequence[tuple[int, int]] = tuple(SIZES), lines: int = 60,
) -> list[Path]:  # fmt: skip
    """Runs of every size, variant and seed under `root`: planted speed-ups, and losses that fall with size."""
    folders = []
    for shape in sizes:
        above = LAW[0] * ((SIZES[shape] / max(SIZES.values())) ** -LAW[1] - 1)
        for name in variants:
            experts, speed = VARIANTS[name]
            cut = 0.02 if experts and max(experts.values()) > 1 else None
            for seed in seeds:
                folder = root / f"{shape[0]}x{shape[1]}-{name}-s{seed}"
                write_run(folder, experts, seed, lines, 0.01, speed=speed, shape=shape, cost=SIZES[shape],
                          above=above, causal=cut, draw=len(folders))  # fmt: skip
                folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """One seed, two layers: read only."""
    return write_study(tmp_path_factory.mktemp("study"), lines=30, layers=2, samples=2)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """dense and moe_4t4i at three sizes and seeds: `root`, read only; `write`: to make others; what was planted."""
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root, ("dense", "moe_4t4i"), lines=30)
    return {"root": root, "write": write_sweep, "write_run": write_run, "write_eval": write_eval,
            "sizes": SIZES, "law": LAW}  # fmt: skip
