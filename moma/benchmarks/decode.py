"""Tokens one after the other, batch 1, greedy: our cached generation against transformers' `generate`.

    text     `prompt_tokens` of text, then `new_tokens` of text        head rows of text ids
    image    a prompt that begins a picture, then its codes            head rows of image codes

One repetition is a whole call: prompt, caches and all. Sparse variants run in the causal mode `threshold`, their
cut-offs set by one micro-batch. The library draws no pictures: image mode is compared with its text.

What bounds batch 1 is reading the weights: every one that a mean token runs through, and the head rows of its mode,
once per new token; the share of the read ceiling says how near that is. Keys and values are left out (they are few).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from moma.benchmarks.config import DTYPES, BenchConfig, architecture
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.peers import HF, Entry, built
from moma.benchmarks.peers_model import chameleon, peer_continued
from moma.benchmarks.timing import Absent, Bench, Case, Goal
from moma.distributed import ParallelConfig, autocast, choose_precision, compiles
from moma.generation.interleaved import Generation, generate
from moma.generation.sampling import GREEDY
from moma.modality import Vocabulary
from moma.model.flops import parts_of, totals
from moma.model.transformer import Transformer, build_model
from moma.objectives import run_model

PEER = "transformers Chameleon generate"
TEXT, IMAGE = "text", "image"
ATTEMPTS = 8  # prompts, until the continuation does not end early


def run(config: BenchConfig, device: torch.device) -> Bench:
    """Both modes of every variant (text of the first one is the baseline), and the library's generation."""
    precision = choose_precision(config.precision, device)
    vocab = picture_of(vocabulary(config.vocab_size), config.new_tokens)
    cases, models, absent = [], {}, []
    first, dense = config.variants[0], None
    for variant in config.variants:
        model = build(config, variant, device)
        dense = model if variant == "dense" else dense
        models[variant] = {mode: bytes_per_token(model, vocab, mode, precision) for mode in (TEXT, IMAGE)}
        for mode in (TEXT, IMAGE):
            moved = models[variant][mode] * config.new_tokens
            cases.append(_case(f"{variant}, {mode}", config, model, vocab, mode, precision, moved))
    again = build(config, first, device)
    moved = models[first][TEXT] * config.new_tokens
    twin = _case(f"{first}, {TEXT} again", config, again, vocab, TEXT, precision, moved)
    if config.peers:
        dense = dense or build(config, "dense", device)
        peer = built(PEER, Entry(_peer, HF), dense, vocab, config.prompt_tokens + config.new_tokens, precision)
        if isinstance(peer, Absent):
            absent.append(peer)
        else:
            ways: list[tuple[str, str | None, bool]] = [("", None, False), (", static cache", "static", False)]
            if compiles(ParallelConfig("cuda" if device.type == "cuda" else "cpu", config.compile), device):
                ways.append((", static cache, compiled", "static", True))
            for suffix, cache, compiled in ways:
                cases.append(_peer_case(f"{PEER}{suffix}", config, peer, vocab, cache, compiled))
    facts = {
        "size": config.size,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "bytes_per_token": models,
    }
    return Bench(cases, f"{first}, {TEXT}", twin, absent, facts, goals(config, device.type))


def picture_of(vocab: Vocabulary, new_tokens: int) -> Vocabulary:
    """The vocabulary with pictures of one code less than `new_tokens`, so that these are a whole one and its end."""
    if new_tokens < 2:
        raise ValueError(f"got new_tokens={new_tokens}, need a picture's code and its end: at least 2")
    return replace(vocab, image_grid=(1, new_tokens - 1))


def build(config: BenchConfig, variant: str, device: torch.device) -> Transformer:
    """A model of fp32 parameters whose cut-offs are those of one micro-batch."""
    model = build_model(
        architecture(config, variant), config.vocab_size, ("text", "image"), seed=config.seed, device=device
    )
    if model.routers():
        side, n_images = images_of(1, config.row_length, config.image_share)
        vocab = vocabulary(config.vocab_size, side)
        batch = micro_batch(vocab, 1, config.row_length, n_images, seed=config.seed).to(device)
        with torch.no_grad():
            _, stats = run_model(model, batch, 1.0)
        model.update_routing({router: seen.observed for router, seen in stats.items()})
    return model.eval()


