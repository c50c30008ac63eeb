"""One study as one file: report.html, with its figures inside, beside them as PNG, and its numbers as JSON.

    verdict (held-out, causal)   eta   curves   gaps   pictures, captions   routing maps   routers   cost   commands

The page needs no network and no script, and prints. Every number names its routing mode: `train` (the training rule
over the micro-batch: expert choice and depth routers see the future), or a causal one: `aux`, `aux_calibrated`
(auxiliary routers), `threshold` (moving cut-offs), `causal` (a model whose rules are causal, or without routers).
Quality is claimed with at least three paired seeds and an interval that excludes zero; else the page says so. Whatever
comes out of data (prompts, captions, tokens, paths) is escaped. Refuses generated files outside their folder and a
page of more than 5 MB.
"""

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
from PIL import Image

from moma import __version__
from moma.analysis import figures, markup, routing_maps
from moma.analysis.fairness import unfair
from moma.analysis.generations import Generations
from moma.analysis.markup import Html
from moma.analysis.runs import Run, with_routers
from moma.analysis.speedup import (
    HELD_OUT,
    LOSSES,
    SEEDS_FOR_A_CLAIM,
    SMOOTHING,
    Row,
    Speedup,
    causal_losses,
    curve,
    held_out,
    speedups,
    variants,
)

MOST_BYTES = markup.MOST_BYTES
MOST_PROMPTS, MOST_SAMPLES, MOST_CHARACTERS = 24, 4, 280
TOP_TOKENS = 6
_MODES = {
    "aux": "aux: causal, auxiliary routers",
    "aux_calibrated": "aux_calibrated: causal, auxiliary routers with moving cut-offs",
    "threshold": "threshold: causal, moving cut-offs",
    "train": "train: routed over the micro-batch, sees the future",
}
_KINDS_OF_PICTURES = {
    "generated": "generated, causal",
    "training": "training pictures",
    "unigram": "codes drawn per position",
}


def write_report(
    runs: Sequence[Run],
    generations: Sequence[Generations],
    out: Path,
    quickstart: dict[str, Any] | None = None,
) -> Path:
    """Write out/report.html, out/summary.json and out/figures/*.png; returns the page's path.

    `quickstart`: what `moma quickstart` records, {"stages": {name: {"cpu_s", "wall_s", "command"}},
    "machine": {}}. Raises ValueError for no runs, and for a page of more than 5 MB.
    """
    if not runs:
        raise ValueError("got no runs, need at least one: add run folders to runs=[...]")
    quickstart = quickstart or {}
    drawn = _draw(runs, generations, out / "figures")
    rows, etas = held_out(runs), speedups(runs)
    body = "\n".join(
        part
        for part in (
            _header(runs),
            _verdict(runs, rows),
            markup.captioned(drawn, "differences", "Held-out loss against dense", DIFFERENCES_CAPTION) if rows else "",
            _eta(runs, etas),
            markup.captioned(drawn, "loss", "Loss over training FLOPs", _loss_caption(runs)),
            _losses(runs),
            _gaps(runs),
            _pictures(runs, generations, drawn),
            _captions(generations),
            _routing(runs, drawn),
            _cost(runs),
            _budget(quickstart),
            _versions(runs, quickstart),
        )
        if part
    )
    page = markup.whole(_title(runs), body, "name fewer runs or generations", MOST_BYTES)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(_summary(runs, rows, etas), indent=1) + "\n")
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summary_lines(runs: Sequence[Run]) -> list[str]:
    """The verdict as plain lines for a console."""
    lines = [
        f"{row.variant} ({row.mode}) - dense (causal), {row.what}: {row.difference.mean:+.4f} nats; {row.verdict}"
        for row in held_out(runs)
    ]
    lines += [f"eta of {s.variant} (training loss, {s.what}): {_eta_text(s)}" for s in speedups(runs)]
    return lines


# ---- figures -------------------------------------------------------------------------------------------


