"""Figures at README width: loss curves, expert shares, where image experts look, routers, generated pictures.

One colour per model throughout (dense grey, the sparse models strong), one per modality in the routing maps;
colour-blind-safe, on solid white, so that they also read on a dark page. Files are a function of the data:
the font comes with matplotlib, and no date or version is written into them. Nothing here computes a result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from moma.analysis import routing_maps
from moma.analysis.runs import Run
from moma.analysis.speedup import LOSSES, SMOOTHING, Row, causal_losses, curve, smooth

WIDTH = 9.0  # inches; 900 px at the density of a README, twice that in the file
INK, MUTED, FAINT = "#1f2328", "#656d76", "#d8dee4"
DENSE = "#7d8590"
SPARSE = ("#d55e00", "#332288", "#aa4499", "#117733", "#0072b2")  # MoMa's own first
MODALITY = {"text": "#0072b2", "image": "#00806a"}
OTHER_MODALITY = "#7a5195"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "mathtext.default": "regular",
}
_FLOP_UNITS = (
    (1e21, "ZFLOP"),
    (1e18, "EFLOP"),
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1.0, "FLOP"),
)
LONG_NAME = 9  # characters of a variant's name that fit beside a panel
DIFFERENCES = ("all targets", "text", "image")  # of `speedup.held_out`
_CAUSAL = {  # marker of a held-out loss by causal mode
    "causal": {"marker": "D", "markersize": 5.5},
    "aux": {"marker": "D", "markersize": 5.5},
    "aux_calibrated": {"marker": "s", "markersize": 5},
    "threshold": {"marker": "^", "markersize": 6.5},
}
_OTHER_MODE = {"marker": "*", "markersize": 8}
_BASELINES = {
    "text": {"text_bigram": "bigram", "text_unigram": "unigram"},
    "image": {"image_position_unigram": "unigram per position"},
}


class Picture(NamedTuple):
    """A prompt with the true picture (None if there is none) and per model its generated ones, as RGB."""

    prompt: str
    real: Image.Image | None
    generated: dict[str, list[Image.Image]]


def colours(variants: Sequence[str]) -> dict[str, str]:
    """One colour per variant: grey for `dense`, the strongest one for the first sparse variant."""
    sparse = [variant for variant in variants if variant != "dense"]
    strong = {variant: SPARSE[i % len(SPARSE)] for i, variant in enumerate(sparse)}
    return {variant: strong.get(variant, DENSE) for variant in variants}


def flop_unit(flops: float) -> tuple[float, str]:
    """The unit in which `flops` is at least 1: (FLOPs per unit, name)."""
    return next(((size, name) for size, name in _FLOP_UNITS if flops >= size), _FLOP_UNITS[-1])


def save(figure: Figure, path: Path, palette: bool = True) -> None:
    """Write a PNG of WIDTH at 200 dpi: the same bytes for the same figure.

    `palette`: 256 colours, a third of the size and no visible difference in drawings; not for photographs.
    """
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(200)
    with matplotlib.rc_context(STYLE):
        canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    (drawn.quantize(256, dither=Image.Dither.NONE) if palette else drawn).save(path, optimize=True)


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Loss per modality over training FLOPs: training (line), held-out during training (circles, mode of
    training), held-out causal at the end (a marker per mode), n-gram baselines (dotted)."""
    with matplotlib.rc_context(STYLE):
        palette = colours(list(dict.fromkeys(run.variant for run in runs)))
        long = max(map(len, palette)) > LONG_NAME  # no room beside the panels: names in a line above them
        figure = Figure(figsize=(WIDTH, 3.6 if long else 3.35))
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(0.055, 0.135, *(0.985, 0.8) if long else (0.92, 0.845), wspace=0.2 if long else 0.5)
        most = max(run.metrics["flops"][-1] for run in runs)
        size, unit = flop_unit(most)
        reference = next((run for run in runs if run.is_dense), runs[0])
        window = SMOOTHING * reference.metrics["flops"][-1]
        for ax, (name, metric) in zip(panels, LOSSES.items(), strict=True):
            ends = _loss_panel(ax, runs, name, metric, window, size, palette)
            if not long:
                _end_labels(ax, ends, palette)
            ax.set_title({"overall": "All targets"}.get(name, name.capitalize() + " targets"), pad=7)
            ax.set_xlim(0, most / size * 1.02)
            ax.set_xlabel(f"training {unit}")
            ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
        panels[0].set_ylabel("cross-entropy, nats per target")
        if long:
            _names_key(figure, palette)
        _loss_key(figure, any(not run.is_dense for run in runs), [mode for run in runs for mode in causal_losses(run)])
        return figure


