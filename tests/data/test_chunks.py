"""Chunks: fixed runs of a source's documents, whatever they hold."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

import moma.data.sources
from moma.data.chunks import Chunk, Cut, cut, survey
from moma.data.sources import Broken, RawDocument, Source
from moma.tokenizer.documents import Picture, Text

RULE = Cut(val_fraction=0.2, salt="s", shard_tokens=100, tokens_per_image=4)


@dataclass(frozen=True)
class ListedConfig:
    n: int = 100
    broken: int = 0


def listed(config: ListedConfig) -> Iterator[RawDocument | Broken]:
    for i in range(config.n):
        picture = Picture(lambda: b"", f"{i}.png")
        yield RawDocument(f"d{i}", f"k{i}", ((Text("x" * 40), picture) if i % 2 else (Text("x" * 40),),))
        if i == 50:
            yield from (Broken("unreadable", f"line {j}", "no JSON") for j in range(config.broken))


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Source(ListedConfig, listed, lambda config: [], "text")
    monkeypatch.setitem(moma.data.sources.SOURCES, "listed", made)


def _chunks(config: ListedConfig, rule: Cut = RULE) -> list[Chunk]:
    return list(cut({"a": config}, rule))  # type: ignore[dict-item]


def test_chunks_tile_each_split_in_order() -> None:
    chunks = _chunks(ListedConfig())
    for split in ("train", "val"):
        of_split = [chunk for chunk in chunks if chunk.split == split]
        assert [chunk.number for chunk in of_split] == list(range(len(of_split))) and len(of_split) > 1
        numbers = [int(item.id[1:]) for chunk in of_split for item in chunk.items if isinstance(item, RawDocument)]
        assert numbers == sorted(numbers)
    assert sum(len(chunk.items) for chunk in chunks) == 100
    assert chunks[0].stem == "train-a-00000"
    # 12 tokens a text, 18 with its picture: a chunk ends as soon as it holds 100
    assert {len(chunk.items) for chunk in chunks[:-2]} <= {6, 7, 8, 9}


def test_broken_documents_stand_in_training_chunks_and_fill_them() -> None:
    chunks = _chunks(ListedConfig(broken=1000))
    broken = [chunk for chunk in chunks if any(isinstance(item, Broken) for item in chunk.items)]
    assert {chunk.split for chunk in broken} == {"train"} and max(len(chunk.items) for chunk in chunks) < 10
    whole = [[item.place for item in chunk.items if isinstance(item, Broken)] for chunk in broken]
    assert sum(whole, []) == [f"line {i}" for i in range(1000)]
    ids = [
        [_ids(made) for made in _chunks(config) if made.split == "val"] for config in (ListedConfig(1), ListedConfig())
    ]
    assert [_ids(chunk) for chunk in chunks if chunk.split == "val"] == ids[1] != ids[0]


def _ids(chunk: Chunk) -> list[str]:
    return [item.id for item in chunk.items if isinstance(item, RawDocument)]


def test_views_make_training_chunks_of_pictures_shorter() -> None:
    def count(views: int, split: str) -> int:
        return sum(chunk.split == split for chunk in _chunks(ListedConfig(), RULE._replace(views=views)))

    assert count(3, "val") == count(1, "val") and count(3, "train") > 1.5 * count(1, "train")


def test_listing_is_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def endless(config: ListedConfig) -> Iterator[RawDocument | Broken]:
        while True:
            seen.append(0)
            yield RawDocument("d", "k", ((Text("x" * 40),),), "train")

    made = Source(ListedConfig, endless, lambda config: [], "text")
    monkeypatch.setitem(moma.data.sources.SOURCES, "listed", made)
    assert len(next(cut({"a": ListedConfig()}, RULE)).items) == len(seen) == 9  # type: ignore[dict-item]


def test_digest_is_of_everything_listed() -> None:
    document = RawDocument("i", "k", ((Text("t"), Picture(np.array([1, 2]), "p")),))
    changed = [
        replace(document, id="j"),
        replace(document, key="l"),
        replace(document, split="val"),
        replace(document, segments=((Text("t"),), (Picture(np.array([1, 2]), "p"),))),
        replace(document, segments=((Text("u"), Picture(np.array([1, 2]), "p")),)),
        replace(document, segments=((Text("t", learn=False), Picture(np.array([1, 2]), "p")),)),
        replace(document, segments=((Text("t"), Picture(np.array([1, 3]), "p")),)),
        replace(document, segments=((Text("t"), Picture(np.array([1, 2]), "q")),)),
        replace(document, segments=((Text("t"), Picture(partial(str, "f", 512), "p")),)),
        replace(document, segments=((Text("t"), Picture(partial(str, "f", 1024), "p")),)),
        Broken("i", "k", "t"),
    ]
    digests = {Chunk("train", "a", 0, [item]).digest() for item in (document, *changed)}
    assert len(digests) == 12 and len(digests.pop()) == hashlib.sha256().digest_size * 2


def test_survey() -> None:
    sources = {"a": ListedConfig(broken=3), "b": ListedConfig(n=5)}
    found = survey(sources, RULE, stop=False)  # type: ignore[arg-type]
    assert found.listed == {"a": 103, "b": 5} and found.repeated_ids == {}
    assert sum(found.shards.values()) == sum(1 for _ in cut(sources, RULE))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got line 0 of source 'a', which is broken \(unreadable: no JSON\), need"):
        survey(sources, RULE, stop=True)  # type: ignore[arg-type]
