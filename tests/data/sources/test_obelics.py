"""OBELICS-style Parquet: lists of texts and pictures, lazily read; URLs are refused."""

import json
import pickle
from pathlib import Path

import pytest

from moma.config import compose
from moma.data.sources import source_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

BYTES = pyarrow.list_(pyarrow.binary())
STRUCTS = pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
NAMES = pyarrow.list_(pyarrow.string())


def _write(
    path: Path, rows: list[tuple[object, object]], type_: object = BYTES, group: int = 7, **columns: list[object]
) -> Path:
    texts = pyarrow.array([row[0] for row in rows], pyarrow.list_(pyarrow.string()))
    images = pyarrow.array([row[1] for row in rows], type_)
    table = pyarrow.table({"texts": texts, "images": images, **columns})
    parquet.write_table(table, path, row_group_size=group)
    return path


def test_pages(tmp_path: Path, png: bytes, listing, shown) -> None:
    rows = [(["a", None, "b", ""], [None, png + bytes([i]), None, None]) for i in range(50)]
    items = listing(
        "obelics", files=_write(tmp_path / "a.parquet", rows, key=[f"k{i // 2}" for i in range(50)]), key="key"
    )
    assert [d.id for d in items[6:9]] == ["a.parquet:0.6", "a.parquet:1.0", "a.parquet:1.1"]
    assert [d.key for d in items[:4]] == ["k0", "k0", "k1", "k1"]
    # in any order, as workers may: each picture is the one listed
    for i in (0, 49, 20, 21, 3, 48):
        assert shown(items[i]) == [["a"], [png + bytes([i])], ["b"]]


def test_a_listing_holds_no_picture(tmp_path: Path, listing) -> None:
    path = _write(tmp_path / "a.parquet", [([None], [bytes(1_000_000)])] * 3)
    assert len(pickle.dumps(listing("obelics", files=path))) < 2000


def test_structs_names_and_missing_pictures(tmp_path: Path, png: bytes, listing, shown) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png)
    structs = [[{"bytes": png, "path": "x"}], [{"bytes": None, "path": "a.png"}], [{"bytes": None, "path": None}]]
    path = _write(tmp_path / "a.parquet", [([None], images) for images in structs], STRUCTS)
    first, second, broken = listing("obelics", files=path, pictures=tmp_path / "images")
    assert shown(first) == shown(second) == [[png]] and broken.kind == "wrong_type"
    _, broken, _ = listing("obelics", files=path)
    assert "got the file name 'a.png', need the picture's bytes: set pictures to its folder" in broken.reason
    path = _write(tmp_path / "b.parquet", [([None], [name]) for name in ("a.png", "../a.parquet", "b.png")], NAMES)
    first, outside, missing = listing("obelics", files=path, pictures=tmp_path / "images")
    assert shown(first) == [[png]] and outside.kind == "outside"
    with pytest.raises(FileNotFoundError):
        missing.segments[0][0].content()


@pytest.mark.parametrize(
    "url", ["https://x.org/a.jpg", "HTTP://x", "//x/a.png", " ftp://x/y", "data:image/png;base64,xx"]
)
def test_a_url_is_refused(tmp_path: Path, listing, url: str) -> None:
    path = _write(tmp_path / "a.parquet", [(["a", None], [None, url])], NAMES)
    (broken,) = listing("obelics", files=path, pictures=tmp_path)
    assert broken.kind == "url" and broken.place == f"{path}:0.0"
    assert "moma never downloads: fetch the pictures first" in broken.reason


def test_alternative_texts_and_what_is_taken(tmp_path: Path, png: bytes, listing, shown) -> None:
    metadata = json.dumps([None, {"alt_text": "a red square"}, {"alt_text": None}])
    path = _write(tmp_path / "a.parquet", [(["a", None, None], [None, png, png])], metadata=[metadata])
    options = {"files": path, "captions": "alt"}
    assert shown(*listing("obelics", **options)) == [["a"], [png, "a red square"], [png]]
    assert shown(*listing("obelics", **options, min_caption=5)) == [["a"], [png, "a red square"]]
    pictures = listing("obelics", **options, take="pictures", order="text_first")
    assert [(d.id, shown(d)) for d in pictures] == [
        ("a.parquet:0.0#0", [["a red square", png]]),
        ("a.parquet:0.0#1", [[png]]),
    ]
    assert [shown(d) for d in listing("obelics", **options, take="prose")] == [[["a"]]]
    for value in ("[]", "7", "[", json.dumps([{"alt_text": 7}] * 3)):
        _write(path, [(["a", None, None], [None, png, png])], metadata=[value])
        assert listing("obelics", **options)[0].kind in ("wrong_type", "unreadable")


@pytest.mark.parametrize(
    ("texts", "images", "kind"),
    [
        (["a"], [None, None], "wrong_type"),
        (["a"], [b"x"], "wrong_type"),
        (None, [None], "wrong_type"),
        (["a"], None, "wrong_type"),
        ([None], [None], "empty"),
        ([], [], "empty"),
        (["x" * (2**23 + 1)], [None], "too_large"),
    ],
)
def test_odd_rows_are_broken(tmp_path: Path, listing, texts: object, images: object, kind: str) -> None:
    good = (["a"], [None])
    first, broken, last = listing("obelics", files=_write(tmp_path / "a.parquet", [good, (texts, images), good]))
    assert (first.id, broken.kind, last.id) == ("a.parquet:0.0", kind, "a.parquet:0.2")


def test_text_that_is_no_utf_8(tmp_path: Path, listing) -> None:
    binary = pyarrow.array([[b"a"], [b"\xff"], [b"b"]], pyarrow.list_(pyarrow.binary()))
    texts = binary.view(pyarrow.list_(pyarrow.string()))
    table = pyarrow.table({"texts": texts, "images": pyarrow.array([[None]] * 3, BYTES)})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, broken, last = listing("obelics", files=tmp_path / "a.parquet")
    assert (first.id[-1], broken.kind, last.id[-1]) == ("0", "unreadable", "2")


def test_a_file_that_changed_is_noticed(tmp_path: Path, png: bytes, listing) -> None:
    path = _write(tmp_path / "a.parquet", [([None], [png])] * 20)
    items = listing("obelics", files=path)
    _write(path, [(["a"], [None])] * 10)
    for item in (items[0], items[19]):
        with pytest.raises(ValueError, match=r"got .*a\.parquet:\d\.\d (changed|unreadable)"):
            item.segments[0][0].content()


def test_data_option(tmp_path: Path, png: bytes) -> None:
    _write(tmp_path / "a.parquet", [(["a", None], [None, png])])
    config = compose("prepare", ["data=obelics", f"folder={tmp_path}"]).config
    made = {name: [len(d.segments) for d in source_of(s).documents(s)] for name, s in config.sources.items()}
    assert made == {"pages": [2], "prose": [1]}
