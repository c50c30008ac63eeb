"""What sparsity buys: eta, the speed-up at equal training loss (paper section 3.1), and held-out differences.

    eta = FLOPs of dense to its final smoothed loss / FLOPs of sparse to first reach that loss

Smoothing: a trailing mean over a window of SMOOTHING of the dense run's FLOPs. Each smoothed point stands at
the mean FLOPs of its window, not at the window's end: on a straight stretch the window then moves a point
along the curve instead of off it, and eta is not biased by the lag. Losses are training losses; under expert
choice those of a sparse model are computed with training-time routing, which sees the future.

A sparse model that never reaches the loss has no eta (None); the gap of the losses at equal FLOPs is given
always. The learning rate of the dense run has decayed where its loss is read and that of the sparse run has
not yet, so eta is rather too low; the first crossing of a noisy curve comes early, so with few lines per
window it is rather too high. Refuses curves without points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moma.analysis.runs import Run

SMOOTHING = 0.05  # of the dense run's FLOPs
LOSSES = {"overall": "loss", "text": "loss_text", "image": "loss_image"}
SEEDS_FOR_A_CLAIM = 3
HELD_OUT = {
    "all targets": "loss",
    "text": "loss_text",
    "text without structural tokens": "loss_text_plain",
    "image": "loss_image",
}
_BASELINE_OF = {"loss_text": "text_bigram", "loss_image": "image_position_unigram"}

# Two-sided 95 % quantiles of Student's t by degrees of freedom, 1 to 30; beyond, the normal quantile is close.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Curve(NamedTuple):
    """Loss (nats per target) over training FLOPs, ascending."""

    flops: np.ndarray
    loss: np.ndarray


class Eta(NamedTuple):
    """`value`: the speed-up, None if never reached; `gap`: sparse minus dense loss (nats) at `gap_flops`.

    `target`: the dense run's final smoothed loss, at `dense_flops`; the sparse run reaches it at
    `sparse_flops`.
    """

    value: float | None
    target: float
    dense_flops: float
    sparse_flops: float | None
    gap: float
    gap_flops: float


class Interval(NamedTuple):
    """A mean over `n` seeds and its 95 % interval; the ends are None with fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and lies on one side of `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True)
class Row:
    """One held-out loss, dense against a sparse variant in one causal mode; means over paired seeds, in nats."""

    variant: str
    mode: str
    what: str
    dense: float
    sparse: float
    difference: Interval  # sparse minus dense
    baseline: float | None

    @property
    def lower(self) -> str:
        """The model with the lower mean: an observation, no claim."""
        return self.variant if self.difference.mean < 0 else "dense"

    @property
    def verdict(self) -> str:
        """The claim that the seeds allow."""
        n = self.difference.n
        if n < SEEDS_FOR_A_CLAIM:
            return "one seed: no verdict" if n == 1 else f"{n} seeds: no verdict"
        return f"{self.lower} is better" if self.difference.excludes(0.0) else "no difference shown"


@dataclass(frozen=True)
class Speedup:
    """eta of one variant on one training loss: per paired seed, with an interval where all seeds reach it."""

    variant: str
    what: str
    per_seed: tuple[Eta, ...]
    interval: Interval | None
    gap: Interval  # sparse minus dense, nats, at equal training FLOPs


def curve(run: Run, metric: str) -> Curve:
    """One metric of a run over its FLOPs, lines without it left out."""
    values = run.column(metric)
    known = np.isfinite(values)
    return Curve(run.metrics["flops"][known], values[known])


def smooth(raw: Curve, window: float) -> Curve:
    """Trailing mean over `window` FLOPs (at least one point) of both coordinates; see the module docstring."""
    flops, loss = (np.asarray(values, float) for values in raw)
    last = np.arange(1, len(flops) + 1)
    first = np.minimum(np.searchsorted(flops, flops - window, side="right"), last - 1)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return (total[last] - total[first]) / (last - first)

    return Curve(mean(flops), mean(loss))


def eta(dense: Curve, sparse: Curve, smoothing: float = SMOOTHING) -> Eta:
    """The speed-up of `sparse` over `dense` from raw training curves; raises ValueError for an empty curve."""
    for name, one in (("dense", dense), ("sparse", sparse)):
        if not len(one.flops):
            raise ValueError(f"got a {name} run without this loss, need a logged curve: train it for longer")
    window = smoothing * dense.flops[-1]
    dense, sparse = smooth(dense, window), smooth(sparse, window)
    target, end = float(dense.loss[-1]), float(min(dense.flops[-1], sparse.flops[-1]))
    gap = float(np.interp(end, sparse.flops, sparse.loss) - np.interp(end, dense.flops, dense.loss))
    reached = first_reach(sparse, target)
    value = None if reached is None else float(dense.flops[-1]) / reached
    return Eta(value, target, float(dense.flops[-1]), reached, gap, end)


def interval(values: Sequence[float], ratio: bool = False) -> Interval:
    """Mean and 95 % t interval of one number per paired seed; `ratio=True` works on logarithms (for eta).

    A t interval rather than a bootstrap: three to five seeds are too few to resample. Raises ValueError for
    no values.
    """
    if not len(values):
        raise ValueError("got no values, need at least one seed: train a pair of runs")
    x = np.log(values) if ratio else np.asarray(values, float)
    back = math.exp if ratio else float
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Interval(back(mean), None, None, n)
    quantile = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = quantile * float(x.std(ddof=1)) / math.sqrt(n)
    return Interval(back(mean), back(mean - half), back(mean + half), n)


def paired(runs: Sequence[Run], variant: str, reference: str = "dense") -> list[tuple[Run, Run]]:
    """(reference run, run of `variant`) for every seed that both have."""
    by_seed = {run.seed: run for run in runs if run.variant == reference}
    return [(by_seed[run.seed], run) for run in runs if run.variant == variant and run.seed in by_seed]


def variants(runs: Sequence[Run]) -> list[str]:
    """Names of the variants, in the order of `runs`."""
    return list(dict.fromkeys(run.variant for run in runs))


def sparse_variants(runs: Sequence[Run]) -> list[str]:
    """The same without `dense`."""
    return [variant for variant in variants(runs) if variant != "dense"]


def causal_losses(run: Run) -> dict[str, dict[str, float]]:
    """Held-out losses of the modes that see the past only, by mode."""
    return {mode: loss for mode, loss in (run.eval or {}).get("loss", {}).items() if mode != "train"}


def held_out(runs: Sequence[Run]) -> list[Row]:
    """Held-out losses of every sparse variant against dense, per causal mode and modality, paired by seed."""
    rows = []
    for variant in sparse_variants(runs):
        pairs = [(d, s) for d, s in paired(runs, variant) if d.eval and s.eval]
        for mode in dict.fromkeys(mode for _, s in pairs for mode in causal_losses(s)):
            for what, key in HELD_OUT.items():
                values = [
                    (d.eval["loss"]["causal"][key], s.eval["loss"][mode][key])  # type: ignore[index]
                    for d, s in pairs
                    if _has(d, "causal", key) and _has(s, mode, key)
                ]
                if not values:
                    continue
                dense, sparse = np.array(values).T
                found = pairs[0][0].eval.get("baselines", {}).get(_BASELINE_OF.get(key, ""))  # type: ignore[union-attr]
                difference = interval(sparse - dense)
                rows.append(Row(variant, mode, what, dense.mean(), sparse.mean(), difference, found))
    return rows


def speedups(runs: Sequence[Run]) -> list[Speedup]:
    """eta and the loss gap of every sparse variant, overall, text and image, over paired seeds."""
    found = []
    for variant in sparse_variants(runs):
        for what, metric in LOSSES.items():
            pairs = [(curve(d, metric), curve(s, metric)) for d, s in paired(runs, variant)]
            etas = tuple(eta(d, s) for d, s in pairs if len(d.flops) and len(s.flops))
            if not etas:
                continue
            values = [one.value for one in etas if one.value is not None]
            over = interval(values, ratio=True) if len(values) == len(etas) else None
            found.append(Speedup(variant, what, etas, over, interval([one.gap for one in etas])))
    return found


def _has(run: Run, mode: str, key: str) -> bool:
    return run.eval is not None and run.eval.get("loss", {}).get(mode, {}).get(key) is not None


def first_reach(sparse: Curve, target: float) -> float | None:
    """FLOPs at which the curve first is at or below `target`, between points on a straight line."""
    below = np.flatnonzero(sparse.loss <= target)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return float(sparse.flops[0])
    (x0, x1), (y0, y1) = sparse.flops[at - 1 : at + 1], sparse.loss[at - 1 : at + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))
