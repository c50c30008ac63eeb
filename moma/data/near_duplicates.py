"""Training documents that show what is held out: near pictures by dHash, near texts by MinHash.

    picture  8 rows of 9 grey values, bit = "brighter than its right neighbour" -> 64 bits; near: few bits differ
    text     words -> runs of 5 -> 128 least hashes of the set; equal share ~ |A & B| / |A | B|; near: a large share

A picture is taken as the image tokenizer sees it: square and small. Near pictures are found by blocks: two of 64
bits that differ in d bits agree in one of d + 1 blocks at least, so a look-up costs d + 1 binary searches. Near
texts are found by 32 bands of 4 hashes: of those that share 0.8 of their runs, one in 10^7 is missed.

dHash knows no colour, and little of flat drawings (a plain square of any colour is 64 times "not brighter"): for
photographs and diagrams it is apt, for icons it drops many. Pictures that come as codes, and texts of fewer than 5
words, are not compared.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

BITS = 64
HASHES = 128
_BANDS = 32
_WORDS = 5  # in a run
_AT_ONCE = 2048  # runs whose hashes are in memory at once
_WORD = re.compile(r"\w+")


class Sketches(NamedTuple):
    """What is kept of documents: picture hashes uint64 (n,), text hashes uint32 (m, HASHES), places of both."""

    pictures: np.ndarray
    picture_places: list[str]
    texts: np.ndarray
    text_places: list[str]


class Found(NamedTuple):
    """The held-out twin of a document: its place, and how near it is."""

    place: str
    reason: str


def picture_hash(pixels: np.ndarray) -> int:
    """dHash of a picture uint8 (s, s, 3): 64 bits."""
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    values = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(values[:, :-1] > values[:, 1:]).tobytes(), "big")


def text_hashes(text: str) -> np.ndarray | None:
    """MinHash uint32 (HASHES,) of a text's runs of 5 words, case and punctuation aside; None if it has fewer."""
    words = _WORD.findall(text.lower())
    if len(words) < _WORDS:
        return None
    numbers = {word: _number(word) for word in set(words)}
    line = np.array([numbers[word] for word in words], np.uint64)
    runs = np.zeros(len(words) - _WORDS + 1, np.uint64)
    for i in range(_WORDS):
        runs = _mix(runs + line[i : len(line) - _WORDS + 1 + i])
    least = np.full(HASHES, 2**32 - 1, np.uint64)
    for start in range(0, len(runs), _AT_ONCE):
        hashes = (runs[start : start + _AT_ONCE, None] * _FACTORS + _SHIFTS) >> np.uint64(32)
        least = np.minimum(least, hashes.min(0))
    return least.astype(np.uint32)


def sketches(pictures: Sequence[tuple[int, str]], texts: Sequence[tuple[np.ndarray, str]]) -> Sketches:
    """Hashes with their places, as arrays."""
    return Sketches(
        np.array([hash_ for hash_, _ in pictures], np.uint64),
        [place for _, place in pictures],
        np.array([hashes for hashes, _ in texts], np.uint32).reshape(-1, HASHES),
        [place for _, place in texts],
    )


def joined(several: Sequence[Sketches]) -> Sketches:
    """All sketches, in order."""
    return Sketches(
        np.concatenate([np.zeros(0, np.uint64), *(each.pictures for each in several)]),
        [place for each in several for place in each.picture_places],
        np.concatenate([np.zeros((0, HASHES), np.uint32), *(each.texts for each in several)]),
        [place for each in several for place in each.text_places],
    )


def packed(held: Sketches) -> bytes:
    """Sketches as the bytes of an .npz file without pickles."""
    buffer = io.BytesIO()
    places = _bytes(held.picture_places), _bytes(held.text_places)
    np.savez(buffer, pictures=held.pictures, texts=held.texts, picture_places=places[0], text_places=places[1])
    return buffer.getvalue()


def unpacked(path: Path) -> Sketches:
    """The sketches that `packed` wrote to a file."""
    with np.load(path, allow_pickle=False) as stored:
        pictures, texts = stored["pictures"], stored["texts"]
        names = [json.loads(stored[name].tobytes()) for name in ("picture_places", "text_places")]
    return Sketches(pictures, names[0], texts, names[1])


class HeldOut:
    """Look-up of near twins; a picture is near within `bits` differing bits, a text from `overlap` on.

    Of several twins the first in the order of the sketches is found.
    """

    def __init__(self, held: Sketches, bits: int, overlap: float) -> None:
        self._held, self._bits, self._overlap = held, bits, overlap
        edges = np.linspace(0, BITS, bits + 2).astype(int)
        self._blocks = [
            (np.uint64(start), np.uint64((1 << int(stop - start)) - 1))
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        self._pictures = [_ordered((held.pictures >> shift) & mask) for shift, mask in self._blocks]
        self._texts = [_ordered(keys) for keys in _bands(held.texts).T]

    def picture(self, hash_: int) -> Found | None:
        """The first held-out picture near to one with this hash."""
        value = np.uint64(hash_)
        for i in _candidates(self._pictures, [(value >> shift) & mask for shift, mask in self._blocks]):
            differ = (int(self._held.pictures[i]) ^ hash_).bit_count()
            if differ <= self._bits:
                place = self._held.picture_places[i]
                return Found(place, f"{differ} of {BITS} bits differ from held-out picture {place}")
        return None

    def text(self, hashes: np.ndarray) -> Found | None:
        """The first held-out text near to one with these hashes uint32 (HASHES,)."""
        candidates = _candidates(self._texts, list(_bands(hashes[None])[0]))
        shares = (self._held.texts[candidates] == hashes).mean(1)
        for i, share in zip(candidates, shares, strict=True):
            if share >= self._overlap:
                place = self._held.text_places[i]
                return Found(place, f"{share:.0%} of its runs of {_WORDS} words are those of held-out text {place}")
        return None


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, every bit from all (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_FACTORS = _mix(np.arange(1, HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
_SHIFTS = _mix(_FACTORS)


def _bands(texts: np.ndarray) -> np.ndarray:
    """Hashes uint32 (m, HASHES) -> one key uint64 a band (m, _BANDS)."""
    keys = np.zeros((len(texts), _BANDS), np.uint64)
    for column in texts.reshape(len(texts), _BANDS, HASHES // _BANDS).transpose(2, 0, 1):
        keys = _mix(keys + column)
    return keys


def _ordered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _candidates(tables: list[tuple[np.ndarray, np.ndarray]], keys: Sequence[np.uint64]) -> np.ndarray:
    """Numbers of all that agree in at least one key, rising."""
    found = [
        order[np.searchsorted(ordered, key, "left") : np.searchsorted(ordered, key, "right")]
        for (ordered, order), key in zip(tables, keys, strict=True)
    ]
    return np.unique(np.concatenate(found))


def _bytes(places: list[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(places).encode(), np.uint8)
