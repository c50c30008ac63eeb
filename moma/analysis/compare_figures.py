"""Figures of `moma compare`: loss over FLOPs with eta marked, eta with intervals, scaling fits, expert counts.

A family has the same colour and marker in every figure and every report: that of its name, whatever else is drawn.
Colours are apart for the colour-blind (Okabe and Ito, Tol), markers tell them apart without any. Every panel says the
routing mode of its numbers. Nothing here computes a result.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from moma.analysis.comparison import TRACKED, TRAINING, Experts, Final
from moma.analysis.efficiency import CAUSAL, ESTIMATED, TRAIN, Efficiency, tracked
from moma.analysis.figures import DENSE, FAINT, INK, MUTED, STYLE, WIDTH, flop_unit
from moma.analysis.runs import Run
from moma.analysis.scaling import Family
from moma.analysis.speedup import LOSSES, SMOOTHING, Curve, Interval, curve, smooth, variants

_TITLES = {"overall": "All targets", "text": "Text targets", "image": "Image targets"}
_MODES = {TRAIN: "training loss (mode train)", CAUSAL: "held-out loss (causal)"}
_FIXED = {
    "dense": (DENSE, "o"),
    "moe_4t4i": ("#d55e00", "D"),
    "moe_8x": ("#332288", "s"),
    "moe_1t1i": ("#0072b2", "^"),
    "moe_2t2i": ("#b87a00", "v"),
    "moe_6t2i": ("#aa4499", "P"),
    "moe_7t1i": ("#117733", "X"),
    "mod_moe_4t4i": ("#882255", "p"),
    "mod_moe_1t1i": ("#56b4e9", "<"),
    "mod_dense": ("#44aa99", ">"),
}
_OTHERS = (("#999933", "h"), ("#661100", "d"), ("#6699cc", "8"), ("#cc6677", "*"))


class Look(NamedTuple):
    """How a family is drawn: colour, marker, and a dash for what is derived from a named one."""

    colour: str
    marker: str
    dash: Any


def looks(names: Sequence[str]) -> dict[str, Look]:
    """The look of every family. Those of the paper's names are fixed; `moe_4t4i_shared` is moe_4t4i in dashes; the
    rest takes what is left in order of the names."""
    found, others = {}, 0
    for name in sorted(names):
        base = max((known for known in _FIXED if f"{name}_".startswith(f"{known}_")), key=len, default=None)
        if base is None:
            found[name] = Look(*_OTHERS[others % len(_OTHERS)], "-")
            others += 1
        else:
            derived = sum(1 for one in found if one.startswith(f"{base}_"))
            dash = "-" if name == base else ((0, (4, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))[derived % 3]
            found[name] = Look(*_FIXED[base], dash)
    return {name: found[name] for name in names}


def loss_over_flops(size_name: str, runs: Sequence[Run], etas: Sequence[Efficiency]) -> Figure:
    """Runs of one size: mean over seeds of the loss by FLOPs, shaded between the least and the greatest; a row per
    mode; where a variant first gets to dense's final loss a line drops to the axis, with its eta."""
    names = variants(runs)
    known = {run.variant for run in runs if len(tracked(run, "overall")[0].flops)}
    rows = [TRAIN] + ([CAUSAL] if known - {"dense"} or known == set(names) else [])  # dense alone says nothing
    palette = looks(names)
    with matplotlib.rc_context(STYLE):
        figure, panels = _grid(f"Loss over training compute, size {size_name}", len(rows), names, palette)
        most = max(float(run.metrics["flops"][-1]) for run in runs)
        size, unit = flop_unit(most)
        window = SMOOTHING * max(float(run.metrics["flops"][-1]) for run in runs if run.is_dense)
        for axes, mode in zip(panels, rows, strict=True):
            for ax, what in zip(axes, LOSSES, strict=True):
                own = [one for one in etas if (one.what, one.mode) == (what, mode)]
                ax.set_xlim(0, most / size * 1.02)
                _curves_panel(ax, runs, what, mode, window, size, palette, own)
                ax.set_xlabel(f"training {unit}")
                ax.set_title(_TITLES[what], pad=6)
            axes[0].set_ylabel(f"{_MODES[mode]},\nnats per target")
        return figure