def bytes_per_token(model: Transformer, vocab: Vocabulary, mode: str, precision: str) -> float:
    """Bytes of the weights that a new token reads, in the compute type: nominal experts, head rows of the mode."""
    with torch.device("meta"):
        outline = Transformer(model.architecture, model.vocab_size)
    found = totals(parts_of(outline, 1, (1.0, 0.0) if mode == TEXT else (0.0, 1.0)))
    image = vocab.image_stop - vocab.image_start
    rows = image if mode == IMAGE else vocab.text_stop - vocab.text_start + 2  # EOS, BOI
    inner = found["params_active"] - 2 * model.vocab_size * model.config.dim
    return (inner + rows * model.config.dim) * DTYPES[precision].itemsize


def prompt_of(vocab: Vocabulary, length: int, mode: str, seed: int) -> list[int]:
    """BOS and random text, `length` tokens; in image mode the last one begins a picture."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(vocab.text_start, vocab.text_stop, (length,), generator=source).tolist()
    return [vocab.bos, *words[: length - 2], vocab.boi if mode == IMAGE else words[-1]]


def continued(model: Transformer, vocab: Vocabulary, prompt: list[int], new_tokens: int, precision: str) -> Generation:
    """What our generation makes of a prompt: the most likely tokens, no picture that the prompt has not begun."""
    with autocast(precision, model.embedding.weight.device):
        (made,) = generate(
            model, [prompt], vocab,
            mode="threshold", max_new_tokens=new_tokens, text=GREEDY, picture=GREEDY, pictures=False,
        )  # fmt: skip
    return made


def _case(
    name: str, config: BenchConfig, model: Transformer, vocab: Vocabulary, mode: str, precision: str, moved: float
) -> Case:
    new_tokens = config.new_tokens

    def attempt(prompt: list[int]) -> Generation:
        return continued(model, vocab, prompt, new_tokens, precision)

    prompt = _long_enough(attempt, config, vocab, mode)
    return Case(name, lambda: attempt(prompt), bytes=moved, tokens=new_tokens, ceiling="read")


def _long_enough(
    attempt: Callable[[list[int]], Generation], config: BenchConfig, vocab: Vocabulary, mode: str
) -> list[int]:
    """The first prompt that is continued by all of the tokens."""
    for number in range(ATTEMPTS):
        prompt = prompt_of(vocab, config.prompt_tokens, mode, config.seed + number)
        if len(attempt(prompt).tokens) == config.new_tokens:
            return prompt
    raise ValueError(
        f"got continuations that end before new_tokens={config.new_tokens} for {ATTEMPTS} prompts, need one that does "
        "not: set fewer, or another seed"
    )


# ---- the peer -------------------------------------------------------------------------------------------------------


def _peer(model: Transformer, vocab: Vocabulary, positions: int, precision: str) -> nn.Module:
    return chameleon(model, vocab, positions, masks_images=True).to(DTYPES[precision]).eval()


def _peer_case(
    name: str, config: BenchConfig, peer: nn.Module, vocab: Vocabulary, cache: str | None, compiled: bool
) -> Case:
    prompt = prompt_of(vocab, config.prompt_tokens, TEXT, config.seed)

    def attempt() -> list[int]:
        return peer_continued(peer, vocab, prompt, config.new_tokens, cache, compiled)

    size = next(peer.parameters()).element_size()
    read = sum(p.numel() for n, p in peer.named_parameters() if p.requires_grad and "embed_tokens" not in n)
    moved, count = float(size * read * config.new_tokens), config.new_tokens
    note = "text, parameters in the compute type; reads every row of the head"
    return Case(name, attempt, False, None, None, moved, count, note, None, "read")


# ---- goals ----------------------------------------------------------------------------------------------------------


def goals(config: BenchConfig, device: str) -> list[Goal]:
    """What is to hold on a CPU or on a GPU."""
    if not {"dense"} & set(config.variants):
        return []
    static = f"{PEER}, static cache"
    if device == "cpu":
        found = []
        for mode, bound in ((TEXT, 1.2), (IMAGE, 1.8)):
            for peer in (PEER, static):
                words = f"{mode}: times as fast as {peer}"
                found.append(Goal("P4", words, bound, f"dense, {mode}", peer, at_least=True))
        return found
    sparse = "moe_4t4i, text"
    return [
        Goal("H12", "share of the read bandwidth", 0.6, sparse, None, "ceiling", at_least=True),
        Goal("H12", f"times as fast as {PEER}", 3.0, sparse, PEER, at_least=True),
        Goal("H12", f"times as fast as {static}, compiled", 1.2, sparse, f"{static}, compiled", at_least=True),
    ]