def _loss_panel(
    ax: Axes, runs: Sequence[Run], name: str, metric: str, window: float, size: float, palette: dict[str, str]
) -> dict[str, float]:
    """Draw one panel; returns where the lines of each variant end."""
    ends: dict[str, float] = {}
    width = 1.3 if len(palette) == len(runs) else 0.8  # several seeds: thinner
    seen: list[float] = []
    for run in runs:
        colour, raw = palette[run.variant], curve(run, metric)
        if len(raw.flops):
            line = smooth(raw, window)
            ax.plot(line.flops / size, line.loss, color=colour, linewidth=width, zorder=3, solid_capstyle="round")
            seen += line.loss[line.flops > 0.06 * line.flops[-1]].tolist()
            ends.setdefault(run.variant, float(line.loss[-1]))
        held = curve(run, f"val_{metric}")
        style: dict[str, Any] = {"color": colour, "linestyle": "none", "zorder": 4, "clip_on": True}
        ax.plot(held.flops / size, held.loss, marker="o", markersize=4, markerfacecolor="white", **style)
        for place, (mode, losses) in enumerate(causal_losses(run).items()):
            if metric in losses:
                at, look = run.metrics["flops"][-1] / size, _CAUSAL.get(mode, _OTHER_MODE)
                aside = ScaledTranslation(-place / 9, 0, ax.figure.dpi_scale_trans)  # inches: the modes side by side
                ax.plot(
                    [at], [losses[metric]], markeredgecolor="white", transform=ax.transData + aside, **look, **style
                )
                seen.append(losses[metric])
    top, bottom = (max(seen), min(seen)) if seen else (1.0, 0.0)
    baselines = next((run.eval["baselines"] for run in runs if run.eval and "baselines" in run.eval), {})
    shown = {text: baselines[key] for key, text in _BASELINES.get(name, {}).items() if key in baselines}
    top = max([top, *list(shown.values())[:1]])  # the strongest one is always in sight
    span = max(top - bottom, 0.1)
    shown = {text: value for text, value in shown.items() if value <= top + 0.2 * span}
    span = max([top, *shown.values()]) - min([bottom, *shown.values()]) or span
    top, bottom = max([top, *shown.values()]), min([bottom, *shown.values()])
    ax.set_ylim(bottom - 0.08 * span, top + 0.08 * span)
    for text, value in shown.items():
        ax.axhline(value, color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=2)
        ax.annotate(
            text, (1, value), (-1, 2.5), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", fontsize=7.5, color=INK,
        )  # fmt: skip
    return ends


def _names_key(figure: Figure, palette: Mapping[str, str]) -> None:
    """Names of the variants in their colours, in a line below the key."""
    handles = [Line2D([], [], linestyle="none", label=variant) for variant in palette]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.045, 0.95), ncol=len(handles), fontsize=8,
        labelcolor=list(palette.values()), handlelength=0, handletextpad=0, columnspacing=1.4, borderaxespad=0.3,
        prop={"weight": "bold", "size": 8},
    )  # fmt: skip


def differences(rows: Sequence[Row], palette: Mapping[str, str]) -> Figure:
    """Held-out loss of every model and causal mode minus that of dense with the same seeds: mean and 95 % interval."""
    with matplotlib.rc_context(STYLE):
        lines = list(dict.fromkeys((row.variant, row.mode) for row in rows))
        shown = [what for what in DIFFERENCES if any(row.what == what for row in rows)]
        figure = Figure(figsize=(WIDTH, 0.9 + 0.2 * len(lines)))
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        height = figure.get_figheight()
        figure.subplots_adjust(0.255, 0.48 / height, 0.985, 1 - 0.3 / height, wspace=0.08)
        for ax, what in zip(panels, shown, strict=True):
            ax.axvline(0, color=DENSE, linewidth=1, zorder=1)
            for row in rows:
                if row.what == what:
                    at, found = lines.index((row.variant, row.mode)), row.difference
                    if found.low is not None and found.high is not None:
                        ax.plot([found.low, found.high], [at, at], color=palette[row.variant], linewidth=1.4, zorder=2)
                    face = palette[row.variant] if found.excludes(0.0) else "white"
                    ax.plot([found.mean], [at], marker="o", markersize=4.5, color=palette[row.variant],
                            markerfacecolor=face, zorder=3)  # fmt: skip
            ax.set_title(what[0].upper() + what[1:], pad=5)
            ax.xaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.set_ylim(len(lines) - 0.4, -0.6)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_xlabel("nats against dense")
        panels[0].set_yticks(range(len(lines)), [f"{variant} ({mode})" for variant, mode in lines], fontsize=7.5)
        for label, (variant, _) in zip(panels[0].get_yticklabels(), lines, strict=True):
            label.set_color(palette[variant])
        return figure


