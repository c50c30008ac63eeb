"""Interleaved documents of your own: a JSON Lines file and a folder or tar file of pictures.

    {"id": "physics/m42", "key": "physics/m42", "segs": [{"t": "text"}, {"i": "a.jpg", "cap": "...", "alt":
    "..."}]}

`segs` in document order: `t` is text, cuttable anywhere; `i` is a picture's file name with an optional
caption `cap` and description `alt`, which stay with the picture. `key` (default: the id) decides train or
val. The JSON Lines file may be compressed (.gz, .bz2, .xz, .zst). A tar file is read in place by offset, never
unpacked.

`take` makes several sources of one file: `pages` as they are, `pictures` each with its caption, `prose` without
pictures; a mixture needs a source of text alone, which fills rows exactly.

A line that is no such object, or names a picture outside of its folder, is `Broken`; so is the rest of a file whose
stream breaks. Refuses a tar file of which nothing can be read (it must not be compressed).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moma.data.sources.files import check_id, check_text, finder, paths, printable, records, version_of
from moma.data.sources.raw import (
    Broken,
    Captions,
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


@dataclass(frozen=True)
class InterleavedConfig:
    """`documents` JSON Lines file or a pattern of several; `pictures` folder or tar file, or one for each of them.

    `captions` cap, alt, both or none; `min_caption` leaves out pictures whose caption and description are both
    shorter. `take` pages, pictures (with a caption of at most `max_caption` characters, 0: any, in this `order`) or
    prose. `split` auto (by key), or train, val or name (of the file: "train.jsonl") for data that comes split.
    `title` (default: the file's name), `author`, `licence` and `url` go to the corpus's attribution.
    """

    documents: str
    pictures: str
    captions: Captions = "both"
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
        files, pictures = paths(self.documents), paths(self.pictures, folders=True)
        if len(pictures) not in (1, len(files)):
            raise ValueError(
                f"got {len(pictures)} of pictures={self.pictures!r} for {len(files)} files, need one, or one for each: "
                "correct the patterns"
            )
        for path in files:
            fixed_split(self.split, path)


def documents(config: InterleavedConfig) -> Iterator[RawDocument | Broken]:
    """What is taken of each line, in the file's order."""
    files, pictures = paths(config.documents), paths(config.pictures, folders=True)
    find = None
    for number, path in enumerate(files):
        if find is None or len(pictures) > 1:
            try:
                find, broken = finder(pictures[number])
            except ValueError as error:
                if not number:
                    raise
                yield Broken("unreadable", printable(str(path)), str(error))
                continue
            yield from broken
        split = fixed_split(config.split, path)
        for record in records(path):
            if isinstance(record, Broken):
                yield record
                continue
            place, value = record
            try:
                page = _page(value, find, split, config)
            except Refused as refused:
                yield Broken(refused.kind, place, str(refused))
                continue
            yield from taken(page, config.take, config.order, config.max_caption)


def attribution(config: InterleavedConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    files = paths(config.documents)
    archives = [path for path in paths(config.pictures, folders=True) if path.is_file()]  # pictures in folders are many
    version = version_of([*files, *archives])
    return credit(config.title or files[0].name, config.author, config.licence, config.url, version)


def _page(record: Any, find: Callable[[str], Picture], split: str | None, config: InterleavedConfig) -> RawDocument:
    if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("segs"), list):
        raise Refused(
            "wrong_type", f"got {record!r:.60}, need an object with 'id' and 'segs', a list of {{'t': text}} or "
            "{'i': file}: correct it"
        )  # fmt: skip
    id_ = check_id(record["id"])
    key = check_id(record.get("key", id_))
    segments = [segment for entry in record["segs"] if (segment := _segment(entry, find, config))]
    if not segments and not any("i" in entry for entry in record["segs"]):
        raise Refused("empty", "got a document without text and pictures, need either: remove it")
    return RawDocument(id_, key, tuple(segments), split)


def _segment(entry: Any, find: Callable[[str], Picture], config: InterleavedConfig) -> tuple[Part, ...] | None:
    if not isinstance(entry, dict) or not ("t" in entry or "i" in entry):
        raise Refused("wrong_type", f"got segment {entry!r:.60}, need {{'t': text}} or {{'i': file}}: correct it")
    if "t" in entry:
        text = check_text(entry["t"], "'t'")
        return (Text(text),) if text else None
    # Checked whether or not they are asked for: a line is sound or broken under any config.
    cap, alt = ("" if entry.get(field) is None else check_text(entry[field], f"'{field}'") for field in ("cap", "alt"))
    picture = find(check_text(entry["i"], "'i'"))
    caption = caption_of(cap, alt, config.captions, config.min_caption)
    if caption is None:
        return None
    return (picture, Text(caption)) if caption else (picture,)


SOURCE = Source(InterleavedConfig, documents, attribution, "interleaved")
