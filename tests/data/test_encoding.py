"""A chunk becomes documents: views, broken pictures anywhere, near duplicates, masks, hostile texts."""

import errno
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from moma.data import encoding
from moma.data.chunks import Chunk
from moma.data.encoding import AugmentConfig, Encoders, Skip, encode_chunk, random_view
from moma.data.near_duplicates import HeldOut
from moma.data.sources import Broken, RawDocument
from moma.tokenizer.documents import Document, Picture, Text
from moma.tokenizer.image import ImageTokenizer
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import write_vocabulary


class StubTokenizer:
    """Stands for the image tokenizer: one code, the red value of the picture's first pixel."""

    size, preprocessing = 8, "crop"

    def __init__(self) -> None:
        self.passes: list[int] = []

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        self.passes.append(len(pixels))
        return pixels[:, 0, 0, :1].astype(np.int64)


@pytest.fixture
def encoders(tmp_path: Path) -> Encoders:
    write_ranks(tmp_path / RANKS_FILE, {bytes([i]): i for i in range(256)})
    vocab = write_vocabulary(tmp_path, text_size=256, image_codes=256, image_grid=(1, 1))
    return Encoders(TextTokenizer.load(tmp_path, vocab), cast(ImageTokenizer, StubTokenizer()), vocab)