def _draw(runs: Sequence[Run], generations: Sequence[Generations], folder: Path) -> dict[str, Path]:
    """Every figure that the data allow, by name."""
    palette = figures.colours(variants(runs))
    drawn = {"loss": figures.loss_curves(runs)}
    if rows := held_out(runs):
        drawn["differences"] = figures.differences(rows, palette)
    for run in _first_of_each(runs):
        found = run.eval or {}
        if found.get("maps") and routing_maps.routers(found["maps"]):
            drawn[f"shares-{run.variant}"] = figures.expert_shares(found["maps"])
            places = figures.expert_places(found["maps"])
            if places:
                drawn[f"places-{run.variant}"] = places
        if any(found.get("routing", {}).values()):
            drawn[f"routers-{run.variant}"] = figures.routers(found["routing"], palette[run.variant])
    entries = _picture_entries(generations)
    grid = figures.pictures(
        entries[:MOST_PROMPTS], palette, per_row=2 if len(generations) * _samples(entries) <= 8 else 1
    )
    if grid:
        drawn["pictures"] = grid
    paths = {}
    for name, figure in drawn.items():
        paths[name] = folder / f"{name}.png"
        figures.save(figure, paths[name], palette=name != "pictures")
    return paths


def _picture_entries(generations: Sequence[Generations]) -> list[figures.Picture]:
    """Generated pictures by prompt, over all models."""
    found: dict[str, figures.Picture] = {}
    for one in generations:
        for entry in one.entries:
            if entry["kind"] != "picture":
                continue
            prompt = str(entry["prompt"])
            real = found[prompt].real if prompt in found else None
            if real is None and entry.get("real"):
                real = _open(one.folder, entry["real"])
            known = found[prompt].generated if prompt in found else {}
            images = [_open(one.folder, name) for name in entry.get("files", [])]
            both = {**known, one.label: [*known.get(one.label, []), *images][:MOST_SAMPLES]}
            found[prompt] = figures.Picture(prompt, real, both)
    return list(found.values())


def _samples(entries: Sequence[figures.Picture]) -> int:
    return max((len(images) for entry in entries for images in entry.generated.values()), default=0)


def _open(folder: Path, name: str) -> Image.Image:
    """A PNG of a generations folder as RGB, at most 256 pixels wide; raises ValueError."""
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"got the file {name} of {folder}, need one inside that folder: run moma generate again")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.thumbnail((256, 256))
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"got an unreadable {path} ({error}), need a PNG: run moma generate again") from None


# ---- sections ------------------------------------------------------------------------------------------


def _header(runs: Sequence[Run]) -> str:
    run = runs[0]
    model, data = run.config.get("model", {}), run.config.get("data", {})
    size, unit = figures.flop_unit(max(float(r.metrics["flops"][-1]) for r in runs))
    facts = [
        f"{model.get('n_layers', '?')} layers of dimension {model.get('dim', '?')}",
        f"corpus {Path(str(data.get('corpus', '?'))).name}",
        f"{run.meta.get('meter', {}).get('tokens', 0) / 1e6:.2f} M training tokens",
        f"up to {max(float(r.metrics['flops'][-1]) for r in runs) / size:.1f} training {unit} per model",
        markup.count(len({r.seed for r in runs}), "seed"),
    ]
    return f"<header><h1>{html.escape(_title(runs))}</h1><p class=sub>{html.escape(' · '.join(facts))}</p></header>"