def _curves_panel(
    ax: Axes, runs: Sequence[Run], what: str, mode: str, window: float, size: float, palette: Mapping[str, Look],
    etas: Sequence[Efficiency],
) -> None:  # fmt: skip
    seen: list[float] = []
    for name, look in palette.items():
        own = [run for run in runs if run.variant == name]
        raw = [curve(run, LOSSES[what]) if mode == TRAIN else tracked(run, what)[0] for run in own]
        lines = [smooth(one, window) if mode == TRAIN else one for one in raw if len(one.flops)]
        if not lines:
            continue
        x, mean, low, high = _over_seeds(lines)
        style: dict[str, Any] = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.4, "zorder": 3}
        few = len(x) <= 30 and mode != TRAIN
        ax.plot(x / size, mean, marker=look.marker if few else None, markersize=3.5, **style)
        if len(lines) > 1:
            ax.fill_between(x / size, low, high, color=look.colour, alpha=0.18, linewidth=0, zorder=2)
        late = x > 0.08 * x[-1]
        seen += [*low[late].tolist(), *high[late].tolist()]
    if not seen:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color=MUTED)
        return
    span = max(max(seen) - min(seen), 1e-3)
    reached = [one for one in etas if one.eta is not None]
    strip = (0.06 + 0.085 * len(reached)) * span  # below the curves: room for the values of eta
    ax.set_ylim(min(seen) - strip, max(seen) + 0.04 * span)
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    _mark_etas(ax, reached, size, palette, 0.085 * span)