def _end_labels(ax: Axes, ends: Mapping[str, float], palette: Mapping[str, str]) -> None:
    """Names at the right end of the lines, pushed apart where they would touch."""
    low, high = ax.get_ylim()
    least, at = 0.062 * (high - low), -np.inf
    for variant, value in sorted(ends.items(), key=lambda item: item[1]):
        at = max(value, at + least)
        ax.annotate(
            variant, (1, at), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=8, fontweight="bold", color=palette[variant], annotation_clip=False,
        )  # fmt: skip


def _loss_key(figure: Figure, sparse: bool, modes: Sequence[str]) -> None:
    style: dict[str, Any] = {"color": MUTED}
    by_marker: dict[str, list[str]] = {}
    for mode in dict.fromkeys(modes or ["causal"]):
        by_marker.setdefault(_CAUSAL.get(mode, _OTHER_MODE)["marker"], []).append(mode)
    several = len(by_marker) > 1
    handles = [
        Line2D([], [], linewidth=1.3, **style,
               label="training, smoothed" if several else f"training, mean over {SMOOTHING:.0%} of dense FLOPs"),
        Line2D([], [], marker="o", markersize=4, markerfacecolor="white", linestyle="none", **style,
               label="held-out, routed as in training" if several else "held-out, routed as in training" if sparse
               else "held-out"),
    ]  # fmt: skip
    for named in by_marker.values():
        look = _CAUSAL.get(named[0], _OTHER_MODE)
        label = ", ".join(named) if several else "held-out, causal"
        handles.append(Line2D([], [], linestyle="none", markeredgecolor="white", **look, **style, label=label))
    handles.append(Line2D([], [], linestyle=(0, (1, 2)), linewidth=1, color=INK, label="n-gram baseline"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncol=len(handles), fontsize=8,
        labelcolor=MUTED, handletextpad=0.5, columnspacing=1.1 if several else 1.8, borderaxespad=0.3,
    )  # fmt: skip


def expert_shares(maps: dict[str, Any]) -> Figure:
    """Share of a modality's tokens per layer and expert, a panel per routing mode, at most two side by side."""
    modes = routing_maps.modes(maps)
    tables = [routing_maps.shares(maps, mode) for mode in modes]
    layers, columns = tables[0].share.shape
    across, down = min(len(modes), 2), -(-len(modes) // 2)
    with matplotlib.rc_context(STYLE):
        tall = down * (0.68 + 0.34 * layers) + 0.32
        figure = Figure(figsize=(WIDTH, tall))
        left, right, between = 0.065, 0.985, 0.03
        width = (right - left - between * (across - 1)) / across
        for number, (mode, table) in enumerate(zip(modes, tables, strict=True)):
            row, column = divmod(number, across)
            bottom = tall - (row + 1) * (0.68 + 0.34 * layers)
            place = (left + column * (width + between), bottom / tall, width, 0.34 * layers / tall)
            ax = figure.add_axes(place)
            _share_panel(ax, table, narrow=columns * across > 20)
            ax.set_title(_mode_title(mode, modes), pad=31)
            ax.set_yticks(range(layers), [f"layer {layer}" for layer in table.layer] if column == 0 else [])
        figure.text(
            0.065,
            0.1 / tall,
            "% of the modality's tokens that the expert computes",
            fontsize=8,
            color=MUTED,
        )
        return figure


def _share_panel(ax: Axes, table: routing_maps.Shares, narrow: bool) -> None:
    """Cells by layer and expert; the share by design has the middle tone, twice it (or more) the darkest."""
    layers = len(table.share)
    at, x, previous = [], 0.0, None
    of_group = [_share_group(expert, modality) for expert, modality in table.column]
    for group in of_group:
        x += 0.35 if previous not in (None, group) else 0.0
        at.append(x)
        x, previous = x + 1, group
    for column, ((_, modality), left) in enumerate(zip(table.column, at, strict=True)):
        scale = ramp(_modality_colour(modality))
        for layer in range(layers):
            value = table.share[layer, column]
            if np.isnan(value):  # the layer has no such expert
                continue
            level = min(1.0, float(value / table.fair[layer, column] / 2))
            ax.add_patch(
                Rectangle((left - 0.5, layer - 0.5), 1, 1, facecolor=scale(level), edgecolor="white", linewidth=1.5)
            )
            ax.text(
                left, layer, f"{100 * value:.0f}", ha="center", va="center",
                fontsize=7 if narrow else 8, color="white" if level > 0.45 else INK,
            )  # fmt: skip
    ax.set_xlim(-0.5, at[-1] + 0.5)
    ax.set_ylim(layers - 0.5, -0.5)
    names = [modality if "depth" in expert else expert.rsplit(" ", 1)[1] for expert, modality in table.column]
    ax.set_xticks(at, names)
    for tick, name in zip(ax.get_xticklabels(), names, strict=True):
        tick.set_fontsize(8 if name.isdigit() else 6 if narrow else 7)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    groups: dict[tuple[str, str], list[float]] = {}
    for group, left in zip(of_group, at, strict=True):
        groups.setdefault(group, []).append(left)
    for (group, modality), lefts in groups.items():
        text = f"{group} experts" if group == modality else f"{group} experts, {modality} tokens" if modality else group
        colour = _modality_colour(modality) if modality else MUTED
        ax.annotate(
            text, (float(np.mean(lefts)), 1), (0, 15), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=8, color=colour,
        )  # fmt: skip


def _share_group(expert: str, modality: str) -> tuple[str, str]:
    """Columns that stand together under one name; the columns of depth are named by their modality each."""
    group = routing_maps.group_of(expert)
    return (group, "") if group == routing_maps.DEPTH else (group, modality)


def expert_places(maps: dict[str, Any]) -> Figure | None:
    """Where in the picture each image expert looks, per layer and routing mode, at most two modes side by side; None
    without routers for image tokens."""
    modes = routing_maps.modes(maps)
    tables = [routing_maps.places(maps, mode) for mode in modes]
    if not tables or not tables[0].expert:
        return None
    layers, n_experts = len(tables[0].layer), len(tables[0].expert)
    across, down = min(len(modes), 2), -(-len(modes) // 2)
    with matplotlib.rc_context(STYLE):
        left, right, between, head = 0.62, 0.12, 0.62, 0.65
        block = (WIDTH - left - right - between * across) / across
        block = min(block, 1.05 * n_experts)
        tall = block * layers / n_experts
        height = down * (tall + head) + 0.55
        figure = Figure(figsize=(WIDTH, height))
        scale = ramp(MODALITY["image"]).with_extremes(bad="white")
        most = max(0.01, max(float(np.nanmax(table.place)) for table in tables))
        for number, (mode, table) in enumerate(zip(modes, tables, strict=True)):
            row, column = divmod(number, across)
            x, y = left + column * (block + between), height - (row + 1) * (tall + head)
            ax = figure.add_axes((x / WIDTH, y / height, block / WIDTH, tall / height))
            sheet = routing_maps.mosaic(table.place)
            ax.imshow(sheet, cmap=scale, vmin=0, vmax=most, interpolation="nearest", aspect="auto")
            ax.set_title(_mode_title(mode, modes), pad=20)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
            grid_h, grid_w = table.place.shape[2:]
            centres_x = [e * (grid_w + 1) + (grid_w - 1) / 2 for e in range(n_experts)]
            centres_y = [i * (grid_h + 1) + (grid_h - 1) / 2 for i in range(layers)]
            names = [name.split()[0] if "depth" in name else name for name in table.expert]
            ax.set_xticks(centres_x, names if len(names) < 6 else [name.split()[-1] for name in names])
            ax.xaxis.tick_top()
            ax.set_yticks(centres_y, [f"layer {i}" for i in table.layer] if column == 0 else [])
            for at, value in zip(centres_y, routing_maps.reliance(table.place), strict=True):
                ax.annotate(
                    f"{value:.0%}", (1, at), (5, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", fontsize=8, color=MUTED,
                )  # fmt: skip
            ax.annotate(
                "by place", (1, 1), (5, 6), xycoords="axes fraction", textcoords="offset points",
                fontsize=7.5, color=MUTED,
            )  # fmt: skip
        _place_key(figure, scale, most, left, height)
        return figure


def _place_key(figure: Figure, scale: Colormap, most: float, left: float, height: float) -> None:
    bar = figure.add_axes((left / WIDTH, 0.33 / height, 1.6 / WIDTH, 0.1 / height))
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=scale, aspect="auto", extent=(0, 100 * most, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([0, 100 * most], ["0", f"{100 * most:.0f} %"])
    bar.tick_params(length=0, pad=2)
    for spine in bar.spines.values():
        spine.set_visible(False)
    figure.text(
        (left + 1.85) / WIDTH, 0.335 / height,
        "of the pictures: the expert takes this place.   by place: 0 % every place alike, 100 % the "
        "place decides.",
        fontsize=8, color=MUTED,
    )  # fmt: skip


_RULES = {"aux": ("o", 0.62), "aux_calibrated": ("D", 0.35), "threshold": ("^", 1.0)}  # marker, tone of the colour


def routers(routing: dict[str, Any], colour: str) -> Figure:
    """Causal rules per layer against their baselines: accuracy, AUC, experts per token; depth routers in a row of their
    own. Tones and markers are the rules, filled on states of training routing, hollow and dashed free-running."""
    found = routing_maps.agreement(routing)
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    kinds = [(False, [n for n in names if "depth" not in n]), (True, [n for n in names if "depth" in n])]
    rows = [(depth, own) for depth, own in kinds if own]
    rules = list(dict.fromkeys(r for entries in found.values() for one in entries.values() for r in one))
    tone = {rule: ramp(colour)(_RULES.get(rule, ("s", 0.8))[1]) for rule in rules}
    with matplotlib.rc_context(STYLE):
        tall = 2.1 * max(1, len(rows)) + 0.5
        figure = Figure(figsize=(WIDTH, tall))
        grid = figure.subplots(max(1, len(rows)), 3, squeeze=False)
        figure.subplots_adjust(0.055, 0.43 / tall, 0.985, 1 - 0.52 / tall, wspace=0.22, hspace=0.55)
        for panels, (depth, own) in zip(grid, rows, strict=False):
            layers = [routing_maps.layer_of(name) for name in own]
            titles = {"accuracy": "Accuracy", "auc": "AUC", "experts_predicted": "Experts per token"}
            if depth:
                titles = {"accuracy": "Accuracy, depth", "auc": "AUC, depth", "experts_predicted": "Share let in"}
            for ax, (key, title) in zip(panels, titles.items(), strict=True):
                for rule in rules:
                    for states, entries in found.items():
                        free = states == "free_running"
                        values = [_number(entries.get(name, {}).get(rule, {}), key) for name in own]
                        ax.plot(
                            layers, values, color=tone[rule], linewidth=1.0 if free else 1.3, markersize=5,
                            marker=_RULES.get(rule, ("s", 0))[0], linestyle="--" if free else "-",
                            markerfacecolor="white" if free else tone[rule],
                        )  # fmt: skip
                _router_reference(ax, key, layers, [_any_rule(found, name) for name in own])
                ax.set_title(title, pad=7)
                ax.set_xlabel("layer")
                ax.set_xticks(layers if len(layers) <= 16 else layers[:: -(-len(layers) // 16)])
                ax.set_xlim(min(layers) - 0.3, max(max(layers) + 0.3, min(layers) + 0.6))
                ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
                ax.set_axisbelow(True)
        handles = [
            Line2D([], [], color=tone[rule], marker=_RULES.get(rule, ("s", 0))[0], markersize=5, label=rule)
            for rule in rules
        ]
        handles += [
            Line2D([], [], color=MUTED, marker="o", markersize=5, label="on states of training routing"),
            Line2D([], [], color=MUTED, marker="o", markersize=5, markerfacecolor="white", linestyle="--",
                   label="free-running"),
            Line2D([], [], color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label="reference"),
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncol=6, fontsize=8,
            labelcolor=MUTED, handletextpad=0.5, columnspacing=1.5, borderaxespad=0.3,
        )  # fmt: skip
        return figure


def _any_rule(found: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry of a router, training states first: majority and experts_true are the same for every rule."""
    states = sorted(found, key=lambda one: one != "training")
    return next((entry for one in states for entry in found[one].get(name, {}).values()), {})


def _router_reference(ax: Axes, key: str, layers: Sequence[int], entries: Sequence[Mapping[str, Any]]) -> None:
    style: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 2)), "linewidth": 1.2}
    if key == "auc":
        low = min([0.5, *(float(line) for one in ax.lines for line in one.get_ydata() if line == line)])
        ax.axhline(0.5, **style)
        ax.set_ylim(low - 0.05, 1.02)
        text, y = "chance", 0.5
    elif key == "accuracy":
        known = [float(line) for one in ax.lines for line in one.get_ydata() if line == line]
        majority = [_number(entry, "majority") for entry in entries]
        ax.plot(layers, majority, **style)
        low = min([0.9, *known, *(value for value in majority if value == value)])
        ax.set_ylim(low - 0.05, 1.0)
        text, y = "majority", majority[0]
    else:
        true = [_number(entry, "experts_true") for entry in entries]
        ax.plot(layers, true, **style)
        text, y = "training rule", true[0]
        low, high = ax.get_ylim()
        ax.set_ylim(min(0, low), max([high, *(value for value in true if value == value)]) * 1.15)
    ax.annotate(
        text,
        (layers[0] - 0.2, y),
        (0, 3),
        xycoords="data",
        textcoords="offset points",
        fontsize=7.5,
        color=INK,
        va="bottom",
    )


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    return float("nan") if value is None else float(value)


def pictures(entries: Sequence[Picture], palette: Mapping[str, str], per_row: int = 2) -> Figure | None:
    """Prompts with their true picture beside the generated ones of each model; None without entries."""
    if not entries:
        return None
    models = list(dict.fromkeys(model for entry in entries for model in entry.generated))
    most = max(len(images) for entry in entries for images in entry.generated.values())
    with matplotlib.rc_context(STYLE):
        gap, edge, label = 0.05, 0.1, 0.24
        block = (WIDTH - 2 * edge - (per_row - 1) * 0.3) / per_row
        side = min((block - 0.18 * len(models)) / (1 + most * len(models)) - gap, 1.0)
        rows = -(-len(entries) // per_row)
        pitch = side + label + 0.12
        height = rows * pitch + 0.32
        figure = Figure(figsize=(WIDTH, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        for number, entry in enumerate(entries):
            x = edge + (number % per_row) * (block + 0.3)
            y = 0.32 + number // per_row * pitch
            heads = number < per_row
            prompt = " ".join(entry.prompt.split())
            ax.text(x, y + label - 0.07, _shorten(prompt, 56), fontsize=8.5, color=INK, parse_math=False)
            columns = [("real", MUTED, [entry.real] if entry.real else [])]
            columns += [(model, palette.get(model, INK), entry.generated.get(model, [])) for model in models]
            for column, (name, colour, images) in enumerate(columns):
                if heads:
                    ax.text(x, 0.22, name, fontsize=8.5, fontweight="bold", color=colour)
                for image in images:
                    _picture(ax, image, x, y + label, side)
                    x += side + gap
                x += ((most if column else 1) - len(images)) * (side + gap) + 0.18
        ax.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")  # after imshow, which sets its own
        return figure


def _picture(ax: Axes, image: Image.Image, x: float, y: float, side: float) -> None:
    ax.imshow(np.asarray(image), extent=(x, x + side, y + side, y), interpolation="bilinear", zorder=2)
    ax.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=FAINT, linewidth=0.8, zorder=3))


def ramp(colour: str) -> LinearSegmentedColormap:
    """Near-white to `colour` to its dark shade, lightness falling evenly."""
    strong = np.array(to_rgb(colour))
    stops = [(0.0, 0.94 + 0.05 * strong), (0.62, strong), (1.0, 0.42 * strong)]
    return LinearSegmentedColormap.from_list(colour, [(at, tuple(np.clip(rgb, 0, 1))) for at, rgb in stops])


def _modality_colour(modality: str) -> str:
    return MODALITY.get(modality, OTHER_MODALITY)


def _mode_title(mode: str, modes: Sequence[str]) -> str:
    titles = {
        "train": "Training rule (train" + (")" if "causal" in modes else ": sees the future)"),
        "causal": "Training rule, dropless (causal)",
        "aux": "Auxiliary routers (aux: causal)",
        "aux_calibrated": "Auxiliary routers, calibrated (causal)",
        "threshold": "Moving cut-offs (threshold: causal)",
    }
    return titles.get(mode, f"Mode {mode}")


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