def _verdict(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    if not rows:
        return markup.section(
            "Verdict",
            "<p class=banner>No verdict: it needs a dense and a sparse run of the same seeds, both "
            "evaluated, the sparse one with trained auxiliary routers.</p>" + _warnings(runs),
        )
    least = min(row.difference.n for row in rows)
    if least == 1:
        banner = "One seed: no verdict on quality. The differences below are one draw each; seeds may reverse them."
    elif least < SEEDS_FOR_A_CLAIM:
        banner = f"{least} seeds: no verdict on quality, which needs {SEEDS_FOR_A_CLAIM} paired seeds."
    else:
        banner = f"{least} paired seeds: a model is called better where the 95 % t interval excludes 0."
    parts = [f"<p class=banner>{banner}</p>"]
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        body = [
            [
                row.mode,
                row.what,
                markup.number(row.baseline),
                markup.mark(markup.number(row.dense), row.lower == "dense"),
                markup.mark(markup.number(row.sparse), row.lower == variant),
                markup.signed_interval(row.difference),
                row.lower,
                row.verdict,
            ]
            for row in own
        ]
        modes = ", ".join(dict.fromkeys(row.mode for row in own))
        columns = ["routing mode", "held-out targets", "baseline", "dense (causal)", f"{variant} ({modes})"]
        parts.append(markup.table([*columns, "difference", "lower", "verdict"], body, numbers=(2, 3, 4, 5)))
    parts.append(
        "<p class=note>Cross-entropy in nats per target token on held-out documents, lower is better, means over "
        "seeds; difference = sparse − dense. All columns are causal: dense has no routers, the sparse model is scored "
        "once in every causal mode that it has (aux, aux_calibrated: auxiliary routers; threshold: moving cut-offs; "
        "causal: its own rule, dropless). Baseline: bigram for text, per-position unigram for image codes, fitted on "
        "the training split.</p>"
    )
    return markup.section("Verdict", "".join(parts) + _warnings(runs))


def _warnings(runs: Sequence[Run]) -> str:
    return "".join(f"<p class=warn>{html.escape(note)}</p>" for note in unfair(runs))


def _eta(runs: Sequence[Run], etas: Sequence[Speedup]) -> str:
    if not etas:
        return ""
    body = [
        [
            s.variant,
            s.what,
            _eta_text(s),
            markup.number(float(np.mean([one.target for one in s.per_seed]))),
            markup.signed_interval(s.gap),
        ]
        for s in etas
    ]
    head = ["model", "training loss", "η", "dense's final loss", "gap at equal FLOPs"]
    lines = SMOOTHING * min(len(curve(run, "loss").flops) for run in runs if run.is_dense)
    note = (
        "η = training FLOPs of dense to its final loss, over those of the sparse model to first reach it "
        f"(paper, section 3.1); both losses smoothed by a trailing mean over {SMOOTHING:.0%} of dense's "
        "FLOPs. Training losses, routed as in training (train): those of expert choice and depth routers see the "
        "future. Its learning rate has not decayed where the lines cross, so η is rather too low. The "
        "FLOPs of the auxiliary routers, trained afterwards, are not in it. Gap: sparse − dense in nats."
    )
    note += f" A window holds {max(lines, 1):.0f} logged lines."
    if lines < 3:
        note += " So few leave noise in the curves, and the first crossing of a noisy curve comes early."
    several = max(len(s.per_seed) for s in etas) > 1
    note += " Intervals: 95 % t interval over paired seeds, of the logarithm for η." if several else ""
    return markup.section(
        "Speed-up at equal loss", markup.table(head, body, numbers=(2, 3, 4)) + f"<p class=note>{note}</p>"
    )


DIFFERENCES_CAPTION = (
    "Held-out loss of a model in a causal routing mode minus that of the dense model with the same seeds, mean and "
    "95 % t interval over paired seeds (left of 0: lower than dense; filled: the interval excludes 0; one seed has no "
    "interval)."
)


def _loss_caption(runs: Sequence[Run]) -> str:
    seeds = markup.count(len({run.seed for run in runs}), "seed")
    return (
        f"Lines: training loss (trailing mean over {SMOOTHING:.0%} of dense's FLOPs), {seeds}. Circles: "
        "held-out during training; sparse models route as in training (train). Other markers: held-out at the end, "
        "one per causal mode, side by side. Dotted: n-gram baselines on the same held-out targets."
    )


def _losses(runs: Sequence[Run]) -> str:
    body = []
    for run in runs:
        for mode, loss in (run.eval or {}).get("loss", {}).items():
            body.append(
                [run.variant, str(run.seed[1]), _mode_name(mode, run)]
                + [markup.number(loss.get(key)) for key in HELD_OUT.values()]
                + [markup.integer(loss.get("targets"))]
            )
    if not body:
        return ""
    for name, value in next(
        (run.eval["baselines"] for run in runs if run.eval and "baselines" in run.eval), {}
    ).items():
        cells = ["", "", "", ""]
        cells[3 if name.startswith("image") else 1] = markup.number(value)
        body.append([f"baseline: {name.replace('_', ' ')}", "", "no model", *cells, ""])
    head = ["model", "seed", "routing mode", "all", "text", "text, plain", "image", "targets"]
    batches = next((run.eval["micro_batches"] for run in runs if run.eval and "micro_batches" in run.eval), None)
    note = (
        f"Nats per target token{f' over {batches} held-out micro-batches' if batches else ''}. Text, "
        "plain: without structural tokens (begin and end of image, end of document). A number that sees the future "
        "cannot be reached when generating."
    )
    return markup.section(
        "Held-out losses by routing mode", markup.table(head, body, (3, 4, 5, 6, 7)) + f"<p class=note>{note}</p>"
    )


def _gaps(runs: Sequence[Run]) -> str:
    """What every causal mode loses to the training rule."""
    body = []
    for run in runs:
        losses = (run.eval or {}).get("loss", {})
        for mode in causal_losses(run) if "train" in losses else ():
            gap = {key: losses[mode][key] - losses["train"][key] for key in LOSSES.values() if key in losses[mode]}
            signed = [f"{gap[key]:+.4f}".replace("-", "−") if key in gap else "" for key in LOSSES.values()]
            body.append([run.variant, str(run.seed[1]), _mode_name(mode, run), *signed])
    if not body:
        return ""
    note = (
        "Held-out loss of the causal mode minus that of mode train, nats per target token: the price of deciding "
        "without the future, or without capacities."
    )
    table = markup.table(["model", "seed", "routing mode", *LOSSES], body, (3, 4, 5))
    return markup.section("What causal routing costs", f"{table}<p class=note>{note}</p>{_planted(runs)}")


def _planted(runs: Sequence[Run]) -> str:
    """Losses under planted routing errors, where they were asked for."""
    body = [
        [run.variant, str(run.seed[1]), target, f"{row['sigma']:.2%}", f"{row.get('realised_rate', 0):.2%}"]
        + [markup.number(row.get(key)) for key in LOSSES.values()]
        for run in runs
        for target, rows in (run.eval or {}).get("error_injection", {}).items()
        for row in rows
    ]
    if not body:
        return ""
    head = ["model", "seed", "errors in", "rate", "realised", *LOSSES]
    note = (
        "Held-out losses when each decision of the training rule (train) is turned round with this probability; the "
        "weights stay the main router's."
    )
    return f"<h3>Planted routing errors</h3>{markup.table(head, body, (3, 4, 5, 6, 7))}<p class=note>{note}</p>"


def _mode_name(mode: str, run: Run) -> str:
    """A mode in words: what `train` and `causal` are depends on the model's rules."""
    modes = (run.eval or {}).get("loss", {})
    if mode == "causal":
        return "causal: its own rule, dropless" if "train" in modes else "causal: no routers"
    if mode == "train" and "causal" in modes:
        return "train: its own rule, with its capacity"
    return _MODES.get(mode, mode)


def _pictures(runs: Sequence[Run], generations: Sequence[Generations], drawn: dict[str, Path]) -> str:
    parts = []
    body = []
    for run in _first_of_each(runs):
        found = (run.eval or {}).get("pictures")
        for kind, name in _KINDS_OF_PICTURES.items():
            # What no model made is the same for all: it stands once.
            if found and kind in found and (kind == "generated" or not any(row[1] == name for row in body)):
                model = f"{run.variant} ({_drawn_in(run)})" if kind == "generated" else "no model"
                kid = f"{found[kind]['kid']:.4f} ± {found[kind]['se']:.4f}"
                body.append([model, name, kid, str(found.get("n", ""))])
    if body:
        network = next(
            (str(r.eval["pictures"].get("network", "?")) for r in runs if r.eval and "pictures" in r.eval),
            "?",
        )
        parts.append(markup.table(["model", "pictures", "KID (± standard error)", "n"], body, numbers=(2, 3)))
        parts.append(
            f"<p class=note>Kernel inception distance to held-out pictures on {html.escape(network)} "
            "features, lower is better. All pictures come out of the image tokenizer. Training pictures show "
            "what the best model could reach, codes drawn per position what a model without context does. "
            "Generation is causal; its routing mode stands behind the model's name.</p>"
        )
    if "pictures" in drawn:
        total = len({entry["prompt"] for one in generations for entry in one.entries if entry["kind"] == "picture"})
        which = f"First {MOST_PROMPTS} of {total} held-out names" if total > MOST_PROMPTS else "Held-out names"
        modes = ", ".join(f"{one.label}: {one.mode}" for one in generations)
        parts.append(
            markup.figure(drawn["pictures"], "real and generated pictures per name")
            + f"<figcaption>{which}; real picture, then samples, not selected. Routing modes: "
            f"{html.escape(modes)}.</figcaption>"
        )
    return markup.section("Pictures from names", "".join(parts)) if parts else ""


def _drawn_in(run: Run) -> str:
    """The mode that pictures were drawn in; older files do not say, and had `aux` alone."""
    found = run.eval or {}
    return str(found["pictures"].get("mode") or ("aux" if "train" in found.get("loss", {}) else "causal"))


def _captions(generations: Sequence[Generations]) -> str:
    by_prompt: dict[str, dict[str, list[str]]] = {}
    real: dict[str, Html] = {}
    for one in generations:
        for entry in one.entries:
            if entry["kind"] == "caption":
                prompt = str(entry["prompt"])
                by_prompt.setdefault(prompt, {}).setdefault(one.label, []).append(str(entry.get("text", "")))
                if prompt not in real and entry.get("real"):
                    real[prompt] = _inline(_open(one.folder, entry["real"]), prompt)
    if not by_prompt:
        return ""
    labels = list(dict.fromkeys(one.label for one in generations))
    modes = {one.label: one.mode for one in generations}
    body = [
        [
            real.get(prompt, ""),
            prompt,
            *("\n".join(map(_clip, texts.get(label, [])[:MOST_SAMPLES])) for label in labels),
        ]
        for prompt, texts in list(by_prompt.items())[:MOST_PROMPTS]
    ]
    note = f"First {MOST_PROMPTS} of {len(by_prompt)} held-out pictures." if len(by_prompt) > MOST_PROMPTS else ""
    head = ["picture", "true name", *(f"{label} ({modes[label]})" for label in labels)]
    return markup.section(
        "Names from pictures", f"<div class=captions>{markup.table(head, body)}</div><p class=note>{note}</p>"
    )


def _routing(runs: Sequence[Run], drawn: dict[str, Path]) -> str:
    parts = []
    for run in _first_of_each(runs):
        found, name = run.eval or {}, html.escape(run.variant)
        if f"places-{run.variant}" in drawn:
            parts.append(
                f"<h3>{name}: where in the picture image experts look</h3>"
                + markup.figure(drawn[f"places-{run.variant}"], "share of pictures per place, layer and image expert")
                + "<figcaption>Each square is the picture's grid of codes, each panel a routing mode.</figcaption>"
            )
        if f"shares-{run.variant}" in drawn:
            parts.append(
                f"<h3>{name}: how much each expert computes</h3>"
                + markup.figure(drawn[f"shares-{run.variant}"], "share of tokens per layer and expert")
                + "<figcaption>Each panel is a routing mode. Expert choice fixes every expert's load by construction "
                "(train); under causal rules it is free. Tokens that a depth router keeps from an expert "
                "count.</figcaption>"
            )
            parts.append(_top_tokens(run.variant, found["maps"]))
        parts.append(_diagnostics(run))
        if f"routers-{run.variant}" in drawn:
            parts.append(
                f"<h3>{name}: do causal rules know what the training rule would do?</h3>"
                + markup.figure(
                    drawn[f"routers-{run.variant}"], "accuracy, AUC and experts per token per layer and rule"
                )
            )
            parts.append(_router_table(found["routing"]))
    return markup.section("Routing", "".join(parts)) if any(parts) else ""


def _top_tokens(variant: str, maps: dict[str, Any]) -> str:
    """Tokens by lift, for experts that have any."""
    found = {name: router for name, router in routing_maps.routers(maps).items() if any(router["top_tokens"])}
    named = [pair for r in found.values() for pair in zip(r["columns"], r["top_tokens"], strict=True)]
    experts = list(dict.fromkeys(expert for expert, tokens in named if tokens))
    if not experts:
        return ""
    body = []
    for name, router in found.items():
        tokens = dict(zip(router["columns"], router["top_tokens"], strict=True))
        cells = []
        for expert in experts:
            chips = (
                f"<code title='lift {lift:.2f}'>{html.escape(_visible(str(token)))}</code>"
                for token, lift in tokens.get(expert, [])[:TOP_TOKENS]
            )
            cells.append(Html(" ".join(chips)))
        body.append([name, *cells])
    note = (
        "Tokens with the highest lift: their rate among the expert's tokens, over their rate among all "
        "text tokens. Routing mode train. ␣ is a space, ⏎ a line break."
    )
    head = ["router", *experts]
    return (
        f"<h3>{html.escape(variant)}: what routers of text pick</h3><div "
        f"class=tokens>{markup.table(head, body)}</div><p class=note>{note}</p>"
    )


def _diagnostics(run: Run) -> str:
    """What every router does with its tokens, in the mode of training."""
    found = (run.eval or {}).get("diagnostics", {}).get("train", {})
    similar = (run.eval or {}).get("specialisation", {})
    body = []
    for router, modalities in found.items():
        for modality, entry in modalities.items():
            groups = similar.get(router, {})
            known, chance = entry.get("token_information"), entry.get("token_information_by_chance")
            body.append(
                [router, modality, *(markup.percent(entry.get(key)) for key in ("none", "one", "several"))]
                + [markup.number(entry.get("load_entropy"), 3), markup.percent(entry.get("dropped"))]
                + [markup.number(groups.get(modality, groups.get("all")), 3)]
                + ["" if known is None else f"{known:.3f} ({chance:.3f})"]
            )
    if not body:
        return ""
    head = ["router", "tokens", "no expert", "one", "several", "load entropy", "dropped", "similarity", "token tells"]
    note = (
        "Routing mode train. Shares of the router's tokens that none, one, several of its experts compute. load "
        "entropy: over its maximum, 1 for equal loads. similarity: mean cosine similarity of the experts' weights, 1 "
        "right after upcycling. token tells: how far the token's id alone decides the choice, 0 to 1 (in brackets what "
        "chance would give)."
    )
    return (
        f"<h3>{html.escape(run.variant)}: what routers do with their tokens</h3>"
        f"{markup.table(head, body, tuple(range(2, 9)))}<p class=note>{note}</p>"
    )


def _router_table(routing: dict[str, Any]) -> str:
    names = {"training": "training routing", "free_running": "free-running"}
    keys = ("accuracy", "majority", "auc", "precision", "recall", "experts_true", "experts_predicted")
    body = [
        [router, rule, names.get(states, states), *(markup.number(entry.get(key), 3) for key in keys)]
        + [markup.percent(entry.get("tie_share"))]
        for states, routers in routing_maps.agreement(routing).items()
        for router, rules in routers.items()
        for rule, entry in rules.items()
    ]
    head = [
        "router",
        "rule",
        "states of",
        "accuracy",
        "majority",
        "AUC",
        "precision",
        "recall",
        "experts true",
        "predicted",
        "ties",
    ]
    note = (
        "Routers: 3 is that of the experts of layer 3, 3.depth its depth router. Per (token, expert) pair, against the "
        "training rule. majority: accuracy of the better constant answer. AUC: of the raw score, whose cut-offs differ "
        "between experts. training routing: the model routes by its training rule (train). free-running: it routes by "
        "the causal rule itself, and the reference is what the training rule would do on those states. experts: mean "
        "per token. ties: pairs that only the order of the tokens decides, since their score stands on both sides of "
        "the cut."
    )
    return markup.table(head, body, tuple(range(3, 11))) + f"<p class=note>{note}</p>"


def _cost(runs: Sequence[Run]) -> str:
    body = []
    for run in runs:
        found, meter = run.eval or {}, run.meta.get("meter", {})
        speed = run.column("tokens_per_second")
        rate = float(np.median(speed[np.isfinite(speed)])) if np.isfinite(speed).any() else None
        body.append(
            [
                run.variant,
                str(run.seed[1]),
                markup.scaled(found.get("params_total"), 1e6, 2),
                markup.scaled(found.get("params_active"), 1e6, 2),
                markup.scaled(found.get("flops_per_token_forward"), 1e6, 2),
                markup.scaled(found.get("flops_per_token_train"), 1e6, 2),
                markup.scaled(meter.get("tokens"), 1e6, 2),
                markup.scaled(float(run.metrics["flops"][-1]), 1e12, 1),
                markup.integer(rate),
                markup.integer(_training_seconds(run)),
            ]
        )
        if run.routers:
            extra = run.routers.meta.get("meter", {})
            spent = float(run.routers.metrics["flops"][-1])
            body.append(
                [f"{run.variant}: auxiliary routers", str(run.seed[1]), "", "", "", "",
                 markup.scaled(extra.get("tokens"), 1e6, 2), markup.scaled(spent, 1e12, 1), "",
                 markup.integer(_training_seconds(run.routers))]
            )  # fmt: skip
    head = [
        "model", "seed", "parameters, M", "active, M", "MFLOP/token forward", "MFLOP/token train", "tokens, M",
        "training TFLOP", "tokens/s", "training s",
    ]  # fmt: skip
    note = (
        "active: parameters that one token meets. Training FLOPs are forward and backward. tokens/s: "
        "median over the run, evaluation and checkpoints left out. Auxiliary routers that are trained after the "
        "model are not counted in η."
    )
    return markup.section(
        "Parameters, FLOPs, throughput", markup.table(head, body, tuple(range(2, 10))) + f"<p class=note>{note}</p>"
    )


def _training_seconds(run: Run) -> float | None:
    """Seconds of all logged windows, evaluation and checkpoints left out; None without rates."""
    tokens, rate = run.column("tokens"), run.column("tokens_per_second")
    known = np.isfinite(tokens) & (rate > 0)
    return float((np.diff(tokens[known], prepend=0) / rate[known]).sum()) if known.any() else None


def _budget(quickstart: dict[str, Any]) -> str:
    stages = quickstart.get("stages", {})
    if not stages:
        return ""
    body = [[name, markup.integer(s.get("wall_s")), markup.integer(s.get("cpu_s"))] for name, s in stages.items()]
    wall, cpu = (sum(s.get(key) or 0 for s in stages.values()) for key in ("wall_s", "cpu_s"))
    body.append([Html("<b>all</b>"), markup.integer(wall), markup.integer(cpu)])
    commands = "\n".join(str(s["command"]) for s in stages.values() if s.get("command"))
    note = "CPU time: user and system, of all threads. Each line below is one command of the study, in order."
    return markup.section(
        "Budget and exact commands",
        markup.table(["stage", "wall time, s", "CPU time, s"], body, (1, 2))
        + f"<p class=note>{note}</p><pre>{html.escape(commands)}</pre>",
    )


def _versions(runs: Sequence[Run], quickstart: dict[str, Any]) -> str:
    body = []
    for run in with_routers(runs):
        git = run.meta.get("git", {})
        commit = str(git.get("commit", "no checkout"))[:12] + ("" if git.get("clean", True) else ", changed")
        body.append(
            [run.name, markup.integer(run.meta.get("step")), commit, str(run.meta.get("torch", "?")),
             str(run.meta.get("precision", "?")), str(run.meta.get("threads", "?"))]
        )  # fmt: skip
    head = ["run", "step", "commit", "torch", "precision", "threads"]
    machine = "; ".join(f"{key}: {value}" for key, value in quickstart.get("machine", {}).items())
    note = (
        f"Report: moma {__version__}, Python {platform.python_version()}, numpy {np.__version__}, matplotlib "
        f"{matplotlib.__version__}, pillow {PIL.__version__}." + (f" Machine: {machine}." if machine else "")
    )
    details = "".join(
        f"<details><summary>configuration of {html.escape(run.name)}</summary>"
        f"<pre>{html.escape(json.dumps(run.config, indent=1))}</pre></details>"
        for run in with_routers(runs)
    )
    return markup.section(
        "Versions and configurations",
        markup.table(head, body, (1, 5)) + f"<p class=note>{html.escape(note)}</p>" + details,
    )


# ---- pieces --------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], rows: Sequence[Row], etas: Sequence[Speedup]) -> dict[str, Any]:
    """The numbers of the page for programs."""
    losses = [
        {
            "variant": row.variant,
            "mode": row.mode,
            "targets": row.what,
            "dense": row.dense,
            "sparse": row.sparse,
            "difference": row.difference._asdict(),
            "verdict": row.verdict,
        }
        for row in rows
    ]
    found = [
        {
            "variant": s.variant,
            "mode": "train",
            "targets": s.what,
            "per_seed": [one._asdict() for one in s.per_seed],
            "interval": s.interval._asdict() if s.interval else None,
            "gap": s.gap._asdict(),
        }
        for s in etas
    ]
    named = [{"run": str(run.folder), "variant": run.variant, "seed": list(run.seed)} for run in runs]
    return {"format": 1, "runs": named, "smoothing": SMOOTHING, "held_out": losses, "eta": found}


def _title(runs: Sequence[Run]) -> str:
    return "moma report: " + " and ".join(variants(runs))


def _first_of_each(runs: Sequence[Run]) -> list[Run]:
    """The first seed of every variant: figures of routing and pictures show one model."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.variant, run)
    return list(first.values())


def _eta_text(s: Speedup) -> str:
    if s.interval is None:
        reached = sum(one.value is not None for one in s.per_seed)
        return "not reached" if not reached else f"reached by {reached} of {len(s.per_seed)} seeds"
    ends = "" if s.interval.low is None else f" [{s.interval.low:.2f}, {s.interval.high:.2f}]"
    return f"{s.interval.mean:.2f}×{ends}"


def _clip(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎") or "∅"


def _inline(image: Image.Image, alt: str) -> Html:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Html(f"<img class=small alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>")
