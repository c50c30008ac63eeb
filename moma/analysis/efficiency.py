"""eta in every mode that a curve exists for, at the end point, by step matching, and per second.

    mode train       eta of training losses, routed as in training: what the paper reports; sees the future
    causal           the same of losses that the past alone decides, tracked while training: a model whose rule sees
                     the future under its moving cut-offs (val_threshold_loss), any other by its own rule (val_loss)
    charged          causal eta with the FLOPs of the auxiliary routers' training added to the sparse side
    aux, estimated   charged, and the curve moved by what the auxiliary routers lose to the cut-offs at the end
    end point        C_dense(L) / (C_sparse + C_routers) at the loss L that the sparse model ends with under a causal
                     rule; where dense never gets as low, its whole FLOPs over the same is a lower bound
    slope            of (dense FLOPs, sparse FLOPs) at equal loss, a straight line by least squares; eta ~ 1 / slope
                     (Mixture-of-Transformers, arXiv 2411.04996)
    per second       eta x tokens per second of sparse / of dense, one machine for both taken for granted

Everything is per pair of seeds; intervals are 95 % t intervals over the logarithms, a verdict needs three pairs.
End points come from eval.json, whose held-out set is larger than that of the curve: the difference to dense there is
laid on dense's curve. Refuses nothing: what the files do not hold is None.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moma.analysis.runs import Run
from moma.analysis.speedup import (
    LOSSES,
    SEEDS_FOR_A_CLAIM,
    SMOOTHING,
    Curve,
    Eta,
    Interval,
    causal_losses,
    curve,
    eta,
    first_reach,
    interval,
    paired,
    smooth,
    sparse_variants,
)
from moma.analysis.study import Study, final_flops

TRAIN, CAUSAL, ESTIMATED = "train", "causal", "aux, estimated"
_ROUTED_BY = {"aux", "aux_calibrated"}  # modes that need the auxiliary routers


class Pair(NamedTuple):
    """One pair of seeds: the speed-up, its relatives, and `routers` FLOPs; None where a loss is never reached."""

    seed: tuple[int, int]
    eta: Eta
    charged: float | None
    slope: float | None
    per_second: float | None
    routers: float


@dataclass(frozen=True)
class Efficiency:
    """eta of a variant at one size, on one loss in one mode; `rule`: what the sparse curve was routed by."""

    size: str
    variant: str
    what: str
    mode: str
    rule: str
    pairs: tuple[Pair, ...]
    eta: Interval | None  # None unless every seed reaches dense's final loss
    charged: Interval | None
    slope: Interval | None
    per_second: Interval | None
    gap: Interval  # sparse minus dense, nats, at equal FLOPs

    @property
    def reached(self) -> int:
        """Seeds that reach dense's final loss."""
        return sum(pair.eta.value is not None for pair in self.pairs)

    @property
    def shown(self) -> Interval | None:
        """The value to go by: with the routers' FLOPs where routers were trained and the mode is causal."""
        return self.charged if any(pair.routers for pair in self.pairs) else self.eta

    @property
    def verdict(self) -> str:
        """The claim that the seeds allow."""
        n = len(self.pairs)
        if n < SEEDS_FOR_A_CLAIM:
            return "one seed: no verdict" if n == 1 else f"{n} seeds: no verdict"
        if self.shown is not None and self.shown.excludes(1.0):
            return "less compute than dense" if self.shown.mean > 1 else "more compute than dense"
        worse = not self.reached and self.gap.excludes(0.0) and self.gap.mean > 0
        return "not as low as dense" if worse else "no difference shown"


@dataclass(frozen=True)
class EndPoint:
    """Compute ratio at the causal loss that a variant ends with; `bounds`: seeds whose value is a lower bound."""

    size: str
    variant: str
    what: str
    mode: str
    value: Interval
    bounds: int
    difference: Interval  # sparse minus dense, nats, held-out
    routers: float  # FLOPs, mean over seeds


def efficiencies(study: Study) -> list[Efficiency]:
    """eta of all sparse variants, by size, mode and loss."""
    return [
        one
        for size, runs in study.sizes.items()
        for variant in sparse_variants(runs)
        for what in LOSSES
        for one in _of_variant(size, variant, what, paired(runs, variant))
    ]


def end_points(study: Study) -> list[EndPoint]:
    """Compute ratios at the end, of all variants evaluated in a causal mode."""
    found = []
    for size, runs in study.sizes.items():
        for variant in sparse_variants(runs):
            pairs = [(d, s) for d, s in paired(runs, variant) if d.eval and s.eval]
            for mode in dict.fromkeys(mode for _, s in pairs for mode in causal_losses(s)):
                for what in LOSSES:
                    values = [one for d, s in pairs if (one := _end_point(d, s, mode, what)) is not None]
                    if values:
                        ratios, bounds, gaps, routers = zip(*values, strict=True)
                        found.append(
                            EndPoint(size, variant, what, mode, interval(ratios, ratio=True), sum(bounds),
                                     interval(gaps), float(np.mean(routers)))
                        )  # fmt: skip
    return found


def tracked(run: Run, what: str) -> tuple[Curve, str]:
    """The causal curve of a run and what it was routed by: moving cut-offs, or its own rule."""
    if run.sees_future:
        return curve(run, f"val_threshold_{LOSSES[what]}"), "moving cut-offs"
    return curve(run, f"val_{LOSSES[what]}"), "its own rule"


