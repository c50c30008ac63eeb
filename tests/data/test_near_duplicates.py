"""Near duplicates: pictures and texts that are nearly held-out ones are found, others are not."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma.data.near_duplicates import HASHES, HeldOut, joined, packed, picture_hash, sketches, text_hashes, unpacked

DRAW = np.random.default_rng(0)


def _picture() -> np.ndarray:
    coarse = Image.fromarray(DRAW.integers(0, 256, (9, 9, 3), np.uint8))
    return np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def _words(n: int) -> list[str]:
    return [f"w{number}" for number in DRAW.integers(0, 10000, n)]


def test_picture_hash_is_of_what_is_seen() -> None:
    picture = _picture()
    image = Image.fromarray(picture)
    smaller = np.asarray(image.resize((48, 48), Image.Resampling.LANCZOS).resize((64, 64)))
    noisy = np.clip(picture.astype(int) + DRAW.integers(-8, 9, picture.shape), 0, 255).astype(np.uint8)
    darker = (picture * 0.8).astype(np.uint8)
    for near in (smaller, noisy, darker):
        assert (picture_hash(picture) ^ picture_hash(near)).bit_count() <= 4
    assert (picture_hash(picture) ^ picture_hash(_picture())).bit_count() > 15
    rows = np.repeat(np.arange(63, -1, -1, dtype=np.uint8)[None], 64, 0)  # darker to the right
    assert picture_hash(np.stack([rows] * 3, -1)) == 2**64 - 1


@pytest.mark.parametrize("bits", [0, 1, 4, 16])
def test_pictures_are_found_as_by_comparing_all(bits: int) -> None:
    held = [int.from_bytes(DRAW.bytes(8), "big") for _ in range(300)]
    index = HeldOut(sketches([(hash_, f"p{i}") for i, hash_ in enumerate(held)], []), bits, 0.8)
    found = 0
    for _ in range(300):
        hash_ = held[DRAW.integers(300)]
        for bit in DRAW.choice(64, DRAW.integers(0, 2 * bits + 2), replace=False):
            hash_ ^= 1 << int(bit)
        near = [i for i, other in enumerate(held) if (other ^ hash_).bit_count() <= bits]
        twin = index.picture(hash_)
        assert (twin.place if twin else None) == (f"p{near[0]}" if near else None)
        found += bool(near)
    assert 20 < found < 280


def test_text_hashes_estimate_the_common_share() -> None:
    words = _words(400)
    for changed in (1, 3, 10):
        other = list(words)
        for i in range(changed):
            other[5 + i * (390 // changed)] = "changed"
        a, b = ({tuple(text[i : i + 5]) for i in range(396)} for text in (words, other))
        share = len(a & b) / len(a | b)
        equal = (text_hashes(" ".join(words)) == text_hashes(" ".join(other))).mean()  # type: ignore[union-attr]
        assert abs(equal - share) < 4 * math.sqrt(share * (1 - share) / HASHES)


def test_text_hashes_pass_over_case_and_punctuation() -> None:
    first, second = text_hashes("The cat, sat; on the Mat."), text_hashes("the cat sat on   the mat")
    assert first is not None and second is not None and (first == second).all()
    assert text_hashes("the cat sat on") is None
    long = text_hashes(" ".join(_words(10000)))
    assert long is not None and long.shape == (HASHES,) and long.dtype == np.uint32


def test_texts_are_found() -> None:
    texts = [_words(200) for _ in range(100)]
    index = HeldOut(
        sketches([], [(text_hashes(" ".join(text)), f"t{i}") for i, text in enumerate(texts)]), 4, 0.8  # type: ignore
    )  # fmt: skip
    near = [*texts[42][:190], *_words(10)]
    twin = index.text(text_hashes(" ".join(near)))  # type: ignore[arg-type]
    assert twin is not None and twin.place == "t42" and twin.reason.endswith("held-out text t42")
    for far in ([*texts[42][:100], *_words(100)], _words(200)):
        assert index.text(text_hashes(" ".join(far))) is None  # type: ignore[arg-type]


def test_sketches_survive_a_file(tmp_path: Path) -> None:
    hashes = text_hashes("one two three four five six")
    assert hashes is not None
    kept = sketches([(2**64 - 1, "a\0b"), (7, "")], [(hashes, "é")])
    (tmp_path / "s.npz").write_bytes(packed(kept))
    (tmp_path / "none.npz").write_bytes(packed(joined([])))
    both = joined([unpacked(tmp_path / "none.npz"), unpacked(tmp_path / "s.npz")])
    assert both.pictures.tolist() == [2**64 - 1, 7] and both.picture_places == ["a\0b", ""]
    assert (both.texts == hashes).all() and both.text_places == ["é"]
    empty = HeldOut(unpacked(tmp_path / "none.npz"), 4, 0.8)
    assert empty.picture(7) is None and empty.text(hashes) is None
