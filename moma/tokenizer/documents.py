"""Interleaved documents <-> token ids.

    document  = segments; segment = parts that belong together; part = Text | Picture

    segments  [Picture, Text("sheaf of rice")]                       [Text("A paragraph.")]  ...
    tokens    BOS BOI c c c ... c EOI s h e a f ...                  A para graph .          ... EOS
    offsets   0                                                      n                           len

Segments tile the document: BOS belongs to the first, EOS to the last. A segment that holds a picture is
atomic (its caption stays with it); a segment of text alone may be cut anywhere. A picture is BOI, its codes
row by row, EOI.

Special strings inside text are ordinary text: nothing in data can forge BOS, BOI or an image code. This
module refuses pictures that are not encoded yet: `ImageTokenizer.encode` turns them into codes in batches
first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moma.modality import Vocabulary
from moma.tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class Text:
    """A piece of text; `learn` False: its tokens are read but never targets (a prompt before an answer)."""

    text: str
    learn: bool = True


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: its codes (integers, any shape), the image, or a function that returns the file's bytes.

    The function form is lazy, so that a source can list a million pictures without opening one. `place` names
    the picture in messages; `learn` as in `Text`.
    """

    content: np.ndarray | Image.Image | Callable[[], bytes]
    place: str = ""
    learn: bool = True


Part = Text | Picture
Segment = Sequence[Part] | Part


@dataclass(frozen=True, eq=False)
class Document:
    """An encoded document of n tokens and k segments.

    `tokens` int64 (n,); `segment_offsets` int64 (k+1,) from 0 to n; `segment_images` int32 (k,) pictures in
    each segment; `mask` uint8 (n,) or None: 0 marks a token that is never a target.
    """

    tokens: np.ndarray
    segment_offsets: np.ndarray
    segment_images: np.ndarray
    mask: np.ndarray | None = None


def parts_of(segment: Segment) -> Sequence[Part]:
    """The parts of a segment; a lone part is a segment of one."""
    return (segment,) if isinstance(segment, Text | Picture) else segment


def encode_document(segments: Iterable[Segment], text: TextTokenizer, vocab: Vocabulary) -> Document:
    """Token ids and segment bounds of one document; empty segments vanish.

    Raises ValueError for a document without content, a picture that is not encoded, and codes of the wrong
    number or range.
    """
    tokens, offsets, images = [vocab.bos], [0], []
    unlearned: list[tuple[int, int]] = []
    for segment in segments:
        before, n_images = len(tokens), 0
        for part in parts_of(segment):
            start = len(tokens)
            if isinstance(part, Text):
                tokens.extend(text.encode(part.text))
            else:
                tokens.extend(_picture_tokens(part, vocab))
                n_images += 1
            if not part.learn:
                unlearned.append((start, len(tokens)))
        if len(tokens) > before:
            offsets.append(len(tokens))
            images.append(n_images)
    if not images:
        raise ValueError("got a document without text or pictures, need at least one: leave it out")
    tokens.append(vocab.eos)
    offsets[-1] = len(tokens)
    mask = None
    if unlearned:
        mask = np.ones(len(tokens), np.uint8)
        for start, stop in unlearned:
            mask[start:stop] = 0
    return Document(np.array(tokens, np.int64), np.array(offsets, np.int64), np.array(images, np.int32), mask)


def decode_document(tokens: np.ndarray, text: TextTokenizer, vocab: Vocabulary) -> list[Part]:
    """The parts of an encoded document in order, pictures as codes int64 (tokens per image,).

    BOS, EOS and padding are dropped; text is decoded as a whole between pictures, so segment bounds are not
    kept. Raises ValueError for a picture whose codes are not exactly one grid between BOI and EOI.
    """
    ids = np.asarray(tokens, np.int64)
    parts: list[Part] = []
    start = 0
    for boi in np.flatnonzero(ids == vocab.boi):
        stop = boi + 1 + vocab.tokens_per_image
        codes = ids[boi + 1 : stop] - vocab.image_start
        if stop >= len(ids) or ids[stop] != vocab.eoi or not _in_range(codes, vocab):
            raise ValueError(
                f"got a picture at token {boi} that is not begin, {vocab.tokens_per_image} codes, end; need "
                "a whole one: cut documents at segment bounds"
            )
        parts.extend(_text_parts(ids[start:boi], text))
        parts.append(Picture(codes))
        start = stop + 1
    parts.extend(_text_parts(ids[start:], text))
    return parts


def _text_parts(ids: np.ndarray, text: TextTokenizer) -> list[Part]:
    decoded = text.decode(ids)
    return [Text(decoded)] if decoded else []


def _picture_tokens(picture: Picture, vocab: Vocabulary) -> list[int]:
    if not isinstance(picture.content, np.ndarray):
        raise ValueError(
            f"got picture {picture.place or '(unnamed)'} without codes, need codes: "
            "run ImageTokenizer.encode on the document's pictures first"
        )
    codes = picture.content.reshape(-1).astype(np.int64)
    if len(codes) != vocab.tokens_per_image or not _in_range(codes, vocab):
        raise ValueError(
            f"got {len(codes)} image codes from {codes.min(initial=0)} to {codes.max(initial=0)}, need "
            f"{vocab.tokens_per_image} in [0, {vocab.image_stop - vocab.image_start}): "
            "use the image tokenizer that belongs to this vocabulary"
        )
    return [vocab.boi, *(codes + vocab.image_start).tolist(), vocab.eoi]


def _in_range(codes: np.ndarray, vocab: Vocabulary) -> bool:
    return bool(((codes >= 0) & (codes < vocab.image_stop - vocab.image_start)).all())