def slope(dense: Curve, sparse: Curve, smoothing: float = SMOOTHING) -> float | None:
    """Slope of sparse FLOPs over dense FLOPs at equal smoothed loss, the first window left out; None where fewer than
    three points of the dense curve have a partner, or they span less than a tenth of its FLOPs."""
    window = smoothing * dense.flops[-1]
    x, level = _falling(smooth(dense, window), window)
    y, reached = _falling(smooth(sparse, window), window)
    if len(x) < 3 or len(y) < 3:
        return None
    both = (level <= reached[0]) & (level >= reached[-1])
    if both.sum() < 3 or np.ptp(x[both]) < 0.1 * x[-1]:
        return None
    partner = np.interp(level[both][::-1], reached[::-1], y[::-1])[::-1]
    return float(np.polyfit(x[both] / x[-1], partner / x[-1], 1)[0])


def tokens_per_second(run: Run) -> float | None:
    """Median over the run, evaluation and checkpoints left out."""
    rate = run.column("tokens_per_second")
    known = rate[np.isfinite(rate)]
    return float(np.median(known)) if len(known) else None


def router_flops(run: Run) -> float:
    """Training FLOPs of a run's auxiliary routers, 0 where they were not trained afterwards."""
    return final_flops(run.routers) if run.routers else 0.0


def _of_variant(size: str, variant: str, what: str, runs: Sequence[tuple[Run, Run]]) -> Iterator[Efficiency]:
    """Every mode of one variant and loss, as far as there are curves."""
    modes: dict[str, list[tuple[Run, Run, Curve, Curve]]] = {TRAIN: [], CAUSAL: [], ESTIMATED: []}
    rule = "its own rule"
    for dense, sparse in runs:
        modes[TRAIN].append((dense, sparse, curve(dense, LOSSES[what]), curve(sparse, LOSSES[what])))
        (one, _), (other, rule) = tracked(dense, what), tracked(sparse, what)
        modes[CAUSAL].append((dense, sparse, one, other))
        moved = _moved(sparse, other, what)
        if moved is not None:
            modes[ESTIMATED].append((dense, sparse, one, moved))
    rules = {TRAIN: "training rule", CAUSAL: rule, ESTIMATED: "auxiliary routers"}
    for mode, curves in modes.items():
        pairs = tuple(
            _pair(dense, sparse, one, other, charge=mode != TRAIN)
            for dense, sparse, one, other in curves
            if len(one.flops) and len(other.flops)
        )
        if pairs:
            known = [pair.charged for pair in pairs] if any(pair.routers for pair in pairs) else []
            yield Efficiency(
                size, variant, what, mode, rules[mode], pairs, _over([pair.eta.value for pair in pairs]),
                _over(known), _over([pair.slope for pair in pairs]), _over([pair.per_second for pair in pairs]),
                interval([pair.eta.gap for pair in pairs]),
            )  # fmt: skip


def _pair(dense: Run, sparse: Run, one: Curve, other: Curve, charge: bool) -> Pair:
    found, extra = eta(one, other), router_flops(sparse) if charge else 0.0
    charged = found.dense_flops / (found.sparse_flops + extra) if found.sparse_flops is not None else None
    speeds = tokens_per_second(dense), tokens_per_second(sparse)
    relative = speeds[1] / speeds[0] if speeds[0] and speeds[1] else None
    per_second = found.value * relative if found.value is not None and relative is not None else None
    return Pair(sparse.seed, found, charged, slope(one, other), per_second, extra)


def _moved(sparse: Run, found: Curve, what: str) -> Curve | None:
    """The curve under cut-offs, moved by what the auxiliary routers lose to them at the end; FLOPs are `charged`."""
    losses = causal_losses(sparse)
    aux, cut = (losses.get(mode, {}).get(LOSSES[what]) for mode in ("aux", "threshold"))
    if not sparse.routers or not sparse.sees_future or aux is None or cut is None:
        return None
    return Curve(found.flops, found.loss + aux - cut)


def _end_point(dense: Run, sparse: Run, mode: str, what: str) -> tuple[float, bool, float, float] | None:
    """(ratio, whether it is a lower bound, difference in nats, FLOPs of routers) of one pair."""
    one, other = causal_losses(dense).get("causal", {}), causal_losses(sparse).get(mode, {})
    held, _ = tracked(dense, what)
    name = LOSSES[what]
    if one.get(name) is None or other.get(name) is None or not len(held.flops):
        return None
    difference, routers = other[name] - one[name], router_flops(sparse) if mode in _ROUTED_BY else 0.0
    line = smooth(held, SMOOTHING * held.flops[-1])
    spent, reached = final_flops(sparse) + routers, first_reach(line, float(line.loss[-1]) + difference)
    bound = difference <= 0 or reached is None
    return (final_flops(dense) if bound or reached is None else reached) / spent, bound, difference, routers


def _falling(line: Curve, start: float) -> Curve:
    """The part after `start` FLOPs, as the lowest loss so far; points that lower nothing are left out."""
    after = line.flops >= start
    flops, lowest = line.flops[after], np.minimum.accumulate(line.loss[after])
    new = np.diff(lowest, prepend=math.inf) < 0
    return Curve(flops[new], lowest[new])


def _over(values: Sequence[float | None]) -> Interval | None:
    """Interval of ratios over seeds, None unless every seed has one."""
    known = [value for value in values if value is not None and value > 0]
    return interval(known, ratio=True) if known and len(known) == len(values) else None