def _png(red: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _document(id_: str, *contents: Any, text: str = "x") -> RawDocument:
    pictures = [
        Picture(partial(_png, content) if isinstance(content, int) else content, f"{id_}.png") for content in contents
    ]
    return RawDocument(id_, id_, ((*pictures, Text(text)),))


def _chunk(*items: RawDocument | Broken, split: str = "train") -> Chunk:
    return Chunk(split, "a", 0, list(items))


def _reds(document: Document, encoders: Encoders) -> list[int]:
    tokens, vocab = document.tokens, encoders.vocab
    return (tokens[(tokens >= vocab.image_start) & (tokens < vocab.image_stop)] - vocab.image_start).tolist()


def _raise(error: Exception) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read


def test_documents_in_order_with_the_codes_of_their_own_pictures(encoders: Encoders) -> None:
    made = encode_chunk(_chunk(_document("a", 1, 2), _document("b"), _document("c", 3)), encoders)
    assert [_reds(document, encoders) for document in made.documents] == [[1, 2], [], [3]] and not made.skipped


def test_a_broken_picture_anywhere_takes_its_document_alone(
    encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_PICTURES_AT_ONCE", 4)
    broken = _document("broken", *range(100, 150), lambda: b"no picture")
    odd = _document("odd", 7, _raise(KeyError("strange")))
    items = [_document("a", 1, 2), broken, _document("b", 3), odd, Broken("unreadable", "line 9", "no JSON")]
    made = encode_chunk(_chunk(*items, _document("c", *range(50)), _document("d", 4)), encoders)
    assert [_reds(document, encoders) for document in made.documents] == [[1, 2], [3], list(range(50)), [4]]
    assert [(skip.kind, skip.place) for skip in made.skipped] == [
        ("broken_picture", "broken"),
        ("broken_picture", "odd"),
        ("unreadable", "line 9"),
    ]
    assert made.skipped[0].reason.startswith("broken.png: got broken.png, which is none of PNG")


def test_a_document_of_many_pictures_is_encoded_in_pieces(encoders: Encoders) -> None:
    reds = [i % 256 for i in range(2000)]
    made = encode_chunk(_chunk(_document("a", *reds)), encoders)
    assert _reds(made.documents[0], encoders) == reds
    passes = cast(StubTokenizer, encoders.image).passes
    assert len(passes) > 3 and max(passes) <= 512


def test_trouble_of_the_machine_is_no_broken_picture(encoders: Encoders) -> None:
    full = _document("a", _raise(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(
        ValueError, match=r"got .*Too many open files at picture a\.png, need a machine .* start the same"
    ):
        encode_chunk(_chunk(full), encoders)
    with pytest.raises(MemoryError):
        encode_chunk(_chunk(_document("a", _raise(MemoryError()))), encoders)


def test_reasons_are_short_and_printable(encoders: Encoders) -> None:
    made = encode_chunk(_chunk(Broken("unreadable", "\ud800" + "x" * 5000, "r" * 5000)), encoders)
    (skip,) = made.skipped
    assert skip == Skip("unreadable", "\\ud800" + "x" * 994, "r" * 1000)


def test_masks_of_text_and_pictures_are_kept(encoders: Encoders) -> None:
    asked = (Picture(partial(_png, 5), learn=False), Text("Q?", learn=False), Text("A", learn=True))
    (made,) = encode_chunk(_chunk(RawDocument("a", "a", (asked,))), encoders).documents
    assert made.mask is not None and made.mask.tolist() == [1, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("unit", [" ", "\t", "a", "^", "\n "])
def test_megabytes_of_one_sign(encoders: Encoders, unit: str) -> None:
    text = unit * (2**21 // len(unit))
    (made,) = encode_chunk(_chunk(_document("a", text=text)), encoders).documents
    assert len(made.tokens) == len(text) + 2


def test_views_of_training_pictures(encoders: Encoders) -> None:
    augment = AugmentConfig(views=3, min_crop=0.3)
    items = [_document("a", 1, 2), _document("b"), _document("c", 3)]
    made = encode_chunk(_chunk(*items), encoders, augment=augment).documents
    assert [_reds(document, encoders) for document in made] == [[1, 2]] * 3 + [[]] + [[3]] * 3
    held = encode_chunk(_chunk(*items, split="val"), encoders, augment=augment).documents
    assert [_reds(document, encoders) for document in held] == [[1, 2], [], [3]]
    codes = RawDocument("d", "d", ((Picture(np.array([9])),),))
    assert len(encode_chunk(_chunk(codes), encoders, augment=augment).documents) == 1


def test_a_view_is_a_square_that_depends_on_its_name_alone() -> None:
    ramp = np.stack([np.tile(np.arange(200), (100, 1)), np.tile(np.arange(100)[:, None], (1, 200))], -1)
    image = Image.fromarray(np.concatenate([ramp, ramp[..., :1]], -1).astype(np.uint8))
    augment = AugmentConfig(views=2, min_crop=0.25, flip=True)
    views = [np.asarray(random_view(image, f"n{i}", augment)).astype(int) for i in range(400)]
    again = np.asarray(random_view(image, "n7", augment))
    assert (views[7] == again).all()
    sides = np.array([view.shape[0] for view in views])
    assert all(view.shape == (side, side, 3) for view, side in zip(views, sides, strict=True))
    assert sides.min() >= 50 and sides.max() <= 100
    assert abs((sides**2).mean() / 100**2 - 0.625) < 0.04  # area shares are uniform
    mirrored = np.array([view[0, 0, 0] > view[0, -1, 0] for view in views])
    assert abs(mirrored.mean() - 0.5) < 0.1
    left = np.array([view[0, :, 0].min() for view in views]) / (200 - sides)
    assert left.min() < 0.05 and left.max() > 0.95 and abs(left.mean() - 0.5) < 0.06
    plain = AugmentConfig(views=2, min_crop=0.25)
    assert all(
        view[0, 0, 0] < view[0, -1, 0] for i in range(50) for view in [np.array(random_view(image, f"n{i}", plain))]
    )


def test_bad_augmentation() -> None:
    for options, message in (
        ({"views": 0}, "got augment.views=0 and augment.min_crop=1.0, need at least 1"),
        ({"min_crop": 0.0}, "got augment.views=1 and augment.min_crop=0.0, need at least 1 and above 0"),
        ({"views": 2}, "got augment.views=2 that would all be alike, need crops or flips"),
    ):
        with pytest.raises(ValueError, match=message):
            AugmentConfig(**options)


def test_near_pictures_and_texts_are_left_out(encoders: Encoders) -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)]
    prose = ["one two three four five six", "seven eight nine ten eleven twelve"]
    broken = _document("v2", pictures[1], lambda: b"")
    held = _chunk(_document("v0", pictures[0]), _document("v1", text=prose[0]), broken, split="val")
    kept = encode_chunk(held, encoders, sketch=True).sketches
    assert kept.picture_places == ["v0.png"] and kept.text_places == ["v1"]  # not of what was skipped
    train = [
        _document("t0", pictures[2], pictures[0]),
        _document("t1", pictures[1]),
        _document("t2", text=prose[0].upper()),
        _document("t3", text=prose[1]),
        _document("t4", pictures[2], text=prose[0]),  # a text beside pictures is no text document
    ]
    made = encode_chunk(_chunk(*train), encoders, on_error="stop", held_out=HeldOut(kept, 4, 0.8))
    assert [(skip.kind, skip.place) for skip in made.skipped] == [("near_duplicate", "t0"), ("near_duplicate", "t2")]
    assert made.skipped[0].reason == "t0.png: 0 of 64 bits differ from held-out picture v0.png"
    assert len(made.documents) == 3 and not len(made.sketches.pictures)
