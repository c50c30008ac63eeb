"""What does an uneven share of images cost? Part 1 simulates stragglers, part 2 measures training on two processes.

    table     seconds of one feed-forward layer, forward and backward, against images in the micro-batch: one thread
    simulate  slowest rank / mean rank over W ranks, from the table and the corpus's plan, and from FLOPs; the bound
              that static shapes need, and how many shapes there are to compile
    costs     CPU seconds of a whole model (without its loss head), forward and backward, for micro-batches that follow
              each other in the plan: one thread; and slowest / mean of W of them
    measure   tokens/s of `moma train` on two processes, balanced and not, in turn
    figure    figure.png from results/

Parts that have their results are not run again: remove results/NAME.json to repeat one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moma import train
from moma.config import compose
from moma.data.batch import build_batch
from moma.data.plan import Plan, PlanShape
from moma.data.shards import open_corpus
from moma.distributed import process_group
from moma.modality import exact_groups, padded_groups
from moma.model.attention import document_mask
from moma.model.feed_forward import DenseConfig, SparseConfig, build_feed_forward
from moma.model.transformer import Architecture, ModelConfig, build_model
from moma.tokenizer.vocab import asset_folder, load_vocabulary

HERE = Path(__file__).resolve().parent / "results"
MICRO_BATCHES, RANKS, SHARES = 8192, (2, 4, 8, 16, 32, 64, 128, 256), 9
KINDS = ("dense again", "moe_1t1i", "moe_4t4i", "moe_4t4i padded")  # the first is the control: it knows no images
LAYERS = {
    "dense": DenseConfig(),
    "moe_1t1i": SparseConfig({"text": 1, "image": 1}),
    "moe_4t4i": SparseConfig({"text": 4, "image": 4}),
}


def plans(arguments: argparse.Namespace) -> dict:
    """Images per micro-batch, and pairs of tokens in one document and row (what attention that skips computes)."""
    vocab = load_vocabulary(asset_folder(arguments.tokenizer))
    sources = open_corpus(arguments.corpus, "train", vocab.hash)
    out = {}
    for rows, length in arguments.shapes:
        shape = PlanShape(rows, length, rows * length // arguments.tokens_per_image)
        for balance in (True, False):
            images, pairs = [], []
            for (batch, _), _ in zip(
                Plan(sources, shape, 0, balance=balance).run(), range(MICRO_BATCHES), strict=False
            ):
                images.append(batch.images)
                pairs.append(sum(piece.tokens**2 for row in batch.rows for piece in row))
            out[f"{rows}x{length} {'balanced' if balance else 'unbalanced'}"] = {
                "shape": f"{rows}x{length}", "images": images, "pairs": pairs, "tokens": rows * length,
                "codes": vocab.tokens_per_image, "vocabulary": vocab.size,
            }  # fmt: skip
    return out


def table(arguments: argparse.Namespace) -> dict:
    """CPU seconds of a layer by images; the kinds take turns, `over_dense` are ratios to the dense one beside."""
    vocab = load_vocabulary(asset_folder(arguments.tokenizer))
    layers, records = {}, []
    for name, config in LAYERS.items():
        layers[name] = build_feed_forward(config, 0, 1, arguments.dim, arguments.hidden, vocab.modalities, False)
        init_weights(layers[name])
    planned = plans(arguments)
    for rows, length in arguments.shapes:
        own = planned[f"{rows}x{length} unbalanced"]
        if own["tokens"] > arguments.table_tokens:
            continue
        tokens, codes, images = own["tokens"], own["codes"], own["images"]
        cases = []
        for count in sorted({round(n) for n in np.linspace(min(images), max(images), SHARES)}):
            ids = some_ids(tokens - count * codes, count * codes, vocab)
            exact, padded = exact_groups(ids, vocab), padded_groups(ids, torch.ones_like(ids, dtype=torch.bool), vocab)
            cases += [(name, name, count, tokens, exact) for name in LAYERS]
            cases.append(("moe_4t4i padded", "moe_4t4i", count, tokens, padded))
            cases.append(("dense again", "dense", count, tokens, exact))
        # static shapes: every group computes its bound
        text, image = tokens - min(images) * codes, max(images) * codes
        cases.append(
            ("moe_4t4i static", "moe_4t4i", None, text + image, exact_groups(some_ids(text, image, vocab), vocab))
        )
        seconds: dict[int, list[float]] = {}
        for _ in range(arguments.repetitions + 1):  # the first makes what the matmuls keep by shape
            for number, (_, layer, _, size, groups) in enumerate(cases):
                seconds.setdefault(number, []).append(once(layers[layer], size, groups, arguments))
        for number, (kind, _, count, size, _) in enumerate(cases):
            beside = max(n for n in range(number + 1) if cases[n][0] == "dense")
            ratios = [own / dense for own, dense in zip(seconds[number][1:], seconds[beside][1:], strict=True)]
            records.append(
                {"shape": own["shape"], "kind": kind, "images": count, "tokens": size, "first_s": seconds[number][0],
                 "median_s": statistics.median(seconds[number][1:]), "over_dense": spread(ratios)}
            )  # fmt: skip
    facts = {name: getattr(arguments, name) for name in ("dim", "hidden", "precision", "repetitions")}
    return facts | {"threads": torch.get_num_threads(), "torch": torch.__version__, "records": records}


def init_weights(layer: torch.nn.Module) -> None:
    """Any numbers do: time does not depend on them."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)


