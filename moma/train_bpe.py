"""`moma train_bpe`: train the text half of a tokenizer asset on the training documents of a corpus.

    sources --train documents only--> text x weight --byte-level BPE--> text.tiktoken + vocab.json +
    ATTRIBUTION

Merges are learned by the `tokenizers` library, which counts words on all cores (RAYON_NUM_THREADS sets how many; the
result does not depend on it), and written as tiktoken ranks over raw bytes. tiktoken merges by rank of the result
where the trainer merges by pair, so the two could in principle differ: training and held-out texts are encoded both
ways, and a difference is an error. Held-out documents are only measured, never trained on.

Sources are listed twice and never held: once to count words, once to measure an even sample of each side. What cannot
be read is skipped, counted and named, or an error with `on_error=stop`.

A name of a picture is a few words among megabytes of prose: `weights` repeats a source's documents, so that
names get tokens of their own. Refuses to overwrite an asset: a new one has a new hash and orphans every
corpus made with it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moma.data.sources import Broken, SourceConfig, attribution_text, source_of, sources_field, split_of
from moma.tokenizer.documents import Text
from moma.tokenizer.text import TextTokenizer, byte_alphabet, sound_text, word_pattern, write_ranks
from moma.tokenizer.vocab import JSON_FILE, RANKS_FILE, VOCAB_FILE, TextOptions, write_vocabulary

ATTRIBUTION = "ATTRIBUTION"
SIDES = ("train", "val")
_PLACES = 3  # of what was skipped that are named
_AT_ONCE = 256  # texts that are encoded together


@dataclass(frozen=True)
class TrainBpeConfig:
    """`out` asset folder; `text_size` tokens with the 256 bytes; `image_codes` and their grid (rows, cols).

    `digits` and `whitespace`: how text is cut into words (`moma/tokenizer/text.py`); `special_tokens`: names that get
    ids of their own and no text. `sources` and `folder` as in `prepare`; `weights`: times that a source counts
    (default 1; 0 leaves it out). About `sample_bytes` of each side of a source are measured. `on_error` skip or stop
    at a document that cannot be read.
    """

    out: str = "tokenizers/small"
    folder: str | None = None
    text_size: int = 4096
    digits: Literal["single", "triple"] = "single"
    whitespace: Literal["grouped", "single"] = "grouped"
    special_tokens: tuple[str, ...] = ()
    image_codes: int = 1024
    image_grid: tuple[int, int] = (8, 8)
    sources: dict[str, SourceConfig] = sources_field()
    weights: dict[str, int] = field(default_factory=dict)
    val_fraction: float = 0.05
    salt: str = "moma-split-1"
    sample_bytes: int = 2**24
    on_error: Literal["skip", "stop"] = "skip"
    overwrite: bool = False


@dataclass
class Listing:
    """What a source holds: bytes of text by side, what was skipped by kind, and the first places of it."""

    n_bytes: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)


def train_bpe(config: TrainBpeConfig) -> dict[str, Any]:
    """Train, check and write the text tokenizer, and print what it reaches.

    Returns `text_size`, `vocab_size`, `hash` and, per source, `train_bytes` and `val_bytes` of text read,
    `bytes_per_token`, `val_bytes_per_token` (0 for a side without text) and `skipped` by kind. Deterministic. Raises
    ValueError for a bad size, unknown sources or weights, an asset that exists already, and a document that cannot be
    read with `on_error=stop`.
    """
    _check(config)
    options = TextOptions(config.digits, config.whitespace)
    listings = {name: Listing() for name in config.sources}
    trained, ranks = _train(_weighted(config, listings), config.text_size, word_pattern(options))
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).unlink(missing_ok=True)
    write_ranks(folder / RANKS_FILE, ranks)
    vocab = write_vocabulary(
        folder,
        text_size=len(ranks),
        image_codes=config.image_codes,
        image_grid=(int(config.image_grid[0]), int(config.image_grid[1])),
        digits=config.digits,
        whitespace=config.whitespace,
        special_tokens=config.special_tokens,
    )
    tokenizer = TextTokenizer.load(folder, vocab)
    credits_ = []
    for source in config.sources.values():
        credits_ += source_of(source).attribution(source)
    title = "The text tokenizer in this folder was trained on:"
    (folder / ATTRIBUTION).write_text(attribution_text(title, credits_))
    measured = {name: _measure(config, name, listing, tokenizer, trained) for name, listing in listings.items()}
    for name, listing in listings.items():
        print(_line(name, listing, measured[name]), flush=True)
    return {
        "text_size": len(ranks),
        "vocab_size": vocab.size,
        "hash": vocab.hash,
        "train_bytes": {name: listing.n_bytes["train"] for name, listing in listings.items()},
        "val_bytes": {name: listing.n_bytes["val"] for name, listing in listings.items()},
        "bytes_per_token": {name: sides["train"] for name, sides in measured.items()},
        "val_bytes_per_token": {name: sides["val"] for name, sides in measured.items()},
        "skipped": {name: dict(listing.skipped) for name, listing in listings.items()},
    }


def _check(config: TrainBpeConfig) -> None:
    if config.text_size < 256:
        raise ValueError(f"got text_size={config.text_size}, need at least the 256 bytes: use 4096")
    if config.sample_bytes < 1:
        raise ValueError(f"got sample_bytes={config.sample_bytes}, need at least 1: use 16777216")
    if not config.sources:
        raise ValueError("got no sources, need at least one: name them, as in conf/raw/data")
    for name, weight in config.weights.items():
        if name not in config.sources:
            raise ValueError(
                f"got a weight for source {name!r}, need one of {sorted(config.sources)}: correct its name"
            )
        if weight < 0:
            raise ValueError(f"got weight {weight} for source {name!r}, need 0 or more: 0 leaves the source out")
    present = [file for file in (RANKS_FILE, JSON_FILE, VOCAB_FILE) if (Path(config.out) / file).exists()]
    if present and not config.overwrite:
        raise ValueError(
            f"got {' and '.join(present)} in {config.out} already, need an empty place: choose another "
            "out, or pass overwrite=true (every corpus and checkpoint made with it will be refused)"
        )


def _weighted(config: TrainBpeConfig, listings: dict[str, Listing]) -> Iterator[str]:
    """The training texts, as often as they count; fills in `listings`."""
    for name, listing in listings.items():
        for side, text in _texts(config, name, listing):
            listing.n_bytes[side] += len(text.encode())
            if side == "train":
                yield from [text] * config.weights.get(name, 1)


def _texts(config: TrainBpeConfig, name: str, listing: Listing | None = None) -> Iterator[tuple[str, str]]:
    """(side, text) of a source in order. Parts of a document stay apart: BPE never merges across them."""
    source = config.sources[name]
    for document in source_of(source).documents(source):
        if isinstance(document, Broken):
            if config.on_error == "stop":
                raise ValueError(
                    f"got {document.place} that cannot be read ({document.reason}), need readable documents: mend or "
                    "remove it, or pass on_error=skip"
                )
            if listing is not None:
                listing.skipped[document.kind] += 1
                if len(listing.places) < _PLACES:
                    listing.places.append(f"{document.place}: {document.reason}")
            continue
        side = split_of(document, config.val_fraction, config.salt)
        for segment in document.segments:
            for part in segment:
                if isinstance(part, Text):
                    yield side, sound_text(part.text)


def _train(texts: Iterator[str], text_size: int, pattern: str) -> tuple[Any, dict[bytes, int]]:
    """The trained `tokenizers.Tokenizer` and the same merges as ranks of raw bytes."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError("got no package 'tokenizers', need it to train: pip install tokenizers") from error

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < text_size:
        raise ValueError(
            f"got text for {tokenizer.get_vocab_size()} tokens, need text_size={text_size}: "
            "add sources, or lower text_size"
        )
    byte_of = byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    return tokenizer, ranks


