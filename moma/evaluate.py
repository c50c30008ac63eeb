"""Evaluate a run on held-out documents: losses per modality and mode, baselines, routers, maps -> eval.json.

    train             the training rule over the micro-batch: sees the future (expert choice, depth routers), or has
                      capacities (token choice, expert threshold)
    aux, aux_calibrated, threshold    the causal forms of a rule that sees the future; the first two with auxiliary
                      routers
    causal            a model whose rules are causal, dropless; a model without routers, which has no other mode

Every number names its mode. Micro-batches have the run's own shape; baselines are scored on the very same targets.
An import has neither corpus nor shape of its own: `data=...` gives it both.
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
from moma.distributed import autocast, choose_device, fast_float32
from moma.evaluation import EVALUATORS
from moma.evaluation.baselines import fit
from moma.evaluation.diagnostics import specialisation
from moma.evaluation.error_injection import check_rates, error_injection, targets
from moma.evaluation.pictures import named_pictures, unigram_codes
from moma.evaluation.runs import LoadedRun, load_run
from moma.generation.interleaved import generate
from moma.generation.kv_cache import for_decoding
from moma.model.feed_forward import Mode
from moma.model.flops import parts_of, totals
from moma.model.transformer import Transformer
from moma.run import DataConfig, require_held_out, validation_batches
from moma.tokenizer.image import ImageTokenizer
from moma.tokenizer.text import TextTokenizer
from moma.vqgan.metrics import PictureFeatures, kernel_distance, picture_features

ROWS = 256  # pictures drawn at once
MIN_PICTURES = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """`run`: a run folder; `data`: for an import alone; `batches`: held-out micro-batches (null: all); `out`: null
    writes RUN/eval.json."""

    run: Path
    corpus: Path | None = None  # null: the run's own
    data: DataConfig | None = None
    batches: int | None = 24
    pictures: int = 0  # held-out names to draw, for the distance of generated pictures from real ones
    error_rates: tuple[float, ...] = ()  # of planted routing errors; empty: none are planted
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"got batches={self.batches}, need at least 1, or null for the whole split")
        if self.pictures and self.pictures < MIN_PICTURES:
            raise ValueError(f"got pictures={self.pictures}, need 0 (none) or at least {MIN_PICTURES} for a distance")
        check_rates(self.error_rates)


def main(composed: Composed) -> int:
    """`moma evaluate run=RUN`: writes eval.json and prints it as a short table."""
    config: EvaluateConfig = composed.config
    device = choose_device(config.device)
    run = load_run(config.run, device)
    data = data_of(run, config.data)
    corpus = config.corpus or data.corpus
    require_held_out(corpus, run.vocab)
    artist = Artist(run, corpus, config.pictures, device) if config.pictures else None
    with fast_float32(device):
        result = evaluate(run, data, corpus, config.batches, device, config.error_rates)
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


def modes_of(model: Transformer) -> dict[str, Mode]:
    """The modes to score a model in, by the names that its numbers carry; the causal one to generate in comes first
    after `train`. See the module docstring."""
    if not model.routers():
        return {"causal": "train"}  # the modes are all the same
    if not model.needs_future:
        return {"train": "train", "causal": "threshold"}
    modes: tuple[Mode, ...] = ("train", *model.causal_modes())
    return {mode: mode for mode in modes}


def data_of(run: LoadedRun, given: DataConfig | None) -> DataConfig:
    """Corpus and shape of the micro-batches: the run's own, or those given for an import; ValueError for both or
    none."""
    own = run.meta["config"].get("data")
    if own and given:
        raise ValueError(
            f"got data=... for {run.run_dir}, need the run's own micro-batches, which are part of the model: leave "
            "data out, give corpus=... for other documents"
        )
    if not own and not given:
        raise ValueError(
            f"got {run.run_dir}, an import without micro-batches of its own, need their shape and a corpus: add "
            "data=emoji, or data=... and data.corpus=..."
        )
    return given or build(DataConfig, own, "data")


def evaluate(
    run: LoadedRun,
    data: DataConfig,
    corpus: Path,
    limit: int | None,
    device: torch.device,
    error_rates: tuple[float, ...] = (),
) -> dict[str, Any]:
    """Everything `eval.json` holds; see the module docstring. Raises ValueError for `error_rates` without routers."""
    config: dict[str, Any] = run.meta["config"]
    vocab, model = run.vocab, run.model
    if error_rates and not targets(model):
        raise ValueError(
            f"got error_rates={list(error_rates)} for {run.run_dir}, which has no routers, need a sparse run: leave "
            "error_rates out"
        )

    def batches() -> Iterator[Batch]:
        return validation_batches(corpus, vocab, data, limit, device)

    table = totals(parts_of(model, data.row_length, data.modality_shares(vocab)))
    with autocast(run.precision, device):
        found = {
            name: {shown: evaluator(model, batches(), vocab, mode) for shown, mode in modes_of(model).items()}
            for name, evaluator in EVALUATORS.items()
        }
        errors = {
            target: error_injection(model, batches(), vocab, error_rates, 0, target)
            for target in (targets(model) if error_rates else [])
        }
    loss, routing = found.pop("perplexity"), found.pop("routing")
    result = {
        "run": str(run.run_dir),
        "model": config["model"],
        "feed_forward": config["feed_forward"],
        "attention": config["attention"],
        "depth": config["depth"],
        "step": run.step,
        "tokens": run.meta["meter"]["tokens"],
        "flops": run.meta["meter"]["flops"],
        "corpus": str(corpus),
        "split": "val",
        "micro_batches": sum(1 for _ in batches()),
        "precision": run.precision,
        **table,
        "loss": loss,
        "gap": gaps(loss),
        "baselines": baselines(corpus, run, batches()),
    }
    if model.routers():
        result["maps"] = _maps(run, {mode: own["maps"] for mode, own in routing.items()})
        result["diagnostics"] = {mode: own["diagnostics"] for mode, own in routing.items()}
        result["specialisation"] = specialisation(model)
    if model.needs_future:
        result["routing"] = _states({mode: own["agreement"] for mode, own in routing.items()})
    if errors:
        result["error_injection"] = errors
    return result | found  # evaluators of one's own: metrics per mode


def gaps(loss: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What each causal mode loses: its losses minus those of `train`, nats; {} where there is one mode alone."""
    train = loss.get("train", {})
    names = [name for name in train if name.startswith("loss")]
    return {m: {name: own[name] - train[name] for name in names} for m, own in loss.items() if names and m != "train"}


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

    Everything that may be missing (image tokenizer, feature weights, enough pairs) is refused when it is built, before
    any work. All pictures come out of the tokenizer's decoder, so its own loss of detail counts for nobody. The mode
    is the first causal one that the run has.
    """

    def __init__(self, run: LoadedRun, corpus: Path, n: int, device: torch.device) -> None:
        self.run, self.n, self.device = run, n, device
        self.shown: str  # the name of the mode in what is written
        self.mode: Mode
        self.shown, self.mode = next((n, mode) for n, mode in modes_of(run.model).items() if n != "train")
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
        with autocast(self.run.precision, self.device):
            model = for_decoding(self.run.model)  # once for all batches
            for start in range(0, self.n, ROWS):
                part = prompts[start : start + ROWS]
                made = generate(
                    model, part, vocab, mode=self.mode, max_new_tokens=vocab.tokens_per_image + 1,
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
        found: dict[str, Any] = {"network": "efficientnet-lite0", "mode": self.shown, "n": self.n}
        found["n_real"] = len(self.held)
        for name, codes in sets.items():
            value, error = kernel_distance(self.features(codes), real)
            found[name] = {"kid": value, "se": error}
        return found


def _maps(run: LoadedRun, by_mode: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The maps of every mode, per router, with names for modalities and tokens."""
    text = TextTokenizer.load(run.tokenizer, run.vocab)
    routers = {}
    for name, first in by_mode["train"].items():
        routers[name] = {field: first[field] for field in ("columns", "expected")}
        for field in ("share", "image_position", "score"):
            routers[name][field] = {mode: found[name][field] for mode, found in by_mode.items()}
        routers[name]["top_tokens"] = [
            [[_token_name(int(i), run, text), lift] for i, lift in column] for column in first["top_tokens"]
        ]
    return {"modalities": list(run.vocab.modalities), "grid": list(run.vocab.image_grid), "routers": routers}