def _over_seeds(lines: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """FLOPs that all seeds cover, and mean, least and greatest loss there."""
    start, end = max(one.flops[0] for one in lines), min(one.flops[-1] for one in lines)
    x = lines[0].flops[(lines[0].flops >= start) & (lines[0].flops <= end)]
    at = np.stack([np.interp(x, one.flops, one.loss) for one in lines])
    return x, at.mean(0), at.min(0), at.max(0)


def _mark_etas(
    ax: Axes, etas: Sequence[Efficiency], size: float, palette: Mapping[str, Look], pitch: float
) -> None:  # fmt: skip
    """Dense's final loss as a dotted line; from where a variant first gets there a line drops to its eta, each
    `pitch` nats above the one before."""
    if not etas:
        return
    marks = []
    for one in etas:
        assert one.eta is not None
        at = math.exp(float(np.mean([math.log(p.eta.sparse_flops) for p in one.pairs if p.eta.sparse_flops])))
        marks.append((at / size, float(np.mean([pair.eta.target for pair in one.pairs])), one))
    target = float(np.mean([level for _, level, _ in marks]))
    (low, _), (_, right) = ax.get_ylim(), ax.get_xlim()
    end = max(pair.eta.dense_flops for one in etas for pair in one.pairs) / size
    ax.plot([min(at for at, _, _ in marks), end], [target, target], color=INK, linewidth=0.9,
            linestyle=(0, (1, 2)), zorder=4)  # fmt: skip
    for place, (at, level, one) in enumerate(sorted(marks, key=lambda mark: mark[0])):
        colour = palette[one.variant].colour
        foot = low + place * pitch
        ax.plot([at, at], [foot, level], color=colour, linewidth=0.9, zorder=4)
        ax.plot([at], [level], marker=palette[one.variant].marker, markersize=5, color=colour,
                markeredgecolor="white", markeredgewidth=0.7, zorder=5)  # fmt: skip
        side, where = (-2.5, "right") if at > 0.82 * right else (2.5, "left")
        ax.annotate(
            f"{one.eta.mean:.2f}×", (at, foot), (side, 1), textcoords="offset points", ha=where,  # type: ignore[union-attr]
            fontsize=7.5, color=colour, va="bottom", fontweight="bold", zorder=6,
        )  # fmt: skip


def speed_ups(etas: Sequence[Efficiency], names: Sequence[str]) -> Figure:
    """eta of every size, variant and mode with its interval: filled in mode train, hollow in causal ones."""
    several = len({one.size for one in etas}) > 1
    lines = list(dict.fromkeys((one.size, one.variant, one.mode) for one in etas))
    palette = looks(names)
    with matplotlib.rc_context(STYLE):
        height = 1.2 + 0.185 * len(lines)
        figure = Figure(figsize=(WIDTH, height))
        panels = figure.subplots(1, 3, sharey=True)
        words = {TRAIN: "train", CAUSAL: "causal", ESTIMATED: "aux, est."}
        labels = [f"{size + '  ' if several else ''}{variant}  ({words[mode]})" for size, variant, mode in lines]
        left = min(0.45, 0.05 + 0.0072 * max(map(len, labels)))  # room for the longest
        figure.subplots_adjust(left, 0.5 / height, 0.985, 1 - 0.59 / height, wspace=0.08)
        _head(figure, "η: compute of dense over that of the model at equal loss, 95 % intervals over seeds")
        shown = [(one, one.shown) for one in etas]
        ends = [end for _, found in shown if found for end in (found.mean, found.low or found.mean, found.high or 1)]
        low, high = min([0.9, *ends]) * 0.93, min(max([1.2, *ends]) * 1.07, 20.0)
        for ax, what in zip(panels, LOSSES, strict=True):
            ax.set_xscale("log")
            ax.set_xlim(low, high)
            ax.axvline(1, color=DENSE, linewidth=1, zorder=1)
            for one, found in shown:
                if one.what == what:
                    _interval_mark(ax, lines.index((one.size, one.variant, one.mode)), found,
                                   palette[one.variant], one.mode == TRAIN, high)  # fmt: skip
            _plain_log_ticks(ax, low, high)
            ax.set_title(_TITLES[what], pad=5)
            ax.set_xlabel("η against dense (log scale)")
            ax.xaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.set_ylim(len(lines) - 0.4, -0.6)
            ax.tick_params(axis="y", length=0)
            for at, (one, other) in enumerate(zip(lines, lines[1:], strict=False)):
                if one[0] != other[0]:  # another size
                    ax.axhline(at + 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
        panels[0].set_yticks(range(len(lines)), labels, fontsize=7.5)
        for label, (_, variant, _) in zip(panels[0].get_yticklabels(), lines, strict=True):
            label.set_color(palette[variant].colour)
        return figure


def _interval_mark(ax: Axes, at: int, found: Interval | None, look: Look, filled: bool, high: float) -> None:
    if found is None:
        ax.text(1.0, at, " not by every seed", fontsize=7, color=MUTED, va="center", ha="left")
        return
    if found.low is not None and found.high is not None:
        ax.plot([found.low, min(found.high, high)], [at, at], color=look.colour, linewidth=1.4, zorder=2)
    ax.plot([found.mean], [at], marker=look.marker, markersize=5, color=look.colour, zorder=3,
            markerfacecolor=look.colour if filled else "white")  # fmt: skip


def scaling_fits(families: Sequence[Family]) -> Figure:
    """Final loss over training FLOPs (log scale), a point per run, the fitted law of every family with its band."""
    rows = [mode for mode in (TRAIN, CAUSAL) if any(one.mode == mode for one in families)]
    names = list(dict.fromkeys(one.variant for one in families))
    palette = looks(names)
    with matplotlib.rc_context(STYLE):
        figure, panels = _grid("Final loss over training compute, all sizes", len(rows), names, palette)
        for axes, mode in zip(panels, rows, strict=True):
            for ax, what in zip(axes, LOSSES, strict=True):
                own = [one for one in families if (one.what, one.mode) == (what, mode)]
                ax.set_xscale("log")
                for one in own:
                    _law(ax, one, palette[one.variant])
                ax.set_title(_TITLES[what], pad=6)
                ax.set_xlabel("training FLOPs (log scale)")
                ax.yaxis.set_major_locator(MaxNLocator(6))
                ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
                ax.set_axisbelow(True)
            axes[0].set_ylabel(f"final {_MODES[mode]},\nnats per target")
        return figure


def _law(ax: Axes, one: Family, look: Look) -> None:
    flops = np.array([point.flops for point in one.points])
    loss = [point.loss for point in one.points]
    ax.plot(flops, loss, linestyle="none", marker=look.marker, markersize=4, color=look.colour,
            markerfacecolor="white", markeredgewidth=0.9, zorder=3)  # fmt: skip
    if one.law is None:
        return
    x = np.geomspace(flops.min() / 1.15, flops.max() * 1.15, 80)
    ax.plot(x, one.law.loss(x), color=look.colour, linestyle=look.dash, linewidth=1.3, zorder=2)
    band = one.band(x)
    if band is not None:
        ax.fill_between(x, *band, color=look.colour, alpha=0.15, linewidth=0, zorder=1)


def expert_counts(size_name: str, rows: Sequence[tuple[Experts, Final]]) -> Figure:
    """Final loss minus dense's by expert counts, at one size: filled training losses (mode train), hollow tracked
    held-out ones (causal), with intervals over seeds."""
    order = list(dict.fromkeys(row.variant for _, row in rows))
    counts = {row.variant: experts for experts, row in rows}
    palette = looks(order)
    with matplotlib.rc_context(STYLE):
        height = 1.4 + 0.34 * len(order)
        figure = Figure(figsize=(WIDTH, height))
        panels = figure.subplots(1, 3, sharey=True)
        figure.subplots_adjust(0.2, 0.5 / height, 0.985, 1 - 0.85 / height, wspace=0.08)
        for ax, what in zip(panels, LOSSES, strict=True):
            ax.axvline(0, color=DENSE, linewidth=1, zorder=1)
            for _, row in rows:
                found = row.difference.get(what)
                if row.source in (TRAINING, TRACKED) and found is not None:
                    at = order.index(row.variant) + (-0.13 if row.source == TRAINING else 0.13)
                    _interval_mark(ax, at, found, palette[row.variant], row.source == TRAINING, math.inf)  # type: ignore[arg-type]
            ax.set_title(_TITLES[what], pad=5)
            ax.set_xlabel("nats against dense")
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.xaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.set_ylim(len(order) - 0.4, -0.6)
            ax.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(order)), [f"{name}  ({_experts(counts[name])})" for name in order])
        for label, name in zip(panels[0].get_yticklabels(), order, strict=True):
            label.set_color(palette[name].colour)
        causal = any(row.source == TRACKED for _, row in rows)
        shown = [("training loss (mode train)", MUTED)] + ([("held-out loss (causal)", "white")] if causal else [])
        handles = [Line2D([], [], linestyle="none", marker="o", markersize=5, color=MUTED, markerfacecolor=face,
                          label=label) for label, face in shown]  # fmt: skip
        _head(figure, f"Final loss by number of experts, size {size_name}", handles)
        return figure