def _measure(
    config: TrainBpeConfig, name: str, listing: Listing, tokenizer: TextTokenizer, trained: Any
) -> dict[str, float]:
    """Bytes per token of a source by side, over about `sample_bytes` of each."""
    every = {side: max(1, -(-listing.n_bytes[side] // config.sample_bytes)) for side in SIDES}
    n_bytes, n_tokens = Counter(), Counter()
    for side, texts in _sample(_texts(config, name), every):
        n_bytes[side] += sum(len(text.encode()) for text in texts)
        n_tokens[side] += _count_tokens(texts, tokenizer, trained)
    return {side: round(n_bytes[side] / max(1, n_tokens[side]), 3) for side in SIDES}


def _sample(texts: Iterator[tuple[str, str]], every: dict[str, int]) -> Iterator[tuple[str, list[str]]]:
    """Every k-th text of a side, k = `every[side]`, in lists of one side."""
    seen, held = Counter(), {side: [] for side in every}
    for side, text in texts:
        if seen[side] % every[side] == 0:
            held[side].append(text)
        seen[side] += 1
        if len(held[side]) == _AT_ONCE:
            yield side, held[side]
            held[side] = []
    yield from held.items()


def _count_tokens(texts: list[str], tokenizer: TextTokenizer, trained: Any) -> int:
    """Tokens of `texts`; ValueError if tiktoken and the trainer's tokenizer disagree on one."""
    start, n_tokens = tokenizer.vocab.text_start, 0
    for text, encoding in zip(texts, trained.encode_batch(texts), strict=True):
        ids = [i - start for i in tokenizer.encode(text)]
        if ids != encoding.ids:
            raise ValueError(
                f"got different tokens from tiktoken and the trainer for {text[:60]!r}, need the same: "
                "change text_size or the weights by a little"
            )
        n_tokens += len(ids)
    return n_tokens


def _line(name: str, listing: Listing, per_token: dict[str, float]) -> str:
    """What a source reached, for the terminal."""
    sides = [f"{side} {per_token[side]} bytes/token ({listing.n_bytes[side]} bytes)" for side in SIDES]
    skipped = [f"{n} {kind}" for kind, n in listing.skipped.items()]
    note = f"; skipped {', '.join(skipped)}: {' | '.join(listing.places)}" if skipped else ""
    return f"{name}: {', '.join(sides)}{note}"
