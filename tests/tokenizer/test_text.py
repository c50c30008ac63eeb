"""Text tokenizer: lossless on any UTF-8, special strings are text, and its errors."""

import random
import sys
from pathlib import Path

import pytest

from moma.tokenizer.text import RANKS_FILE, TextTokenizer, read_ranks, write_ranks
from moma.tokenizer.vocab import asset_folder, load_vocabulary, write_vocabulary


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    folder = asset_folder("small")
    return TextTokenizer.load(folder, load_vocabulary(folder))


def _bytes_only(folder: Path) -> TextTokenizer:
    write_ranks(folder / RANKS_FILE, {bytes([i]): i for i in range(256)})
    return TextTokenizer.load(folder, write_vocabulary(folder, text_size=256, image_codes=8, image_grid=(2, 2)))


def _samples() -> list[str]:
    draw = random.Random(0)
    plane = [chr(i) for i in range(0, sys.maxunicode + 1, 97) if not 0xD800 <= i < 0xE000]
    texts = [
        "",
        " ",
        "\n\n \t\r\n",
        "sheaf of rice",
        "It's 1,234.5 o’clock\n\nthen   spaces  ",
        "\x00\x01\x7f",
    ]
    texts += ["👩🏽‍🌾 flag 🇺🇬 keycap 1️⃣", "汉字 العربية हिन्दी ไทย", "e\u0301\u0300", "".join(plane)]
    for _ in range(50):
        raw = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        texts.append(raw.decode("utf-8", errors="replace"))
        texts.append("".join(draw.choices(plane, k=20)))
    return texts


def test_round_trip(small: TextTokenizer, tmp_path: Path) -> None:
    for tokenizer in (small, _bytes_only(tmp_path)):
        vocab = tokenizer.vocab
        for text in _samples():
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode_bytes(ids) == text.encode()
            assert all(vocab.text_start <= i < vocab.text_stop for i in ids)


def test_special_strings_are_text(small: TextTokenizer) -> None:
    text = "<s><|endoftext|><pad></s>"
    assert small.decode(small.encode(text)) == text


def test_other_ids_are_ignored(small: TextTokenizer) -> None:
    vocab = small.vocab
    ids = small.encode("rice")
    mixed = [vocab.bos, vocab.boi, vocab.image_start, vocab.eoi, *ids, vocab.eos, vocab.text_start - 1]
    assert small.decode(mixed) == "rice"


def test_half_a_character_decodes_as_replacement(tmp_path: Path) -> None:
    tokenizer = _bytes_only(tmp_path)
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_digits_stand_alone(small: TextTokenizer) -> None:
    assert len(small.encode("2024")) == 4


def test_names_take_few_tokens(small: TextTokenizer) -> None:
    assert len(small.encode("woman farmer medium-dark skin tone")) <= 9


def test_ranks_file_round_trip(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b" \n\xff": 257}
    write_ranks(tmp_path / RANKS_FILE, ranks)
    assert read_ranks(tmp_path / RANKS_FILE) == ranks


def test_missing_ranks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no file .*text\.tiktoken, need the text ranks: run train_bpe"):
        read_ranks(tmp_path / RANKS_FILE)


def test_damaged_ranks(tmp_path: Path) -> None:
    (tmp_path / RANKS_FILE).write_bytes(b"YQ== 0\n!!! 1\n")
    with pytest.raises(ValueError, match=r"got line 2 of .* need 'base64 rank': copy the file again"):
        read_ranks(tmp_path / RANKS_FILE)


def test_ranks_that_do_not_fit_the_vocabulary(tmp_path: Path) -> None:
    vocab = _bytes_only(tmp_path).vocab
    with pytest.raises(ValueError, match=r"got 255 text tokens, need ranks 0 to 255, each once"):
        TextTokenizer({bytes([i]): i for i in range(255)}, vocab)


def test_ranks_without_a_byte(tmp_path: Path) -> None:
    vocab = _bytes_only(tmp_path).vocab
    ranks = {bytes([i]): i for i in range(255)} | {b"ab": 255}
    with pytest.raises(ValueError, match=r"without the single bytes \[255\], need all 256"):
        TextTokenizer(ranks, vocab)
