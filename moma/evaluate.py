"""Evaluate a run on held-out documents: losses per modality and mode, baselines, routers, maps -> eval.json.

Modes: models with routers are scored in `train` mode (expert choice over the micro-batch: sees the future) and, once
their auxiliary routers are trained, in `aux` mode (causal); models without routers are causal as they are. Every
number names its mode. Micro-batches have the run's own shape; baselines are scored on the very same targets.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moma.config import Composed, build
from moma.data.batch import Batch
from moma.data.shards import open_corpus
from moma.distributed import autocast, choose_device
from moma.evaluation import perplexity, routing
from moma.evaluation.baselines import fit
from moma.evaluation.maps import expert_names, routing_maps
from moma.evaluation.pictures import (
    PictureFeatures,
    kernel_distance,
    named_pictures,
    picture_features,
    unigram_codes,
)
from moma.evaluation.runs import LoadedRun, load_run
from moma.generation.interleaved import generate
from moma.model.feed_forward import SparseFeedForward
from moma.model.flops import parts_of, totals
from moma.tokenizer.image import ImageTokenizer
from moma.tokenizer.text import TextTokenizer
from moma.train import DataConfig, validation_batches

ROWS = 256  # pictures drawn at once
MIN_PICTURES = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """`run`: a run folder; `batches`: held-out micro-batches (null: all); `out`: null writes RUN/eval.json."""

    run: Path
    corpus: Path | None = None  # null: the run's own
    batches: int | None = 24
    pictures: int = 0  # held-out names to draw, for the distance of generated pictures from real ones
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.pictures and self.pictures < MIN_PICTURES:
            raise ValueError(f"got pictures={self.pictures}, need 0 (none) or at least {MIN_PICTURES} for a distance")


def main(composed: Composed) -> int:
    """`moma evaluate run=RUN`: writes eval.json and prints it as a short table."""
    config: EvaluateConfig = composed.config
    device = choose_device(config.device)
    run = load_run(config.run, device)
    result = evaluate(run, config.corpus, config.batches, device)
    if config.pictures:
        result["pictures"] = picture_distances(run, config.corpus or run.corpus, config.pictures, device)
    out = config.out or config.run / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(out)
    print_table(result)
    print(f"wrote {out}")
    return 0


def evaluate(run: LoadedRun, corpus: Path | None, limit: int | None, device: torch.device) -> dict[str, Any]:
    """Everything `eval.json` holds; see the module docstring."""
    config: dict[str, Any] = run.meta["config"]
    data: DataConfig = build(DataConfig, config["data"], "data")
    corpus = corpus or run.corpus
    vocab, model = run.vocab, run.model

    def batches() -> Iterator[Batch]:
        return validation_batches(corpus, vocab, data.shape, limit, device)

    layer = model.blocks[0].feed_forward
    routed = isinstance(layer, SparseFeedForward) and layer.n_routed > 0
    has_aux = routed and len(layer.aux) > 0  # type: ignore[union-attr, arg-type]
    modes = {"train": "train"} | ({"aux": "aux"} if has_aux else {}) if routed else {"causal": "train"}
    table = totals(parts_of(model, data.row_length, data.modality_shares(vocab)))
    with autocast(run.precision, device):
        losses = {name: perplexity(model, batches(), vocab, mode) for name, mode in modes.items()}  # type: ignore[arg-type]
        result = {
            "run": str(run.run_dir),
            "model": config["model"],
            "feed_forward": config["feed_forward"],
            "step": run.step,
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


def baselines(corpus: Path, run: LoadedRun, batches: Iterator[Batch]) -> dict[str, float]:
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


def picture_distances(run: LoadedRun, corpus: Path, n: int, device: torch.device) -> dict[str, Any]:
    """Kernel distance of `n` pictures drawn for held-out names (the model's own distribution, causal mode) from the
    held-out pictures, beside pictures of per-position unigram codes and training pictures.

    All pictures come out of the tokenizer's decoder, so its own loss of detail counts for nobody.
    """
    vocab, text = run.vocab, TextTokenizer.load(run.tokenizer, run.vocab)
    image, network = ImageTokenizer.load(run.tokenizer, device), PictureFeatures()
    held = list(named_pictures(open_corpus(corpus, "val", vocab.hash), text, vocab, seed=0))
    if len(held) < n:
        raise ValueError(f"got pictures={n}, need at most the {len(held)} held-out pairs of {corpus}: lower it")
    train = named_pictures(open_corpus(corpus, "train", vocab.hash), text, vocab, seed=0)
    train_codes = np.stack([pair.codes for pair in train])
    prompts = [[vocab.bos, *text.encode(pair.name), vocab.boi] for pair in held[:n]]
    limit = vocab.tokens_per_image + 1
    with autocast(run.precision, device):
        drawn = [
            g
            for start in range(0, n, ROWS)
            for g in generate(
                run.model, prompts[start : start + ROWS], vocab,
                mode="aux", max_new_tokens=limit, pictures=False, rows=range(start, min(n, start + ROWS)),
            )
        ]  # fmt: skip
    generated = np.array([g.tokens[: vocab.tokens_per_image] for g in drawn]) - vocab.image_start

    def features(codes: np.ndarray) -> np.ndarray:
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in image.decode(codes)])
        return picture_features(pixels, network, device=device)

    real = features(np.stack([pair.codes for pair in held]))
    sets = {
        "generated": generated,
        "unigram": unigram_codes(train_codes, n, seed=0),
        "training": train_codes[:n],
    }
    found: dict[str, Any] = {"network": "efficientnet-lite0", "n": n, "n_real": len(held)}
    for name, codes in sets.items():
        value, error = kernel_distance(features(codes), real)
        found[name] = {"kid": value, "se": error}
    return found


def _maps(run: LoadedRun, batches: Callable[[], Iterator[Batch]], modes: dict[str, str]) -> dict[str, Any]:
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
    print(f"{result['run']}, step {result['step']}: {result['micro_batches']} held-out micro-batches, nats per target")
    for mode, loss in result["loss"].items():
        print(f"  {mode:8} text {loss['loss_text']:.4f}  image {loss['loss_image']:.4f}  all {loss['loss']:.4f}")
    if found := result.get("pictures"):
        parts = [f"{name} {found[name]['kid']:.4f} +- {found[name]['se']:.4f}" for name in ("generated", "unigram")]
        print(f"  distance of pictures from held-out ones ({found['network']} KID): {', '.join(parts)}")
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
