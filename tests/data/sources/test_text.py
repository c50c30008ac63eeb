"""Plain text: .txt by file and by separator, JSON Lines, Parquet, and what is broken in them."""

import gzip
import json
from pathlib import Path

import pytest

from moma.config import compose
from moma.data.sources import source_of, text
from moma.data.sources.text import paragraphs


def _text(document) -> str:
    return "".join(part.text for segment in document.segments for part in segment)


@pytest.mark.parametrize(
    "text", ["one", "a\nb\n\nc\n \n\n\nd\n", "\n\n a \r\n\r\n b", "\n", "x" + "\n" * 1000, " \n" * 999]
)
def test_paragraphs_are_the_text(text: str) -> None:
    assert "".join(part.text for (part,) in paragraphs(text)) == text


def test_paragraphs_are_segments() -> None:
    assert [part.text for (part,) in paragraphs("a\nb\n\nc\n \n\nd\n")] == ["a\nb\n\n", "c\n \n\n", "d\n"]


def test_a_document_a_file(tmp_path: Path, listing) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt.gz").write_bytes(gzip.compress("bl\u00e5\n\nno".encode()))
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.txt").write_bytes(b"x" * (2**23 + 1))
    (tmp_path / "f.txt.gz").write_bytes(b"x")
    a, c, d, e, f, b = listing("text", files=f"{tmp_path}/{{*.txt*,sub/*}}")
    assert (a.id, a.key, _text(a)) == ("a.txt", "a.txt", "one\ntwo\n")
    assert (b.id, _text(b)) == ("sub/b.txt.gz", "bl\u00e5\n\nno")
    assert [x.kind for x in (c, d, e, f)] == ["empty", "unreadable", "too_large", "unreadable"]
    assert d.place == f"{tmp_path}/d.txt" and "need it whole in UTF-8: copy or convert it" in d.reason


def test_a_document_between_separators(tmp_path: Path, listing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\n\nthree\n\nfour \xff\nfive\n\n\nsix\n\n" + b"x\n" * 100 + b"\nlast")
    one, three, line, six, long, last = listing("text", files=path, separator="")
    assert [(d.id, _text(d)) for d in (one, three, six)] == [
        ("a.txt:3", "one\ntwo"),
        ("a.txt:6", "three"),
        ("a.txt:12", "six"),
    ]
    assert (line.kind, line.place, long.kind, long.place) == ("unreadable", f"{path}:8", "too_large", f"{path}:14")
    assert _text(last) == "last"
    path.write_text("one\n\ntwo\n***\n\n***\nthree\n")
    assert [_text(d) for d in listing("text", files=path, separator="***")] == ["one\n\ntwo", "three"]


def test_json_lines(tmp_path: Path, listing) -> None:
    path = tmp_path / "a.jsonl.gz"
    records = [{"text": "one", "url": "u"}, {"text": ""}, {"text": 7}, {"body": "x"}, [], {"text": "\ud800", "url": 1}]
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode() + b'{"text": "tw'))
    one, *broken = listing("text", files=path)
    assert (one.id, one.key, _text(one)) == ("a.jsonl.gz:1", "a.jsonl.gz:1", "one")
    assert [b.kind for b in broken] == ["empty", "wrong_type", "wrong_type", "wrong_type", "unreadable", "unreadable"]
    assert broken[2].place == f"{path}:4" and "need an object with 'text': set field or key" in broken[2].reason
    one, *broken = listing("text", files=path, key="url")
    assert one.key == "u" and broken[0].kind == "wrong_type"


def test_parquet(tmp_path: Path, listing) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"content": ["one", None, "", "four"] * 10, "n": list(range(40))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    items = listing("text", files=tmp_path / "a.parquet", field="content", key="n", split="val")
    assert [items[i].id for i in (0, 3, 20)] == ["a.parquet:0.0", "a.parquet:0.3", "a.parquet:1.0"]
    assert (items[3].key, _text(items[3]), items[3].split) == ("3", "four", "val")
    assert [items[1].kind, items[2].kind] == ["wrong_type", "empty"] and items[1].place.endswith("a.parquet:0.1")
    (broken,) = listing("text", files=tmp_path / "a.parquet")
    assert broken.kind == "wrong_type" and "need text: set the names of the columns" in broken.reason
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table PAR1")
    (broken,) = listing("text", files=tmp_path / "a.parquet")
    assert broken.kind == "unreadable"


def test_a_broken_row_group_is_followed_by_the_next(tmp_path: Path, listing) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} " + "word " * 100 for i in range(60)]})
    parquet.write_table(table, path, row_group_size=20, use_dictionary=False, write_statistics=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 8] = b"\0" * 8
    path.write_bytes(data)
    items = listing("text", files=path)
    (broken,) = [item for item in items if not hasattr(item, "segments")]
    assert broken.kind == "unreadable" and "in row group 1" in broken.reason
    assert [d.id for d in items if d is not broken] == [f"a.parquet:{g}.{i}" for g in (0, 2) for i in range(20)]


def test_data_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    config = compose("prepare", ["data=text", f"folder={tmp_path}"]).config.sources["text"]
    assert [_text(d) for d in source_of(config).documents(config)] == ["one"]
