"""Interleaved documents: layout of ids and segments, round trip, and errors."""

import numpy as np
import pytest
from PIL import Image

from moma.tokenizer.documents import Picture, Text, decode_document, encode_document
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import write_vocabulary


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("asset")
    write_ranks(folder / RANKS_FILE, {bytes([i]): i for i in range(256)})
    return TextTokenizer.load(folder, write_vocabulary(folder, text_size=256, image_codes=8, image_grid=(2, 2)))


CODES = np.array([[0, 7], [3, 1]])


def test_layout(text: TextTokenizer) -> None:
    vocab = text.vocab
    document = encode_document([[Picture(CODES), Text("ab")], Text("c"), [Text("")], [Text("d")]], text, vocab)
    letter = {c: vocab.text_start + ord(c) for c in "abcd"}
    picture = [vocab.boi, *(4 + CODES.reshape(-1)), vocab.eoi]
    expected = [vocab.bos, *picture, letter["a"], letter["b"], letter["c"], letter["d"], vocab.eos]
    assert document.tokens.tolist() == expected
    assert document.segment_offsets.tolist() == [0, 9, 10, 12]  # BOS in the first, EOS in the last
    assert document.segment_images.tolist() == [1, 0, 0]
    assert (document.tokens.dtype, document.segment_offsets.dtype, document.segment_images.dtype) == (
        np.int64,
        np.int64,
        np.int32,
    )


def test_what_is_not_learned_is_never_a_target(text: TextTokenizer) -> None:
    asked = [[Picture(CODES, learn=False), Text("ab", learn=False), Text("cd")], Text("e", learn=False), Text("f")]
    document = encode_document(asked, text, text.vocab)
    assert document.mask is not None and document.mask.dtype == np.uint8
    #                                    bos  picture  ab      cd      e    f    eos
    assert document.mask.tolist() == [1, *[0] * 6, *[0] * 2, *[1] * 2, 0, 1, 1]
    assert encode_document([[Picture(CODES), Text("ab")]], text, text.vocab).mask is None


def test_round_trip(text: TextTokenizer) -> None:
    parts = [Text("before <s> "), Picture(CODES), Picture(CODES[::-1]), Text("ünter 👩🏽‍🌾"), Picture(CODES)]
    document = encode_document([parts[:2], parts[2:]], text, text.vocab)
    found = decode_document(document.tokens, text, text.vocab)
    assert [type(part) for part in found] == [type(part) for part in parts]
    for got, put in zip(found, parts, strict=True):
        if isinstance(put, Text):
            assert got == put
        else:
            assert np.array_equal(got.content, put.content.reshape(-1))
    again = encode_document([found], text, text.vocab)
    assert np.array_equal(again.tokens, document.tokens)


def test_text_cannot_forge_a_picture(text: TextTokenizer) -> None:
    vocab = text.vocab
    document = encode_document([Text("<boi> <image> \x04\x05")], text, vocab)
    assert not np.isin(document.tokens[1:-1], range(vocab.text_start)).any()


def test_no_content(text: TextTokenizer) -> None:
    for segments in ([], [Text("")], [[]]):
        with pytest.raises(ValueError, match="got a document without text or pictures, need at least one"):
            encode_document(segments, text, text.vocab)


def test_picture_without_codes(text: TextTokenizer) -> None:
    picture = Picture(Image.new("RGB", (2, 2)), place="a.png")
    with pytest.raises(ValueError, match=r"got picture a\.png without codes, need codes: run ImageTokenizer"):
        encode_document([picture], text, text.vocab)


@pytest.mark.parametrize("codes", [[1, 2, 3], [1, 2, 3, 8], [1, 2, 3, -1], []])
def test_codes_of_another_tokenizer(text: TextTokenizer, codes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"image codes from .* need 4 in \[0, 8\): use the image tokenizer that"):
        encode_document([Picture(np.array(codes, np.int64))], text, text.vocab)


def test_broken_picture_block(text: TextTokenizer) -> None:
    tokens = encode_document([[Text("a"), Picture(CODES)]], text, text.vocab).tokens
    for broken in (tokens[:5], np.delete(tokens, 4), np.insert(tokens, 4, text.vocab.text_start)):
        with pytest.raises(ValueError, match="got a picture at token 2 that is not begin, 4 codes, end; need a whole"):
            decode_document(broken, text, text.vocab)
