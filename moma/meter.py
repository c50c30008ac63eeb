"""How much work, in which unit: `Duration` (steps, tokens, FLOPs, percent) and `Meter` (seconds, rates, MFU).

    tokens_per_second = tokens / seconds of the window
    mfu_<convention>  = FLOPs / (seconds of the window * peak FLOP/s)

The window runs from the last `rates()` to this one, less the seconds booked as anything but training and
waiting for data: an evaluation or a checkpoint does not make the training look slow, a starved loader does.
An MFU without the name of its FLOP count means nothing, so the count (attention in full, or its causal half)
is part of the metric's name. Imports no torch: whoever wants device time must synchronise before the clock is
read.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import ceil
from typing import Any, Literal

KINDS = ("train", "eval", "data_wait", "compile", "checkpoint")


@dataclass(frozen=True)
class Duration:
    """A length of training in one unit: {steps: 100}, {tokens: 1e9}, {flops: 1e18} or {percent: 5}."""

    steps: int | None = None
    tokens: float | None = None
    flops: float | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise ValueError(
                f"got a duration with {sorted(given) or 'no unit'}, need exactly one of steps, tokens, "
                f"flops, percent: keep one and set the others to null"
            )
        (value,) = given.values()
        if not 0 <= value < float("inf"):
            raise ValueError(f"got a duration of {given}, need a finite number >= 0: change it")
        if self.percent is not None and self.percent > 100:
            raise ValueError(f"got a duration of {self.percent} percent, need at most 100: change it")

    def to_steps(
        self,
        tokens_per_step: int | None = None,
        flops_per_token: float | None = None,
        total_steps: int | None = None,
    ) -> int:
        """Optimizer steps that last at least this long (rounded up).

        `tokens_per_step`: all micro-batches of one step; `flops_per_token`: training FLOPs (forward and
        backward); `total_steps`: the whole run, for percent. Raises ValueError where the unit needs a number
        not given.
        """
        if self.steps is not None:
            return self.steps
        if self.percent is not None:
            return _ceil(self.percent / 100 * _given(total_steps, "percent", "the total number of steps"))
        per_step = _given(tokens_per_step, "tokens or flops", "tokens per step")
        if self.tokens is not None:
            return _ceil(self.tokens / per_step)
        assert self.flops is not None
        return _ceil(self.flops / (per_step * _given(flops_per_token, "flops", "FLOPs per token")))


def _ceil(value: float) -> int:
    """Round up, but forgive the last bits of a product: 5 percent of 100 is 5 steps, not 6."""
    return round(value) if abs(value - round(value)) < 1e-6 else ceil(value)


def _given(value: float | None, unit: str, what: str) -> float:
    if not value:
        raise ValueError(f"got a duration in {unit} without {what}, need it to count steps: use {{steps: n}}")
    return value


class Meter:
    """Seconds by kind of work, tokens and FLOPs of a run, over all of its restarts.

    `peak_flops`: FLOP/s of all devices together, None leaves MFU out. `convention`: how the caller counts
    attention FLOPs. `state`: what `state()` returned before the restart.
    """

    def __init__(
        self,
        peak_flops: float | None = None,
        convention: Literal["full", "causal"] = "full",
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        state = state or {}
        self.peak_flops, self.convention, self._clock = peak_flops, convention, clock
        self.tokens: int = state.get("tokens", 0)
        self.flops: float = state.get("flops", 0.0)
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0) | state.get("seconds", {})
        self._inner = 0.0  # seconds booked by blocks inside the running one
        self._open()

    def _open(self) -> None:
        self._mark = self._clock()
        self._at_mark = (self.tokens, self.flops, dict(self._seconds))

    @contextmanager
    def time(self, kind: str) -> Iterator[None]:
        """Book the block's seconds under `kind` (one of KINDS); those of an inner block count once."""
        if kind not in KINDS:
            raise ValueError(f"got the kind of time {kind!r}, need one of {', '.join(KINDS)}: add it to KINDS")
        start, outer, self._inner = self._clock(), self._inner, 0.0
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._seconds[kind] += elapsed - self._inner
            self._inner = outer + elapsed

    def add(self, tokens: int, flops: float) -> None:
        """Count the work of one optimizer step, over all devices."""
        self.tokens += tokens
        self.flops += flops

    def rates(self) -> dict[str, float]:
        """Metrics of the window since the last call; then a new window starts."""
        tokens, flops, before = self._at_mark
        other = sum(self._seconds[kind] - before[kind] for kind in ("eval", "compile", "checkpoint"))
        seconds = max(self._clock() - self._mark - other, 1e-9)
        values = {
            "tokens": self.tokens,
            "flops": self.flops,
            "tokens_per_second": (self.tokens - tokens) / seconds,
            "data_wait_s": self._seconds["data_wait"] - before["data_wait"],
        }
        if self.peak_flops:
            values[f"mfu_{self.convention}"] = (self.flops - flops) / (seconds * self.peak_flops)
        self._open()
        return values

    def seconds(self) -> dict[str, float]:
        """Seconds of the whole run by kind, as metrics `time/<kind>_s`."""
        return {f"time/{kind}_s": value for kind, value in self._seconds.items()}

    def state(self) -> dict[str, Any]:
        """Plain numbers for the checkpoint's meta.json."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": dict(self._seconds)}