def _states(agreement: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Agreement by kind of states, router and causal rule."""
    free = {
        router: {mode: found[router][mode] for mode, found in agreement.items() if mode != "train"}
        for router in agreement["train"]
    }
    return {"training": agreement["train"], "free_running": free}


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
    """Losses per mode beside the baselines, and how well the causal rules know the training rule, per router."""
    print(f"{result['run']}, step {result['step']}: {result['micro_batches']} held-out micro-batches, nats per target")
    for mode, loss in result["loss"].items():
        gap = result["gap"].get(mode)
        behind = f"  ({gap['loss']:+.4f} to train)" if gap else ""
        print(
            f"  {mode:14} text {loss['loss_text']:.4f}  image {loss['loss_image']:.4f}  all {loss['loss']:.4f}{behind}"
        )
    if found := result.get("pictures"):
        parts = [f"{name} {found[name]['kid']:.4f} +- {found[name]['se']:.4f}" for name in ("generated", "unigram")]
        print(f"  distance of pictures from held-out ones ({found['network']} KID): {', '.join(parts)}")
    found = result["baselines"]
    print(
        f"  baseline text {found['text_bigram']:.4f} (bigram)  image {found['image_position_unigram']:.4f} "
        f"(unigram per position)"
    )
    for states, routers in result.get("routing", {}).items():
        for router, rules in routers.items():
            for rule, r in rules.items():
                experts = f"per token {r['experts_true']:.3f} true {r['experts_predicted']:.3f} predicted"
                area = "" if r["auc"] is None else f", AUC {r['auc']:.3f}"
                accuracy = f"accuracy {r['accuracy']:.3f} (majority {r['majority']:.3f}){area}"
                print(f"  router {router} {rule} on {states} states: {accuracy}, {experts}")
    for target, rows in result.get("error_injection", {}).items():
        for row in rows:
            print(f"  errors {row['sigma']:.2%} in {target}: all {row['loss']:.4f} (train)")