def some_ids(text: int, image: int, vocab) -> torch.Tensor:  # noqa: ANN001
    """Token ids of `text` and `image` tokens, in runs of a picture's length, as documents have them."""
    ids = torch.full((text + image,), vocab.text_start)
    places = torch.arange(text + image)[: image // vocab.tokens_per_image * vocab.tokens_per_image]
    ids[places] = vocab.image_start
    return ids


def once(layer: torch.nn.Module, tokens: int, groups, arguments: argparse.Namespace) -> float:  # noqa: ANN001
    """CPU seconds of one forward and backward: others use this machine too."""
    x_TD = torch.randn(tokens, arguments.dim, requires_grad=True)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
        y_TD, _ = layer(x_TD, groups, "train")
    y_TD.backward(x_TD.detach().to(y_TD.dtype))
    return time.process_time() - start


def simulate(arguments: argparse.Namespace) -> dict:
    """Mean over steps of slowest / mean rank, every rank one micro-batch of the plan."""
    planned = plans(arguments)
    timed = json.loads((HERE / "table.json").read_text())["records"]
    out = {}
    for name, own in planned.items():
        images, pairs = np.array(own["images"]), np.array(own["pairs"], float)
        record = {
            "images_mean": float(images.mean()), "images_std": float(images.std()),
            "micro_batches_by_images": {str(n): own["images"].count(n) for n in sorted(set(own["images"]))},
            "shapes_in_1000": len(set(images[:1000].tolist())),
        }  # fmt: skip
        for quantile in (0.99, 1.0):  # of either modality; beyond it tokens would be dropped
            image = np.quantile(images, quantile) * own["codes"]
            text = own["tokens"] - np.quantile(images, 1 - quantile) * own["codes"]
            record[f"static_slots_per_token_{quantile:.2f}"] = float((image + text) / own["tokens"])
        # a layer's forward, d = 512: matmuls 24 d^2 a token, causal attention inside documents 2 d len^2 a document; an
        # eighth of the head; the feed-forward's part is the same for every mix
        fixed = own["tokens"] * (24 * 512**2 + 2 * 512 * own["vocabulary"] / 8)
        record["step_flops"] = {w: straggler(fixed + 2 * 512 * pairs, w) for w in RANKS}
        record["attention_flops"] = {w: straggler(pairs, w) for w in RANKS}
        for kind in KINDS:
            rows = [r for r in timed if (r["shape"], r["kind"]) == (own["shape"], kind)]
            if rows:
                counts, costs = np.array(sorted((r["images"], r["over_dense"]["median"]) for r in rows)).T
                record[kind] = {
                    "mean_over_dense": float(np.interp(images, counts, costs).mean()),
                    "most_over_least": float(costs.max() / costs.min()),
                    "slowest_over_mean": {w: straggler(np.interp(images, counts, costs), w) for w in RANKS},
                }
        static = [r for r in timed if (r["shape"], r["kind"]) == (own["shape"], "moe_4t4i static")]
        if static:
            record["moe_4t4i static"] = {"mean_over_dense": static[0]["over_dense"]["median"]}
        out[name] = record
    return out


def costs(arguments: argparse.Namespace) -> dict:
    """The fastest of three; plans and models take turns, so that what else the machine does hits them alike."""
    vocab = load_vocabulary(asset_folder(arguments.tokenizer))
    sources = dict(open_corpus(arguments.corpus, "train", vocab.hash))
    rows, length = arguments.shapes[0]
    shape = PlanShape(rows, length, rows * length // arguments.tokens_per_image)
    size = ModelConfig(dim=arguments.dim, n_layers=2, n_heads=4, hidden_dim=arguments.hidden)
    models = {name: build_model(Architecture(size, config), vocab.size, vocab.modalities, seed=0)
              for name, config in LAYERS.items()}  # fmt: skip
    batches = {}
    for balance in (True, False):
        planned = zip(Plan(sources, shape, 0, balance=balance).run(), range(100 * arguments.batches), strict=False)
        every = (batch for (batch, _), number in planned if number % 100 == 0)  # neighbours are alike
        batches[balance] = [build_batch(batch, sources, shape, vocab) for batch in every]
    seconds = {(name, balance): [float("inf")] * arguments.batches for name in models for balance in (True, False)}
    for _ in range(3):
        for number in range(arguments.batches):
            for (name, balance), least in seconds.items():
                taken = pass_through(models[name], batches[balance][number], arguments)
                least[number] = min(least[number], taken)
    out = []
    draw = np.random.default_rng(0)
    for (name, balance), taken in seconds.items():
        images = [int((b.tokens_RL == vocab.boi).sum()) for b in batches[balance]]
        drawn = {w: draw.choice(taken, (4000, w)) for w in RANKS[:4]}
        out.append({"model": name, "balance": balance, "median_s": statistics.median(taken),
                    "slowest_over_mean": {w: float((d.max(1) / d.mean(1)).mean()) for w, d in drawn.items()},
                    "correlation_with_images": None if balance else float(np.corrcoef(images, taken)[0, 1]),
                    "images": images, "seconds": taken})  # fmt: skip
    return {"shape": f"{rows}x{length}", "dim": arguments.dim, "n_layers": 2, "runs": out}


def pass_through(model: torch.nn.Module, batch, arguments: argparse.Namespace) -> float:  # noqa: ANN001
    """CPU seconds of forward and backward, without the loss head, which is the same for every mix."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
        mask = document_mask(batch.document_RL)
        hidden_RLD, _ = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, "train")
    hidden_RLD.backward(torch.ones_like(hidden_RLD))
    model.zero_grad(set_to_none=True)
    return time.process_time() - start


def straggler(costs: np.ndarray, ranks: int) -> float:
    """Mean of slowest / mean over steps of `ranks` micro-batches that follow each other."""
    steps = costs[: len(costs) // ranks * ranks].reshape(-1, ranks)
    return float((steps.max(1) / steps.mean(1)).mean())


def measure(arguments: argparse.Namespace) -> dict:
    """Tokens/s of two processes with a thread each, all runs in one process group; a run's first window is left out."""
    runs = [
        (feed_forward, balance, repetition)
        for repetition in range(arguments.runs)
        for feed_forward in ("dense", "moe_4t4i")
        for balance in ((True, False) if repetition % 2 == 0 else (False, True))
    ]
    found = []
    with tempfile.TemporaryDirectory() as made:
        commands = [
            [
                *(
                    f"data={arguments.train_data}",
                    f"feed_forward={feed_forward}",
                    f"data.balance={str(balance).lower()}",
                ),
                *("data.accumulation=2", "parallel.threads=1", "parallel.compile=off", "eval.interval=null"),
                *("log.interval=5", "checkpoint.interval.percent=100", f"duration.steps={arguments.steps}"),
                *(f"run_dir={made}/{number}", *arguments.overrides),
            ]
            for number, (feed_forward, balance, _) in enumerate(runs)
        ]
        (Path(made) / "commands.json").write_text(json.dumps(commands))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([*launcher, __file__, "worker", "--commands", f"{made}/commands.json"], check=True)
        for number, (feed_forward, balance, repetition) in enumerate(runs):
            lines = (Path(made) / str(number) / "metrics.jsonl").read_text().splitlines()
            rates = [json.loads(line)["tokens_per_second"] for line in lines][1:]
            found.append({"feed_forward": feed_forward, "balance": balance, "repetition": repetition,
                          "tokens_per_second": statistics.median(rates), "windows": rates})  # fmt: skip
    summary = {}
    for feed_forward in ("dense", "moe_4t4i"):
        own = {
            balance: [
                f["tokens_per_second"] for f in found if (f["feed_forward"], f["balance"]) == (feed_forward, balance)
            ]
            for balance in (True, False)
        }
        summary[feed_forward] = {
            "balanced": spread(own[True]), "unbalanced": spread(own[False]),
            "unbalanced_over_balanced": spread([u / b for b, u in zip(own[True], own[False], strict=True)]),
        }  # fmt: skip
    return {"overrides": arguments.overrides, "steps": arguments.steps, "summary": summary, "runs": found}


def worker(arguments: argparse.Namespace) -> None:
    """One of the two processes: the trainings one after the other."""
    with process_group("cpu"):
        for command in json.loads(arguments.commands.read_text()):
            train.main(compose("train", command))


def spread(values: list[float]) -> dict:
    """Median, lowest, highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def figure(arguments: argparse.Namespace) -> None:
    """Three panels: seconds by images, slowest over mean by ranks, images per micro-batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed, simulated = (json.loads((HERE / f"{name}.json").read_text()) for name in ("table", "simulate"))
    shape = timed["records"][-1]["shape"]
    made, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 5))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncol": 2, "fontsize": 8, "frameon": False}
    names = {"dense again": "dense, measured again (noise)", "moe_4t4i padded": "moe_4t4i, padded form"}
    for balance, colour in (("unbalanced", "tab:red"), ("balanced", "tab:blue")):
        found = simulated[f"{shape} {balance}"]["micro_batches_by_images"]
        shares = [n / MICRO_BATCHES for n in found.values()]
        left.bar([int(n) for n in found], shares, color=colour, alpha=0.6, label=balance)
    left.set(
        xlabel=f"images in a micro-batch of {shape} tokens", ylabel="share of micro-batches", title="what a rank gets"
    )
    left.legend(**below)
    for kind in KINDS:
        own = [r for r in timed["records"] if (r["shape"], r["kind"]) == (shape, kind)]
        own.sort(key=lambda r: r["images"])
        costs = [r["over_dense"]["median"] for r in own]
        errors = [[abs(r["over_dense"][end] - r["over_dense"]["median"]) for r in own] for end in ("low", "high")]
        middle.errorbar([r["images"] for r in own], costs, yerr=errors, capsize=2, label=names.get(kind, kind))
        ranks = simulated[f"{shape} unbalanced"][kind]["slowest_over_mean"]
        right.plot([int(w) for w in ranks], list(ranks.values()), marker="o", label=names.get(kind, kind))
    static = simulated[f"{shape} unbalanced"]["moe_4t4i static"]["mean_over_dense"]
    middle.axhline(static, color="black", linestyle=":", label="moe_4t4i, static shapes at the bound")
    middle.set(xlabel="images in the micro-batch", ylabel="CPU time / that of a dense layer", ylim=(0, None))
    middle.set_title("one layer, one thread")
    middle.legend(**below)
    for balance, style in (("unbalanced", "--"), ("balanced", ":")):
        ranks = simulated[f"{shape} {balance}"]["step_flops"]
        right.plot(
            [int(w) for w in ranks], list(ranks.values()), style, color="black", label=f"FLOPs of a step, {balance}"
        )
    right.set_xscale("log", base=2)
    right.set(
        xlabel="ranks", ylabel="slowest rank / mean rank", title="simulated: one layer unbalanced; FLOPs of a step"
    )
    right.legend(**below)
    made.tight_layout()
    made.savefig(HERE.parent / "figure.png", dpi=110)


