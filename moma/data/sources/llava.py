"""LLaVA-style conversations about pictures: a JSON list or JSON Lines file, and a folder or tar file of pictures.

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A red square."}]}

    segment 1   [picture] "What is this?\\n"     read, never a target (`learn=False`)
                "A red square.\\n\\n"           learned
    segment 2   the next question ...

A segment is a question with its answer, so a picture stays with the first answer about it. A line end stands after
a question, a blank line after an answer that is not the last; it is learned, as the answer's end. White
space around turns and pictures is dropped. `image` may be a list; its pictures take the places of `<image>`.

`human`, `user` and `system` turns are prompts, `gpt` and `assistant` turns are answers. A record of another shape, with
an unequal number of pictures and places, or without an answer is `Broken`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moma.data.sources.files import check_id, check_text, finder, name_in, paths, records, version_of
from moma.data.sources.raw import Broken, RawDocument, Refused, Source, Split, credit, fixed_split
from moma.tokenizer.documents import Part, Picture, Text

_LEARNED = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True}


@dataclass(frozen=True)
class LlavaConfig:
    """`documents` JSON or JSON Lines file, or a pattern; `pictures` folder or tar file (None: no record has pictures).

    The split goes by the picture, or by the id of a record without one; `split` and the credits as in
    `InterleavedConfig`.
    """

    documents: str
    pictures: str | None = None
    split: Split = "auto"
    title: str = ""
    author: str = "unknown"
    licence: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        for path in paths(self.documents):
            fixed_split(self.split, path)
        if self.pictures is not None:
            paths(self.pictures, folders=True)


def documents(config: LlavaConfig) -> Iterator[RawDocument | Broken]:
    """One document a record, in the file's order."""
    find: Callable[[str], Picture] = _no_folder
    if config.pictures is not None:
        find, broken = finder(paths(config.pictures, folders=True)[0])
        yield from broken
    for path in paths(config.documents):
        name, split = name_in(config.documents, path), fixed_split(config.split, path)
        for record in records(path):
            if isinstance(record, Broken):
                yield record
                continue
            place, value = record
            try:
                yield _conversation(value, f"{name}:{place.rpartition(':')[2]}", find, split)
            except Refused as refused:
                yield Broken(refused.kind, place, str(refused))


def attribution(config: LlavaConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    files = paths(config.documents)
    places = paths(config.pictures, folders=True) if config.pictures else []
    archives = [path for path in places if path.is_file()]  # pictures in folders are many
    version = version_of([*files, *archives])
    return credit(config.title or files[0].name, config.author, config.licence, config.url, version)


def _conversation(record: Any, place: str, find: Callable[[str], Picture], split: str | None) -> RawDocument:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise Refused("wrong_type", f"got {record!r:.60}, need an object with 'conversations', a list: correct it")
    images = record.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    names = [check_text(image, "'image'") for image in images]
    pictures = iter([find(name) for name in names])
    segments: list[tuple[Part, ...]] = []
    exchange: list[Part] = []
    places = 0
    for turn in record["conversations"]:
        learn, value = _turn(turn)
        places += value.count("<image>")
        if places > len(names):
            break
        if exchange:
            answered = exchange[-1].learn
            _append(exchange, "\n\n" if answered else "\n", answered)
            if answered and not learn:
                segments.append(tuple(exchange))
                exchange = []
        for number, words in enumerate(value.split("<image>")):
            if number:
                exchange.append(replace(next(pictures), learn=learn))
            _append(exchange, words.strip(), learn)
    if places != len(names):
        raise Refused("wrong_type", f"got {len(names)} pictures and {places} places <image>, need as many: correct it")
    segments += [tuple(exchange)] if exchange else []
    if not any(isinstance(part, Text) and part.learn and part.text.strip() for each in segments for part in each):
        raise Refused("empty", "got a conversation without an answer, need a gpt turn: remove it")
    id_ = check_id(record.get("id", place))
    return RawDocument(id_, names[0] if names else id_, tuple(segments), split)


def _turn(turn: Any) -> tuple[bool, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or turn["from"] not in _LEARNED:
        need = ", ".join(_LEARNED)
        raise Refused(
            "wrong_type", f"got turn {turn!r:.60}, need {{'from': ..., 'value': ...}}, from {need}: correct it"
        )
    return _LEARNED[turn["from"]], check_text(turn.get("value"), "'value'").strip()


def _append(parts: list[Part], words: str, learn: bool) -> None:
    """Add text, to the last part where that is text of the same kind: it is encoded as one."""
    last = parts[-1] if parts else None
    if isinstance(last, Text) and last.learn == learn:
        parts[-1] = Text(last.text + words, learn)
    elif words:
        parts.append(Text(words, learn))


def _no_folder(name: str) -> Picture:
    raise Refused("wrong_type", f"got picture {name!r:.80}, need the folder that it lies in: set pictures")


SOURCE = Source(LlavaConfig, documents, attribution, "interleaved")
