"""Held-out pictures with their names, and the baseline that drawn ones must beat.

The distance of drawn from real pictures is `kernel_distance` of `moma/vqgan/metrics.py`; the baseline is
`unigram_codes`: each position's code drawn by itself.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moma.data.shards import ShardedSource
from moma.modality import Vocabulary
from moma.tokenizer.documents import Picture, Text, decode_document
from moma.tokenizer.text import TextTokenizer


class NamedPicture(NamedTuple):
    """A picture's codes, int64 (tokens per image,), 0 .. n - 1, and the text that stands with it."""

    name: str
    codes: np.ndarray


def unigram_codes(train_codes: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Codes int64 (n, positions) drawn from the frequencies of `train_codes` (k, positions), each position alone."""
    k, positions = train_codes.shape
    rows = np.random.default_rng(seed).integers(k, size=(n, positions))
    return train_codes[rows, np.arange(positions)].astype(np.int64)


def named_pictures(
    sources: Mapping[str, ShardedSource], text: TextTokenizer, vocab: Vocabulary, seed: int | None = None
) -> Iterator[NamedPicture]:
    """Every document of one picture and one text, in the corpus' order or shuffled by `seed`."""
    places = [(name, doc) for name, s in sources.items() for doc in np.flatnonzero(s.document_images == 1)]
    if seed is not None:
        places = [places[i] for i in np.random.default_rng(seed).permutation(len(places))]
    for name, doc in places:
        source = sources[name]
        parts = decode_document(source.read(int(doc), 0, int(source.document_tokens[doc])), text, vocab)
        words = [part.text.strip() for part in parts if isinstance(part, Text)]
        codes = [part.content for part in parts if isinstance(part, Picture)]
        if len(words) == 1 and words[0] and isinstance(codes[0], np.ndarray):
            yield NamedPicture(words[0], codes[0])
