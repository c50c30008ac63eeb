"""OpenStax textbooks from their repositories: CNXML modules with their figures, in the order of the book.

    folder/osbooks-physics/collections/physics.collection.xml    modules in order
                           modules/m54196/index.cnxml            one document: paragraphs, and figures in place
                           media/CNX_07_00_Kepler.jpg

`folder` is a checkout or holds several. Of a module are kept, each as a segment of text: titles, paragraphs, list
items, tables (cells joined by "|"), notes, exercises with solutions, glossary entries. Figures stand where they do in
the module, each with its title and caption, and with its description (`alt`); other media are left out. Mathematics is
written in a line: a/b, x^2, v_0, \u221a(x). A reference without words becomes "the figure", "the table", ...; footnotes
stand in parentheses; the learning objectives of the module's metadata are left out.

A module that is no XML, declares a document type (entities could grow without end or read other files) or nests deeper
than Python's stack is `Broken`, as is one whose figure lies outside of its checkout.
"""

import os
import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element

from moma.data.sources.files import check_id, inside, printable, read_picture, read_text
from moma.data.sources.raw import (
    Broken,
    Captions,
    Order,
    RawDocument,
    Refused,
    Source,
    Take,
    caption_of,
    credit,
    taken,
)
from moma.tokenizer.documents import Part, Picture, Text

MAX_MODULE = 2 * 2**20  # bytes of a module: the largest of 23 books has 0.5 MB
_LEFT_OUT = {"metadata", "annotation", "annotation-xml"}
_BLOCKS = {
    *("document", "content", "section", "para", "title", "label", "list", "item", "note", "quote", "example"),
    *("exercise", "problem", "solution", "commentary", "equation", "table", "figure", "subfigure", "media"),
    *("glossary", "definition", "meaning", "rule", "statement", "proof", *_LEFT_OUT),
}
_NAMED = {"figure", "table", "equation", "example", "exercise", "section", "note", "list"}
_OPERATORS = set("=+\u2212\u00d7\u00f7<>\u2264\u2265\u2248\u2192\u00b1-")


@dataclass(frozen=True)
class OpenStaxConfig:
    """`folder` of a checkout or of several.

    `captions` cap, alt, both or none; `min_caption` leaves out pictures whose caption and description are both
    shorter, `skip_captions` (a regular expression, "" for none) those whose caption names a licence that is not free.
    `take`, `max_caption` and `order` as in `InterleavedConfig`. `licence` replaces what each book says of itself.
    """

    folder: str
    captions: Captions = "both"
    min_caption: int = 20
    skip_captions: str = "(?i)noncommercial|by-nc|permission"
    take: Take = "pages"
    max_caption: int = 0
    order: Order = "half"
    split: Literal["auto", "train", "val"] = "auto"
    author: str = "OpenStax, Rice University"
    licence: str = ""

    def __post_init__(self) -> None:
        if not _books(self.folder):
            raise ValueError(
                f"got folder {self.folder!r} without collections/ in it or one below, need checkouts of OpenStax "
                "books: run experiments/openstax/fetch.sh FOLDER"
            )
        try:
            re.compile(self.skip_captions)
        except re.error as error:
            raise ValueError(
                f"got skip_captions={self.skip_captions!r} ({error}), need a pattern: correct it"
            ) from error


class Figure(NamedTuple):
    """A picture of a module: `source` as written there, caption and description."""

    source: str
    caption: str
    alt: str


def documents(config: OpenStaxConfig) -> Iterator[RawDocument | Broken]:
    """What is taken of each module, book by book, in the order of its collections."""
    for book in _books(config.folder):
        seen: set[str] = set()
        for module in _modules(book):
            if isinstance(module, Broken):
                yield module
            elif module not in seen:
                seen.add(module)
                try:
                    page = _page(book, module, config)
                except Refused as refused:
                    yield Broken(refused.kind, f"{printable(book.name)}/{module}", str(refused))
                    continue
                yield from taken(page, config.take, config.order, config.max_caption)


def attribution(config: OpenStaxConfig) -> list[dict[str, str]]:
    """One credit a book: its title and licence from its collections, its commit."""
    credits_ = []
    for book in _books(config.folder):
        titles, licences = [], []
        for collection in _collections(book):
            try:
                root = _parse(book, collection)
            except Refused:
                continue
            titles += [_tidy(each.text or "") for each in root.findall("./{*}metadata/{*}title")]
            licences += [each.get("url", "") for each in root.findall("./{*}metadata/{*}license")]
        own = printable(book.name)
        credits_ += credit(
            ", ".join(titles) or own,
            config.author,
            config.licence or ", ".join(sorted(set(licences))) or "unknown",
            f"https://github.com/openstax/{own}" if own.startswith("osbooks-") else own,
            _commit(book),
        )
    return credits_


