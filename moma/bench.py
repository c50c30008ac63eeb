"""`moma bench suite=...`: the same work done in several ways, timed side by side, as a table and as JSON.

    ceilings of the machine  ->  cases of the suite, built and warmed up  ->  rounds, in turns  ->  ratios and goals

Only the ratios of one run mean something. On a CPU that other processes use they do not: the load average is part of
the result, and said when it is high. The same function serves CPU and GPU. See `moma/benchmarks/`.
"""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moma.benchmarks import SUITES
from moma.benchmarks.ceilings import measure_ceilings
from moma.benchmarks.config import DTYPES, BenchConfig
from moma.benchmarks.peers import use_sources
from moma.benchmarks.timing import Absent, Goal, Noise, Reading, judge, measure, noise
from moma.config import Composed, locate, plain
from moma.distributed import choose_device, choose_precision, fast_float32

__all__ = ["BenchConfig", "bench", "main", "print_table"]

PACKAGES = (
    *("torch", "numpy", "moma", "transformers", "torchtitan", "st-moe-pytorch", "liger-kernel"),
    *("cut-cross-entropy", "triton"),
)
HIGH_LOAD = 1.5
AGREEMENT = 0.01  # of FLOPs by formula and as counted


def main(composed: Composed) -> int:
    """`moma bench`: prints the table, and writes `out` where it is given."""
    config: BenchConfig = composed.config
    result = bench(config) | {"command": " ".join(["moma bench", *composed.overrides])}
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = config.out.with_name(f".{config.out.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(config.out)
    print_table(result)
    return 0


def bench(config: BenchConfig) -> dict[str, Any]:
    """Everything the JSON holds but the command; raises ValueError for a device that is not there."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    load = [os.getloadavg()[0]]
    try:
        ceilings = {}
        if config.ceilings:
            shape = (config.tokens, config.model.dim, 2 * config.model.ffn_dim)
            with fast_float32(device):
                ceilings = measure_ceilings(device, DTYPES[precision], shape)
        use_sources(config.peers_path)
        suite = locate(SUITES[config.suite])(config, device)
        readings, absent = measure(suite, config.rounds, config.warmup, device, ceilings)
    finally:
        torch.set_num_threads(threads)
    load.append(os.getloadavg()[0])
    spread = noise(suite, readings)
    goals = [judge(goal, readings, spread, suite.baseline) for goal in suite.goals]
    if device.type == "cpu" and load[-1] > HIGH_LOAD:  # seconds of a busy machine prove nothing
        goals = [goal if goal.of in ("memory", "value") else goal._replace(held=None) for goal in goals]
    return {
        "suite": config.suite,
        "config": plain(config),
        "precision": precision,
        "versions": versions(),
        "machine": machine(device, config.threads or threads, load),
        "ceilings": ceilings,
        "baseline": suite.baseline,
        "noise": spread._asdict(),
        "cases": [reading._asdict() for reading in readings],
        "absent": [each._asdict() for each in absent],
        "goals": [goal._asdict() for goal in goals],
        "facts": suite.facts,
    }


def versions() -> dict[str, str]:
    """Python and the packages that what is timed comes from, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: torch.device, threads: int, load: Sequence[float]) -> dict[str, Any]:
    """Processor, cores, threads used, GPU, and the load average over a minute before and after."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"load_before": load[0], "load_after": load[-1]}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(result: dict[str, Any]) -> None:
    """The same facts for people."""
    machine = result["machine"]
    print(
        f"{result['suite']}, {result['precision']}, {machine.get('gpu', machine['cpu'])}, {machine['threads']} threads,"
        f" torch {result['versions']['torch']}; ratios to {result['baseline']}"
    )
    if result["ceilings"]:
        print("ceilings: " + ", ".join(_ceiling(*each) for each in result["ceilings"].items()))
    cases = [Reading(**case) for case in result["cases"]]
    width = max(len(case.name) for case in cases)
    print(
        f"{'':{width}} {'median ms':>10} {'min':>9} {'ratio [quartiles]':>21} {'work':>6} {'rate':>12} {'ceiling':>8} "
        f"{'memory MiB':>10} {'tokens/s':>10}"
    )
    unit = next(case.flops for case in cases if case.name == result["baseline"])
    for case in cases:
        print(f"{case.name:{width}} {_row(case, unit)}".rstrip())
    spread = Noise(**result["noise"])
    print(
        f"noise: equal work comes out at {spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}], "
        f"{spread.least:.3f} to {spread.most:.3f}"
    )
    for case in cases:
        if case.note:
            print(f"note: {case.name}: {case.note}")
        if case.flops and case.executed_flops and abs(case.executed_flops / case.flops - 1) > AGREEMENT:
            print(f"note: {case.name}: {case.executed_flops / case.flops:.3f} x the FLOPs of its formula were executed")
    for each in (Absent(**each) for each in result["absent"]):
        print(f"absent: {each.name}: {each.reason}")
    for name, fact in result["facts"].items():
        print(f"{name}: {_said(fact)}")
    for goal in (Goal(**goal) for goal in result["goals"]):
        print(_goal(goal))
    load = machine["load_after"]
    if load > HIGH_LOAD and "gpu" not in machine:
        print(f"load average {load:.2f}, above {HIGH_LOAD}: other processes were running, measure again")


def _row(case: Reading, unit: float | None) -> str:
    ratio = f"{case.ratio:.3f} [{case.ratio_low:.3f}, {case.ratio_high:.3f}]"
    work = f"{case.flops / unit:.2f}x" if case.flops and unit else ""
    rate = ""
    if case.flops_per_s is not None:
        rate = f"{case.flops_per_s / 1e9:,.1f} GF/s"
    elif case.bytes_per_s is not None:
        rate = f"{case.bytes_per_s / 1e9:,.1f} GB/s"
    share = "" if case.ceiling_share is None else f"{case.ceiling_share:.1%}"
    memory = "" if case.memory_bytes is None else f"{case.memory_bytes / 2**20:,.1f}"
    tokens = "" if case.tokens_per_s is None else f"{case.tokens_per_s:,.0f}"
    times = f"{case.median_s * 1e3:>10,.2f} {case.min_s * 1e3:>9,.2f}"
    return f"{times} {ratio:>21} {work:>6} {rate:>12} {share:>8} {memory:>10} {tokens:>10}"


def _said(fact: Any) -> str:
    if isinstance(fact, dict):
        deep = any(isinstance(value, dict) for value in fact.values())
        return ("; " if deep else ", ").join(
            f"{name}{':' if deep else ''} {_said(value)}" for name, value in fact.items()
        )
    return f"{fact:.3g}" if isinstance(fact, float) else str(fact)


def _ceiling(name: str, rate: float) -> str:
    return f"{name} {rate / 1e9:,.1f} {'GF/s' if name.startswith('gemm') else 'GB/s'}"


def _goal(goal: Goal) -> str:
    if goal.held is None:
        why = "a case is absent" if goal.value is None else f"{goal.value:.4g} for {goal.bound:g}"
        return f"goal {goal.id}: not judged (noise, or a busy machine): {goal.words}: {why}"
    sign = ">=" if goal.at_least else "<="
    return f"goal {goal.id}: {'held' if goal.held else 'MISSED'}: {goal.words}: {goal.value:.4g} {sign} {goal.bound:g}"
