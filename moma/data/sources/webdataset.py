"""WebDataset: tar files of pictures with their captions.

    web-000.tar:  0001.jpg 0001.txt 0001.json  0002.png 0002.txt  ...   ->   one document a sample

Members in a row whose names agree up to the first dot of the file name are one sample; its ending is the rest. The
picture is the first of .jpg .jpeg .png .webp .gif .bmp; the caption is the text of `caption=txt` (any ending), or a key
of the .json member, `caption=json:KEY`. Other members are not read. The tar files are read in place, never unpacked;
picture bytes only when a worker needs them.

A sample without picture or caption, or with two of one ending, is `Broken`. Refuses compressed tar files: they cannot
be read by offset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from moma.data.sources.files import (
    Member,
    check_text,
    member_picture,
    name_in,
    parse_json,
    paths,
    printable,
    read_slice,
    tar_members,
    version_of,
)
from moma.data.sources.raw import (
    MAX_LINE,
    Broken,
    Order,
    RawDocument,
    Refused,
    Source,
    Split,
    credit,
    fixed_split,
    in_order,
)

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


@dataclass(frozen=True)
class WebDatasetConfig:
    """`shards` tar files: a path or a pattern like "web-{000..012}.tar" or "*.tar".

    `caption` an ending, or json:KEY; captions of more than `max_caption` characters (0: any) leave their picture out;
    `order` half, picture_first or text_first; `split` and the credits as in `InterleavedConfig`.
    """

    shards: str
    caption: str = "txt"
    max_caption: int = 0
    order: Order = "half"
    split: Split = "auto"
    title: str = ""
    author: str = "unknown"
    licence: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        if not self.caption or self.caption == "json:" or self.caption in PICTURES:
            raise ValueError(f"got caption={self.caption!r}, need an ending or json:KEY: use txt or json:caption")
        for path in paths(self.shards):
            fixed_split(self.split, path)


def documents(config: WebDatasetConfig) -> Iterator[RawDocument | Broken]:
    """One document of one segment a sample, in the order of the tar files and their members."""
    for path in paths(config.shards):
        name = name_in(config.shards, path).removesuffix(".tar")
        split = fixed_split(config.split, path)
        for (is_broken, stem), group in groupby(tar_members(path), key=_stem):
            if is_broken:
                yield from (member for member in group if isinstance(member, Broken))
                continue
            members = [member for member in group if isinstance(member, Member)]
            try:
                picture, caption = _sample(path, stem, members, config.caption)
            except Refused as refused:
                yield Broken(refused.kind, f"{printable(str(path))}:{printable(stem)}", str(refused))
                continue
            if config.max_caption and len(caption) > config.max_caption:
                continue
            id_ = f"{name}/{stem}"
            yield RawDocument(id_, id_, (in_order(member_picture(path, picture), caption, config.order, id_),), split)


def attribution(config: WebDatasetConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    files = paths(config.shards)
    return credit(config.title or files[0].name, config.author, config.licence, config.url, version_of(files))


def _stem(member: Member | Broken) -> tuple[bool, str]:
    if isinstance(member, Broken):
        return True, ""
    return False, _parts(member)[0]


def _parts(member: Member) -> tuple[str, str]:
    """Stem and ending: "a.b/0001.Left.PNG" -> "a.b/0001", "left.png"."""
    folder, slash, file = member.name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _sample(path: Path, stem: str, members: list[Member], caption: str) -> tuple[Member, str]:
    found = {_parts(member)[1]: member for member in members}
    if len(found) < len(members):
        raise Refused(
            "wrong_type", f"got two members of {stem!r:.80} with one ending, need one: make the archive again"
        )
    ending, _, key = caption.partition(":")
    picture, text = next((found[name] for name in PICTURES if name in found), None), found.get(ending)
    if picture is None or text is None:
        raise Refused("wrong_type", f"got members {sorted(found)!s:.80}, need a picture and .{ending}: add them, or "
                      "set caption to the ending of the texts")  # fmt: skip
    if text.size > MAX_LINE:
        raise Refused("too_large", f"got a caption file of {text.size} bytes, need at most {MAX_LINE}: shorten it")
    try:
        words = read_slice(path, text.offset, text.size).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise Refused("unreadable", f"got a caption of other bytes ({error!s:.80}), need UTF-8: convert it") from None
    if key:
        record = parse_json(words)
        if not isinstance(record, dict) or key not in record:
            raise Refused("wrong_type", f"got {record!r:.60}, need an object with {key!r}: set caption=json:KEY")
        words = check_text(record[key], repr(key))
    if not words.strip():
        raise Refused("empty", "got an empty caption, need words: remove the picture or describe it")
    return picture, words.strip()


SOURCE = Source(WebDatasetConfig, documents, attribution, "pair")
