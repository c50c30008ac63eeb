"""Interleaved documents: what is taken of them, hostile lines, and where their pictures may lie."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moma.config import compose
from moma.data.sources import Broken, RawDocument, split_of
from moma.data.sources.interleaved import InterleavedConfig

List = Callable[..., list[RawDocument | Broken]]
RECORD = {
    "id": "d1",
    "segs": [{"t": "one "}, {"i": "a.png", "cap": "red", "alt": "a red square"}, {"t": "two"}],
}


@pytest.fixture
def mine(tmp_path: Path, png: bytes, listing: List) -> Callable[..., list[RawDocument | Broken]]:
    """`mine(record, ..., **options)`: the listing of a file of these records with a folder of one picture."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png)

    def list_(*records: object, **options: object) -> list[RawDocument | Broken]:
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (tmp_path / "documents.jsonl").write_text("".join(line + "\n" for line in lines))
        places = {"documents": tmp_path / "documents.jsonl", "pictures": tmp_path / "pictures"}
        return listing("interleaved", **(places | options))

    return list_


@pytest.mark.parametrize("tar", [False, True])
def test_pages(mine, tmp_path: Path, png: bytes, tarred, shown, tar: bool) -> None:
    pictures = tarred(tmp_path / "p.tar", {"./a.png": png}) if tar else tmp_path / "pictures"
    first, second = mine(RECORD, RECORD | {"id": 2, "key": "k"}, pictures=pictures)
    assert (first.id, first.key, second.id, second.key, first.split) == ("d1", "d1", "2", "k", None)
    assert shown(first) == [["one "], [png, "red\na red square"], ["two"]]


def test_captions_and_split(mine, shown, png: bytes) -> None:
    (document,) = mine(RECORD, captions="alt", split="val")
    assert shown(document)[1] == [png, "a red square"] and split_of(document, 0.0, "s") == "val"
    assert shown(*mine(RECORD, captions="none"))[1] == [png]
    assert shown(*mine(RECORD, captions="cap", min_caption=12))[1] == [png, "red"]  # the description is long enough
    assert shown(*mine(RECORD, min_caption=13)) == [["one "], ["two"]]
    assert shown(*mine({"id": "d", "segs": [{"i": "a.png", "cap": None, "alt": ""}]})) == [[png]]
    assert mine({"id": "d", "segs": [{"i": "a.png"}]}, min_caption=1) == []


def test_pictures_and_prose_stay_on_their_page_s_side(mine, shown, png: bytes) -> None:
    page = {"id": "p", "key": "k", "segs": [*RECORD["segs"], {"i": "a.png", "cap": "x" * 9}, {"i": "a.png"}]}
    pictures = mine(page, take="pictures", captions="cap", order="picture_first", split="train")
    assert [(d.id, d.key, d.split) for d in pictures] == [(f"p#{i}", "k", "train") for i in range(3)]
    assert [shown(d) for d in pictures] == [[[png, "red"]], [[png, "x" * 9]], [[png]]]
    short = mine(page, take="pictures", captions="cap", order="text_first", max_caption=8)
    assert [shown(d) for d in short] == [[["red", png]], [[png]]]
    (prose,) = mine(page, take="prose")
    assert (prose.id, prose.key, shown(prose)) == ("p", "k", [["one "], ["two"]])
    assert mine({"id": "p", "segs": [{"i": "a.png"}]}, take="prose") == []


def test_half_of_the_pairs_begin_with_the_picture(mine, shown, png: bytes) -> None:
    pairs = mine(*({**RECORD, "id": f"d{i}"} for i in range(200)), take="pictures")
    first = [shown(pair)[0][0] == png for pair in pairs]
    assert 70 < sum(first) < 130 and first == [shown(pair)[0][0] == png for pair in mine(
        *({**RECORD, "id": f"d{i}"} for i in range(200)), take="pictures")]  # fmt: skip


def test_prepared_folder_as_a_data_option(tmp_path: Path, png: bytes, tarred, listing: List) -> None:
    for split in ("train", "val"):
        page = {"id": f"{split}-page", "segs": [{"t": split}, {"i": f"{split}.png", "cap": "red"}]}
        (tmp_path / f"{split}.jsonl.xz").write_bytes(lzma.compress(json.dumps(page).encode()))
        tarred(tmp_path / f"{split}.tar", {f"{split}.png": png})
    config = compose("prepare", ["data=openstax256", f"folder={tmp_path}"]).config
    made = {name: list(source_documents(source)) for name, source in config.sources.items()}
    assert {name: [(d.id, d.key, d.split) for d in documents] for name, documents in made.items()} == {
        "pairs": [("train-page#0", "train-page", "train"), ("val-page#0", "val-page", "val")],
        "prose": [("train-page", "train-page", "train"), ("val-page", "val-page", "val")],
    }
    assert all(part.content() == png for d in made["pairs"] for part in d.segments[0] if hasattr(part, "content"))


