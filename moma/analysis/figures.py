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
from PIL import Image

from moma.analysis import routing_maps
from moma.analysis.runs import Run
from moma.analysis.speedup import LOSSES, SMOOTHING, causal_losses, curve, smooth

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
    training), held-out causal at the end (diamonds), n-gram baselines (dotted)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.35))
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(0.055, 0.145, 0.92, 0.845, wspace=0.5)
        palette = colours(list(dict.fromkeys(run.variant for run in runs)))
        most = max(run.metrics["flops"][-1] for run in runs)
        size, unit = flop_unit(most)
        reference = next((run for run in runs if run.is_dense), runs[0])
        window = SMOOTHING * reference.metrics["flops"][-1]
        for ax, (name, metric) in zip(panels, LOSSES.items(), strict=True):
            _loss_panel(ax, runs, name, metric, window, size, palette)
            ax.set_title({"overall": "All targets"}.get(name, name.capitalize() + " targets"), pad=7)
            ax.set_xlim(0, most / size * 1.02)
            ax.set_xlabel(f"training {unit}")
            ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
        panels[0].set_ylabel("cross-entropy, nats per target")
        _loss_key(figure, any(not run.is_dense for run in runs))
        return figure


def _loss_panel(
    ax: Axes, runs: Sequence[Run], name: str, metric: str, window: float, size: float, palette: dict[str, str]
) -> None:
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
        for losses in causal_losses(run).values():
            if metric in losses:
                at = run.metrics["flops"][-1] / size
                ax.plot([at], [losses[metric]], marker="D", markersize=5.5, markeredgecolor="white", **style)
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
    _end_labels(ax, ends, palette)


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


def _loss_key(figure: Figure, sparse: bool) -> None:
    style: dict[str, Any] = {"color": MUTED}
    handles = [
        Line2D([], [], linewidth=1.3, **style, label=f"training, mean over {SMOOTHING:.0%} of dense FLOPs"),
        Line2D([], [], marker="o", markersize=4, markerfacecolor="white", linestyle="none", **style,
               label="held-out, routed as in training" if sparse else "held-out"),
        Line2D([], [], marker="D", markersize=5, markeredgecolor="white", linestyle="none", **style,
               label="held-out, causal"),
        Line2D([], [], linestyle=(0, (1, 2)), linewidth=1, color=INK, label="n-gram baseline"),
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncol=4, fontsize=8, labelcolor=MUTED,
        handletextpad=0.5, columnspacing=1.8, borderaxespad=0.3,
    )  # fmt: skip


def expert_shares(maps: dict[str, Any]) -> Figure:
    """Share of a modality's tokens per layer and expert, a panel per routing mode."""
    modes = routing_maps.modes(maps)
    tables = [routing_maps.shares(maps, mode) for mode in modes]
    layers, columns = tables[0].share.shape
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.34 * layers))
        panels = figure.subplots(1, len(modes), squeeze=False)[0]
        height = figure.get_figheight()
        figure.subplots_adjust(0.065, 0.32 / height, 0.985, 1 - 0.68 / height, wspace=0.1)
        for ax, mode, table in zip(panels, modes, tables, strict=True):
            _share_panel(ax, table, narrow=columns * len(modes) > 20)
            ax.set_title(_mode_title(mode), pad=31)
            ax.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)] if ax is panels[0] else [])
        figure.text(
            0.065,
            0.1 / height,
            "% of the modality's tokens that the expert computes",
            fontsize=8,
            color=MUTED,
        )
        return figure


def _share_panel(ax: Axes, table: routing_maps.Shares, narrow: bool) -> None:
    """Cells by layer and expert; the equal share has the middle tone, twice it (or more) the darkest."""
    layers = len(table.share)
    at, x, previous = [], 0.0, None
    for expert, modality in table.column:
        group = (routing_maps.group_of(expert), modality)
        x += 0.35 if previous not in (None, group) else 0.0
        at.append(x)
        x, previous = x + 1, group
    for column, ((_, modality), left) in enumerate(zip(table.column, at, strict=True)):
        scale = ramp(_modality_colour(modality))
        for layer in range(layers):
            value = table.share[layer, column]
            level = min(1.0, float(value / table.fair[column] / 2))
            ax.add_patch(
                Rectangle((left - 0.5, layer - 0.5), 1, 1, facecolor=scale(level), edgecolor="white", linewidth=1.5)
            )
            ax.text(
                left, layer, f"{100 * value:.0f}", ha="center", va="center",
                fontsize=7 if narrow else 8, color="white" if level > 0.45 else INK,
            )  # fmt: skip
    ax.set_xlim(-0.5, at[-1] + 0.5)
    ax.set_ylim(layers - 0.5, -0.5)
    ax.set_xticks(at, [expert.rsplit(" ", 1)[1] for expert, _ in table.column])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    groups: dict[tuple[str, str], list[float]] = {}
    for (expert, modality), left in zip(table.column, at, strict=True):
        groups.setdefault((routing_maps.group_of(expert), modality), []).append(left)
    for (group, modality), lefts in groups.items():
        text = f"{group} experts" if group == modality else f"{group} experts, {modality} tokens"
        ax.annotate(
            text, (float(np.mean(lefts)), 1), (0, 15), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=8, color=_modality_colour(modality),
        )  # fmt: skip