def shape_of(text: str) -> tuple[int, int]:
    """ "4x1024" as rows and row length."""
    rows, length = text.split("x")
    return int(rows), int(length)


def main() -> None:
    """Run the parts named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"table": table, "simulate": simulate, "costs": costs, "measure": measure, "figure": figure}
    parser.add_argument("parts", nargs="*", choices=[[], *parts, "worker"], help="default: all")
    parser.add_argument("--commands", type=Path, help="of `worker`, which `measure` starts")
    parser.add_argument("--corpus", type=Path, default=Path("corpora/openstax256"))
    parser.add_argument("--tokenizer", default="openstax16k")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[(1, 1024), (4, 1024), (4, 4096)])
    parser.add_argument("--table-tokens", type=int, default=4096, help="no table of larger micro-batches")
    parser.add_argument("--tokens-per-image", type=int, default=512, help="one image in as many tokens, on average")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=704)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--batches", type=int, default=24, help="in part `costs`")
    parser.add_argument("--train-data", default="emoji")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--overrides", nargs="*", default=[], help="of `moma train` in part `measure`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.parts == ["worker"]:
        return worker(arguments)
    HERE.mkdir(exist_ok=True)
    for name in arguments.parts or parts:
        start, path = time.perf_counter(), HERE / f"{name}.json"
        if name == "figure":
            figure(arguments)
        elif not path.exists():
            path.write_text(json.dumps(parts[name](arguments)) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
