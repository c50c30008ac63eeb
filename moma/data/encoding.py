"""A chunk of raw documents -> encoded documents: open, look for twins, crop, encode, tokenize.

    item -- Broken ----------------------------------------------------------------> counted, with place and reason
         -- document -- open each picture -- views -- codes -- ids ----------------> Document, one a view
                              | unreadable, or near to a held-out picture ---------> counted, with place and reason

What is skipped is skipped whole: a document is never made without one of its pictures. A view is a document of its
own: view 0 shows the pictures as they are, the others a random square of each, perhaps mirrored, drawn from the
document's id and the picture's number. Views are made of training documents alone; texts are repeated as they are.

Pictures go through the image tokenizer in batches of one chunk, so codes depend on nothing outside of it. At most
one opened picture and a few hundred small squares are in memory, however many pictures a document has.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from moma.data.chunks import Chunk, is_raw, parts, views_of
from moma.data.near_duplicates import HeldOut, Sketches, picture_hash, sketches, text_hashes
from moma.data.sources import Broken, RawDocument
from moma.modality import Vocabulary
from moma.tokenizer.documents import Document, Picture, Text, encode_document
from moma.tokenizer.image import ImageTokenizer, open_image, preprocess
from moma.tokenizer.text import TextTokenizer
from moma.tokenizer.vocab import IMAGE_FILES

_PICTURES_AT_ONCE = 256  # squares held by a worker; a multiple of the tokenizer's batch
_TEXT_AT_ONCE = 2**17  # characters; tiktoken's regex engine gives up on a run of a million spaces
_REASON_CHARS = 1000
# The machine's trouble, not the data's: what is skipped for it today would be there tomorrow.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EIO)


@dataclass(frozen=True)
class AugmentConfig:
    """`views` of each training document with pictures, the plain one included.

    Every further view shows of each picture a square of `min_crop` to 1 of the area of the largest one, and mirrors
    every other picture if `flip` (no good for pictures of writing).
    """

    views: int = 1
    min_crop: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.views < 1 or not 0 < self.min_crop <= 1:
            raise ValueError(
                f"got augment.views={self.views} and augment.min_crop={self.min_crop}, need at least 1 and above 0 to "
                "1: use 2 and 0.6"
            )
        if self.views > 1 and self.min_crop == 1 and not self.flip:
            raise ValueError(
                f"got augment.views={self.views} that would all be alike, need crops or flips: set augment.min_crop "
                "below 1 or augment.flip=true"
            )


class Encoders(NamedTuple):
    """What turns raw documents into tokens; `image` is None in an asset without an image tokenizer."""

    text: TextTokenizer
    image: ImageTokenizer | None
    vocab: Vocabulary


class Skip(NamedTuple):
    """Something left out: `kind` it is counted under, `place`, `reason`."""

    kind: str
    place: str
    reason: str


class Encoded(NamedTuple):
    """The documents of a chunk in order, what was left out, and the sketches of the documents if asked for."""

    documents: list[Document]
    skipped: list[Skip]
    sketches: Sketches


def load_encoders(asset: Path, vocab: Vocabulary, device: str) -> Encoders:
    """Text and image tokenizer of an asset folder; ValueError if codes and vocabulary do not fit."""
    text = TextTokenizer.load(asset, vocab)
    if not any((asset / name).is_file() for name in IMAGE_FILES):
        return Encoders(text, None, vocab)
    image = ImageTokenizer.load(asset, device)
    n_codes = vocab.image_stop - vocab.image_start
    if (image.n_codes, tuple(image.grid)) != (n_codes, tuple(vocab.image_grid)):
        raise ValueError(
            f"got an image tokenizer of {image.n_codes} codes on a grid of {tuple(image.grid)}, need "
            f"{n_codes} on {tuple(vocab.image_grid)} as in {asset}/vocab.json: "
            "train the two halves with the same sizes"
        )
    return Encoders(text, image, vocab)


def encode_chunk(
    chunk: Chunk,
    encoders: Encoders,
    on_error: str = "skip",
    augment: AugmentConfig | None = None,
    salt: str = "",
    held_out: HeldOut | None = None,
    sketch: bool = False,
) -> Encoded:
    """Encode a chunk in order: documents, what is skipped, and with `sketch` what `HeldOut` is made of.

    Documents near to one of `held_out` are skipped. Raises ValueError for what is broken with `on_error` stop, for
    pictures without an image tokenizer, and when the machine, not the data, is why a picture cannot be read.
    """
    made = _Making(chunk, encoders, augment or AugmentConfig(), salt, held_out, sketch)
    for run in _runs(chunk.items):
        made.encode(run, on_error)
    return Encoded(made.documents, made.skipped, sketches(made.pictures, made.texts))


class _Skipped(Exception):
    """Why a document is left out; `args` are kind and reason."""


class _Making:
    """A chunk half encoded."""

    def __init__(
        self,
        chunk: Chunk,
        encoders: Encoders,
        augment: AugmentConfig,
        salt: str,
        held_out: HeldOut | None,
        sketch: bool,
    ) -> None:
        self.documents: list[Document] = []
        self.skipped: list[Skip] = []
        self.pictures: list[tuple[int, str]] = []
        self.texts: list[tuple[np.ndarray, str]] = []
        self._chunk, self._encoders, self._augment, self._salt = chunk, encoders, augment, salt
        self._held_out, self._sketch = held_out, sketch
        self._squares: list[np.ndarray] = []  # not encoded yet
        self._codes: list[np.ndarray] = []  # of the run, up to the first of `_squares`

    def encode(self, run: list[RawDocument | Broken], on_error: str) -> None:
        """Encode some documents whose pictures go through the tokenizer together."""
        ready: list[RawDocument] = []
        for item in run:
            if isinstance(item, Broken):
                self._skip(item.kind, item.place, item.reason)
                continue
            before = len(self._codes) + len(self._squares), len(self.pictures), len(self.texts)
            try:
                self._read(item)
            except _Skipped as skipped:
                kind, reason = skipped.args
                if on_error == "stop" and kind != "near_duplicate":
                    what = "a broken picture in document" if kind == "broken_picture" else "the document"
                    raise ValueError(
                        f"got {what} {item.id} ({kind}: {reason}), need readable ones: "
                        "mend or remove it, or pass on_error=skip"
                    ) from skipped
                self._skip(kind, item.id, reason)
                self._forget(*before)
            else:
                ready.append(item)
        self._flush()
        codes = iter(self._codes)
        for document in ready:
            views = views_of(document, self._chunk.split, self._augment.views)
            # A picture's views lie together, a document's pictures in order: picture 0 view 0, picture 0 view 1, ...
            of_document = [[next(codes) for _ in range(views)] for part in parts(document) if is_raw(part)]
            for view in range(views):
                self._add(document, [of_picture[view] for of_picture in of_document])
        self._codes.clear()

    def _read(self, document: RawDocument) -> None:
        """Open a document's pictures and keep their squares; raises _Skipped."""
        all_parts = parts(document)
        texts = [part.text for part in all_parts if isinstance(part, Text) and part.text]
        if not texts and not any(isinstance(part, Picture) for part in all_parts):
            raise _Skipped("empty", "no text and no picture")
        if (self._held_out or self._sketch) and not any(isinstance(part, Picture) for part in all_parts):
            self._compare_text(document, "\n".join(texts))
        views = views_of(document, self._chunk.split, self._augment.views)
        for number, picture in enumerate(cast(list[Picture], list(filter(is_raw, all_parts)))):
            tokenizer = self._image_tokenizer()
            image = _opened(picture)
            plain = preprocess(image, tokenizer.size, tokenizer.preprocessing)
            if self._held_out or self._sketch:
                self._compare_picture(plain, picture.place or document.id)
            self._squares.append(plain)
            for view in range(1, views):
                name = f"{self._salt}:{document.id}:{number}:{view}"
                square = random_view(image, name, self._augment)
                self._squares.append(preprocess(square, tokenizer.size, tokenizer.preprocessing))
            if len(self._squares) >= 2 * _PICTURES_AT_ONCE:
                self._flush()

    def _compare_text(self, document: RawDocument, text: str) -> None:
        hashes = text_hashes(text)
        if hashes is None:
            return
        if self._held_out and (found := self._held_out.text(hashes)):
            raise _Skipped("near_duplicate", found.reason)
        if self._sketch:
            self.texts.append((hashes, document.id))

    def _compare_picture(self, square: np.ndarray, place: str) -> None:
        hash_ = picture_hash(square)
        if self._held_out and (found := self._held_out.picture(hash_)):
            raise _Skipped("near_duplicate", f"{place}: {found.reason}")
        if self._sketch:
            self.pictures.append((hash_, place))

    def _image_tokenizer(self) -> ImageTokenizer:
        if self._encoders.image is None:
            raise ValueError(
                f"got pictures in source {self._chunk.source!r} but no image tokenizer, need "
                f"{' and '.join(IMAGE_FILES)} in the tokenizer's folder: run `moma train_vq`, or leave sources with "
                "pictures out"
            )
        return self._encoders.image

    def _flush(self) -> None:
        if self._squares:
            self._codes.extend(self._image_tokenizer().encode_pixels(np.stack(self._squares)))
            self._squares.clear()

    def _forget(self, squares: int, pictures: int, texts: int) -> None:
        """Take back what a document left that turned out to be broken."""
        del self._squares[max(0, squares - len(self._codes)) :], self._codes[squares:]
        del self.pictures[pictures:], self.texts[texts:]

    def _add(self, document: RawDocument, codes: list[np.ndarray]) -> None:
        rest = iter(codes)
        segments = []
        for segment in document.segments:
            encoded: list[Text | Picture] = []
            for part in segment:
                if isinstance(part, Text):
                    encoded += [replace(part, text=text) for text in _pieces(part.text)]
                else:
                    encoded.append(replace(part, content=next(rest)) if is_raw(part) else part)
            segments.append(encoded)
        self.documents.append(encode_document(segments, self._encoders.text, self._encoders.vocab))

    def _skip(self, kind: str, place: str, reason: str) -> None:
        cut = (text.encode("utf-8", "backslashreplace").decode()[:_REASON_CHARS] for text in (kind, place, reason))
        self.skipped.append(Skip(*cut))


