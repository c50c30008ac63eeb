"""OBELICS-style Parquet: web pages as two lists of equal length, of texts and of pictures.

    texts   ["Intro", None,   "More text"]
    images  [None,    b"...", None       ]     ->   segments in the lists' order

One of the two is null at each position. A picture is bytes, a struct {bytes, path}, or a file name in `pictures`. The
alternative texts in the JSON of the column `metadata` may be taken as captions. Rows are read in batches, and a
picture's bytes again when a worker opens it: a listing holds none.

A picture that is a URL makes its row `Broken`: moma never downloads. Fetch the pictures first, and write their bytes
or file names in the place of the URLs.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moma.data.sources.files import check_id, check_text, finder, name_in, parse_json, paths, version_of
from moma.data.sources.parquet import read_cell, rows
from moma.data.sources.raw import (
    MAX_LINE,
    MAX_PICTURE_BYTES,
    Broken,
    Order,
    RawDocument,
    Refused,
    Source,
    Split,
    Take,
    caption_of,
    credit,
    fixed_split,
    taken,
)
from moma.tokenizer.documents import Part, Picture, Text

_IMAGES, _TEXTS, _METADATA = "images", "texts", "metadata"


@dataclass(frozen=True)
class ObelicsConfig:
    """`files` Parquet files: a path or a pattern; `pictures` a folder or tar file, where rows hold file names.

    `key`: the column that decides the split (default: the row's place). `captions` none or alt; `min_caption`, `take`,
    `max_caption`, `order`, `split` and the credits as in `InterleavedConfig`.
    """

    files: str
    pictures: str | None = None
    key: str | None = None
    captions: Literal["alt", "none"] = "none"
    min_caption: int = 0
    take: Take = "pages"
    max_caption: int = 0
    order: Order = "half"
    split: Split = "auto"
    title: str = ""
    author: str = "unknown"
    licence: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        for path in paths(self.files):
            fixed_split(self.split, path)
        if self.pictures is not None:
            paths(self.pictures, folders=True)


def documents(config: ObelicsConfig) -> Iterator[RawDocument | Broken]:
    """What is taken of each row, in order."""
    find: Callable[[str], Picture] = _no_folder
    if config.pictures is not None:
        find, broken = finder(paths(config.pictures, folders=True)[0])
        yield from broken
    columns = [_TEXTS, _IMAGES, *([config.key] if config.key else [])]
    for path in paths(config.files):
        name, split = name_in(config.files, path), fixed_split(config.split, path)
        for found in rows(path, columns, optional=[_METADATA] if config.captions == "alt" else []):
            if isinstance(found, Broken):
                yield found
                continue
            place, row = found
            id_ = f"{name}:{place.rpartition(':')[2]}"
            try:
                key = check_id(row[config.key]) if config.key else id_
                segments = _segments(path, place, row, find, config)
            except Refused as refused:
                yield Broken(refused.kind, place, str(refused))
                continue
            yield from taken(RawDocument(id_, key, segments, split), config.take, config.order, config.max_caption)


def attribution(config: ObelicsConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    files = paths(config.files)
    return credit(config.title or files[0].name, config.author, config.licence, config.url, version_of(files))


def _segments(
    path: Path, place: str, row: dict[str, Any], find: Callable[[str], Picture], config: ObelicsConfig
) -> tuple[tuple[Part, ...], ...]:
    texts, images = row[_TEXTS], row[_IMAGES]
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise Refused(
            "wrong_type", "got a row of other types, need texts and images, lists of one length: write it again"
        )
    alts = _alts(row.get(_METADATA), len(texts))
    segments: list[tuple[Part, ...]] = []
    for index, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise Refused(
                "wrong_type", f"got text and picture at position {index}, need one of them null: write it again"
            )
        if text is not None:
            words = check_text(text, "text")
            if len(words) > MAX_LINE:
                raise Refused("too_large", f"got a text of {len(words)} characters, need at most {MAX_LINE}: cut it")
            segments += [(Text(words),)] if words else []
        elif image is not None:
            caption = caption_of("", alts[index], config.captions, config.min_caption)
            if caption is not None:
                picture = _picture(path, place, image, index, find)
                segments.append((picture, Text(caption)) if caption else (picture,))
    if not segments and all(image is None for image in images):
        raise Refused("empty", "got a row without text and pictures, need either: remove it")
    return tuple(segments)


def _picture(path: Path, place: str, image: Any, index: int, find: Callable[[str], Picture]) -> Picture:
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        if len(image) > MAX_PICTURE_BYTES:
            raise Refused(
                "too_large", f"got a picture of {len(image)} bytes, need at most {MAX_PICTURE_BYTES}: shrink it"
            )
        group, row = map(int, place.rpartition(":")[2].split("."))
        return Picture(partial(read_cell, path, group, row, _IMAGES, index), f"{place}[{index}]")
    name = check_text(image, "picture")
    if re.match(r"(?i)\s*([a-z][a-z0-9+.-]*:)?//|data:", name):
        raise Refused("url", f"got {name!r:.80}, need the picture itself, moma never downloads: fetch the pictures "
                      "first, and write their bytes or file names in the place of the URLs")  # fmt: skip
    return find(name)


def _no_folder(name: str) -> Picture:
    raise Refused("wrong_type", f"got the file name {name!r:.80}, need the picture's bytes: set pictures to its folder")


def _alts(metadata: Any, n: int) -> list[str]:
    """The alternative text of every position; "" where there is none."""
    if metadata is None:
        return [""] * n
    entries = parse_json(check_text(metadata, "metadata"))
    if not isinstance(entries, list) or len(entries) != n:
        raise Refused("wrong_type", f"got metadata {entries!r:.60}, need a JSON list of {n} entries: write it again")
    alts = [entry.get("alt_text") if isinstance(entry, dict) else None for entry in entries]
    return ["" if alt is None else check_text(alt, "alt_text") for alt in alts]


SOURCE = Source(ObelicsConfig, documents, attribution, "interleaved")
