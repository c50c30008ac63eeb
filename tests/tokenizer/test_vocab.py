"""Vocabulary file: layout, hash, and every error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import moma.tokenizer.vocab
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import (
    IMAGE_FILES,
    VOCAB_FILE,
    TextOptions,
    asset_folder,
    check_vocabulary,
    load_vocabulary,
    text_options,
    write_vocabulary,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ranks(tmp_path / RANKS_FILE, {bytes([i]): i for i in range(256)})
    write_vocabulary(tmp_path, text_size=256, image_codes=16, image_grid=(2, 3))
    return tmp_path


def _change(folder: Path, **changes: object) -> None:
    stored = json.loads((folder / VOCAB_FILE).read_text())
    (folder / VOCAB_FILE).write_text(json.dumps(stored | changes))


def test_shipped_layout() -> None:
    vocab = load_vocabulary(asset_folder("small"))
    assert (vocab.bos, vocab.pad, vocab.eos) == (0, 1, 2)
    assert (vocab.image_start, vocab.image_stop, vocab.eoi, vocab.boi) == (4, 1028, 1028, 1029)
    assert (vocab.text_start, vocab.text_stop, vocab.size) == (1088, 5184, 5184)
    assert vocab.tokens_per_image == 64 and len(vocab.hash) == 16
    assert text_options(asset_folder("small")) == TextOptions()


@pytest.mark.parametrize(("name", "text_size"), [("openstax16k", 16384), ("openstax32k", 32768)])
def test_textbook_assets(name: str, text_size: int) -> None:
    folder = asset_folder(name)
    vocab = load_vocabulary(folder)
    assert (vocab.image_start, vocab.image_stop, vocab.eoi, vocab.boi) == (4, 4100, 4100, 4101)
    assert (vocab.text_start, vocab.text_stop, vocab.image_grid) == (4160, 4160 + text_size, (16, 16))
    assert text_options(folder) == TextOptions(special_tokens={"<sep>": 4102})
    text = TextTokenizer.load(folder, vocab)
    sample = "Figure 2.1 The Earth's crust, in 1906: é 🌋\n\n  (credit: USGS)"
    assert text.decode(text.encode(sample)) == sample and len(text.encode(" temperature of the atmosphere")) == 4


def test_hash_of_older_assets() -> None:
    """Every corpus and checkpoint made with it carries this."""
    assert load_vocabulary(asset_folder("small")).hash == "4b53d900a411a8ae"


def test_written_is_read(folder: Path) -> None:
    vocab = load_vocabulary(folder)
    assert (vocab.image_stop, vocab.text_start, vocab.size, vocab.image_grid) == (20, 64, 320, (2, 3))


def test_hash_follows_every_file(folder: Path) -> None:
    hashes = [load_vocabulary(folder).hash]
    write_ranks(folder / RANKS_FILE, {bytes([i]): 255 - i for i in range(256)})
    hashes.append(load_vocabulary(folder).hash)
    for name in IMAGE_FILES:
        (folder / name).write_bytes(b"a")
    hashes.append(load_vocabulary(folder).hash)
    for name in IMAGE_FILES:
        (folder / name).write_bytes(b"b")
        hashes.append(load_vocabulary(folder).hash)
    _change(folder, pad=3)
    hashes.append(load_vocabulary(folder).hash)
    assert len(set(hashes)) == len(hashes)
    (folder / VOCAB_FILE).write_text(json.dumps(json.loads((folder / VOCAB_FILE).read_text()), indent=7))
    assert load_vocabulary(folder).hash == hashes[-1]  # spelling of the JSON does not count


def test_text_options(folder: Path) -> None:
    options = {"digits": "triple", "whitespace": "single", "special_tokens": ["<sep>", "<call>"]}
    hashes = {load_vocabulary(folder).hash}
    assert not {"digits", "whitespace", "special_tokens"} & json.loads((folder / VOCAB_FILE).read_text()).keys()
    for name, value in options.items():
        vocab = write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(2, 3), **{name: value})
        hashes.add(vocab.hash)
        assert vocab.text_start == 64
    assert len(hashes) == 4
    write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(2, 3), **options)
    assert text_options(folder) == TextOptions("triple", "single", {"<sep>": 22, "<call>": 23})
    names = [f"<{i}>" for i in range(43)]
    assert write_vocabulary(
        folder, text_size=256, image_codes=16, image_grid=(2, 3), special_tokens=names
    ).text_start == 128  # fmt: skip


def test_special_tokens_that_do_not_fit(folder: Path) -> None:
    vocab = load_vocabulary(folder)
    for specials, message in (
        ({"<sep>": 64}, "got special token '<sep>' and text ids that overlap at 64, need one meaning: move one"),
        ({"<sep>": 2}, "got special token '<sep>' and eos ids that overlap|got eos and special token '<sep>' ids that"),
        ({"<a>": 30, "<b>": 30}, "got special token '<a>' and special token '<b>' ids that overlap at 30"),
        ({"<sep>": 320}, r"got special token '<sep>' ids \[320, 321\), need a range inside \[0, 320\)"),
        ({"": 30}, "got a special token without a name, need one like <sep>: name id 30"),
    ):
        with pytest.raises(ValueError, match=message):
            check_vocabulary(vocab, specials)
        _change(folder, special_tokens=specials)
        with pytest.raises(ValueError, match=message):
            load_vocabulary(folder)
    with pytest.raises(ValueError, match=r"got special tokens \['<a>', '<a>'\], need each name once: drop the second"):
        write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(2, 3), special_tokens=["<a>", "<a>"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos": "0"}, r"got .*vocab\.json\.bos='0' \(str\), need int"),
        ({"pad": True}, r"got .*vocab\.json\.pad=True \(bool\), need int"),
        ({"image_grid": 4}, r"got .*vocab\.json\.image_grid=4 \(int\), need"),
        ({"extra_modalities": [["audio", 30]]}, r"got .*extra_modalities\.0=\['audio', 30\] \(list\), need"),
        ({"digits": "double"}, r"got .*vocab\.json\.digits=double, need one of single, triple"),
        ({"special_tokens": ["<sep>"]}, r"got .*special_tokens=\['<sep>'\] \(list\), need a mapping of names to int"),
        ({"special_tokens": {"<sep>": 1.5}}, r"got .*special_tokens\.<sep>=1\.5 \(float\), need int"),
    ],
)
def test_wrong_types(folder: Path, changes: dict, message: str) -> None:
    _change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(folder)


def test_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (
        ("{", r"got .*vocab\.json that is no JSON .*, need a whole file: copy it again"),
        ("[]", r"got .*vocab\.json that holds a list, need an object: copy the file again"),
    ):
        (folder / VOCAB_FILE).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_vocabulary(folder)
    monkeypatch.setattr(moma.tokenizer.vocab, "MAX_VOCAB_BYTES", 1)
    with pytest.raises(ValueError, match=r"got .*vocab\.json of 2 bytes, need at most 1: it is no file of this kind"):
        load_vocabulary(folder)


def test_extra_modality(folder: Path) -> None:
    _change(folder, extra_modalities=[["audio", 30, 40]])
    assert load_vocabulary(folder).modalities == ("text", "image", "audio")


def test_missing_file(folder: Path) -> None:
    (folder / RANKS_FILE).unlink()
    with pytest.raises(ValueError, match=r"without vocab\.json or text\.tiktoken, need both: check"):
        load_vocabulary(folder)


def test_half_an_image_tokenizer(folder: Path) -> None:
    (folder / IMAGE_FILES[0]).write_text("{}")
    with pytest.raises(ValueError, match=r"got vqgan\.json alone .* need vqgan\.json and vqgan\.safetensors"):
        load_vocabulary(folder)


def test_unknown_format(folder: Path) -> None:
    _change(folder, format=2)
    with pytest.raises(ValueError, match="need format 1: train the tokenizer again"):
        load_vocabulary(folder)


def test_unknown_field(folder: Path) -> None:
    _change(folder, boj=7)
    with pytest.raises(ValueError, match=r"unknown fields \['boj'\] and without \[\], need exactly"):
        load_vocabulary(folder)


def test_range_outside(folder: Path) -> None:
    _change(folder, size=300)
    with pytest.raises(ValueError, match=r"got text ids \[64, 320\), need a range inside \[0, 300\)"):
        load_vocabulary(folder)


def test_overlap(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got eoi and image ids that overlap at 4, need one meaning: move one"):
        check_vocabulary(replace(load_vocabulary(folder), eoi=4, image_start=4))


def test_bad_grid_and_multiple(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got image_grid \(0, 3\), need \(rows, columns\)"):
        write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(0, 3))
    with pytest.raises(ValueError, match="got multiple=0, need at least 1: use 64"):
        write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(2, 3), multiple=0)


def test_unknown_asset() -> None:
    with pytest.raises(ValueError, match=r"got tokenizer 'smal', need a folder .*: did you mean 'small'\?"):
        asset_folder("smal")
    with pytest.raises(ValueError, match=r"choose one of .* or give its path"):
        asset_folder("zzz")
