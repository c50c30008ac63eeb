"""WebDataset tar files: samples, captions, the order of picture and text, and hostile members."""

import json
import tarfile
from pathlib import Path

import pytest

from moma.config import compose
from moma.data.sources import source_of


def test_samples(tmp_path: Path, png: bytes, tarred, listing, shown) -> None:
    tarred(tmp_path / "b-1.tar", {"x/7.v1.TXT": b"", "x/8.jpeg": png, "x/8.txt": b" blue "})
    tarred(
        tmp_path / "b-0.tar",
        {"1.jpg": png, "1.txt": b"red\n", "1.json": b"{}", "2.cls": b"0", "2.txt": b"green", "2.png": png},
    )
    one, two, broken, eight = listing("webdataset", shards=f"{tmp_path}/b-*.tar", order="picture_first")
    assert [(d.id, d.key, d.split) for d in (one, two, eight)] == [(i, i, None) for i in ("b-0/1", "b-0/2", "b-1/x/8")]
    assert [shown(d) for d in (one, two, eight)] == [[[png, "red"]], [[png, "green"]], [[png, "blue"]]]
    assert broken.place == f"{tmp_path}/b-1.tar:x/7" and "need a picture and .txt: add them" in broken.reason
    assert len(listing("webdataset", shards=f"{tmp_path}/b-{{0..1}}.tar", max_caption=3)) == 2  # "red", the broken one


def test_captions_from_json(tmp_path: Path, png: bytes, tarred, listing, shown) -> None:
    values = [
        b'{"caption": "red"}',
        b"{",
        b"7",
        b'{"caption": 7}',
        b'{"caption": " "}',
        b'{"caption": "\\ud800"}',
        b"\xff",
    ]
    members = {
        f"{i}.{ending}": data for i, value in enumerate(values) for ending, data in (("png", png), ("json", value))
    }
    items = listing(
        "webdataset", shards=tarred(tmp_path / "a.tar", members), caption="json:caption", order="text_first"
    )
    assert shown(items[0]) == [["red", png]]
    kinds = ["unreadable", "wrong_type", "wrong_type", "empty", "unreadable", "unreadable"]
    assert [item.kind for item in items[1:]] == kinds


def test_half_of_the_samples_begin_with_the_picture(tmp_path: Path, png: bytes, tarred, listing, shown) -> None:
    members = {f"{i}.{ending}": data for i in range(200) for ending, data in (("png", png), ("txt", b"red"))}
    pairs = listing("webdataset", shards=tarred(tmp_path / "a.tar", members))
    first = [shown(pair)[0][0] == png for pair in pairs]
    assert len(first) == 200 and 70 < sum(first) < 130


def test_hostile_samples(tmp_path: Path, png: bytes, tarred, listing, shown) -> None:
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {"0.png": png, "0.txt": b"red", "1.png": link, "1.txt": b"x", "../2.png": png, "2.txt": b"x",
               "3.png": png, "3.txt": b" \n", "4.png": png, "4.txt": b"\xff", "5.jpg": png, "5.JPG": png,
               "5.txt": b"x", "6.png": png, "6.txt": b"y" * (2**23 + 1), "7.png": png, "7.txt": b"blue"}  # fmt: skip
    items = listing("webdataset", shards=tarred(tmp_path / "a.tar", members))
    kinds = ["wrong_type", "wrong_type", "outside", "wrong_type", "empty", "unreadable", "wrong_type", "too_large"]
    assert [shown(item) for item in items][1:-1] == kinds
    assert sorted(map(str, shown(items[0])[0])) == sorted(map(str, [png, "red"])) and "7" in items[-1].id


def test_settings_that_cannot_work(tmp_path: Path, listing) -> None:
    with pytest.raises(ValueError, match=r"got no file '.*\*\.tar', need one: correct the path"):
        listing("webdataset", shards=f"{tmp_path}/*.tar")
    with pytest.raises(ValueError, match="got caption='json:', need an ending or json:KEY: use txt or json:caption"):
        listing("webdataset", shards=f"{tmp_path}/*.tar", caption="json:")


def test_data_option(tmp_path: Path, png: bytes, tarred) -> None:
    tarred(tmp_path / "a.tar", {"1.jpg": png, "1.txt": json.dumps("red").encode()})
    config = compose("prepare", ["data=webdataset", f"folder={tmp_path}"]).config.sources["pairs"]
    (document,) = source_of(config).documents(config)
    (credit,) = source_of(config).attribution(config)
    assert document.id == "a/1" and credit["title"] == "a.tar" and credit["version"].startswith("10240 bytes")