def random_view(image: Image.Image, name: str, augment: AugmentConfig) -> Image.Image:
    """A square out of the picture, perhaps mirrored: a pure function of picture and `name`."""
    digest = hashlib.sha256(f"moma-view-1:{name}".encode("utf-8", "surrogatepass")).digest()
    share, left, top, mirror = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 32, 8))
    area = augment.min_crop + (1 - augment.min_crop) * share
    side = max(1, round(min(image.size) * area**0.5))
    x, y = int(left * (image.width - side + 1)), int(top * (image.height - side + 1))
    square = image.crop((x, y, x + side, y + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if augment.flip and mirror < 0.5 else square


def _runs(items: Iterable[RawDocument | Broken]) -> Iterator[list[RawDocument | Broken]]:
    """Runs of documents with some `_PICTURES_AT_ONCE` pictures together."""
    run: list[RawDocument | Broken] = []
    held = 0
    for item in items:
        run.append(item)
        held += 0 if isinstance(item, Broken) else sum(isinstance(part, Picture) for part in parts(item))
        if held >= _PICTURES_AT_ONCE:
            yield run
            run, held = [], 0
    if run:
        yield run


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture.content, Image.Image):
        return picture.content
    try:
        return open_image(cast(Callable[[], bytes], picture.content)(), picture.place)
    except MemoryError:
        raise
    except Exception as error:  # whatever a reader of strange bytes raises, the picture cannot be read
        if isinstance(error, OSError) and error.errno in _PASSING:
            raise ValueError(
                f"got {error} at picture {picture.place}, need a machine that can read it: start the same command "
                "again (with fewer workers?); finished shards are kept"
            ) from error
        raise _Skipped("broken_picture", f"{picture.place}: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _TEXT_AT_ONCE):
        yield text[start : start + _TEXT_AT_ONCE]
