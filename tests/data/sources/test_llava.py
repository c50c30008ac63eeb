"""LLaVA-style conversations: prompts are never targets, pictures stand in their places, odd records are broken."""

import json
from pathlib import Path

import pytest

from moma.config import compose
from moma.data.sources import source_of


def _record(*turns: tuple[str, object], **fields: object) -> dict[str, object]:
    return {"id": "7", **fields, "conversations": [{"from": who, "value": value} for who, value in turns]}


CAT = _record(
    ("human", "<image>\nWhat is this?"), ("gpt", "A square. "), ("human", "Red?"), ("gpt", "Yes."), image="a.png"
)


@pytest.fixture
def mine(tmp_path: Path, png: bytes, listing):
    """`mine(record, ..., lines=False)`: the listing of a JSON list or of lines, with a folder of two pictures."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(png)

    def list_(*records: object, lines: bool = False, **options: object):
        path = tmp_path / "talk.json"
        path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1))
        return listing("llava", **({"documents": path, "pictures": tmp_path / "images"} | options))

    return list_


@pytest.mark.parametrize("lines", [False, True])
def test_a_conversation(mine, png: bytes, shown, lines: bool) -> None:
    first, _ = mine(CAT, CAT, lines=lines)
    assert (first.id, first.key) == ("7", "a.png")
    assert shown(first) == [[png, "What is this?\n", "A square.\n\n"], ["Red?\n", "Yes."]]
    assert [[part.learn for part in segment] for segment in first.segments] == [[False, False, True], [False, True]]


def test_turns_and_places(mine, png: bytes, shown) -> None:
    record = _record(
        ("system", "Be brief."),
        ("human", "A <image> and <image> B"),
        ("gpt", "one"),
        ("assistant", "two"),
        image=["a.png", "b.png"],
    )
    (document,) = mine(record)
    assert shown(document) == [["Be brief.\nA", png, "and", png, "B\n", "one\n\ntwo"]]
    del record["id"]
    (document,) = mine(_record(("user", "Hello"), ("gpt", "Hi")) | {"id": 3}, pictures=None)
    assert (document.id, document.key, shown(document)) == ("3", "3", [["Hello\n", "Hi"]])
    (document,) = mine(record)
    assert document.id == "talk.json:[0]"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (7, "wrong_type"),
        ({"id": "7"}, "wrong_type"),
        (_record(("robot", "x"), ("gpt", "y")), "wrong_type"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "wrong_type"),
        ({"conversations": ["x"]}, "wrong_type"),
        (_record(("human", 7), ("gpt", "y")), "wrong_type"),
        (_record(("human", "x"), ("gpt", "y"), image=7), "wrong_type"),
        (_record(("human", "x"), ("gpt", "y"), image="a.png"), "wrong_type"),
        (_record(("human", "<image> x"), ("gpt", "y")), "wrong_type"),
        (_record(("human", "<image><image>"), ("gpt", "y"), image="a.png"), "wrong_type"),
        (_record(("human", "<image>"), ("gpt", "y"), image="../talk.json"), "outside"),
        (_record(("human", "x")), "empty"),
        (_record(("human", "x"), ("gpt", " ")), "empty"),
        (_record(), "empty"),
        (_record(("human", "x"), ("gpt", "\ud800")), "unreadable"),
        (_record(("human", "x"), ("gpt", "y")) | {"id": {}}, "wrong_type"),
    ],
)
def test_odd_records_are_broken(mine, tmp_path: Path, record: object, kind: str) -> None:
    first, broken, last = mine(CAT, record, CAT)
    assert (first.id, broken.kind, last.id) == ("7", kind, "7")
    assert broken.place == f"{tmp_path}/talk.json:[1]" and broken.reason.startswith("got ")


def test_a_picture_without_a_folder(mine) -> None:
    (broken,) = mine(CAT, pictures=None)
    assert "got picture 'a.png', need the folder that it lies in: set pictures" in broken.reason


def test_data_option(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png)
    (tmp_path / "talk.json").write_text(json.dumps([CAT]))
    config = compose("prepare", ["data=llava", f"folder={tmp_path}"]).config.sources["conversations"]
    assert [d.id for d in source_of(config).documents(config)] == ["7"]
