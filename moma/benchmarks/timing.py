"""Several ways to do the same work, timed side by side in one process.

    round 1:  A B C A'      every round runs every case once; the order rotates, and every second round runs backwards,
    round 2:  A A' C B      so that no case always follows the same one
    ...
    ratio of a case = its time / the baseline's time in the same round: median and quartiles over the rounds
    noise           = the same ratio for A', a second instance of the baseline: how far from 1 equal things come out

A goal "at most g" holds where the median less half of the quartile range of the noise is at most g; "at least g"
likewise from the other side. Where that range is wider than MAX_SPREAD, what only holds by it is not judged. A peer
that raises is absent, with its reason; what is ours raises.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch

from moma.log import Progress

MAX_SPREAD = 0.1
Stopwatch = Callable[[Callable[[], Any]], float]  # runs once and returns seconds


class Case(NamedTuple):
    """One way to do the work: `run` is one repetition, everything built and warmed up outside of it.

    `flops` and `bytes` of one repetition are by formula; `executed_flops` is what FlopCounterMode saw. `memory`: peak
    extra bytes of one repetition, measured outside of the timing. `ceiling`: the name of the ceiling that bounds it
    (None: "gemm" where it has flops, else "copy"). `note`: what differs from ours, in words. `within`: what a
    repetition runs in, entered outside of the timing.
    """

    name: str
    run: Callable[[], Any]
    ours: bool = True
    flops: float | None = None
    executed_flops: float | None = None
    bytes: float | None = None
    tokens: float | None = None
    note: str = ""
    memory: Callable[[], int] | None = None
    ceiling: str | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


class Absent(NamedTuple):
    """A case that could not run, and why."""

    name: str
    reason: str


class Goal(NamedTuple):
    """A bound on what `case` measures: `of` its time or memory as a ratio to `than` (None: the baseline), its share
    of the ceiling, its rate (FLOP/s or tokens/s), or a `value` that is known already.

    With `at_least` a time is a speed-up: time of `than` / time of `case`. `held` is None where it could not be judged.
    """

    id: str
    words: str
    bound: float
    case: str = ""
    than: str | None = None
    of: Literal["time", "memory", "ceiling", "flops", "tokens", "value"] = "time"
    at_least: bool = False
    value: float | None = None
    held: bool | None = None


class Bench(NamedTuple):
    """The cases of a suite; `baseline` is the name of one of them, `twin` a second, separately built instance of it."""

    cases: list[Case]
    baseline: str
    twin: Case
    absent: list[Absent]
    facts: dict[str, Any]
    goals: list[Goal]


class Reading(NamedTuple):
    """What was measured of a case; seconds per repetition, rates at the median, `ratio` to the baseline."""

    name: str
    ours: bool
    times_s: list[float]
    min_s: float
    median_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    flops: float | None
    executed_flops: float | None
    flops_per_s: float | None
    bytes_per_s: float | None
    ceiling_share: float | None
    tokens_per_s: float | None
    memory_bytes: int | None
    note: str


class Noise(NamedTuple):
    """The twin's time / the baseline's, over the rounds: quartiles and extremes."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        return self.high - self.low


def measure(
    bench: Bench,
    rounds: int,
    warmup: int,
    device: torch.device,
    ceilings: Mapping[str, float] | None = None,
    clock: Stopwatch | None = None,
) -> tuple[list[Reading], list[Absent]]:
    """Run every case `warmup` times, then once in each of `rounds`; the readings (the twin's is the last one) and the
    absent, the suite's own first.

    `ceilings`: FLOP/s or bytes/s by name. `clock` takes the place of `stopwatch(device)`.
    """
    timed = clock or stopwatch(device)
    cases = {case.name: case for case in (*bench.cases, bench.twin)}
    assert len(cases) == len(bench.cases) + 1, "two cases have the same name"
    times: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, int | None] = dict.fromkeys(cases)
    absent = list(bench.absent)

    def attempt(case: Case, work: Callable[[], Any]) -> Any:
        try:
            with case.within():
                return work()
        except Exception as error:
            if case.ours or case.name == bench.baseline:
                raise
            absent.append(Absent(case.name, first_line(error)))
            del cases[case.name]

    progress = Progress("rounds", rounds, stream=sys.stderr)
    for case in list(cases.values()):
        progress.update(0, f"warming up {case.name}")
        attempt(case, lambda case=case: [case.run() for _ in range(warmup)])
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through in every round
    try:
        for number in range(rounds):
            gc.collect()
            for case in in_turn(list(cases.values()), number):
                seconds = attempt(case, lambda case=case: timed(case.run))
                if seconds is not None:
                    times[case.name].append(seconds)
            progress.update(number + 1)
    finally:
        progress.close()
        gc.unfreeze()
        if collecting:
            gc.enable()
    for case in list(cases.values()):
        if case.memory is not None:
            memory[case.name] = attempt(case, case.memory)
    readings = [
        _reading(case, times[name], times[bench.baseline], memory[name], ceilings or {}) for name, case in cases.items()
    ]
    return readings, absent