def source_documents(config: InterleavedConfig) -> list[RawDocument]:
    from moma.data.sources import source_of

    return list(source_of(config).documents(config))


@pytest.mark.parametrize(
    "record",
    [
        {"id": "d"},
        {"segs": []},
        {"id": "d", "segs": {}},
        {"id": "d", "segs": [{"x": 1}]},
        {"id": "d", "segs": [["t"]]},
        {"id": "d", "segs": [{"t": 7}]},
        {"id": "d", "segs": [{"t": None}]},
        {"id": "d", "segs": [{"i": 7}]},
        {"id": "d", "segs": [{"i": ""}]},
        {"id": "d", "segs": [{"i": "a\0.png"}]},
        {"id": "d", "segs": [{"i": "a.png", "cap": ["red"]}]},
        {"id": "d", "segs": [{"i": "a.png", "cap": 0}]},
        {"id": "d", "segs": [{"i": "a.png", "alt": {"en": "red"}}]},
        {"id": ["d"], "segs": []},
        {"id": True, "segs": []},
        {"id": 1.5, "segs": []},
        {"id": "d", "key": None, "segs": []},
        7,
        None,
        [],
    ],
)
def test_a_record_of_another_shape_is_broken(mine, tmp_path: Path, record: object) -> None:
    first, broken, last = mine(RECORD, record, RECORD)
    assert (first.id, broken.kind, last.id) == ("d1", "wrong_type", "d1")
    assert broken.place == f"{tmp_path}/documents.jsonl:2" and broken.reason.startswith("got ")
    assert "need" in broken.reason


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('{"id": "d", "segs": [', "unreadable"),
        ('{"id": "d", "segs": []}', "empty"),
        ('{"id": "d", "segs": [{"t": ""}]}', "empty"),
        ('{"id": "", "segs": [{"t": "x"}]}', "wrong_type"),
        ("[" * 100_000, "unreadable"),
        ('{"id": "d", "segs": [], "n": ' + "9" * 5000 + "}", "unreadable"),
        ('{"id": "\\ud800", "segs": []}', "unreadable"),
        ('{"id": "d", "segs": [{"t": "\\udfff"}]}', "unreadable"),
        ('{"id": ' + "9" * 4000 + ', "segs": []}', "wrong_type"),
        ('{"id": "' + "d" * 1001 + '", "segs": []}', "too_large"),
        ('{"id": "d", "segs": [{"i": "' + "a" * 1001 + '"}]}', "too_large"),
        ('{"id": NaN, "segs": []}', "wrong_type"),
        ('{"id": "d", "segs": [{"i": "../documents.jsonl"}]}', "outside"),
        ('{"id": "d", "segs": [{"i": "/etc/passwd"}]}', "outside"),
        ('{"id": "d", "segs": [{"i": "link.png"}]}', "outside"),
    ],
)
@pytest.mark.parametrize("tar", [False, True])
def test_hostile_lines(mine, tmp_path: Path, png: bytes, tarred, line: str, kind: str, tar: bool) -> None:
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "documents.jsonl")
    pictures = tarred(tmp_path / "p.tar", {"a.png": png}) if tar else tmp_path / "pictures"
    items = mine(RECORD, line, RECORD, pictures=pictures)
    assert items[0].id == items[2].id == "d1"
    if tar and "link" in line:
        with pytest.raises(FileNotFoundError):
            items[1].segments[0][0].content()
    else:
        assert isinstance(items[1], Broken) and items[1].kind == kind


def test_a_long_line_is_passed_over(mine, tmp_path: Path) -> None:
    long = json.dumps({"id": "d", "segs": [{"t": "x" * 10_000_000}]})
    first, broken, last = mine(RECORD, long, RECORD)
    assert (first.id, broken.kind, last.id) == ("d1", "too_large", "d1")
    assert "need at most 8388608" in broken.reason and broken.place.endswith(":2")


