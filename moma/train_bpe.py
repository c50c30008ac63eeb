"""`moma train_bpe`: train the text half of a tokenizer asset on the training documents of a corpus.

    sources --train documents only--> text x weight --byte-level BPE--> text.tiktoken + vocab.json +
    ATTRIBUTION

Merges are learned by the `tokenizers` library and written as tiktoken ranks over raw bytes. tiktoken merges
by rank of the result where the trainer merges by pair, so the two could in principle differ: every training
and held-out text is encoded both ways, and a difference is an error. Held-out documents are only measured,
never trained on.

A name of a picture is a few words among megabytes of prose: `weights` repeats a source's documents, so that
names get tokens of their own. Refuses to overwrite an asset: a new one has a new hash and orphans every
corpus made with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moma.data.sources import SourceConfig, attribution_text, source_of, sources_field, split_of
from moma.tokenizer.documents import Text
from moma.tokenizer.text import PATTERN, RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import VOCAB_FILE, write_vocabulary

ATTRIBUTION = "ATTRIBUTION"


@dataclass(frozen=True)
class TrainBpeConfig:
    """`out` asset folder; `text_size` tokens with the 256 bytes; `image_codes` and their grid (rows, cols).

    `sources` and `folder` as in `prepare`; `weights`: times that a source counts (default 1; 0 leaves it out).
    """

    out: str = "tokenizers/small"
    folder: str | None = None
    text_size: int = 4096
    image_codes: int = 1024
    image_grid: tuple[int, int] = (8, 8)
    sources: dict[str, SourceConfig] = sources_field()
    weights: dict[str, int] = field(default_factory=dict)
    val_fraction: float = 0.05
    salt: str = "moma-split-1"
    overwrite: bool = False


def train_bpe(config: TrainBpeConfig) -> dict[str, Any]:
    """Train, check and write the text tokenizer.

    Returns `text_size`, `vocab_size`, `hash` and, per source, `bytes_per_token` and `val_bytes_per_token`.
    Deterministic. Raises ValueError for a bad size, unknown sources or weights, and an asset that exists
    already.
    """
    _check(config)
    texts = {name: _texts(config, name) for name in config.sources}
    repeated = (
        text for name, (train, _) in texts.items() for _ in range(config.weights.get(name, 1)) for text in train
    )
    trained, ranks = _train(repeated, config.text_size)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / RANKS_FILE, ranks)
    grid = (int(config.image_grid[0]), int(config.image_grid[1]))
    vocab = write_vocabulary(folder, text_size=len(ranks), image_codes=config.image_codes, image_grid=grid)
    tokenizer = TextTokenizer(ranks, vocab)
    credits_ = []
    for source in config.sources.values():
        credits_ += source_of(source).attribution(source)
    title = "The text tokenizer in this folder was trained on:"
    (folder / ATTRIBUTION).write_text(attribution_text(title, credits_))
    return {
        "text_size": len(ranks),
        "vocab_size": vocab.size,
        "hash": vocab.hash,
        "bytes_per_token": {name: _measure(train, tokenizer, trained) for name, (train, _) in texts.items()},
        "val_bytes_per_token": {name: _measure(val, tokenizer, trained) for name, (_, val) in texts.items()},
    }


def _check(config: TrainBpeConfig) -> None:
    if config.text_size < 256:
        raise ValueError(f"got text_size={config.text_size}, need at least the 256 bytes: use 4096")
    if not config.sources:
        raise ValueError("got no sources, need at least one: name them, as in conf/raw/data")
    for name in config.weights:
        if name not in config.sources:
            raise ValueError(
                f"got a weight for source {name!r}, need one of {sorted(config.sources)}: correct its name"
            )
    present = [file for file in (RANKS_FILE, VOCAB_FILE) if (Path(config.out) / file).exists()]
    if present and not config.overwrite:
        raise ValueError(
            f"got {' and '.join(present)} in {config.out} already, need an empty place: choose another "
            "out, or pass overwrite=true (every corpus and checkpoint made with it will be refused)"
        )


def _texts(config: TrainBpeConfig, name: str) -> tuple[list[str], list[str]]:
    """The texts of a source's documents: train, val. Segments stay apart: BPE never merges across them."""
    source = config.sources[name]
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for document in source_of(source).documents(source):
        sides[split_of(document, config.val_fraction, config.salt)].extend(
            part.text for segment in document.segments for part in segment if isinstance(part, Text)
        )
    return sides["train"], sides["val"]


def _train(texts: Iterator[str], text_size: int) -> tuple[Any, dict[bytes, int]]:
    """The trained `tokenizers.Tokenizer` and the same merges as ranks of raw bytes."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError("got no package 'tokenizers', need it to train: pip install tokenizers") from error

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
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
    byte_of = _byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    return tokenizer, ranks


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's printable byte alphabet: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _measure(texts: list[str], tokenizer: TextTokenizer, trained: Any) -> float:
    """Bytes per token; ValueError if tiktoken and the trainer's tokenizer disagree on a text."""
    n_bytes = n_tokens = 0
    start = tokenizer.vocab.text_start
    for text, encoding in zip(texts, trained.encode_batch(texts), strict=True):
        ids = [i - start for i in tokenizer.encode(text)]
        if ids != encoding.ids:
            raise ValueError(
                f"got different tokens from tiktoken and the trainer for {text[:60]!r}, need the same: "
                "change text_size or the weights by a little"
            )
        n_bytes += len(text.encode())
        n_tokens += len(ids)
    return round(n_bytes / max(1, n_tokens), 3)
