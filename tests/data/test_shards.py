"""Shards: what is written is read, across shards; every damage is an error, also one that comes while they are read."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from moma.data.shards import (
    MANIFEST,
    open_corpus,
    open_source,
    read_manifest,
    source_record,
    token_dtype,
    write_manifest,
    write_shard,
    write_shards,
)
from moma.tokenizer.documents import Document


def _documents(n: int = 23, mask: bool = False, top: int = 60000) -> list[Document]:
    draw = np.random.default_rng(0)
    made = []
    for _ in range(n):
        lengths = draw.integers(1, 9, draw.integers(1, 5))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = draw.integers(0, top, offsets[-1])
        targets = draw.integers(0, 2, offsets[-1]).astype(np.uint8) if mask else None
        made.append(Document(tokens, offsets, draw.integers(0, 3, len(lengths)).astype(np.int32), targets))
    return made


def _corpus(folder: Path, documents: list[Document], shard_tokens: int = 50, dtype: str = "uint16") -> Path:
    records = write_shards(folder / "train" / "a", documents, shard_tokens, dtype)
    write_manifest(
        folder,
        {
            "name": "t",
            "vocab_hash": "h1",
            "tokenizer": "small",
            "token_dtype": dtype,
            "splits": {"train": {"a": source_record("pair", records)}, "val": {}},
        },
    )
    return folder


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_written_is_read(tmp_path: Path, dtype: str, mask: bool) -> None:
    documents = _documents(mask=mask, top=60000 if dtype == "uint16" else 200000)
    source = open_source(_corpus(tmp_path, documents, dtype=dtype), "train", "a")
    source = pickle.loads(pickle.dumps(source))  # as a data loader's worker gets it
    assert len(source._shards) > 3
    assert source.n_documents == len(documents)
    assert source.document_tokens.tolist() == [len(d.tokens) for d in documents]
    assert source.document_images.tolist() == [d.segment_images.sum() for d in documents]
    assert (source.document_tokens.dtype, source.document_images.dtype) == (np.int64, np.int32)
    for i, document in enumerate(documents):
        offsets, images = source.segments(i)
        assert np.array_equal(offsets, document.segment_offsets)
        assert np.array_equal(images, document.segment_images)
        n = len(document.tokens)
        assert source.read(i, 0, n).tolist() == document.tokens.tolist()
        assert source.read(i, n // 2, n).tolist() == document.tokens[n // 2 :].tolist()
        expected = document.mask if mask else np.ones(n, np.uint8)
        assert source.read_mask(i, 1, n).tolist() == expected[1:].tolist()


def test_segments_tile_documents(tmp_path: Path) -> None:
    source = open_source(_corpus(tmp_path, _documents()), "train", "a")
    for i in range(source.n_documents):
        offsets, _ = source.segments(i)
        assert offsets[0] == 0 and offsets[-1] == source.document_tokens[i] and (np.diff(offsets) > 0).all()


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    records = [write_shard(tmp_path / name, 0, _documents(), "uint16") for name in ("a", "b")]
    assert records[0] == records[1] and records[0]["index_sha256"]


def test_every_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync, rename = set(), os.fsync, os.replace

    def remember(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def need_synced(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced, target
        rename(source, target)

    monkeypatch.setattr("moma.data.shards.os.fsync", remember)
    monkeypatch.setattr("moma.data.shards.os.replace", need_synced)
    record = write_shard(tmp_path, 0, _documents(mask=True), "uint16")
    files = {path.name: path for path in tmp_path.iterdir()}
    assert sorted(files) == [f"shard-00000.{name}" for name in ("index.npz", "mask.bin", "tokens.bin")]
    for field, name in (("sha256", "tokens.bin"), ("index_sha256", "index.npz")):
        assert hashlib.sha256(files[f"shard-00000.{name}"].read_bytes()).hexdigest() == record[field]


def test_out_of_range(tmp_path: Path) -> None:
    source = open_source(_corpus(tmp_path, _documents()), "train", "a")
    with pytest.raises(IndexError, match="got document 23, need 0 to 22"):
        source.segments(23)
    with pytest.raises(IndexError, match=r"got tokens \[0, 999\) of document 0, need a range in"):
        source.read(0, 0, 999)


def test_empty_shard_leaves_no_file(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "a", 0, [], "uint16")
    assert record["documents"] == 0 and not (tmp_path / "a").exists()
    assert source_record("text", [record]) == {
        "kind": "text",
        "shards": [],
        "tokens": 0,
        "documents": 0,
        "images": 0,
    }


def test_token_dtype(tmp_path: Path) -> None:
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "uint32")
    with pytest.raises(ValueError, match=r"got token ids from .* need ids that fit uint16: use token_dtype"):
        write_shard(tmp_path, 0, _documents(top=200000), "uint16")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no manifest\.json in .* need a prepared corpus: run `moma prepare`"):
        read_manifest(tmp_path)


def test_other_format(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match=r"got corpus format 0 .* need 1: prepare the corpus again"):
        read_manifest(tmp_path)


def test_other_tokenizer(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, _documents())
    assert list(open_corpus(corpus, "train", "h1")) == ["a"]
    with pytest.raises(ValueError, match=r"got .* hash h1, need the run's tokenizer with hash h2: prepare it again"):
        open_corpus(corpus, "train", "h2")


def test_unknown_source_and_split(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, _documents())
    with pytest.raises(ValueError, match=r"got source 'aa', need a source of .* did you mean 'a'\?"):
        open_source(corpus, "train", "aa")
    with pytest.raises(ValueError, match=r"got source 'zz', .* choose one of \['a'\]"):
        open_source(corpus, "train", "zz")
    with pytest.raises(ValueError, match=r"got split 'test', need one of \['train', 'val'\]"):
        open_source(corpus, "test", "a")


@pytest.mark.parametrize("file", ["shard-00001.tokens.bin", "shard-00001.mask.bin"])
def test_truncated_shard(tmp_path: Path, file: str) -> None:
    path = _corpus(tmp_path, _documents(mask=True)) / "train" / "a" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"got {len(whole) - 1} bytes in .*{file}, need {len(whole)} as in the"):
        open_source(tmp_path, "train", "a")


@pytest.mark.parametrize("file", ["shard-00001.tokens.bin", "shard-00001.mask.bin"])
def test_a_shard_that_is_cut_short_while_it_is_read(tmp_path: Path, file: str) -> None:
    """A memory map would end the process here, by a bus error and without a word."""
    source = open_source(_corpus(tmp_path, _documents(n=60, mask=True), shard_tokens=400), "train", "a")
    first, second = source._first_document[1:3]
    for doc in range(second):
        source.read(doc, 0, 1)
        source.read_mask(doc, 0, 1)
    os.truncate(tmp_path / "train" / "a" / file, 7)
    read = source.read if "tokens" in file else source.read_mask
    with pytest.raises(ValueError, match=rf"got 0 of \d+ bytes at \d+ in .*{file}, need the file as it was when the"):
        read(int(second) - 1, 0, 1)
    assert len(read(int(first) - 1, 0, 1)) == 1  # other shards go on


def test_a_shard_that_cannot_be_read(tmp_path: Path) -> None:
    source = open_source(_corpus(tmp_path, _documents()), "train", "a")
    path = tmp_path / "train" / "a" / "shard-00000.tokens.bin"
    path.unlink()
    with pytest.raises(
        ValueError, match=r"got .*shard-00000.tokens.bin that cannot be read \(No such file or directory"
    ):
        source.read(0, 0, 1)
    path.mkdir()
    with pytest.raises(
        ValueError, match=r"cannot be read \(Is a directory\), need every shard of the corpus: check its"
    ):
        source.read(0, 0, 1)


def test_a_shard_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = _corpus(tmp_path, _documents()) / "train" / "a" / "shard-00001.tokens.bin"
    monkeypatch.setattr("moma.data.shards.os.access", lambda path, _: path != forbidden)  # root may read everything
    with pytest.raises(ValueError, match=r"got .*shard-00001.tokens.bin that cannot be read \(Permission denied\)"):
        open_source(tmp_path, "train", "a")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + 40 * b"\0"])
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = _corpus(tmp_path, _documents()) / "train" / "a" / "shard-00001.index.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*shard-00001.index.npz that cannot be read \("):
        open_source(tmp_path, "train", "a")
    whole = path.with_name("shard-00000.index.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"got .*shard-00001.index.npz that cannot be read \("):
        open_source(tmp_path, "train", "a")


def test_missing_shard(tmp_path: Path) -> None:
    (_corpus(tmp_path, _documents()) / "train" / "a" / "shard-00001.index.npz").unlink()
    with pytest.raises(ValueError, match=r"got no file .*shard-00001\.index\.npz, need every shard of the manifest"):
        open_source(tmp_path, "train", "a")


def test_index_of_another_shard(tmp_path: Path) -> None:
    folder = _corpus(tmp_path, _documents()) / "train" / "a"
    (folder / "shard-00001.index.npz").write_bytes((folder / "shard-00000.index.npz").read_bytes())
    with pytest.raises(ValueError, match=r"got an index .* that does not tile its \d+ documents, need the one"):
        open_source(tmp_path, "train", "a")
