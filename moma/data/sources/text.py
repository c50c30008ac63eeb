"""Plain text: a document a file, a record of JSON Lines, or a row of Parquet.

    book.txt                            one document; with a separator, one between two lines that equal it
    pages.jsonl   {"text": "...", ...}  one document a line, from `field`
    pages.parquet                       one document a row, from the column `field`

.txt (and every ending that is not another format's) and .jsonl may be compressed (.gz, .bz2, .xz, .zst). A document's
paragraphs are its segments, in order, so that a long one is cut between two of them.

A document that is no UTF-8, empty, of another type or longer than `MAX_LINE` is `Broken`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from moma.data.sources.files import (
    check_id,
    check_text,
    lines,
    name_in,
    paths,
    printable,
    read_text,
    records,
    suffix_of,
    version_of,
)
from moma.data.sources.parquet import rows
from moma.data.sources.raw import MAX_LINE, Broken, RawDocument, Refused, Source, Split, credit, fixed_split
from moma.tokenizer.documents import Part, Text


@dataclass(frozen=True)
class TextConfig:
    """`files` a path or a pattern like "books/**/*.txt.gz"; `field` the key or column that holds the text.

    `key`: the key or column whose value decides the split (default: the document's place). `separator`: the line
    between two documents of a .txt file ("" for a blank line), None for a document a file. `split` and the credits as
    in `InterleavedConfig`.
    """

    files: str
    field: str = "text"
    key: str | None = None
    separator: str | None = None
    split: Split = "auto"
    title: str = ""
    author: str = "unknown"
    licence: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        for path in paths(self.files):
            fixed_split(self.split, path)


def documents(config: TextConfig) -> Iterator[RawDocument | Broken]:
    """One document a text, in order."""
    for path in paths(config.files):
        name, split = name_in(config.files, path), fixed_split(config.split, path)
        for found in _texts(path, name, config):
            if isinstance(found, Broken):
                yield found
                continue
            place, id_, text, key = found
            try:
                text = check_text(text, repr(config.field))
                if len(text) > MAX_LINE:
                    raise Refused("too_large", f"got a text of {len(text)} characters, need at most {MAX_LINE}: cut it")
                if not text.strip():
                    raise Refused("empty", "got an empty text, need words: remove it")
                yield RawDocument(id_, check_id(key), paragraphs(text), split)
            except Refused as refused:
                yield Broken(refused.kind, place, str(refused))


def attribution(config: TextConfig) -> list[dict[str, str]]:
    """Credits as configured."""
    files = paths(config.files)
    return credit(config.title or files[0].name, config.author, config.licence, config.url, version_of(files))


def paragraphs(text: str) -> tuple[tuple[Part, ...], ...]:
    """Segments of a text, each with the blank lines after it; together they are the text."""
    pieces = re.split(r"(\n[ \t\r]*\n\s*)", text)
    joined = (part + gap for part, gap in zip_longest(pieces[::2], pieces[1::2], fillvalue=""))
    return tuple((Text(part),) for part in joined if part)


def _texts(path: Path, name: str, config: TextConfig) -> Iterator[tuple[str, str, Any, Any] | Broken]:
    """(place, id, text, key) of every document of a file, unchecked."""
    suffix = suffix_of(path)
    if suffix in (".jsonl", ".json", ".ndjson", ".parquet"):
        columns = [config.field, *([config.key] if config.key else [])]
        for found in rows(path, columns) if suffix == ".parquet" else records(path):
            if isinstance(found, Broken):
                yield found
                continue
            place, record = found
            if not isinstance(record, dict) or any(column not in record for column in columns):
                need = " and ".join(map(repr, columns))
                yield Broken("wrong_type", place, f"got {record!r:.60}, need an object with {need}: set field or key")
                continue
            id_ = f"{name}:{place.rpartition(':')[2]}"
            yield place, id_, record[config.field], record[config.key] if config.key else id_
    elif config.separator is None:
        place = printable(str(path))
        try:
            yield place, name, read_text(path), name
        except Refused as refused:
            yield Broken(refused.kind, place, str(refused))
    else:
        yield from _separated(path, name, config.separator)


def _separated(path: Path, name: str, separator: str) -> Iterator[tuple[str, str, Any, Any] | Broken]:
    """Documents between lines that equal `separator`; one with a broken line in it is left out with that line."""
    held: list[str] = []
    start, size, whole = "", 0, True
    for line in chain(lines(path, blank=True), [(printable(str(path)), separator)]):
        if isinstance(line, Broken):
            yield line
            whole = False
            continue
        place, text = line
        if text.strip() != separator:
            start = start or place
            size += len(text) + 1
            if size <= MAX_LINE:
                held.append(text)
            continue
        if size > MAX_LINE and whole:
            yield Broken("too_large", start, f"got a text of {size} characters, need at most {MAX_LINE}: cut it")
        elif whole and any(part.strip() for part in held):
            id_ = f"{name}:{start.rpartition(':')[2]}"
            yield start, id_, "\n".join(held), id_
        held, start, size, whole = [], "", 0, True


SOURCE = Source(TextConfig, documents, attribution, "text")
