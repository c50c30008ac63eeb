"""Whole training steps of one model after the other, for those that do not fit beside each other; CUDA graphs.

    python experiments/speed-h200/steps.py OUT.json model=1_4b variants=dense,moe_4t4i reduced=moe_4t4i
    ... graphs=1        every variant also with parallel.cuda_graphs
    ... dry=1           small, on a CPU too

The first variant is measured again at the end: how far equal things come out apart in this way of measuring. `reduced`:
variants whose optimizer states and gradients are bf16 (10 bytes per parameter). A model that does not fit is tried
again with `recompute=selective`. Everything else is `moma bench suite=step`'s.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moma.benchmarks import step as suite
from moma.benchmarks.config import BenchConfig, architecture
from moma.benchmarks.timing import stopwatch
from moma.config import compose
from moma.distributed import ParallelConfig, begin_pass
from moma.optim import build_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
SMALL = ["model.dim=64", "model.n_layers=2", "model.n_heads=2", "rows=2", "row_length=256", "vocab_size=512",
         "micro_batches=2"]  # fmt: skip


def main(out: Path, given: dict[str, str]) -> int:
    """All variants; nonzero if one of them failed."""
    dry, variants = "dry" in given, given["variants"].split(",")
    overrides = ["suite=step", f"model={given['model']}", f"variants=[{','.join(dict.fromkeys(variants))}]"]
    overrides += SMALL if dry else ["rows=6", "row_length=4096", f"micro_batches={given.get('micro_batches', 8)}"]
    config: BenchConfig = compose("bench", [*overrides, *(["compile=off"] if not CUDA else [])]).config
    results: dict[str, Any] = {"torch": torch.__version__, "given": given}
    results["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    ways = [False, True] if "graphs" in given and CUDA else [False]
    for variant in [*variants, variants[0]]:
        for graphs in ways:
            name = f"{variant}{', CUDA graphs' if graphs else ''}"
            name = f"{name}, again" if name in results else name
            results[name] = attempt(config, variant, graphs, variant in given.get("reduced", "").split(","), dry)
            print(name, json.dumps(results[name]), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    first = results[variants[0]]
    for found in results.values():
        if isinstance(found, dict) and "step_s" in found and "step_s" in first:
            for what in ("forward_backward_s", "step_s"):
                found[f"{what.removesuffix('_s')} / {variants[0]}"] = found[what] / first[what]
    out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(isinstance(found, dict) and "error" in found for found in results.values()))


def attempt(config: BenchConfig, variant: str, graphs: bool, reduced: bool, dry: bool) -> dict[str, Any]:
    """One variant as it is, then recomputing, if memory is short."""
    for recompute in ("none", "selective"):
        parallel = ParallelConfig(DEVICE.type, config.compile, cuda_graphs=graphs, recompute=recompute)
        try:
            return measure(config, variant, parallel, reduced, dry) | {"recompute": recompute}
        except torch.OutOfMemoryError as error:
            found = {"error": str(error)[:500]}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            gc.collect()
            torch.compiler.reset()
            if CUDA:
                torch.cuda.empty_cache()
    return found


def measure(config: BenchConfig, variant: str, parallel: ParallelConfig, reduced: bool, dry: bool) -> dict[str, Any]:
    """Seconds, memory and the share of time that the GPU works."""
    suite._parallel = lambda config, device: parallel  # how the suite arranges its models
    vocab, batches = suite.batches_of(config, config.image_share, DEVICE)
    made = architecture(config, variant)
    subject = suite.build(config, made, vocab, batches, DEVICE)
    if reduced:
        optim = replace(suite.OPTIM, state_dtype="bf16")  # gradients are sums: fp32
        subject.optimizer = build_optimizer(subject.model.named_parameters(), optim)

    def once(number: int = 0) -> Any:
        begin_pass(parallel, subject.trained)
        return suite.gradients(subject, [batches[number]])

    def clear() -> None:
        subject.optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        clear()
        for number in range(len(batches)):
            seen = once(number)
        suite.update(subject, *seen)

    for _ in range(1 if dry else 4):  # compiled, warmed up, recorded
        clear()
        suite.update(subject, *once())
    found = suite.flops_of(made, vocab, batches[0])
    timed = stopwatch(DEVICE)

    def seconds(run: Callable[[], Any], before: Callable[[], Any], times: int) -> float:
        measured = []
        for _ in range(times):
            before()
            measured.append(timed(run))
        return median(measured)

    n_times = 2 if dry else 7
    if CUDA:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()  # adds to the gradients that are there
        found["activations_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
        found["states_gib"] = held / 2**30
    found["forward_backward_s"] = seconds(once, clear, n_times)
    last = once()
    found["optimizer_s"] = seconds(lambda: suite.update(subject, *last), lambda: None, n_times)
    found["step_s"] = seconds(step, lambda: None, 2 if dry else 3)
    once_s, tokens = found["forward_backward_s"], config.tokens
    found["tokens_per_second"] = tokens * len(batches) / found["step_s"]
    for count in ("flops", "flops_causal"):
        found[f"mfu_{count}"] = found[count] / once_s / 989e12 if CUDA else None
    if CUDA:
        found["gpu_busy"] = busy(step)
    return found


def busy(run: Callable[[], Any]) -> float:
    """Share of the time, from the first kernel to the last, in which a kernel or copy runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    worked, end = 0.0, spans[0][0]
    for start, stop in spans:
        worked += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return worked / (end - spans[0][0])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), dict(each.split("=", 1) for each in sys.argv[2:])))
