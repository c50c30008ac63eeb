"""The paper's Table 2 beside ours: throughput of every sparse variant relative to dense.

    figure.py OUT.png BENCH.json...        files of `moma bench suite=step`; a panel for all of one size and machine

Throughput = time of dense / time of the variant in the same round, median and quartiles. Hollow: forward and backward
of one micro-batch. Filled: the whole step as it was measured. A step of another number n of micro-batches is derived
from the parts, n (forward and backward) + optimizer, and named so. Prints the numbers as a table.
"""

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moma.analysis.figures import FAINT, INK, MUTED, STYLE, WIDTH, colours, save

PAPER = {  # Table 2: change of throughput against dense
    "moe_8x": -0.09,
    "moe_1t1i": -0.06,
    "moe_4t4i": -0.17,
    "mod_moe_1t1i": -0.21,
    "mod_moe_4t4i": -0.31,
}
PAPER_WORDS = "paper: 435M, 256 A100, S = 4,096"
LABELS = dict(zip(PAPER, ("MoE 8x", "MoMa 1t1i", "MoMa 4t4i", "MoD 1t1i", "MoD 4t4i"), strict=True))
ONCE, OPTIMIZER = ": forward and backward", ": optimizer"
DERIVED = 8  # micro-batches


def times(result: dict[str, Any], name: str) -> list[float] | None:
    """Seconds of a case in every round; None where it was not measured."""
    return next((case["times_s"] for case in result["cases"] if case["name"] == name), None)


def derived(result: dict[str, Any], variant: str, micro_batches: int) -> list[float] | None:
    """Seconds of a step of so many micro-batches in every round, from its parts."""
    once, optimizer = times(result, variant + ONCE), times(result, variant + OPTIMIZER)
    if once is None or optimizer is None:
        return None
    return [micro_batches * each + last for each, last in zip(once, optimizer, strict=True)]


def throughput(variant: Sequence[float] | None, dense: Sequence[float] | None) -> tuple[float, float, float] | None:
    """Change of throughput against dense, round by round: lower quartile, median, upper quartile."""
    if variant is None or dense is None:
        return None
    changes = [d / v - 1 for v, d in zip(variant, dense, strict=True)]
    low, middle, high = quantiles(changes, n=4, method="inclusive")
    return low, middle, high


Measured = Sequence[dict[str, Any]]  # files of one size and machine; every variant against the dense model of its file


def changes(results: Measured) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By variant: `once`, `step`, and `derived` where another number of micro-batches was measured."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for result, variant in product(results, PAPER):
        ways = {
            "once": throughput(times(result, variant + ONCE), times(result, "dense" + ONCE)),
            "step": throughput(times(result, variant), times(result, "dense")),
        }
        if result["facts"]["micro_batches"] != DERIVED:
            ways["derived"] = throughput(derived(result, variant, DERIVED), derived(result, "dense", DERIVED))
        if present := {name: value for name, value in ways.items() if value is not None}:
            found[variant] = present
    return found


def title(result: dict[str, Any]) -> tuple[str, str]:
    """Model, device and precision; tokens and micro-batches."""
    machine, facts = result["machine"], result["facts"]
    threads = {1: "one thread"}.get(machine["threads"], f"{machine['threads']} threads")
    device = machine.get("gpu") or f"CPU, {threads}"
    size = facts["size"].replace("_", ".").upper()
    compiled = ", compiled" if facts["compiled"] else ", eager"
    count = facts["micro_batches"]
    return (
        f"{size}, {device}, {result['precision']}{compiled}",
        f"{facts['tokens_per_micro_batch']:,} tokens per micro-batch, {count} per step",
    )


