"""Final losses, expert counts and throughput of a study, by size and variant: the tables of `moma compare`.

    source          mode                        losses
    training        train                       trailing mean over SMOOTHING of dense's FLOPs: sees the future
    tracked         causal                      the last held-out losses of the run: val_threshold_loss or val_loss
    evaluated       every mode of eval.json     held-out, by `moma evaluate`

Means over seeds; differences are per pair of seeds, with a 95 % t interval where there are two pairs or more. Numbers
of one source alone compare: their held-out sets differ.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moma.analysis.efficiency import CAUSAL, TRAIN, tokens_per_second, tracked
from moma.analysis.runs import Run
from moma.analysis.speedup import LOSSES, SMOOTHING, Interval, curve, interval, paired, smooth, variants
from moma.analysis.study import Study, final_flops

TRAINING, TRACKED, EVALUATED = "training", "tracked", "evaluated"
SOURCES = (TRAINING, TRACKED, EVALUATED)
# Table 2 of the paper: tokens per second and GPU relative to dense, 435m, 256 A100
PAPER_THROUGHPUT = {
    "dense": 1.0, "moe_8x": 0.907, "moe_1t1i": 0.945, "moe_4t4i": 0.827, "mod_moe_1t1i": 0.793, "mod_moe_4t4i": 0.692,
}  # fmt: skip


class Spread(NamedTuple):
    """Mean, least and greatest over `n` seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Final:
    """Final losses (nats) of one variant at one size; `difference`: minus dense, {} for dense itself."""

    size: str
    variant: str
    source: str
    mode: str
    losses: dict[str, Spread]
    difference: dict[str, Interval]


class Experts(NamedTuple):
    """How many experts a plain mixture has: per modality, or `shared` by all tokens."""

    text: int
    image: int
    shared: int

    @property
    def total(self) -> int:
        return self.text + self.image + self.shared


class Throughput(NamedTuple):
    """Tokens per second over seeds, and relative to dense per pair of seeds (None for dense)."""

    size: str
    variant: str
    tokens_per_second: Spread
    relative: Interval | None
    paper: float | None


def finals(study: Study) -> list[Final]:
    """Final losses of every size, source, variant and mode."""
    found = []
    for source in SOURCES:
        for size, runs in study.sizes.items():
            for variant in variants(runs):
                own = [run for run in runs if run.variant == variant]
                for mode in dict.fromkeys(mode for run in own for mode in _modes(run, source)):
                    losses = [_losses(run, source, mode, _window(runs)) for run in own]
                    spreads = {what: spread([one[what] for one in losses if what in one]) for what in LOSSES}
                    kept = {what: one for what, one in spreads.items() if one is not None}
                    if kept:
                        gaps = {} if variant == "dense" else dict(_gaps(runs, variant, source, mode))
                        found.append(Final(size, variant, source, mode, kept, gaps))
    return found


def final_losses(study: Study, run: Run, mode: str) -> dict[str, float]:
    """Final losses of one run by modality, for fits: of training in mode train; in mode causal the tracked ones, or
    those of eval.json in its first causal mode where some run of the study tracked none."""
    runs = next(runs for runs in study.sizes.values() if any(run is one for one in runs))
    if mode == TRAIN:
        return _losses(run, TRAINING, TRAIN, _window(runs))
    source = causal_source(study)
    modes = [found for found in _modes(run, source) if found != TRAIN]
    return _losses(run, source, modes[0], _window(runs)) if modes else {}


def causal_source(study: Study) -> str:
    """Where causal final losses of all runs come from: tracked, unless some run did not track them."""
    return TRACKED if all(_modes(run, TRACKED) for run in study.runs) else EVALUATED


def experts_of(variant: str) -> Experts | None:
    """Expert counts of a plain mixture under expert choice, by the paper's names; None for anything else."""
    if found := re.fullmatch(r"moe_(\d+)t(\d+)i", variant):
        return Experts(int(found[1]), int(found[2]), 0)
    found = re.fullmatch(r"moe_(\d+)x", variant)
    return Experts(0, 0, int(found[1])) if found else None


def ablation(rows: Sequence[Final]) -> list[tuple[Experts, Final]]:
    """Final losses of plain mixtures, by size, total and text experts; [] unless a size has two of them."""
    found = [(experts, row) for row in rows if (experts := experts_of(row.variant)) is not None]
    several = {row.size for _, row in found if len({r.variant for _, r in found if r.size == row.size}) > 1}
    order = list(dict.fromkeys(row.size for row in rows))
    kept = [(experts, row) for experts, row in found if row.size in several]
    return sorted(kept, key=lambda one: (order.index(one[1].size), one[0].total, one[0].shared, one[0].text))


def throughputs(study: Study) -> list[Throughput]:
    """Tokens per second of every size and variant that logged them."""
    found = []
    for size, runs in study.sizes.items():
        for variant in variants(runs):
            speeds = [speed for run in runs if run.variant == variant and (speed := tokens_per_second(run))]
            known = spread(speeds)
            if known is None:
                continue
            pairs = [(tokens_per_second(d), tokens_per_second(s)) for d, s in paired(runs, variant)]
            ratios = [s / d for d, s in pairs if d and s]
            relative = interval(ratios, ratio=True) if ratios and variant != "dense" else None
            found.append(Throughput(size, variant, known, relative, PAPER_THROUGHPUT.get(variant)))
    return found


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and range over seeds; None without values."""
    return Spread(float(np.mean(values)), min(values), max(values), len(values)) if len(values) else None


def _window(runs: Sequence[Run]) -> float:
    """What losses are averaged over, in FLOPs: the same for all runs of a size."""
    return SMOOTHING * max(final_flops(run) for run in runs if run.is_dense)


def _modes(run: Run, source: str) -> list[str]:
    if source == TRAINING:
        return [TRAIN]
    if source == TRACKED:
        return [CAUSAL] if len(tracked(run, "overall")[0].flops) else []
    return list((run.eval or {}).get("loss", {}))


def _losses(run: Run, source: str, mode: str, window: float) -> dict[str, float]:
    """Final losses of one run by modality, as far as they are known."""
    if source == EVALUATED:
        known = (run.eval or {}).get("loss", {}).get(mode, {})
        return {what: known[name] for what, name in LOSSES.items() if known.get(name) is not None}
    found = {}
    for what, name in LOSSES.items():
        line = smooth(curve(run, name), window) if source == TRAINING else tracked(run, what)[0]
        if len(line.flops):
            found[what] = float(line.loss[-1])
    return found


def _gaps(runs: Sequence[Run], variant: str, source: str, mode: str) -> Iterator[tuple[str, Interval]]:
    """Loss minus dense's over pairs of seeds; of eval.json, minus the causal one of dense."""
    window = _window(runs)
    both = [
        (_losses(d, source, mode if mode in _modes(d, source) else CAUSAL, window), _losses(s, source, mode, window))
        for d, s in paired(runs, variant)
    ]
    for what in LOSSES:
        values = [s[what] - d[what] for d, s in both if what in d and what in s]
        if values:
            yield what, interval(values)
