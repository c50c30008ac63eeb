"""Text tokenizer: lossless on any UTF-8, special strings are text, and its errors."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import regex

from moma.tokenizer.text import (
    RANKS_FILE,
    TextTokenizer,
    rank_coder,
    read_ranks,
    sound_text,
    word_pattern,
    write_ranks,
)
from moma.tokenizer.vocab import TextOptions, asset_folder, load_vocabulary, write_vocabulary

# Of the text in `test_older_asset_encodes_as_before`, from before the text options.
OLD_IDS = [
    *(1440, 2837, 1308, 1260, 1341, 1327, 1190, 1721, 1323, 1260, 1341, 1322, 1210, 1308, 1105, 1103, 1105, 1107),
    *(1099, 1286, 1286, 1308, 2210, 1349, 3844, 2367, 1171, 1174, 1400),
]


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    folder = asset_folder("small")
    return TextTokenizer.load(folder, load_vocabulary(folder))


def _bytes_and(folder: Path, *tokens: bytes, **options: Any) -> TextTokenizer:
    """A tokenizer of the 256 bytes and `tokens`, in order of rank."""
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    write_ranks(folder / RANKS_FILE, ranks)
    vocab = write_vocabulary(folder, text_size=len(ranks), image_codes=8, image_grid=(2, 2), **options)
    return TextTokenizer.load(folder, vocab)


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
    for tokenizer in (small, _bytes_and(tmp_path)):
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
    tokenizer = _bytes_and(tmp_path)
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_digits_stand_alone(small: TextTokenizer) -> None:
    assert len(small.encode("2024")) == 4


def _words(tokenizer: TextTokenizer, text: str) -> list[bytes]:
    return [tokenizer.decode_bytes([id_]) for id_ in tokenizer.encode(text)]


def test_digits_in_groups_of_three(tmp_path: Path) -> None:
    numbers = [b"20", b"202", b"2024"]
    assert _words(_bytes_and(tmp_path, *numbers, digits="triple"), "2024") == [b"202", b"4"]
    assert _words(_bytes_and(tmp_path, *numbers), "2024") == [b"2", b"0", b"2", b"4"]


def test_every_space_alone(tmp_path: Path) -> None:
    tokens = [b"  ", b"   ", b" a", b"\n\n", b".\n"]
    text = "a    a.\n\n\ta"
    assert _words(_bytes_and(tmp_path, *tokens), text) == [b"a", b"   ", b" a", b".", b"\n\n", b"\t", b"a"]
    single = [b"a", b" ", b" ", b" ", b" a", b".", b"\n", b"\n", b"\t", b"a"]
    assert _words(_bytes_and(tmp_path, *tokens, whitespace="single"), text) == single


@pytest.mark.parametrize("digits", ["single", "triple"])
@pytest.mark.parametrize("whitespace", ["grouped", "single"])
def test_words_cover_the_text(digits: Any, whitespace: Any) -> None:
    pattern = regex.compile(word_pattern(TextOptions(digits, whitespace)))
    for text in _samples():
        assert "".join(pattern.findall(text)) == text


def test_pattern_of_older_assets() -> None:
    """Assets without text options were made with this pattern: their hash promises it."""
    assert word_pattern(TextOptions()) == (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def test_older_asset_encodes_as_before(small: TextTokenizer) -> None:
    text = "woman farmer 👩‍🌾 2024,\n\n  In the beginning 'twas"
    ids = small.encode(text)
    assert ids == OLD_IDS and small.decode(ids) == text


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = _bytes_and(tmp_path, special_tokens=("<sep>", "<call>"))
    vocab = tokenizer.vocab
    assert tokenizer.specials == {"<sep>": 14, "<call>": 15} and (vocab.boi, vocab.text_start) == (13, 64)
    assert tokenizer.special("<call>") == 15
    ids = tokenizer.encode("a<sep>b")
    assert tokenizer.decode([*ids, 14]) == "a<sep>b" and min(ids) >= 64
    with pytest.raises(ValueError, match=r"got the special token '<sepp>', need one of .*: did you mean <sep>\?"):
        tokenizer.special("<sepp>")
    with pytest.raises(ValueError, match=r"need one of \[\]: train the tokenizer with it among special_tokens"):
        _bytes_and(tmp_path).special("<sep>")


def test_surrogates_become_replacements(small: TextTokenizer) -> None:
    assert sound_text("a\ud800b") == "a\ufffdb" and sound_text("\ud83d\ude42 é") == "🙂 é"
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"


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
    vocab = _bytes_and(tmp_path).vocab
    with pytest.raises(ValueError, match=r"got 255 text tokens, need ranks 0 to 255, each once"):
        rank_coder({bytes([i]): i for i in range(255)}, vocab, TextOptions())


def test_ranks_without_a_byte(tmp_path: Path) -> None:
    vocab = _bytes_and(tmp_path).vocab
    ranks = {bytes([i]): i for i in range(255)} | {b"ab": 255}
    with pytest.raises(ValueError, match=r"without the single bytes \[255\], need all 256"):
        rank_coder(ranks, vocab, TextOptions())
