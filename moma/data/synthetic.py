"""A tiny made-up corpus with its tokenizer: for tests and benches, never for a claim.

    pair   BOS BOI [c_0 .. c_{n-1}] EOI name EOS, or the name first       codes are a noisy function of the name
    text   BOS words EOS                                                  words of a fixed list, in random order

Needs no download and no image tokenizer: the asset has byte-level text and codes without a decoder.
"""

from pathlib import Path

import numpy as np

from moma.data.shards import source_record, write_manifest, write_shards
from moma.modality import Vocabulary
from moma.tokenizer.documents import Document, Picture, Text, encode_document
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import write_vocabulary

WORDS = "sun moon star rain snow wind leaf stone river cloud bird fish wolf bear oak pine".split()


def write_synthetic(
    folder: Path,
    *,
    pairs: int = 200,
    texts: int = 100,
    image_codes: int = 32,
    grid: tuple[int, int] = (4, 4),
    text_size: int = 256,
    seed: int = 0,
) -> tuple[Path, Path, Vocabulary]:
    """Write `folder`/tokenizer and `folder`/corpus (val: a quarter of train); returns both and the vocabulary.

    `text_size`: text tokens, the bytes and then pairs of bytes, at most 256 + 256^2.
    """
    tokenizer, corpus = folder / "tokenizer", folder / "corpus"
    tokenizer.mkdir(parents=True)
    pairs_of_bytes = {bytes(divmod(n, 256)): 256 + n for n in range(text_size - 256)}
    write_ranks(tokenizer / RANKS_FILE, {bytes([b]): b for b in range(256)} | pairs_of_bytes)
    vocab = write_vocabulary(tokenizer, text_size=text_size, image_codes=image_codes, image_grid=grid)
    text = TextTokenizer.load(tokenizer, vocab)
    splits = {}
    for number, (split, share) in enumerate((("train", 1.0), ("val", 0.25))):
        rng = np.random.default_rng([seed, number])
        sources = {
            "pair": ("pair", [_pair(rng, text, vocab) for _ in range(int(pairs * share))]),
            "text": ("text", [_text(rng, text, vocab) for _ in range(int(texts * share))]),
        }
        splits[split] = {
            name: source_record(kind, write_shards(corpus / split / name, documents, 4096, "uint16"))
            for name, (kind, documents) in sources.items()
        }
    write_manifest(
        corpus,
        {
            "name": "synthetic",
            "vocab_hash": vocab.hash,
            "tokenizer": "synthetic",
            "token_dtype": "uint16",
            "splits": splits,
        },
    )
    return tokenizer, corpus, vocab


def _pair(rng: np.random.Generator, text: TextTokenizer, vocab: Vocabulary) -> Document:
    word = int(rng.integers(len(WORDS)))
    n_codes = vocab.image_stop - vocab.image_start
    codes = (word * 7 + np.arange(vocab.tokens_per_image) * (word + 1)) % n_codes
    noisy = np.where(rng.random(codes.shape) < 0.1, rng.integers(n_codes, size=codes.shape), codes)
    parts = [Picture(noisy.reshape(vocab.image_grid)), Text(WORDS[word])]
    return encode_document([parts if rng.random() < 0.5 else parts[::-1]], text, vocab)


def _text(rng: np.random.Generator, text: TextTokenizer, vocab: Vocabulary) -> Document:
    words = rng.choice(WORDS, size=int(rng.integers(3, 30)))
    return encode_document([Text(" ".join(words))], text, vocab)
