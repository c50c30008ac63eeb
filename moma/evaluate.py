"""Evaluate a run on held-out documents: losses per modality and mode, baselines, routers, maps -> eval.json.

Modes: models with routers are scored in `train` mode (expert choice over the micro-batch: sees the future) and, once
their auxiliary routers are trained, in `aux` mode (causal); models without routers are causal as they are. Every
number names its mode. Micro-batches have the run's own shape; baselines are scored on the very same targets.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moma.config import Composed, build
from moma.data.batch import Batch
from moma.data.shards import open_corpus
from moma.distributed import autocast, choose_device
from moma.evaluation import EVALUATORS
from moma.evaluation.baselines import fit
from moma.evaluation.maps import expert_names
from moma.evaluation.pictures import (
    PictureFeatures,
    kernel_distance,
    named_pictures,
    picture_features,
    unigram_codes,
)
from moma.evaluation.runs import LoadedRun, load_run
from moma.generation.interleaved import causal_mode, generate
from moma.model.feed_forward import Mode, SparseFeedForward
from moma.model.flops import parts_of, totals
from moma.tokenizer.image import ImageTokenizer
from moma.tokenizer.text import TextTokenizer
from moma.train import DataConfig, require_held_out, validation_batches

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
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"got batches={self.batches}, need at least 1, or null for the whole split")
        if self.pictures and self.pictures < MIN_PICTURES:
            raise ValueError(f"got pictures={self.pictures}, need 0 (none) or at least {MIN_PICTURES} for a distance")


def main(composed: Composed) -> int:
    """`moma evaluate run=RUN`: writes eval.json and prints it as a short table."""
    config: EvaluateConfig = composed.config
    device = choose_device(config.device)
    run = load_run(config.run, device)
    corpus = config.corpus or run.corpus
    require_held_out(corpus, run.vocab)
    artist = Artist(run, corpus, config.pictures, device) if config.pictures else None
    result = evaluate(run, corpus, config.batches, device)
    if artist is not None:
        result["pictures"] = artist.distances()
    out = config.out or config.run / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(out)
    print_table(result)
    print(f"wrote {out}")
    return 0


def evaluate(run: LoadedRun, corpus: Path, limit: int | None, device: torch.device) -> dict[str, Any]:
    """Everything `eval.json` holds; see the module docstring."""
    config: dict[str, Any] = run.meta["config"]
    data: DataConfig = build(DataConfig, config["data"], "data")
    vocab, model = run.vocab, run.model

    def batches() -> Iterator[Batch]:
        return validation_batches(corpus, vocab, data, limit, device)

    layer = model.blocks[0].feed_forward
    routed = layer if isinstance(layer, SparseFeedForward) and layer.n_routed else None
    has_aux = routed is not None and len(routed.aux) > 0
    modes: dict[str, Mode] = {"causal": "train"} if routed is None else {"train": "train"}
    modes |= {"aux": "aux"} if has_aux else {}
    table = totals(parts_of(model, data.row_length, data.modality_shares(vocab)))
    with autocast(run.precision, device):
        found = {
            name: {shown: evaluator(model, batches(), vocab, mode) for shown, mode in modes.items()}
            for name, evaluator in EVALUATORS.items()
        }
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
            "loss": found.pop("perplexity"),
            "baselines": baselines(corpus, run, batches()),
        }
    maps, routing = found.pop("maps"), found.pop("routing")
    if routed is not None:
        result["maps"] = _maps(run, routed, maps)
    if has_aux:
        result["routing"] = {"training": routing["train"], "free_running": routing["aux"]}
    result |= found  # evaluators of one's own: metrics per mode
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


class Artist:
    """Draws `n` pictures for held-out names and measures their distance from the held-out pictures.

    Everything that may be missing (image tokenizer, feature weights, causal routers, enough pairs) is refused when it
    is built, before any work. All pictures come out of the tokenizer's decoder, so its own loss of detail counts for
    nobody.
    """

    def __init__(self, run: LoadedRun, corpus: Path, n: int, device: torch.device) -> None:
        self.run, self.n, self.device = run, n, device
        self.mode: Mode = causal_mode(run.model, "aux")
        self.text = TextTokenizer.load(run.tokenizer, run.vocab)
        self.image, self.network = ImageTokenizer.load(run.tokenizer, device), PictureFeatures()
        held, train = (open_corpus(corpus, split, run.vocab.hash) for split in ("val", "train"))
        self.held = list(named_pictures(held, self.text, run.vocab, seed=0))
        if len(self.held) < n:
            raise ValueError(
                f"got pictures={n}, need at most the {len(self.held)} held-out pairs of {corpus}: lower it"
            )
        self.train_codes = np.stack([pair.codes for pair in named_pictures(train, self.text, run.vocab, seed=0)])

    def draw(self) -> np.ndarray:
        """Codes (n, tokens per image) from the model's own distribution, in a causal mode."""
        vocab, codes = self.run.vocab, []
        prompts = [[vocab.bos, *self.text.encode(pair.name), vocab.boi] for pair in self.held[: self.n]]
        for start in range(0, self.n, ROWS):
            part = prompts[start : start + ROWS]
            with autocast(self.run.precision, self.device):
                made = generate(
                    self.run.model, part, vocab, mode=self.mode, max_new_tokens=vocab.tokens_per_image + 1,
                    pictures=False, rows=range(start, start + len(part)),
                )  # fmt: skip
            codes += [row.tokens[: vocab.tokens_per_image] for row in made]
        return np.array(codes) - vocab.image_start

    def features(self, codes: np.ndarray) -> np.ndarray:
        """Features (n, 1280) of decoded pictures."""
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in self.image.decode(codes)])
        return picture_features(pixels, self.network, device=self.device)

    def distances(self) -> dict[str, Any]:
        """Kernel distance and its standard error of generated, per-position unigram and training pictures."""
        real = self.features(np.stack([pair.codes for pair in self.held]))
        sets = {
            "generated": self.draw(),
            "unigram": unigram_codes(self.train_codes, self.n, seed=0),
            "training": self.train_codes[: self.n],
        }
        found: dict[str, Any] = {"network": "efficientnet-lite0", "n": self.n, "n_real": len(self.held)}
        for name, codes in sets.items():
            value, error = kernel_distance(self.features(codes), real)
            found[name] = {"kid": value, "se": error}
        return found


def _maps(run: LoadedRun, layer: SparseFeedForward, by_mode: dict[str, Any]) -> dict[str, Any]:
    """The maps of every mode with names for experts, modalities and tokens."""
    text = TextTokenizer.load(run.tokenizer, run.vocab)
    names = expert_names(layer.group_sizes, run.vocab.modalities)
    maps: dict[str, Any] = {"experts": names, "modalities": list(run.vocab.modalities)}
    for field in ("share", "image_position", "score"):
        maps[field] = {mode: found[field] for mode, found in by_mode.items()}
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
