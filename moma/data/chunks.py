"""Raw documents, in the order of their source -> chunks, each of which becomes one shard.

    documents of a source   d0 d1 d2 ! d3 d4 d5 ...      ! = Broken, kept in its place
    split by key            train: d0 d2 ! d3 ...        val: d1 d4 ...
    cut by size             [d0 d2 !] [d3 ...] ...       as soon as a chunk holds about `shard_tokens` tokens

The cut goes by an estimate from characters and pictures, so it needs no tokenizer run and depends on the listing
alone: not on workers, interruptions or what turns out to be unreadable. What is broken stands in a chunk of the
training split, where it is counted. Only the open chunks, one a split, are in memory.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moma.data.sources import Broken, RawDocument, SourceConfig, source_of, split_of
from moma.tokenizer.documents import Part, Picture, Text

_BYTES_PER_TOKEN = 4  # of English text: only sets where chunks end
_BROKEN_TOKENS = 64  # so that a chunk of nothing but broken lines ends too


class Cut(NamedTuple):
    """Where chunks end: held-out share and salt, tokens a shard and a picture, views of a training picture."""

    val_fraction: float
    salt: str
    shard_tokens: int
    tokens_per_image: int
    views: int = 1


class Chunk(NamedTuple):
    """What becomes one shard: the `number`-th of its source and split."""

    split: str
    source: str
    number: int
    items: list[RawDocument | Broken]

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.source}-{self.number:05d}"

    def digest(self) -> str:
        """sha256 of all that the source lists of these documents (hex); a picture counts by where it is read."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(_listed(item), separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


class Survey(NamedTuple):
    """A listing in numbers: shards by "split/source", documents (broken ones too) by source, and how many documents
    bear an id that an earlier one of their source has (they are kept)."""

    shards: dict[str, int]
    listed: dict[str, int]
    repeated_ids: dict[str, int]


def cut(sources: Mapping[str, SourceConfig], rule: Cut) -> Iterator[Chunk]:
    """The chunks of every source, in order."""
    for name, source in sources.items():
        held: dict[str, list[RawDocument | Broken]] = {"train": [], "val": []}
        size, number = Counter(), Counter()
        for item in source_of(source).documents(source):
            split = "train" if isinstance(item, Broken) else split_of(item, rule.val_fraction, rule.salt)
            held[split].append(item)
            size[split] += _estimate(item, split, rule)
            if size[split] >= rule.shard_tokens:
                yield Chunk(split, name, number[split], held[split])
                held[split], size[split] = [], 0
                number[split] += 1
        for split, items in held.items():
            if items:
                yield Chunk(split, name, number[split], items)


def survey(sources: Mapping[str, SourceConfig], rule: Cut, stop: bool) -> Survey:
    """Go through the listing once, eight bytes a document being held; with `stop` a broken one is a ValueError."""
    shards, listed, repeated = Counter(), Counter(), {}
    for name, source in sources.items():
        ids = array("Q")
        for chunk in cut({name: source}, rule):
            shards[f"{chunk.split}/{name}"] += 1
            listed[name] += len(chunk.items)
            for item in chunk.items:
                if isinstance(item, RawDocument):
                    id_ = hashlib.blake2b(item.id.encode("utf-8", "surrogatepass"), digest_size=8)
                    ids.append(int.from_bytes(id_.digest(), "little"))
                elif stop:
                    raise ValueError(
                        f"got {item.place} of source {name!r}, which is broken ({item.kind}: {item.reason}), need "
                        "readable documents: mend or remove it, or pass on_error=skip"
                    )
        if again := len(ids) - len(np.unique(np.frombuffer(ids, np.uint64))):
            repeated[name] = again
    return Survey(dict(shards), dict(listed), repeated)


def parts(document: RawDocument) -> list[Part]:
    """All parts of a document, in order."""
    return [part for segment in document.segments for part in segment]


def is_raw(part: Part) -> bool:
    """Whether the part is a picture that is still to be encoded."""
    return isinstance(part, Picture) and not isinstance(part.content, np.ndarray)


def views_of(document: RawDocument, split: str, views: int) -> int:
    """How many documents are made of one: `views` in training where it shows a picture to be encoded, else 1."""
    return views if split == "train" and any(map(is_raw, parts(document))) else 1


def _estimate(item: RawDocument | Broken, split: str, rule: Cut) -> int:
    if isinstance(item, Broken):
        return _BROKEN_TOKENS
    text = sum(len(part.text) for part in parts(item) if isinstance(part, Text))
    pictures = sum(isinstance(part, Picture) for part in parts(item))
    tokens = 2 + text // _BYTES_PER_TOKEN + pictures * (rule.tokens_per_image + 2)
    return tokens * views_of(item, split, rule.views)


def _listed(item: RawDocument | Broken) -> list[Any]:
    if isinstance(item, Broken):
        return [item.kind, item.place, item.reason]
    return [item.id, item.key, item.split, [[_part(part) for part in segment] for segment in item.segments]]


def _part(part: Part) -> list[Any]:
    if isinstance(part, Text):
        return ["text", part.learn, part.text]
    content = None
    if isinstance(part.content, np.ndarray):
        content = part.content.tolist()
    elif isinstance(part.content, partial):  # a reader with path, offset and size
        content = [str(argument) for argument in part.content.args]
    return ["picture", part.learn, part.place, content]
