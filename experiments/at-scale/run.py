"""Steps at the published sizes, compiled and under FSDP2: recompilations, waits of the host, speed, checkpoints.

    python -m torch.distributed.run --standalone --nproc-per-node=1 experiments/at-scale/run.py OUT.json
    ... run.py OUT.json dry=1                      a few steps of small models on CPUs
    ... run.py OUT.json only=NAME,NAME             some of the cases

Trains through `moma train` on a made-up corpus with the paper's vocabulary (65,536; pictures of 1,024 codes). Between
two lines of the log nothing may make the host wait: on a GPU torch's sync debug mode is set to "error", on a CPU the
operations that would wait are counted. The traced graphs are counted after step 5 and at the end.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from moma import train
from moma.checkpoint import Saver, latest, read_meta
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.distributed import process_group

CASES = {
    "435m-dense": ["model=435m", "feed_forward=dense", "data.rows=6"],
    "435m-moe_4t4i": ["model=435m", "feed_forward=moe_4t4i", "data.rows=6"],
    "1_4b-dense": ["model=1_4b", "feed_forward=dense", "data.rows=4"],
    # as many images in a micro-batch as come: padded groups
    "435m-moe_4t4i-mixed": [
        "model=435m",
        "feed_forward=moe_4t4i",
        "data.balance=false",
        "data.rows=6",
        "parallel.shard=false",
    ],
}
PAUSES = ("_validate", "_save", "_refuse_bad_parameters")  # where the loop waits on purpose, once in a while
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item", "aten.unique")


class Waits(TorchDispatchMode):
    """Counts operations on tensors for whose result the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found = False, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and str(func).startswith(WAITING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def watch(waits: Waits, warm: int) -> Callable[[], dict[str, int]]:
    """Forbid waiting from step `warm` on, but where the loop reads metrics, validates or saves."""
    cuda, steps, graphs = torch.cuda.is_available(), [0], [0]
    real_step = train.step_

    def forbid(yes: bool) -> None:
        waits.on = yes
        if cuda:
            torch.cuda.set_sync_debug_mode("error" if yes else "default")

    def step_(*arguments: Any) -> None:
        real_step(*arguments)
        steps[0] += 1
        if steps[0] == warm:
            graphs[0] = counters["stats"]["unique_graphs"]
            forbid(True)

    def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **named: Any) -> Any:
            before, _ = waits.on, forbid(False)
            try:
                return function(*arguments, **named)
            finally:
                forbid(before)

        return inner

    train.step_ = step_
    train._means = allowed(train._means)
    for name in PAUSES:
        setattr(train._Run, name, allowed(getattr(train._Run, name)))
    Saver.wait = allowed(Saver.wait)

    def summary() -> dict[str, int]:
        forbid(False)
        return {
            "steps_watched": steps[0] - warm,
            "waits": len(waits.found),
            "graphs_after_warm_up": graphs[0],
            "graphs": counters["stats"]["unique_graphs"],
        }

    return summary


def run(name: str, overrides: list[str], folder: Path, steps: int, made: list[str]) -> dict[str, Any]:
    """One training; what its log and its last checkpoint say."""
    torch._dynamo.reset()
    counters.clear()
    waits, run_dir = Waits(), folder / name
    saved = (train.step_, train._means, Saver.wait, *(getattr(train._Run, name) for name in PAUSES))

    def restore() -> None:
        train.step_, train._means, Saver.wait, *pauses = saved
        for name, function in zip(PAUSES, pauses, strict=True):
            setattr(train._Run, name, function)

    summary = watch(waits, 5)
    command = [
        *made, *overrides, f"run_dir={run_dir}", f"duration={{steps:{steps}}}",
        "parallel.compile=on", "optim=paper", "optim.warmup.steps=10", "log.interval=20", "eval.interval=null",
        f"checkpoint.interval={{steps:{steps // 2}}}", "checkpoint.keep_last=1",
    ]  # fmt: skip
    if "parallel.shard=false" not in overrides:
        command.append("parallel.shard=true")
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:  # a compiled graph cannot be watched operation by operation: an eager run first
            with waits:
                assert train.main(compose("train", [*command, "parallel.compile=off"])) == 0
            summary()
            shutil.rmtree(run_dir)
            restore()
            summary = watch(waits, 5)
        assert train.main(compose("train", command)) == 0
    finally:
        found = summary()
        restore()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    newest = latest(run_dir / "checkpoints")
    assert newest is not None
    written = [line for line in lines if "checkpoint_write_s" in line]
    n_bytes = sum(read_meta(newest)["files"].values())
    result = found | {
        "tokens_per_second": median(line["tokens_per_second"] for line in lines),
        "tokens_per_second_range": [f(line["tokens_per_second"] for line in lines) for f in (min, max)],
        "mfu_full": median([line["mfu_full"] for line in lines if "mfu_full" in line] or [0]),
        "mfu_causal": median([line["mfu_causal"] for line in lines if "mfu_causal" in line] or [0]),
        "memory_gib": max(line["memory_gib"] for line in lines),
        "checkpoint_pause_s": [line["checkpoint_pause_s"] for line in written][:1],
        "checkpoint_write_s": [line["checkpoint_write_s"] for line in written][:1],
        "checkpoint_gb_per_s": [n_bytes / 1e9 / line["checkpoint_write_s"] for line in written][:1],
        "checkpoint_bytes": n_bytes,
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
    }
    shutil.rmtree(run_dir)
    return result


def main(out: Path, dry: bool, names: list[str]) -> int:
    """The named cases; nonzero if the host waited or a graph was traced again."""
    folder = Path(tempfile.mkdtemp())
    sizes = {"image_codes": 64, "grid": (8, 8)} if dry else {"image_codes": 8192, "grid": (32, 32), "text_size": 57_000}
    tokenizer, corpus, vocab = write_synthetic(folder, pairs=300, texts=40_000 if not dry else 2000, **sizes)
    made = [f"tokenizer={tokenizer}", f"data.corpus={corpus}"]
    results: dict[str, Any] = {"torch": torch.__version__, "vocabulary": vocab.size}
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with process_group("auto") as ranks:
        for name in names:
            overrides = CASES[name]
            if dry:
                small = ["model.dim=64", "model.n_layers=2", "model.n_heads=2", "data.rows=2", "data.row_length=256"]
                overrides = [*overrides, *small, "data.images=3"]
            else:
                rows = int(overrides[-1].split("=")[1])
                overrides = [*overrides, "data.row_length=4096", f"data.images={2 * rows}"]
            results[name] = run(name, overrides, folder, 60 if dry else 200, made)
            if ranks.rank == 0:
                print(name, json.dumps(results[name]), flush=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(folder)
    cases = [results[name] for name in names]
    return int(any(case["waits"] or case["graphs"] != case["graphs_after_warm_up"] for case in cases))


if __name__ == "__main__":
    chosen = [each.removeprefix("only=").split(",") for each in sys.argv[2:] if each.startswith("only=")]
    sys.exit(main(Path(sys.argv[1]), "dry=1" in sys.argv[2:], chosen[0] if chosen else list(CASES)))
