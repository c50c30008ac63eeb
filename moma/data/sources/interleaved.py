"""Interleaved documents of your own: a JSON Lines file and a folder or tar file of pictures.

    {"id": "physics/m42", "key": "physics/m42", "segs": [{"t": "text"}, {"i": "a.jpg", "cap": "...", "alt":
    "..."}]}

`segs` in document order: `t` is text, cuttable anywhere; `i` is a picture's file name with an optional
caption `cap` and description `alt`, which stay with the picture. `key` (default: the id) decides train or
val. The JSON Lines file may be compressed (.gz, .xz). A tar file is read in place by offset, never unpacked.

Refuses picture names that lead out of the folder, a line that is no such object, and a file that cannot be read
to its end (a tar file must not be compressed).
"""

import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moma.data.sources.raw import RawDocument, Source
from moma.tokenizer.documents import Part, Picture, Text

_CAPTIONS = {"cap": ("cap",), "alt": ("alt",), "both": ("cap", "alt"), "none": ()}
_OPEN = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class InterleavedConfig:
    """`documents` JSON Lines file, `pictures` folder or tar file.

    `captions` cap, alt, both or none; `split` auto (by key), or train or val for data that comes split.
    `author`, `licence` and `url` go to the corpus's attribution.
    """

    documents: str
    pictures: str
    captions: Literal["cap", "alt", "both", "none"] = "both"
    split: Literal["auto", "train", "val"] = "auto"
    author: str = "unknown"
    licence: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        for path in (self.documents, self.pictures):
            if not Path(path).exists():
                raise ValueError(f"got no file or folder {path!r}, need one: correct the path")


def documents(config: InterleavedConfig) -> Iterator[RawDocument]:
    """One document a line, in the file's order; ValueError names a line that cannot be read."""
    find = _finder(Path(config.pictures))
    path = Path(config.documents)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            segments = tuple(_segment(entry, find, config) for entry in record["segs"])
            name = str(record["id"])
            key = str(record.get("key", name))
            (name + key).encode()  # half a surrogate pair could not be hashed or written to the manifest
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"got line {number} of {path} unreadable ({error!r}), need an object with 'id' and "
                "'segs', each of them {'t': text} or {'i': file}: correct the line"
            ) from error
        yield RawDocument(name, key, segments, split=None if config.split == "auto" else config.split)


def attribution(config: InterleavedConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    path = Path(config.documents)
    version = f"{path.stat().st_size} bytes"
    return [
        {
            "title": path.name,
            "author": config.author,
            "licence": config.licence,
            "url": config.url,
            "version": version,
        }
    ]


def read_slice(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _lines(path: Path) -> Iterator[str]:
    try:
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(
            f"got {path} that cannot be read ({error}), need JSON Lines in UTF-8, plain or whole .gz or .xz: "
            "copy or compress it again"
        ) from error


def _segment(entry: dict[str, Any], find: Callable[[str], Picture], config: InterleavedConfig) -> tuple[Part, ...]:
    if "t" in entry:
        return (Text(_string(entry, "t")),)
    # Checked whether or not they are asked for: a line is sound or broken under any config.
    texts = {field: _string(entry, field) for field in ("cap", "alt") if entry.get(field) is not None}
    captions = [texts[field] for field in _CAPTIONS[config.captions] if texts.get(field)]
    return (find(_string(entry, "i")), *([Text("\n".join(captions))] if captions else []))


def _string(entry: dict[str, Any], field: str) -> str:
    if not isinstance(entry[field], str):
        raise TypeError(f"{field!r} is no string but {entry[field]!r:.40}")
    return entry[field]


def _finder(pictures: Path) -> Callable[[str], Picture]:
    if pictures.is_dir():
        return partial(_in_folder, pictures.resolve())
    try:
        with tarfile.open(pictures, "r:") as archive:
            index = {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"got {pictures} that cannot be read as a tar file ({error}), need a whole, uncompressed one or a "
            "folder: decompress it or copy it again"
        ) from error
    return partial(_in_tar, pictures, index)


def _in_folder(folder: Path, name: str) -> Picture:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"got picture {name!r} outside of {folder}, need a file inside: correct the documents")
    return Picture(path.read_bytes, place=str(path))


def _in_tar(path: Path, index: dict[str, tuple[int, int]], name: str) -> Picture:
    place = f"{path}:{name}"
    if name not in index:
        return Picture(partial(_missing, place), place)
    return Picture(partial(read_slice, path, *index[name]), place)


def _missing(place: str) -> bytes:
    raise FileNotFoundError(f"no such picture: {place}")


SOURCE = Source(InterleavedConfig, documents, attribution, "interleaved")