def expert_places(maps: dict[str, Any]) -> Figure | None:
    """Where in the picture each image expert looks, per layer and routing mode; None without image experts."""
    experts = routing_maps.image_experts(maps)
    if not experts:
        return None
    modes = routing_maps.modes(maps)
    tables = [routing_maps.places(maps, mode) for mode in modes]
    layers = len(tables[0])
    with matplotlib.rc_context(STYLE):
        left, right, between = 0.62, 0.12, 0.62
        block = (WIDTH - left - right - between * len(modes)) / len(modes)
        block = min(block, 1.05 * len(experts))
        tall = block * layers / len(experts)
        height = tall + 1.2
        figure = Figure(figsize=(WIDTH, height))
        scale = ramp(MODALITY["image"]).with_extremes(bad="white")
        most = max(0.01, max(float(table.max()) for table in tables))
        for number, (mode, table) in enumerate(zip(modes, tables, strict=True)):
            x = left + number * (block + between)
            ax = figure.add_axes((x / WIDTH, 0.55 / height, block / WIDTH, tall / height))
            sheet = routing_maps.mosaic(table)
            ax.imshow(sheet, cmap=scale, vmin=0, vmax=most, interpolation="nearest", aspect="auto")
            ax.set_title(_mode_title(mode), pad=20)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
            grid_h, grid_w = table.shape[2:]
            centres_x = [e * (grid_w + 1) + (grid_w - 1) / 2 for e in range(len(experts))]
            centres_y = [i * (grid_h + 1) + (grid_h - 1) / 2 for i in range(layers)]
            names = [maps["experts"][e] for e in experts]
            ax.set_xticks(centres_x, names if len(names) < 6 else [name.split()[-1] for name in names])
            ax.xaxis.tick_top()
            ax.set_yticks(centres_y, [f"layer {i}" for i in range(layers)] if number == 0 else [])
            for y, value in zip(centres_y, routing_maps.reliance(table), strict=True):
                ax.annotate(
                    f"{value:.0%}", (1, y), (5, 0), xycoords=("axes fraction", "data"),
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


def routers(routing: dict[str, list[dict[str, float]]], colour: str) -> Figure:
    """Auxiliary routers per layer against their baselines: accuracy, AUC, experts per token."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6))
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(0.055, 0.165, 0.985, 0.80, wspace=0.22)
        looks = {"training": {"marker": "o"}, "free_running": {"marker": "s", "markerfacecolor": "white"}}
        titles = ("Accuracy", "AUC", "Experts per token")
        for ax, title in zip(panels, titles, strict=True):
            for states, look in looks.items():
                entries = routing.get(states, [])
                x = np.arange(len(entries))
                key = {"Accuracy": "accuracy", "AUC": "auc"}.get(title, "experts_predicted")
                ax.plot(x, [_number(e, key) for e in entries], color=colour, linewidth=1.3, markersize=5, **look)
            _router_reference(ax, title, routing)
            layers = max((len(entries) for entries in routing.values()), default=0)
            ax.set_title(title, pad=7)
            ax.set_xlabel("layer")
            ax.set_xticks(range(layers))
            ax.set_xlim(-0.3, max(layers - 0.7, 0.3))
            ax.yaxis.grid(True, color=FAINT, linewidth=0.6)
            ax.set_axisbelow(True)
        handles = [
            Line2D([], [], color=colour, marker="o", markersize=5, label="states of training routing"),
            Line2D([], [], color=colour, marker="s", markersize=5, markerfacecolor="white",
                   label="free-running: states of its own routing"),
            Line2D([], [], color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label="without a router"),
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncol=3, fontsize=8,
            labelcolor=MUTED, handletextpad=0.5, columnspacing=1.8, borderaxespad=0.3,
        )  # fmt: skip
        return figure


def _router_reference(ax: Axes, title: str, routing: dict[str, list[dict[str, float]]]) -> None:
    entries = routing.get("training") or routing.get("free_running") or []
    style: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 2)), "linewidth": 1.2}
    x = np.arange(len(entries))
    if title == "Accuracy":
        ax.plot(x, [_number(e, "majority") for e in entries], **style)
        ax.set_ylim(min([0.5, *(_number(e, "majority") - 0.05 for e in entries)]), 1.0)
        text, y = "majority", _number(entries[0], "majority") if entries else 0.5
    elif title == "AUC":
        ax.axhline(0.5, **style)
        ax.set_ylim(0.45, 1.0)
        text, y = "chance", 0.5
    else:
        true = [_number(e, "experts_true") for e in entries]
        ax.plot(x, true, **style)
        text, y = "expert choice", true[0] if true else 1.0
        low, high = ax.get_ylim()
        ax.set_ylim(min(0, low), max(high, y) * 1.15)
    ax.annotate(
        text,
        (0.0, y),
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


def _mode_title(mode: str) -> str:
    return {"train": "Expert choice (train: sees the future)", "aux": "Auxiliary routers (aux: causal)"}.get(
        mode, f"Mode {mode}"
    )


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
