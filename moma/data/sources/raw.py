"""What a source of raw documents is: a config, a list of documents, its credits.

    Source(config class, documents(config) -> RawDocument | Broken ..., attribution(config) -> credits, kind
    of document)

A source lists its documents lazily, in a fixed order, and opens no picture: `Picture.content` is a function
that returns the encoded image (PNG, JPEG, ...) when a worker needs it. So a source of a million pictures
costs one listing, and everything slow runs in parallel.

What cannot be read is yielded as `Broken`, in its place in the order, and the listing goes on: whether that
is skipped or an error is the caller's policy. A setting that cannot work (a file that does not exist) is a
ValueError of the config instead.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from moma.tokenizer.documents import Part


@dataclass(frozen=True)
class RawDocument:
    """A document before tokenization.

    `id` is unique in its source and stable from release to release; `key` decides train or val: documents
    with equal keys, of whatever source, stay together. `split` (train or val) overrides the key, for data
    that comes split. A segment is a tuple of parts (`moma/tokenizer/documents.py`).
    """

    id: str
    key: str
    segments: tuple[tuple[Part, ...], ...]
    split: str | None = None


@dataclass(frozen=True)
class Broken:
    """A document that cannot be read: `kind` it is counted under, `place` ("pages.jsonl:17"), `reason`."""

    kind: str
    place: str
    reason: str


@dataclass(frozen=True)
class Source:
    """One kind of input and its config dataclass.

    `attribution` gives dicts with title, author, licence, url and version.
    """

    config: type
    documents: Callable[[Any], Iterator[RawDocument | Broken]]
    attribution: Callable[[Any], list[dict[str, str]]]
    kind: Literal["pair", "text", "interleaved"]


def picture_first(id_: str) -> bool:
    """Whether the picture stands before its text, a fair coin of the document's id (Chameleon section 2.1)."""
    return hashlib.sha256(f"moma-order-1:{id_}".encode()).digest()[0] % 2 == 0


def package_folder(package: str, module: str) -> Path:
    """The folder of an installed package; ValueError with the install command if it is missing."""
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"got no package {package!r}, need it for this source: pip install {package}, or leave the source out"
        )
    return Path(spec.origin).parent


def package_version(package: str) -> str:
    """The installed version of a package."""
    return metadata.version(package)
