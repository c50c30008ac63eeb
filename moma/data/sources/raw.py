"""What a source of raw documents is: a config, a list of documents, its credits.

    Source(config class, documents(config) -> RawDocument | Broken ..., attribution(config) -> credits, kind
    of document)

A source lists its documents lazily, in a fixed order, and opens no picture: `Picture.content` is a function
that returns the encoded image (PNG, JPEG, ...) when a worker needs it. So a source of a million pictures
costs one listing, and everything slow runs in parallel.

What cannot be read is yielded as `Broken`, in its place in the order, and the listing goes on: whether that
is skipped or an error is the caller's policy. A setting that cannot work (a file that does not exist) is a
ValueError of the config instead. Whatever the bytes are, no other exception leaves `documents`, and opening a
picture raises ValueError or OSError alone. A `Broken` is counted under one of these kinds:

    unreadable  bytes that are not what they should be: JSON, UTF-8, gzip, tar, Parquet, XML
    wrong_type  well-formed, but not the record that this source describes
    too_large   over a limit below
    outside     a name that leads out of its folder or archive
    url         a picture that would have to be downloaded
    empty       neither text nor picture
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from moma.tokenizer.documents import Part, Picture, Text

MAX_LINE = 8 * 2**20  # bytes of a record (a line, a text, an XML file): ten times the longest textbook page
MAX_PICTURE_BYTES = 64 * 2**20  # of a picture file: its pixels are limited when it is opened
MAX_NAME = 1000  # characters of an id or a file name: they stand in manifests and messages

KINDS = ("unreadable", "wrong_type", "too_large", "outside", "url", "empty")
CAPTIONS = {"cap": ("cap",), "alt": ("alt",), "both": ("cap", "alt"), "none": ()}
Captions = Literal["cap", "alt", "both", "none"]
Order = Literal["half", "picture_first", "text_first"]
Split = Literal["auto", "train", "val", "name"]
Take = Literal["pages", "pictures", "prose"]


@dataclass(frozen=True)
class RawDocument:
    """A document before tokenization.

    `id` names it in messages, flips its coin (`picture_first`) and is stable from release to release; sources make
    it unique, but ids that come with the data are kept as they are. `key` decides train or val: documents with
    equal keys, of whatever source, stay together. `split` (train or val) overrides the key, for data
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


class Refused(ValueError):
    """Why a record is not taken: `kind` as in `Broken`. Sources raise it inside and yield it as `Broken`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


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


def in_order(picture: Picture, caption: str, order: Order, id_: str) -> tuple[Part, ...]:
    """The segment of a picture and its caption; `half`: the picture stands first by the coin of `picture_first`."""
    if not caption:
        return (picture,)
    first = picture_first(id_) if order == "half" else order == "picture_first"
    return (picture, Text(caption)) if first else (Text(caption), picture)


def caption_of(cap: str, alt: str, captions: Captions, min_chars: int) -> str | None:
    """The text that goes with a picture; None: both texts are shorter than `min_chars`, leave the picture out."""
    if max(len(cap), len(alt)) < min_chars:
        return None
    texts = {"cap": cap, "alt": alt}
    return "\n".join(texts[field] for field in CAPTIONS[captions] if texts[field])


def taken(page: RawDocument, take: Take, order: Order, max_caption: int) -> Iterator[RawDocument]:
    """What is taken of a page of text segments and captioned pictures (picture first); nothing of one without either.

    `pages`: the page as it is. `pictures`: each picture with its caption, if that has at most `max_caption`
    characters (0: any), as the document "page#number". `prose`: the page's text without its pictures. All keep
    the page's key, so they stay on its side of the split.
    """
    if take == "pages":
        yield from [page] if page.segments else []
        return
    pictures = [segment for segment in page.segments if isinstance(segment[0], Picture)]
    if take == "prose":
        prose = tuple(segment for segment in page.segments if not isinstance(segment[0], Picture))
        if prose:
            yield RawDocument(page.id, page.key, prose, page.split)
        return
    for number, (picture, *rest) in enumerate(pictures):
        caption = "".join(part.text for part in rest if isinstance(part, Text))
        if isinstance(picture, Picture) and (not max_caption or len(caption) <= max_caption):
            id_ = f"{page.id}#{number}"
            yield RawDocument(id_, page.key, (in_order(picture, caption, order, id_),), page.split)


def fixed_split(split: Split, path: Path) -> str | None:
    """`RawDocument.split` for documents of a file; ValueError if its name should say it and does not.

    `auto`: None, the key decides; `train`, `val`: that; `name`: as the file's name begins ("train.jsonl.xz").
    """
    if split != "name":
        return None if split == "auto" else split
    for side in ("train", "val"):
        if path.name.startswith(side):
            return side
    raise ValueError(f"got {path} with split=name, need a name that begins with train or val: rename it or set split")


def credit(title: str, author: str, licence: str, url: str, version: str) -> list[dict[str, str]]:
    """The attribution of a source with one work, as its config names it."""
    return [{"title": title, "author": author, "licence": licence, "url": url, "version": version}]


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