def blocks(root: Element) -> Iterator[str | Figure]:
    """Blocks of text and figures of a module, in its order; RecursionError if it is nested too deeply."""
    names = {each.get("id", ""): _tag(each) for each in root.iter() if _tag(each) in _NAMED}
    for block in _flow(root, names):
        if isinstance(block, Figure):
            yield block
        elif (words := _tidy(block)) not in ("", "-"):
            yield words


def _page(book: Path, module: str, config: OpenStaxConfig) -> RawDocument:
    folder = f"modules/{module}"
    root = _parse(book, f"{folder}/index.cnxml")
    id_ = check_id(f"{printable(book.name)}/{module}")
    segments: list[tuple[Part, ...]] = []
    try:
        for block in blocks(root):
            if isinstance(block, Figure):
                segment = _picture(book, folder, block, config)
                segments += [segment] if segment else []
            else:
                segments.append((Text(f"\n{block}" if segments else block),))
    except RecursionError:
        raise Refused("too_large", "got a module that nests too deeply, need CNXML: remove it") from None
    if not segments:
        raise Refused("empty", "got a module without text and pictures, need either: remove it from the collection")
    return RawDocument(id_, id_, tuple(segments), None if config.split == "auto" else config.split)


def _picture(book: Path, folder: str, figure: Figure, config: OpenStaxConfig) -> tuple[Part, ...] | None:
    caption = caption_of(figure.caption, figure.alt, config.captions, config.min_caption)
    if caption is None or (config.skip_captions and re.search(config.skip_captions, figure.caption)):
        return None
    name = posixpath.normpath(posixpath.join(folder, figure.source))
    path = inside(os.path.realpath(book), name)
    picture = Picture(partial(read_picture, path), f"{printable(book.name)}/{name}")
    return (picture, Text(caption)) if caption else (picture,)


# ---- books ----------------------------------------------------------------------------------------------------------


def _books(folder: str) -> list[Path]:
    root = Path(folder)
    if (root / "collections").is_dir():
        return [root.resolve()]
    return sorted(path for path in root.glob("*") if (path / "collections").is_dir())


def _collections(book: Path) -> list[str]:
    return sorted(f"collections/{path.name}" for path in (book / "collections").glob("*.collection.xml"))


def _modules(book: Path) -> Iterator[str | Broken]:
    for collection in _collections(book):
        place = f"{printable(book.name)}/{printable(collection)}"
        try:
            root = _parse(book, collection)
        except Refused as refused:
            yield Broken(refused.kind, place, str(refused))
            continue
        for module in _all(root, "module"):
            name = module.get("document", "")
            if re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
                yield name
            else:
                yield Broken("wrong_type", place, f"got module {name!r:.80}, need a plain name: correct the collection")


def _parse(book: Path, name: str) -> Element:
    path = inside(os.path.realpath(book), name)
    if not os.path.isfile(path):
        raise Refused("unreadable", f"got no file {name!r:.80}, need it: check the book out again")
    text = read_text(Path(path))
    if len(text) > MAX_MODULE:
        raise Refused("too_large", f"got XML of {len(text)} characters, need at most {MAX_MODULE}: split it")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise Refused("unreadable", "got XML with a document type, need none (entities are not read): remove it")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise Refused("unreadable", f"got no XML ({error!s:.80}), need CNXML: check the book out again") from None


def _commit(book: Path) -> str:
    try:
        head = (book / ".git" / "HEAD").read_text()[:200].strip()
        if found := re.fullmatch(r"ref: (refs/heads/[\w.-]+)", head):
            head = (book / ".git" / found[1]).read_text()[:200].strip()
    except (OSError, ValueError):
        return "unknown commit"
    return f"commit {head}" if re.fullmatch(r"[0-9a-f]{40,64}", head) else "unknown commit"


# ---- CNXML ----------------------------------------------------------------------------------------------------------


