"""Vocabulary file: layout, hash, and every error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moma.tokenizer.text import RANKS_FILE, write_ranks
from moma.tokenizer.vocab import (
    IMAGE_FILES,
    VOCAB_FILE,
    asset_folder,
    check_vocabulary,
    load_vocabulary,
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
