"""Evaluate a run on held-out documents: losses per modality and mode, baselines, routers, maps -> eval.json.

Modes: models with routers are scored in `train` mode (expert choice over the micro-batch: sees the future) and, once
their auxiliary routers are trained, in `aux` mode (causal); models without routers are causal as they are. Every
number names its mode. Micro-batches have the run's own shape; baselines are scored on the very same targets.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moma.config import Composed
from moma.data.shards import open_corpus
from moma.evaluation import perplexity, routing
from moma.evaluation.baselines import fit
from moma.evaluation.maps import expert_names, routing_maps
from moma.evaluation.runs import LoadedRun, load_run
from moma.model.feed_forward import SparseFeedForward
from moma.model.flops import parts_of, totals
from moma.tokenizer.text import TextTokenizer
from moma.train import DataConfig, autocast, validation_batches


@dataclass(frozen=True)
class EvaluateConfig:
    """`run`: a run folder; `batches`: held-out micro-batches (null: all); `out`: null writes RUN/eval.json."""

    run: Path
    corpus: Path | None = None  # null: the run's own
    batches: int | None = 24
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None


def main(composed: Composed) -> int:
    """`moma evaluate run=RUN`: writes eval.json and prints it as a short table."""
    config: EvaluateConfig = composed.config
    run = load_run(config.run, config.device)
    result = evaluate(run, config.corpus, config.batches)
    out = config.out or config.run / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(out)
    print_table(result)
    print(f"wrote {out}")
    return 0


def evaluate(run: LoadedRun, corpus: Path | None, limit: int | None) -> dict[str, Any]:
    """Everything `eval.json` holds; see the module docstring."""
    data: DataConfig = run.config.data
    corpus = corpus or data.corpus
    vocab, model = run.vocab, run.model
    batches: Callable[[], Any] = lambda: validation_batches(corpus, vocab, data.shape, limit, run.device)  # noqa: E731
    layer = model.blocks[0].feed_forward
    routed = isinstance(layer, SparseFeedForward) and layer.n_routed > 0
    has_aux = routed and len(layer.aux) > 0  # type: ignore[union-attr, arg-type]
    modes = {"train": "train"} | ({"aux": "aux"} if has_aux else {}) if routed else {"causal": "train"}
    table = totals(parts_of(model, data.row_length, data.modality_shares(vocab)))
    with autocast(run.precision, run.device):
        losses = {name: perplexity(model, batches(), vocab, mode) for name, mode in modes.items()}  # type: ignore[arg-type]
        result = {
            "run": str(run.folder),
            "model": run.choices("model"),
            "feed_forward": run.choices("feed_forward"),
            "step": run.meta["step"],
            "tokens": run.meta["meter"]["tokens"],
            "flops": run.meta["meter"]["flops"],
            "corpus": str(corpus),
            "split": "val",
            "micro_batches": sum(1 for _ in batches()),
            "precision": run.precision,
            **table,
            "loss": losses,
            "baselines": baselines(corpus, run, batches()),
        }
        if routed:
            result["maps"] = _maps(run, batches, modes)
        if has_aux:
            result["routing"] = {
                "training": routing(model, batches(), vocab, "train"),
                "free_running": routing(model, batches(), vocab, "aux"),
            }
    return result


def baselines(corpus: Path, run: LoadedRun, batches: Any) -> dict[str, float]:
    """Nats per target of the n-grams fitted on the whole training split, on the targets of `batches`."""
    sources = open_corpus(corpus, "train", run.vocab.hash)
    documents = [
        source.read(doc, 0, int(source.document_tokens[doc]))
        for source in sources.values()
        for doc in range(source.n_documents)
    ]
    fitted = fit(np.concatenate(documents).astype(np.int64), run.vocab)
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        scored = fitted.score(batch.tokens_RL.cpu().numpy(), batch.target_RL.cpu().numpy())
        for name, pair in scored.items():
            sums[name] = sums.get(name, np.zeros(2)) + np.array(pair)
    return {name: float(total / max(count, 1)) for name, (total, count) in sums.items()}


def _maps(run: LoadedRun, batches: Callable[[], Any], modes: dict[str, str]) -> dict[str, Any]:
    layer = run.model.blocks[0].feed_forward
    assert isinstance(layer, SparseFeedForward)
    by_mode = {name: routing_maps(run.model, batches(), run.vocab, mode) for name, mode in modes.items()}  # type: ignore[arg-type]
    text = TextTokenizer.load(run.tokenizer, run.vocab)
    names = expert_names(layer.group_sizes, run.vocab.modalities)
    maps: dict[str, Any] = {"experts": names, "modalities": list(run.vocab.modalities)}
    for field in ("share", "image_position", "score"):
        maps[field] = {name: found[field] for name, found in by_mode.items()}
    maps["grid"] = list(run.vocab.image_grid)
    maps["top_tokens"] = [
        [[[_token_name(int(i), run, text), lift] for i, lift in expert] for expert in found]
        for found in by_mode["train"]["top_tokens"]
    ]
    return maps


def _token_name(token: int, run: LoadedRun, text: TextTokenizer) -> str:
    vocab = run.vocab
    special = {
        vocab.bos: "<bos>",
        vocab.eos: "<eos>",
        vocab.boi: "<boi>",
        vocab.eoi: "<eoi>",
        vocab.pad: "<pad>",
    }
    return special.get(token) or text.decode([token])


def print_table(result: dict[str, Any]) -> None:
    """Losses per mode beside the baselines, and the auxiliary routers per layer."""
    print(f"{result['run']}: {result['micro_batches']} held-out micro-batches, nats per target")
    for mode, loss in result["loss"].items():
        print(f"  {mode:8} text {loss['loss_text']:.4f}  image {loss['loss_image']:.4f}  all {loss['loss']:.4f}")
    found = result["baselines"]
    print(
        f"  baseline text {found['text_bigram']:.4f} (bigram)  image {found['image_position_unigram']:.4f} "
        f"(unigram per position)"
    )
    for states, layers in result.get("routing", {}).items():
        for number, r in enumerate(layers):
            experts = f"experts per token {r['experts_true']:.3f} true {r['experts_predicted']:.3f} predicted"
            accuracy = f"accuracy {r['accuracy']:.3f} (majority {r['majority']:.3f}), AUC {r['auc']:.3f}"
            print(f"  router {number} on {states:12} states: {accuracy}, {experts}")