def _tag(element: Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _all(element: Element, tag: str) -> list[Element]:
    return [each for each in element.iter() if _tag(each) == tag]


def _tidy(words: str) -> str:
    """White space as single spaces (a table keeps its line ends), without the brackets of references left empty."""
    words = "\n".join(" ".join(line.split()) for line in words.split(_ROW))
    return re.sub(r" ?\( ?\)", "", words).strip()


_ROW = "\0"  # between the rows of a table: no character of XML


def _flow(element: Element, names: dict[str, str]) -> Iterator[str | Figure]:
    tag = _tag(element)
    if tag in _LEFT_OUT:
        return
    if tag == "figure":
        yield from _figures(element, names)
    elif tag == "media":
        yield from _media(element, "")
    elif tag == "table":
        yield from _table(element, names)
    elif tag == "definition":
        yield ": ".join(_tidy(_words(child, names)) for child in element if _tag(child) in ("term", "meaning"))
    else:
        words = ("- " if tag == "item" else "") + (element.text or "")
        for child in element:
            if _tag(child) in _BLOCKS:
                yield words
                yield from _flow(child, names)
                words = child.tail or ""
            else:
                words += _inline(child, names) + (child.tail or "")
        yield words


def _figures(element: Element, names: dict[str, str]) -> Iterator[Figure]:
    title, caption = (_tidy(_words(found, names)) if (found := element.find(f"{{*}}{tag}")) is not None else ""
                      for tag in ("title", "caption"))  # fmt: skip
    if title and caption:
        title += " " if title.endswith((".", "?", "!", ":")) else ". "
    words = title + caption
    for media in _all(element, "media"):
        for figure in _media(media, words):
            yield figure
            words = ""


def _media(element: Element, caption: str) -> Iterator[Figure]:
    """The first image of a media element: others are the same for print."""
    for image in _all(element, "image"):
        yield Figure(image.get("src", ""), caption, _tidy(element.get("alt", "")))
        return


def _table(element: Element, names: dict[str, str]) -> Iterator[str | Figure]:
    for tag in ("title", "caption"):
        if (found := element.find(f"{{*}}{tag}")) is not None:
            yield _words(found, names)
    rows = []
    for row in _all(element, "row"):
        cells = [_tidy(_words(entry, names)) for entry in row if _tag(entry) == "entry"]
        rows.append(" | ".join(cells) if any(cells) else "")
    yield _ROW.join(row for row in rows if row)
    for media in _all(element, "media"):
        yield from _media(media, "")


def _words(element: Element, names: dict[str, str]) -> str:
    """The text of an element, blocks in it included."""
    inner = "".join(
        (f" {_words(child, names)} " if _tag(child) in _BLOCKS else _inline(child, names)) + (child.tail or "")
        for child in element
        if _tag(child) not in _LEFT_OUT
    )
    return (element.text or "") + inner


def _inline(element: Element, names: dict[str, str]) -> str:
    tag = _tag(element)
    if tag == "math":
        return _math(element)
    if tag in ("newline", "space"):
        return " "
    if tag in ("", "iframe"):  # comments, processing instructions, embedded pages
        return ""
    words = _words(element, names)
    if tag == "sup":
        return f"^{words.strip()}"
    if tag == "footnote":
        return f" ({words.strip()})"
    if tag == "link" and not words.strip():
        if element.get("document"):
            return "another section"
        return f"the {names[target]}" if (target := element.get("target-id", "")) in names else ""
    return words


# ---- mathematics ----------------------------------------------------------------------------------------------------


def _math(element: Element) -> str:
    """Presentation MathML in a line."""
    tag = _tag(element)
    if tag in ("mi", "mn", "mo", "mtext", "ms"):
        words = " ".join((element.text or "").split())
        return f" {words} " if tag == "mtext" or words in _OPERATORS else words
    if tag == "mspace":
        return " "
    if tag in _LEFT_OUT:
        return ""
    parts = [_math(child) for child in element]
    if tag in _SCRIPTS and parts:
        first, *rest = [_group(part) for part in parts]
        return first + "".join(mark + part for mark, part in zip(_SCRIPTS[tag], rest, strict=False) if part)
    if tag == "mmultiscripts" and parts:
        return _multiscripts([_tag(child) for child in element], parts)
    if tag == "mover":
        return parts[0] if parts else ""
    words = {"mtable": "; ", "mtr": " "}.get(tag, "").join(parts)
    return f"\u221a({words.strip()})" if tag == "msqrt" else words


_SCRIPTS = {
    "mfrac": "/",
    "msup": "^",
    "msub": "_",
    "msubsup": "_^",
    "munder": "_",
    "munderover": "_^",
    "mroot": "^1/",
}


def _group(words: str) -> str:
    words = words.strip()
    return words if len(words) == 1 or re.fullmatch(r"[\w.,']*|\([^()]*\)", words) else f"({words})"


def _multiscripts(tags: list[str], parts: list[str]) -> str:
    """base, sub, sup, ..., then `mprescripts` and the scripts before the base: of a nuclide, ^4_2 He."""
    at = tags.index("mprescripts") if "mprescripts" in tags else len(tags)
    marks = ["_" + part.strip() if number % 2 == 0 else "^" + part.strip() for number, part in enumerate(parts[1:at])]
    before = [
        "_" + part.strip() if number % 2 == 0 else "^" + part.strip() for number, part in enumerate(parts[at + 1 :])
    ]
    return "".join(mark for mark in before[::-1] if len(mark) > 1) + parts[0] + "".join(m for m in marks if len(m) > 1)


SOURCE = Source(OpenStaxConfig, documents, attribution, "interleaved")
