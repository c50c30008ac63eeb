"""The comparison of many runs as one page: report.html with its figures, figures/*.png, comparison.json.

    what was left out   eta (train, causal, end points)   curves   final losses   expert counts   scaling   throughput

The page stands alone and can be read without the code: every figure has a title, units, a sentence on how to read it,
and every number its routing mode. comparison.json holds every number of the page. Equal inputs give equal bytes. A
claim needs three paired seeds and an interval that excludes "no difference". Refuses a page of more than 5 MB.
"""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from moma import __version__
from moma.analysis import compare_figures, comparison, markup
from moma.analysis.comparison import EVALUATED, TRACKED, TRAINING, Experts, Final, Spread, Throughput
from moma.analysis.efficiency import (
    CAUSAL,
    ESTIMATED,
    TRAIN,
    Efficiency,
    EndPoint,
    efficiencies,
    end_points,
    router_flops,
)
from moma.analysis.figures import save
from moma.analysis.scaling import Family, families
from moma.analysis.speedup import LOSSES, SEEDS_FOR_A_CLAIM, SMOOTHING, Interval
from moma.analysis.study import Study, final_flops

_SOURCES = {
    TRAINING: "Training loss, mode train: trailing mean over the last {window:.0%} of dense's FLOPs. Expert choice and "
    "depth routers see the future in this mode.",
    TRACKED: "Held-out loss at the end of training, causal: models whose training rule sees the future under moving "
    "cut-offs, all others by their own rule.",
    EVALUATED: "Held-out loss from eval.json (`moma evaluate`), in every mode that the model has: train sees the "
    "future; aux (auxiliary routers), threshold (moving cut-offs) and causal (own rule, or no routers) do not. "
    "Differences are to dense in mode causal.",
}


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows."""

    study: Study
    etas: list[Efficiency]
    ends: list[EndPoint]
    finals: list[Final]
    counts: list[tuple[Experts, Final]]
    fits: list[Family]
    speeds: list[Throughput]


def compare(study: Study) -> Comparison:
    """All numbers of a study."""
    rows = comparison.finals(study)
    return Comparison(
        study, efficiencies(study), end_points(study), rows, comparison.ablation(rows), families(study),
        comparison.throughputs(study),
    )  # fmt: skip


def write(found: Comparison, out: Path) -> Path:
    """Write out/report.html, out/comparison.json and out/figures/*.png; returns the page's path. Raises ValueError for
    a page of more than 5 MB."""
    drawn = _draw(found, out / "figures")
    parts = (
        _header(found), _left_out(found.study), _etas(found, drawn), _curves(found, drawn), _ends(found.ends),
        _finals(found), _counts(found, drawn), _scaling(found, drawn), _throughput(found.speeds), _runs(found.study),
    )  # fmt: skip
    page = markup.whole(
        _title(found.study), "\n".join(filter(None, parts)), "compare fewer sizes at a time", width=1180
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(numbers(found), indent=1, allow_nan=False) + "\n")
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summary_lines(found: Comparison) -> list[str]:
    """What was left out and eta, as plain lines for a console."""
    lines = [f"left out: {one.folder} ({one.reason})" for one in found.study.left_out]
    for size, variant, mode in dict.fromkeys((one.size, one.variant, one.mode) for one in found.etas):
        own = [one for one in found.etas if (one.size, one.variant, one.mode) == (size, variant, mode)]
        values = ", ".join(f"{one.what} {_eta(one, one.shown)}" for one in own)
        lines.append(f"eta of {variant}, {size} ({mode}): {values}; {own[0].what}: {own[0].verdict}")
    return lines


def numbers(found: Comparison) -> dict[str, Any]:
    """The comparison for programs: plain numbers, every interval and every seed."""
    study = found.study
    return {
        "format": 1,
        "smoothing": SMOOTHING,
        "runs": [
            {
                "run": str(run.folder), "size": size, "variant": run.variant, "seed": list(run.seed),
                "flops": final_flops(run), "router_flops": router_flops(run),
                "steps": int(run.metrics["step"][-1]),
            }
            for size, runs in study.sizes.items() for run in runs
        ],
        "left_out": [{"run": str(one.folder), "reason": one.reason} for one in study.left_out],
        "notes": list(study.notes),
        "eta": [_plain(one) | {"reached": one.reached, "verdict": one.verdict} for one in found.etas],
        "end_points": [_plain(one) for one in found.ends],
        "final_losses": [_plain(one) for one in found.finals],
        "expert_counts": [_plain(experts) | {"variant": row.variant, "size": row.size}
                          for experts, row in found.counts if row.source == TRAINING],
        "scaling": [
            _plain(replace(one, resampled=()))
            | {"ranges": {name: one.range(name) for name in ("c", "a", "b")}, "remarks": one.remarks}
            for one in found.fits
        ],
        "throughput": [_plain(one) for one in found.speeds],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Tuples with names and dataclasses as objects, all the way down."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}  # type: ignore[attr-defined]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


# ---- figures -------------------------------------------------------------------------------------------


def _draw(found: Comparison, folder: Path) -> dict[str, Path]:
    """Every figure that the data allow, by name."""
    drawn = {
        f"loss-{size}": compare_figures.loss_over_flops(size, runs, [one for one in found.etas if one.size == size])
        for size, runs in found.study.sizes.items()
    }
    if found.etas:
        drawn["eta"] = compare_figures.speed_ups(found.etas, found.study.variants)
    for size in dict.fromkeys(row.size for _, row in found.counts):
        own = [(experts, row) for experts, row in found.counts if row.size == size]
        drawn[f"experts-{size}"] = compare_figures.expert_counts(size, own)
    if len(found.study.sizes) > 1:
        drawn["scaling"] = compare_figures.scaling_fits(found.fits)
    paths = {name: folder / f"{name.replace('×', 'x')}.png" for name in drawn}
    for name, figure in drawn.items():
        save(figure, paths[name])
    return paths


def _shown(drawn: dict[str, Path], name: str, alt: str, how: str) -> str:
    """A figure and the sentence on how to read it; nothing where it was not drawn."""
    return f"{markup.figure(drawn[name], alt)}<figcaption>{html.escape(how)}</figcaption>" if name in drawn else ""


# ---- sections ------------------------------------------------------------------------------------------


def _header(found: Comparison) -> str:
    study = found.study
    seeds = {run.seed for run in study.runs}
    facts = [
        markup.count(len(study.runs), "finished run"),
        f"{markup.count(len(study.variants), 'model')}: {', '.join(study.variants)}",
        f"{markup.count(len(study.sizes), 'size')}: {', '.join(study.sizes)}",
        markup.count(len(seeds), "seed"),
    ]
    pairs = [len(one.pairs) for one in found.etas]
    if not pairs:
        banner = "No pair: eta needs a dense and a sparse run of the same size and seeds."
    elif min(pairs) < SEEDS_FOR_A_CLAIM:
        banner = (
            f"Down to {markup.count(min(pairs), 'pair')} of seeds: a verdict needs {SEEDS_FOR_A_CLAIM}. Where there "
            "are fewer, the numbers are single draws that other seeds may reverse."
        )
    else:
        banner = f"At least {min(pairs)} pairs of seeds: a verdict is given where the 95 % interval excludes 1."
    terms = (
        "Size: the dense model's name in the paper, or its width × layers. A sparse model stands beside the dense "
        "one that costs as many FLOPs per token. Mode train: routed as in training; expert choice and depth routers "
        "then see the future, so this loss cannot be reached when generating. Causal: decided by the past alone."
    )
    return (
        f"<header><h1>{html.escape(_title(study))}</h1><p class=sub>{html.escape(' · '.join(facts))}</p></header>"
        f"<p class=banner>{html.escape(banner)}</p><p class=note>{html.escape(terms)}</p>"
    )


def _left_out(study: Study) -> str:
    parts = []
    if study.left_out:
        body = [[str(one.folder), one.reason] for one in study.left_out]
        note = "These runs take part in no number below."
        parts.append(markup.table(["run", "reason"], body) + f"<p class=note>{note}</p>")
    parts += [f"<p class=warn>{html.escape(note)}</p>" for note in study.notes]
    return markup.section("Left out, and what is not equal", "".join(parts)) if parts else ""


def _etas(found: Comparison, drawn: dict[str, Path]) -> str:
    if not found.etas:
        return ""
    how = (
        "Each mark is a model's η at one size, right of 1× means that it needs less compute than dense for dense's "
        "final loss; the line is the 95 % interval over seeds (none with one seed). Filled: training losses, mode "
        "train; hollow: held-out losses, causal, with the FLOPs of auxiliary routers where some were trained."
    )
    parts = [_shown(drawn, "eta", "speed-up of every model, by kind of loss", how)]
    titles = {
        TRAIN: "Mode train, as in the paper",
        CAUSAL: "Causal, tracked while training",
        ESTIMATED: "Causal with auxiliary routers, estimated",
    }
    for mode, title in titles.items():
        own = [one for one in found.etas if one.mode == mode]
        if own:
            parts.append(f"<h3>{title}</h3>{_eta_table(own, mode)}")
    note = (
        "η = FLOPs of dense to its final loss / FLOPs of the model to first get there (paper, section 3.1), "
        f"geometric mean over pairs of seeds; losses smoothed by a trailing mean over {SMOOTHING:.0%} of dense's "
        "FLOPs. The learning rate has not decayed where the lines cross, so η is rather too low; a noisy curve "
        "crosses early, which makes η too high. 1/slope: η from a straight line through (dense FLOPs, model FLOPs) at "
        "equal loss, which does not hang on one crossing. Per second: η × tokens per second relative "
        "to dense; it means something where both ran on one machine. Gap: model − dense at equal FLOPs, nats. "
        "Routers charged: the FLOPs of training the auxiliary routers count for the model. Estimated: the causal curve "
        "moved by what the auxiliary routers lose to the cut-offs in eval.json, a stand-in for a curve that nobody "
        "tracks. Causal curves have few points; between two, a straight line makes η rather too low."
    )
    return markup.section("Compute at equal loss: η", "".join(parts) + f"<p class=note>{html.escape(note)}</p>")


def _eta_table(etas: Sequence[Efficiency], mode: str) -> str:
    charged = mode != TRAIN and any(pair.routers for one in etas for pair in one.pairs)
    head = ["size", "model", "targets", *(["routed by"] if mode != TRAIN else []), "seeds", "dense's loss"]
    head += ["η"] if mode != ESTIMATED else []
    head += ["η, routers charged"] if charged else []
    head += ["1/slope", "per second", "gap", "verdict"]
    body = []
    for one in etas:
        target = sum(pair.eta.target for pair in one.pairs) / len(one.pairs)
        inverse = None if one.slope is None else 1 / one.slope.mean
        row = [one.size, one.variant, one.what, *([one.rule] if mode != TRAIN else []), str(len(one.pairs))]
        row += [markup.number(target, 3)]
        row += [_eta(one, one.eta)] if mode != ESTIMATED else []
        row += [_eta(one, one.charged) if any(pair.routers for pair in one.pairs) else ""] if charged else []
        row += [f"{inverse:.2f}×" if inverse else "", f"{one.per_second.mean:.2f}×" if one.per_second else ""]
        body.append([*row, markup.signed_interval(one.gap, 3), one.verdict])
    first = head.index("seeds")
    return _table(head, body, tuple(range(first, len(head) - 1)))


def _curves(found: Comparison, drawn: dict[str, Path]) -> str:
    how = (
        "Lower is better. Lines are means over seeds, shaded from the least to the greatest seed. The dotted line is "
        "dense's final loss; from where a model first gets there, a line drops to its η. Top: training loss, mode "
        "train (smoothed). Bottom, where logged: held-out loss, causal."
    )
    parts = [_shown(drawn, f"loss-{size}", f"loss over FLOPs, size {size}", how) for size in found.study.sizes]
    return markup.section("Loss over training FLOPs", "".join(parts))


def _ends(ends: Sequence[EndPoint]) -> str:
    if not ends:
        return ""
    body = []
    for one in ends:
        ratio = f"{one.value.mean:.2f}×" + (
            "" if one.value.low is None else f" [{one.value.low:.2f}, {one.value.high:.2f}]"
        )
        bound = "at least" if one.bounds == one.value.n else f"at least, in {one.bounds} seeds" if one.bounds else ""
        body.append(
            [one.size, one.variant, one.what, one.mode, str(one.value.n), f"{one.routers:.3g}",
             markup.signed_interval(one.difference, 3), f"{bound} {ratio}".strip()]
        )  # fmt: skip
    head = ["size", "model", "targets", "mode", "seeds", "routers' FLOPs", "model − dense", "compute ratio"]
    note = (
        "Where the model ends, all FLOPs counted, those of its auxiliary routers' training too (modes aux, "
        "aux_calibrated). Compute ratio: FLOPs of dense to the loss that the model ends with, over the model's. Where "
        "dense never gets as low, the ratio of the whole runs is a lower bound ('at least'). model − dense: held-out, "
        "from eval.json, nats."
    )
    table = _table(head, body, (4, 5, 6, 7))
    return markup.section("At the end of training, causal", f"{table}<p class=note>{html.escape(note)}</p>")


def _finals(found: Comparison) -> str:
    parts = []
    for source, text in _SOURCES.items():
        rows = [row for row in found.finals if row.source == source]
        if not rows:
            continue
        body = [
            [row.size, row.variant, *([row.mode] if source == EVALUATED else []), *_spreads(row)]
            + [markup.signed_interval(gap, 3) if (gap := row.difference.get(what)) else "" for what in LOSSES]
            for row in rows
        ]
        head = ["size", "model", *(["mode"] if source == EVALUATED else []), "seeds", *LOSSES]
        head += [f"{what} − dense" for what in LOSSES]
        note = html.escape(text.format(window=SMOOTHING))
        title = {TRAINING: "Training", TRACKED: "Held-out, tracked", EVALUATED: "Held-out, evaluated"}[source]
        parts.append(
            f"<h3>{title}</h3>{_table(head, body, tuple(range(head.index('seeds'), len(head))))}"
            f"<p class=note>{note}</p>"
        )
    note = (
        "Nats per target token, means over seeds ± half of their range; differences with 95 % t intervals over pairs."
    )
    return markup.section("Final losses", "".join(parts) + f"<p class=note>{note}</p>")


def _spreads(row: Final) -> Iterator[str]:
    """Number of seeds, then mean and half range of each loss."""
    yield str(max(one.n for one in row.losses.values()))
    for what in LOSSES:
        yield _spread(row.losses[what], 3) if what in row.losses else ""


def _spread(one: Spread, digits: int) -> str:
    half = f" ± {(one.high - one.low) / 2:,.{digits}f}" if one.n > 1 else ""
    return f"{one.mean:,.{digits}f}{half}"


def _counts(found: Comparison, drawn: dict[str, Path]) -> str:
    if not found.counts:
        return ""
    how = (
        "Left of 0: lower loss than dense. Filled: training loss, mode train; hollow: held-out loss, causal. Lines: "
        "95 % intervals over pairs of seeds."
    )
    sizes = dict.fromkeys(row.size for _, row in found.counts)
    parts = [_shown(drawn, f"experts-{size}", f"loss by expert counts, size {size}", how) for size in sizes]
    body = [
        [row.size, row.variant]
        + [str(n) if n else "" for n in (experts.text, experts.image, experts.shared, experts.total)]
        + [{TRAINING: "train", TRACKED: "causal"}[row.source]]
        + [_spread(row.losses[what], 3) if what in row.losses else "" for what in LOSSES]
        for experts, row in found.counts
        if row.source in (TRAINING, TRACKED)
    ]
    head = ["size", "model", "text experts", "image experts", "for all tokens", "in all", "mode", *LOSSES]
    note = (
        "Final losses, nats: training loss in mode train, held-out loss in causal rows. Every token meets one expert "
        "on average whatever their number, so all rows of a size cost the same FLOPs per token."
    )
    table = _table(head, body, (2, 3, 4, 5, 7, 8, 9))
    return markup.section("Expert counts", "".join(parts) + f"{table}<p class=note>{note}</p>")


def _scaling(found: Comparison, drawn: dict[str, Path]) -> str:
    how = (
        "A point is one run's final loss at its training FLOPs, a line the fitted law of a family, shaded its 95 % "
        "range over resampled seeds. A family that lies lower at equal FLOPs is better; lines that stay parallel say "
        "that the advantage lasts. Top: training loss, mode train. Bottom, where logged: held-out loss, causal."
    )
    if not any(one.law for one in found.fits):
        reasons = "; ".join(dict.fromkeys(one.why_not for one in found.fits))
        figure = _shown(drawn, "scaling", "final loss over training FLOPs", how)
        return markup.section("Scaling", f"{figure}<p class=note>No fit: {html.escape(reasons)}.</p>")
    body = []
    for one in found.fits:
        fitted = [_with_range(one, name) for name in ("c", "a", "b")] if one.law else ["", "", ""]
        worst = f"{max(map(abs, one.residuals)):.4f}" if one.residuals else ""
        body.append([one.variant, one.what, one.mode, *fitted, worst, "; ".join(one.remarks)])
    at = max(final_flops(run) for run in found.study.runs)
    source = "at the end of training" if comparison.causal_source(found.study) == TRACKED else "of eval.json"
    note = (
        f"Loss = c + a (FLOPs / {at:.3g})^−b, nats, over the final losses of all sizes; mode train: training loss, "
        f"causal: held-out loss {source}. In brackets 95 % over resampled seeds, rather too narrow with few of them. "
        "Residual: the largest distance of a point from its law, nats. A law is no licence to read beyond its points."
    )
    head = ["family", "targets", "mode", "c", "a", "b", "residual", "remark"]
    table = _table(head, body, (3, 4, 5, 6))
    figure = _shown(drawn, "scaling", "final loss over training FLOPs with fitted laws", how)
    return markup.section("Scaling", f"{figure}{table}<p class=note>{html.escape(note)}</p>")


def _with_range(one: Family, name: str) -> str:
    ends = one.range(name)
    return f"{getattr(one.law, name):.3f}" + ("" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]")


def _throughput(speeds: Sequence[Throughput]) -> str:
    if not speeds:
        return ""
    body = [
        [one.size, one.variant, _spread(one.tokens_per_second, 0), _relative(one.relative),
         "" if one.paper in (None, 1.0) else f"{one.paper - 1:+.0%}".replace("-", "−")]
        for one in speeds
    ]  # fmt: skip
    note = (
        "Median over each run, evaluation and checkpoints left out, mean over seeds ± half of their range. Against "
        "dense: geometric mean over pairs of seeds, 95 % interval; it means something where all ran on the same "
        "machine with nothing beside them. Paper: its Table 2, size 435m on 256 A100."
    )
    head = ["size", "model", "tokens/s", "against dense", "paper"]
    return markup.section("Throughput", _table(head, body, (2, 3, 4)) + f"<p class=note>{note}</p>")


def _relative(found: Interval | None) -> str:
    if found is None:
        return ""
    ends = "" if found.low is None or found.high is None else f" [{found.low - 1:+.0%}, {found.high - 1:+.0%}]"
    return f"{found.mean - 1:+.0%}{ends}".replace("-", "−")


def _runs(study: Study) -> str:
    body = [
        [size, run.variant, f"{run.seed[0]}/{run.seed[1]}", str(run.folder), markup.integer(run.metrics["step"][-1]),
         f"{final_flops(run):.4g}", f"{router_flops(run):.3g}" if run.routers else "",
         str(run.meta.get("git", {}).get("commit", ""))[:12]]
        for size, runs in study.sizes.items() for run in runs
    ]  # fmt: skip
    head = ["size", "model", "seed data/init", "run", "steps", "FLOPs", "routers' FLOPs", "commit"]
    note = f"moma {__version__}. Every number of this page is in comparison.json."
    return markup.section("Runs", _table(head, body, (4, 5, 6)) + f"<p class=note>{note}</p>")


def _table(head: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table in which a size and a model stand once, over the rows that share them; no cell breaks."""
    shown, above = [], [""] * 2
    for row in body:
        repeated = [head[i] in ("size", "model", "family") and list(row[: i + 1]) == above[: i + 1] for i in range(2)]
        shown.append(["" if i < 2 and repeated[i] else cell for i, cell in enumerate(row)])
        above = list(row[:2])
    return f"<div class=fit>{markup.table(head, shown, numbers)}</div>"


def _eta(one: Efficiency, found: Interval | None) -> str:
    if found is None:
        return f"reached by {one.reached} of {len(one.pairs)} seeds" if one.reached else "not reached"
    ends = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:.2f}×{ends}"


def _title(study: Study) -> str:
    sparse = [name for name in study.variants if name != "dense"]
    return "moma compare: dense" + (f" and {', '.join(sparse)}" if sparse else "")