def _experts(found: Experts) -> str:
    return f"{found.shared} for all" if found.shared else f"{found.text} text, {found.image} image"


def _grid(title: str, rows: int, names: Sequence[str], palette: Mapping[str, Look]) -> tuple[Figure, Any]:
    """Rows of three panels under a title and a key of the families."""
    more = 0.2 * (-(-len(names) // _across(names)) - 1)  # lines of the key beyond the first
    height = 2.75 * rows + 0.65 + more
    figure = Figure(figsize=(WIDTH, height))
    panels = figure.subplots(rows, 3, squeeze=False)
    figure.subplots_adjust(0.085, 0.48 / height, 0.985, 1 - (0.85 + more) / height, wspace=0.2, hspace=0.42)
    handles = [
        Line2D([], [], color=palette[name].colour, linestyle=palette[name].dash, marker=palette[name].marker,
               markersize=5, linewidth=1.4, label=name)
        for name in names
    ]  # fmt: skip
    _head(figure, title, handles)
    return figure, panels


def _head(figure: Figure, title: str, handles: Sequence[Line2D] = ()) -> None:
    """The figure's title, and the key below it."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=10.5, fontweight="bold", color=INK, va="top")
    if handles:
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.004, 1 - 0.27 / height), fontsize=8, labelcolor=INK,
            ncol=_across([str(handle.get_label()) for handle in handles]), handletextpad=0.5, columnspacing=1.6,
            borderaxespad=0.3,
        )  # fmt: skip


def _across(names: Sequence[str]) -> int:
    """Entries of a key that fit beside each other."""
    return max(1, min(len(names), 105 // (max(map(len, names)) + 7)))


def _plain_log_ticks(ax: Axes, low: float, high: float) -> None:
    """Powers of two as plain numbers; quarters where the range is narrow."""
    steps = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16] if high / low > 2.5 else np.arange(0.5, 4, 0.25).tolist()
    ax.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(FixedLocator([]))