def stopwatch(device: torch.device) -> Stopwatch:
    """Times one repetition on a device: CUDA events on a GPU, from an idle queue to an idle queue."""
    return _cuda_seconds if device.type == "cuda" else _seconds


def in_turn(cases: Sequence[Case], number: int) -> list[Case]:
    """The order of round `number`: rotated by it, and backwards in every second round."""
    start = number % len(cases)
    turned = [*cases[start:], *cases[:start]]
    return turned[::-1] if number % 2 else turned


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Time / other time of the same round."""
    return [time / other for time, other in zip(times, others, strict=True)]


def noise(bench: Bench, readings: Iterable[Reading]) -> Noise:
    """How far equal work comes out apart: the twin against the baseline."""
    times = {reading.name: reading.times_s for reading in readings}
    values = ratios(times[bench.twin.name], times[bench.baseline])
    low, median, high = quartiles(values)
    return Noise(median, low, high, min(values), max(values))


def judge(goal: Goal, readings: Sequence[Reading], noise: Noise, baseline: str) -> Goal:
    """The goal with its value, and whether it holds; neither where a case of it is absent or has no such figure.

    Only times and rates are given the benefit of the noise.
    """
    value = goal.value if goal.of == "value" else _value(goal, {each.name: each for each in readings}, baseline)
    if value is None:
        return goal._replace(value=None, held=None)
    # the noise is one of a ratio of 1: relative
    allowance = value * noise.spread / 2 if goal.of in ("time", "ceiling", "flops", "tokens") else 0.0
    within = value + allowance >= goal.bound if goal.at_least else value - allowance <= goal.bound
    plainly = value >= goal.bound if goal.at_least else value <= goal.bound
    held = None if within and not plainly and noise.spread > MAX_SPREAD else within
    return goal._replace(value=value, held=held)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _value(goal: Goal, readings: Mapping[str, Reading], baseline: str) -> float | None:
    case, than = readings.get(goal.case), readings.get(goal.than or baseline)
    if case is None or than is None:
        return None
    if goal.of == "ceiling":
        return case.ceiling_share
    if goal.of == "flops":
        return case.flops_per_s
    if goal.of == "tokens":
        return case.tokens_per_s
    if goal.of == "memory":
        return case.memory_bytes / than.memory_bytes if case.memory_bytes is not None and than.memory_bytes else None
    pair = (than.times_s, case.times_s) if goal.at_least else (case.times_s, than.times_s)
    return quartiles(ratios(*pair))[1]


def _reading(
    case: Case, times: list[float], baseline: list[float], memory: int | None, ceilings: Mapping[str, float]
) -> Reading:
    median = statistics.median(times)
    low, ratio, high = quartiles(ratios(times, baseline))
    flops = None if case.flops is None else case.flops / median
    moved = None if case.bytes is None else case.bytes / median
    ceiling = ceilings.get(case.ceiling or ("copy" if flops is None else "gemm"))
    rate = moved if flops is None else flops
    return Reading(
        name=case.name,
        ours=case.ours,
        times_s=times,
        min_s=min(times),
        median_s=median,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        flops=case.flops,
        executed_flops=case.executed_flops,
        flops_per_s=flops,
        bytes_per_s=moved,
        ceiling_share=rate / ceiling if rate is not None and ceiling else None,
        tokens_per_s=None if case.tokens is None else case.tokens / median,
        memory_bytes=memory,
        note=case.note,
    )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


AHEAD = 2_000_000  # cycles, about a millisecond


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)  # the host launches while the device is busy: what is timed is the device's work
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