def test_line_ends_byte_order_mark_and_other_encodings(mine, tmp_path: Path) -> None:
    path, record = tmp_path / "d.jsonl", json.dumps(RECORD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + record + b"\r\n\n" + '{"id": "caf\u00e9"}'.encode("latin-1") + b"\n" + record)
    first, broken, last = mine(documents=path)
    assert (first.id, broken.kind, last.id) == ("d1", "unreadable", "d1")
    assert "got a line that is no UTF-8" in broken.reason and broken.place == f"{path}:3"
    path.write_bytes('{"id": "d"}'.encode("utf-16"))
    assert [item.kind for item in mine(documents=path)] == ["unreadable"]


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_documents(mine, tmp_path: Path, suffix: str) -> None:
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd}[suffix]
    whole = compress(b"".join(json.dumps({**RECORD, "id": f"{i * i}"}).encode() + b"\n" for i in range(500)))
    path = tmp_path / f"d.jsonl.{suffix}"
    path.write_bytes(whole)
    assert [item.id for item in mine(documents=path)] == [f"{i * i}" for i in range(500)]
    middle = len(whole) // 2
    changed = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 20]) + whole[middle + 20 :]
    for damaged in (whole[:middle], changed, b"plain text"):
        path.write_bytes(damaged)
        other = tmp_path / "e.jsonl"
        other.write_text(json.dumps(RECORD))
        *_, broken, last = mine(documents=f"{tmp_path}/{{d.jsonl.{suffix},e.jsonl}}")
        assert broken.kind == "unreadable" and "need a whole one" in broken.reason and last.id == "d1"


def test_a_bomb_is_given_up(mine, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    for unit in (b"\n", b"x"):  # lines without end, or a line without end
        path.write_bytes(gzip.compress(unit * 80_000_000, compresslevel=6))
        (broken,) = mine(documents=path)
        assert broken.kind == "too_large" and "need no bomb" in broken.reason


def test_a_missing_picture_is_found_when_it_is_opened(mine, tmp_path: Path, tarred) -> None:
    for pictures in (tmp_path / "pictures", tarred(tmp_path / "p.tar", {})):
        (document,) = mine({"id": "d", "segs": [{"i": "b.png"}]}, pictures=pictures)
        with pytest.raises(OSError, match=r"b\.png"):
            document.segments[0][0].content()


def test_what_is_no_plain_file_is_refused_when_it_is_opened(mine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    (document,) = mine({"id": "d", "segs": [{"i": "pipe.png"}]})
    with pytest.raises(ValueError, match=r"got .*pipe\.png, which is no plain file, need a picture: remove it"):
        document.segments[0][0].content()


def test_a_huge_picture_is_refused_when_it_is_opened(mine, tmp_path: Path) -> None:
    with open(tmp_path / "pictures" / "b.png", "wb") as file:
        file.truncate(2**36)
    (document,) = mine({"id": "d", "segs": [{"i": "b.png"}]})
    with pytest.raises(ValueError, match=r"got a picture of 68719476736 bytes, need at most 67108864"):
        document.segments[0][0].content()


def test_unreadable_tar(mine, tmp_path: Path, png: bytes, tarred) -> None:
    path = tarred(tmp_path / "p.tar", {"a.png": png})
    whole = path.read_bytes()
    for damaged in (gzip.compress(whole), lzma.compress(whole), whole[:520], b"", b"no tar file" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"got .*p\.tar that cannot be read as a tar file .*, need a whole, unc"):
            mine(RECORD, pictures=path)
    path.write_bytes(whole[:1024] + b"\1" * 512)
    broken, document = mine(RECORD, pictures=path)
    assert broken.kind == "unreadable" and document.segments[1][0].content() == png


def test_a_later_tar_that_cannot_be_read_costs_its_documents_alone(mine, tmp_path: Path, png: bytes, tarred) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(RECORD | {"id": name}))
        tarred(tmp_path / f"{name}.tar", {"a.png": png})
    (tmp_path / "b.tar").write_bytes(b"no tar file" * 100)
    options = {"documents": f"{tmp_path}/{{a,b,c}}.jsonl", "pictures": f"{tmp_path}/{{a,b,c}}.tar"}
    first, broken, last = mine(**options)
    assert (first.id, last.id, broken.kind) == ("a", "c", "unreadable") and broken.place == f"{tmp_path}/b.jsonl"
    assert "b.tar that cannot be read as a tar file" in broken.reason


def test_settings_that_cannot_work(mine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no file or folder 'nowhere', need one: correct the path"):
        mine(RECORD, pictures="nowhere")
    with pytest.raises(ValueError, match=r"got no file '.*pictures', need one: correct the path"):
        mine(RECORD, documents=tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"got .*documents\.jsonl with split=name, need a name that begins with tr"):
        mine(RECORD, split="name")
    with pytest.raises(ValueError, match=r"got 2 of pictures=.* for 1 files, need one, or one for each: correct the"):
        mine(RECORD, pictures=f"{tmp_path}/{{pictures,documents.jsonl}}")