def panel(ax: Axes, results: Measured) -> None:
    """One size and machine: a row per variant, the paper's mark above ours."""
    found, palette = changes(results), colours(["dense", *PAPER])
    ax.axvline(0, color=MUTED, linewidth=1.0)
    for row, variant in enumerate(PAPER):
        ax.plot(100 * PAPER[variant], row - 0.24, "D", color=INK, markersize=5, markerfacecolor=FAINT)
        ax.annotate(
            f"{100 * PAPER[variant]:.0f}", (100 * PAPER[variant], row - 0.24), (6, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=MUTED,
        )  # fmt: skip
        for way, (low, middle, high) in found.get(variant, {}).items():
            place = row + {"once": 0.0, "step": 0.24, "derived": 0.44}[way]
            ax.plot([100 * low, 100 * high], [place] * 2, color=palette[variant], linewidth=1.6)
            ax.plot(
                100 * middle, place, {"derived": "s"}.get(way, "o"), color=palette[variant], markersize=5.5,
                markerfacecolor=palette[variant] if way == "step" else "white",
            )  # fmt: skip
            ax.annotate(
                f"{100 * middle:+.1f}", (100 * max(high, middle), place), (6, 0), textcoords="offset points",
                va="center", fontsize=7.5, color=palette[variant],
            )  # fmt: skip
        if variant not in found:
            ax.annotate("not measured", (0, row + 0.12), (-6, 0), textcoords="offset points", ha="right",
                        va="center", fontsize=7.5, color=MUTED)  # fmt: skip
    head, below = title(results[0])
    ax.set_title(head, pad=18)
    ax.annotate(below, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8, color=MUTED)
    ax.set_yticks(range(len(PAPER)), [LABELS[name] for name in PAPER])
    ax.set_ylim(len(PAPER) - 0.35, -0.6)
    ax.set_xlabel("throughput against dense, %")
    ax.xaxis.grid(True, color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)


def draw(groups: Sequence[Measured]) -> Figure:
    """All sizes and machines side by side on one scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.1))
        panels = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
        figure.subplots_adjust(0.085, 0.115, 0.975, 0.78, wspace=0.1)
        for ax, results in zip(panels, groups, strict=True):
            panel(ax, results)
        low, high = panels[0].get_xlim()
        panels[0].set_xlim(low - 1, high + 0.09 * (high - low))  # room for the last number
        handles = [
            Line2D([], [], linestyle="", marker="D", color=INK, markerfacecolor=FAINT, label=PAPER_WORDS),
            Line2D([], [], color=MUTED, marker="o", markerfacecolor="white", label="forward and backward"),
            Line2D([], [], color=MUTED, marker="o", label="whole step, as measured"),
        ]
        if any(results[0]["facts"]["micro_batches"] != DERIVED for results in groups):
            handles.append(
                Line2D([], [], color=MUTED, marker="s", markerfacecolor="white",
                       label=f"step of {DERIVED} micro-batches, derived")
            )  # fmt: skip
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.075, 1.0), ncol=len(handles), fontsize=8,
            labelcolor=MUTED, handletextpad=0.5, columnspacing=1.5, borderaxespad=0.3,
        )  # fmt: skip
        return figure


def table(groups: Sequence[Measured]) -> str:
    """Change of throughput in per cent: the paper's, and every panel's with its quartiles."""
    titles = [title(results[0]) for results in groups]
    heads = [f"{head}; {below}: {way}" for head, below in titles for way in ("fwd + bwd", "step")]
    lines = ["| | paper | " + " | ".join(heads) + " |", "| --- " * (2 + len(heads)) + "|"]
    measured = [changes(results) for results in groups]
    for variant, paper in PAPER.items():
        cells = [f"{100 * paper:.0f}"]
        for found in measured:
            for way in ("once", "step"):
                one = found.get(variant, {}).get(way)
                cells.append("-" if one is None else "{1:+.1f} [{0:+.1f}, {2:+.1f}]".format(*(100 * v for v in one)))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    out, *files = sys.argv[1:]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in files:
        result = json.loads(Path(file).read_text())
        groups.setdefault(title(result), []).append(result)
    save(draw(list(groups.values())), Path(out))
    print(table(list(groups.values())))
