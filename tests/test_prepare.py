"""`moma prepare`: the same shards however it runs, continues after a stop, and its errors."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moma.data.encoding
import moma.data.sources
from moma.checkpoint import alone
from moma.config import compose
from moma.data.encoding import AugmentConfig, load_encoders
from moma.data.shards import open_corpus, open_source, read_manifest
from moma.data.sources import Broken, RawDocument, Source
from moma.data.sources.interleaved import InterleavedConfig
from moma.prepare import PrepareConfig, prepare
from moma.tokenizer.documents import Picture, Text, decode_document
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, write_ranks
from moma.tokenizer.vocab import IMAGE_FILES, load_vocabulary, write_vocabulary


class StubTokenizer:
    """Stands for the image tokenizer: four codes from a picture's red value."""

    grid, n_codes, size, preprocessing = (2, 2), 16, 2, "crop"
    encoded = 0

    @classmethod
    def load(cls, folder: Path, device: str) -> "StubTokenizer":
        return cls()

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        StubTokenizer.encoded += len(pixels)
        return np.array([np.arange(4) + square[0, 0, 0] % 12 for square in pixels])


@dataclass(frozen=True)
class MadeUpConfig:
    n: int = 40
    broken: int = -1
    empty: int = -1
    killed: int = -1
    unreadable: int = -1
    repeated: int = -1
    pictures: bool = True
    title: str = "Made up"


def _png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _truncated() -> bytes:
    return _png(0)[:30]


# A test sets this to the document before which listing fails, as a pulled plug would, and to how many listings end
# well before: `prepare` goes through the sources once before it makes the first shard.
STOP_AT = [-1, 1]


def made_up(config: MadeUpConfig) -> Iterator[RawDocument | Broken]:
    STOP_AT[1] -= 1
    for i in range(config.n):
        if i == STOP_AT[0] and STOP_AT[1] < 0:
            raise KeyboardInterrupt
        if i == config.unreadable:
            yield Broken("unreadable", f"made.jsonl:{i}", "got no JSON")
            continue
        content: Callable[[], bytes] = _truncated if i == config.broken else partial(_png, i)
        if i == config.killed:
            content = partial(os._exit, 1)  # type: ignore[assignment]
        picture = Picture(content, place=f"made/{i}.png")
        pair = (Text("" if i == config.empty else f"picture {i}"),)
        id_ = "made/0" if i == config.repeated else f"made/{i}"
        yield RawDocument(id_, f"k{i}", ((picture, *pair) if config.pictures else pair,))


@dataclass(frozen=True)
class TwinsConfig:
    """40 training texts, the first 10 of which are also held out, behind them."""


def twins(config: TwinsConfig) -> Iterator[RawDocument | Broken]:
    STOP_AT[1] -= 1
    for i in range(50):
        if i == STOP_AT[0] and STOP_AT[1] < 0:
            raise KeyboardInterrupt
        split, number = ("train", i) if i < 40 else ("val", i - 40)
        text = " ".join(hashlib.sha256(f"{number}:{word}".encode()).hexdigest()[:5] for word in range(20))
        yield RawDocument(f"{split}/{number}", "", ((Text(text),),), split)


TWINS = Source(TwinsConfig, twins, lambda c: [], "text")

MADE_UP = Source(
    MadeUpConfig,
    made_up,
    lambda c: [{"title": c.title, "author": "us", "licence": "CC0", "url": "u", "version": "v1"}],
    "pair",
)


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "asset"
    folder.mkdir()
    write_ranks(folder / RANKS_FILE, {bytes([i]): i for i in range(256)})
    for name in IMAGE_FILES:
        (folder / name).write_text("stub")
    write_vocabulary(folder, text_size=256, image_codes=16, image_grid=(2, 2))
    monkeypatch.setattr(moma.data.encoding, "ImageTokenizer", StubTokenizer)
    monkeypatch.setitem(moma.data.sources.SOURCES, "made_up", MADE_UP)
    monkeypatch.setitem(moma.data.sources.SOURCES, "twins", TWINS)
    monkeypatch.setattr(StubTokenizer, "encoded", 0)
    STOP_AT[:] = [-1, 1]
    return folder


def _config(asset: Path, name: str = "c", workers: int = 1, source: Any = None, **options: Any) -> PrepareConfig:
    return PrepareConfig(
        name=name,
        corpora=str(asset.parent / "corpora"),
        tokenizer=str(asset),
        sources={"made": source or MadeUpConfig()},
        val_fraction=0.2,
        shard_tokens=100,
        workers=workers,
        **options,
    )


def _files(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in sorted(corpus.rglob("*")) if path.is_file()}


def _verified(corpus: Path) -> int:
    """How many shards the manifest lists, once each file is known to have the hash that it says."""
    count = 0
    for split, sources in read_manifest(corpus)["splits"].items():
        for source, entry in sources.items():
            for shard in entry["shards"]:
                tokens = corpus / split / source / shard["file"]
                index = tokens.with_name(tokens.name.replace("tokens.bin", "index.npz"))
                assert hashlib.sha256(tokens.read_bytes()).hexdigest() == shard["sha256"]
                assert hashlib.sha256(index.read_bytes()).hexdigest() == shard["index_sha256"]
                count += 1
    return count


def _no_pictures(asset: Path) -> None:
    for name in IMAGE_FILES:
        (asset / name).unlink()


def test_prepare(asset: Path) -> None:
    config = _config(asset)
    manifest = prepare(config)
    corpus = Path(config.corpora) / "c"
    train, val = (manifest["splits"][split]["made"] for split in ("train", "val"))
    assert train["documents"] + val["documents"] == train["images"] + val["images"] == 40
    assert val["documents"] >= 1 and len(train["shards"]) > 2 and train["kind"] == "pair"
    assert manifest["skipped"] == {} and manifest["token_dtype"] == "uint16"
    assert "Made up, by us" in (corpus / "ATTRIBUTION").read_text()
    assert not (corpus / ".progress").exists() and _verified(corpus) == len(train["shards"]) + len(val["shards"])
    vocab = load_vocabulary(asset)
    text = TextTokenizer.load(asset, vocab)
    seen = []
    for split in ("train", "val"):
        source = open_corpus(corpus, split, vocab.hash)["made"]
        for i in range(source.n_documents):
            picture, name = decode_document(source.read(i, 0, source.document_tokens[i]), text, vocab)
            number = int(name.text.removeprefix("picture "))
            assert picture.content.tolist() == (np.arange(4) + number % 12).tolist()
            offsets, images = source.segments(i)
            assert offsets.tolist() == [0, source.document_tokens[i]] and images.tolist() == [1]
            seen.append(number)
    assert sorted(seen) == list(range(40))


def test_same_config_same_bytes(asset: Path) -> None:
    for name in ("a", "b"):
        prepare(_config(asset, name))
    a, b = (_files(asset.parent / "corpora" / name) for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(a[file] == b[file] for file in a if file != "manifest.json")
    assert a["manifest.json"].replace(b'"name": "a"', b'"name": "b"') == b["manifest.json"]


def test_number_of_workers_changes_nothing(asset: Path) -> None:
    _no_pictures(asset)
    for name, workers in (("a", 1), ("b", 2)):
        prepare(_config(asset, name, workers, MadeUpConfig(pictures=False)))
    a, b = (_files(asset.parent / "corpora" / name) for name in ("a", "b"))
    assert len(a) > 4 and {k: v for k, v in a.items() if "bin" in k} == {k: v for k, v in b.items() if "bin" in k}


def test_continues_after_a_stop(asset: Path) -> None:
    whole = prepare(_config(asset, "whole"))
    encoded = StubTokenizer.encoded
    config = _config(asset, "stopped")
    corpus = Path(config.corpora) / "stopped"
    STOP_AT[:] = [25, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert not (corpus / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.bin")}
    assert kept
    (corpus / "train" / "made" / ".shard-00009.tokens.bin.1.tmp").write_text("half")  # as a killed worker leaves
    before = StubTokenizer.encoded - encoded
    STOP_AT[0] = -1
    manifest = prepare(config)
    assert StubTokenizer.encoded - encoded == 40 and before > 0  # each picture once, over both runs
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert manifest | {"name": ""} == whole | {"name": ""}
    assert _verified(corpus) and not list(corpus.rglob("*.tmp"))


def test_finished_corpus_is_reopened(asset: Path) -> None:
    manifest = prepare(_config(asset))
    encoded = StubTokenizer.encoded
    assert prepare(_config(asset)) == manifest and StubTokenizer.encoded == encoded


def test_other_config_is_refused(asset: Path) -> None:
    prepare(_config(asset))
    with pytest.raises(ValueError, match=r"another config.*shard_tokens of made was 100, now 50\).*overwrite=true"):
        prepare(replace(_config(asset), shard_tokens=50))
    with pytest.raises(ValueError, match=r"\(options of made was .*'n': 40.* now .*'n': 7"):
        prepare(_config(asset, source=MadeUpConfig(n=7)))
    with pytest.raises(ValueError, match=r"\(sources \['made'\], now \['other'\]\)"):
        prepare(replace(_config(asset), sources={"other": MadeUpConfig()}))
    (asset / IMAGE_FILES[1]).write_text("another")
    with pytest.raises(ValueError, match=r"\(vocab_hash of made was"):
        prepare(_config(asset))
    assert prepare(_config(asset, overwrite=True))["vocab_hash"] == load_vocabulary(asset).hash


def test_overwrite_spares_other_folders(asset: Path) -> None:
    config = _config(asset, overwrite=True)
    folder = Path(config.corpora) / "c"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="with files that are no corpus, need a corpus or an empty folder"):
        prepare(config)
    assert (folder / "thesis.tex").exists()


def test_overwrite_makes_the_corpus_afresh(asset: Path) -> None:
    prepare(_config(asset))
    corpus = asset.parent / "corpora" / "c"
    (corpus / "train" / "gone").mkdir()
    config = _config(asset, source=MadeUpConfig(n=7), overwrite=True)
    manifest = prepare(config)
    assert sum(split["made"]["documents"] for split in manifest["splits"].values() if split) == 7
    assert prepare(replace(config, name="fresh")) | {"name": "c"} == manifest
    assert _files(corpus).keys() == _files(corpus.parent / "fresh").keys() and not (corpus / "train" / "gone").exists()


def test_killed_overwrite_leaves_no_manifest_without_shards(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(_config(asset))
    corpus = asset.parent / "corpora" / "c"

    def kill(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moma.prepare.shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(_config(asset, overwrite=True))
    assert not (corpus / "manifest.json").exists() and list(corpus.rglob("*.bin"))
    with pytest.raises(ValueError, match=r"another config.*\(sources \[\], now \['made'\]\).*overwrite=true"):
        prepare(_config(asset))
    assert prepare(_config(asset, overwrite=True)) == whole and _verified(corpus)


def _skipped(corpus: Path) -> list[dict[str, str]]:
    """The lines of skipped.jsonl, once the manifest's hash and counts are known to fit."""
    manifest, content = read_manifest(corpus), (corpus / "skipped.jsonl").read_bytes()
    assert manifest["skipped_file"] == {"file": "skipped.jsonl", "sha256": hashlib.sha256(content).hexdigest()}
    lines = [json.loads(line) for line in content.splitlines()]
    assert Counter(line["kind"] for line in lines) == manifest["skipped"]
    return lines


def test_what_is_broken_is_skipped_with_its_place(asset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(_config(asset, source=MadeUpConfig(broken=7, unreadable=30)))
    assert manifest["skipped"] == {"broken_picture": 1, "unreadable": 1} and manifest["listed"] == {"made": 40}
    picture, line = _skipped(asset.parent / "corpora" / "c")
    assert (picture["place"], picture["split"]) == ("made/7", "train") and "made/7.png" in picture["reason"]
    unreadable = {"source": "made", "split": "train", "kind": "unreadable", "place": "made.jsonl:30"}
    assert line == unreadable | {"reason": "got no JSON"}
    assert sum(split["made"]["documents"] for split in manifest["splits"].values()) == 38
    told = "prepare: skipped 2 of 40: 1 broken_picture, 1 unreadable; see .*skipped.jsonl"
    assert re.search(told, capsys.readouterr().err)


def test_what_is_broken_does_not_depend_on_a_stop(asset: Path) -> None:
    source = MadeUpConfig(broken=3, unreadable=30)
    whole = prepare(_config(asset, "whole", source=source))
    STOP_AT[:] = [25, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare(_config(asset, "stopped", source=source))
    STOP_AT[0] = -1
    assert prepare(_config(asset, "stopped", source=source)) == whole | {"name": "stopped"}
    assert _skipped(asset.parent / "corpora" / "whole") == _skipped(asset.parent / "corpora" / "stopped")


def test_nothing_skipped_no_list(asset: Path) -> None:
    assert prepare(_config(asset))["skipped_file"] is None
    assert not list((asset.parent / "corpora").rglob("*skipped*"))


def test_what_is_broken_stops(asset: Path) -> None:
    with pytest.raises(ValueError, match=r"got a broken picture in document made/7 .*made/7\.png.* on_error=skip"):
        prepare(_config(asset, source=MadeUpConfig(broken=7), on_error="stop"))
    message = r"got made\.jsonl:30 of source 'made', which is broken \(unreadable: got no JSON\), need .* on_error=skip"
    with pytest.raises(ValueError, match=message):
        prepare(_config(asset, "d", source=MadeUpConfig(unreadable=30), on_error="stop"))
    assert STOP_AT[1] == 1 - 3 and not list((asset.parent / "corpora" / "d").rglob("*.bin"))  # before any work


def test_empty_document_is_skipped(asset: Path) -> None:
    _no_pictures(asset)
    source = MadeUpConfig(empty=3, pictures=False)
    assert prepare(_config(asset, source=source))["skipped"] == {"empty": 1}
    (line,) = _skipped(asset.parent / "corpora" / "c")
    assert (line["place"], line["reason"]) == ("made/3", "no text and no picture")
    with pytest.raises(ValueError, match=r"got the document made/3 \(empty: no text and no picture\), need readable"):
        prepare(_config(asset, "d", source=source, on_error="stop"))


def test_repeated_ids_are_kept_and_told(asset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(_config(asset, source=MadeUpConfig(repeated=9)))
    assert manifest["repeated_ids"] == {"made": 1}
    assert sum(split["made"]["documents"] for split in manifest["splits"].values()) == 40
    assert "prepare: 1 documents of made bear the id of an earlier one; kept" in capsys.readouterr().err


def test_changed_input_is_noticed(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(asset)
    STOP_AT[:] = [25, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    STOP_AT[0] = -1
    with monkeypatch.context() as patch:
        patch.setitem(moma.data.sources.SOURCES, "made_up", replace(MADE_UP, documents=_renamed))
        message = "got other documents from source 'made' than when shard 0 of train was made, need the same"
        with pytest.raises(ValueError, match=message):
            prepare(config)
    with monkeypatch.context() as patch:
        patch.setitem(moma.data.sources.SOURCES, "made_up", replace(MADE_UP, documents=_longer))
        with pytest.raises(ValueError, match=r"got sources that list otherwise than at the start \(shards train-made-"):
            prepare(config)


def _renamed(config: MadeUpConfig) -> Iterator[RawDocument | Broken]:
    yield from (replace(document, id=f"{document.id}!") for document in made_up(config))  # type: ignore[type-var]


def _longer(config: MadeUpConfig) -> Iterator[RawDocument | Broken]:
    yield from made_up(config)
    yield from (replace(document, split="train") for document in made_up(replace(config, n=20)))  # type: ignore


def test_other_libraries_do_not_continue(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = prepare(_config(asset))
    assert finished["libraries"]["torch"] == torch.__version__
    STOP_AT[:] = [25, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare(_config(asset, "stopped"))
    STOP_AT[0] = -1
    monkeypatch.setattr("moma.prepare.metadata.version", lambda name: "0.0")
    with pytest.raises(ValueError, match=r"stopped begun with .*torch.*, need the same to continue it: install"):
        prepare(_config(asset, "stopped"))
    assert prepare(_config(asset)) == finished


def test_augmented_views(asset: Path) -> None:
    plain = prepare(_config(asset))
    manifest = prepare(_config(asset, "views", augment=AugmentConfig(views=3, flip=True)))
    assert manifest["provenance"][0]["augment"] == {"views": 3, "min_crop": 1.0, "flip": True}
    for split, factor in (("train", 3), ("val", 1)):
        assert manifest["splits"][split]["made"]["images"] == factor * plain["splits"][split]["made"]["images"]
    assert "augment" not in plain["provenance"][0]
    with pytest.raises(ValueError, match=r"\(augment of made was \{.*\}, now None\)"):
        prepare(_config(asset, "views"))


def test_hostile_input_is_skipped_line_by_line(asset: Path, tmp_path: Path) -> None:
    good, bomb = _png(1), bytearray(_png(1))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # the size in its header
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name, content in (("a.png", good), ("cut.png", good[:40]), ("bomb.png", bytes(bomb)), ("../b.png", good)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    lines: list[Any] = [{"id": "good", "segs": [{"t": "text"}, {"i": "a.png"}]}, "{not JSON", {"id": "no segments"}, 17]
    lines += [{"id": name, "segs": [{"i": name}]} for name in ("cut.png", "bomb.png", "../b.png", "none.png")]
    lines += [{"id": "empty", "segs": [{"t": ""}]}, {"id": "long", "segs": [{"t": "x" * 10 * 2**20}]}]
    lines += [{"id": "types", "segs": [{"t": 5}]}, {"id": "last", "segs": [{"t": " " * 2**20}]}]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "p.jsonl").write_bytes(text.encode() + b'\n{"id": "\xff"}\n')
    config = _config(asset, source=InterleavedConfig(str(tmp_path / "p.jsonl"), str(tmp_path / "p.tar"), split="train"))
    manifest = prepare(config)
    assert manifest["splits"]["train"]["made"]["documents"] == 2  # good and last
    broken = {line["place"]: line["kind"] for line in _skipped(asset.parent / "corpora" / "c")}
    kinds = {2: "unreadable", 3: "wrong_type", 4: "wrong_type", 7: "outside", 9: "empty", 10: "too_large"}
    kinds |= {11: "wrong_type", 13: "unreadable"}
    assert broken == {
        f"{tmp_path}/p.tar:../b.png": "outside",
        **{f"{tmp_path}/p.jsonl:{number}": kind for number, kind in kinds.items()},
        **{name: "broken_picture" for name in ("cut.png", "bomb.png", "none.png")},
    }
    with pytest.raises(
        ValueError, match=r"p\.tar:\.\./b\.png of source 'made', which is broken \(outside: .*on_error=skip"
    ):
        prepare(replace(config, name="d", on_error="stop"))


def test_near_duplicates(asset: Path) -> None:
    _no_pictures(asset)
    source = TwinsConfig()
    assert prepare(replace(_config(asset), sources={"twins": source}))["skipped"] == {}
    config = replace(_config(asset, "dropped", near_duplicates="drop"), sources={"twins": source})
    manifest = prepare(config)
    corpus = asset.parent / "corpora" / "dropped"
    assert manifest["skipped"] == {"near_duplicate": 10}
    lines = _skipped(corpus)
    assert {line["place"] for line in lines} == {f"train/{i}" for i in range(10)}
    assert lines[3]["reason"] == "100% of its runs of 5 words are those of held-out text val/3"
    assert manifest["splits"]["train"]["twins"]["documents"] == 30
    assert manifest["splits"]["val"]["twins"]["documents"] == 10
    assert manifest["provenance"][0]["near_duplicates"] == {"bits": 4, "overlap": 0.8}
    # listings: the survey, held-out chunks, training chunks
    for name, listing, workers in (("second", 1, 1), ("third", 2, 2)):
        STOP_AT[:] = [40, listing]
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(config, name=name))
        STOP_AT[0] = -1
        assert prepare(replace(config, name=name, workers=workers)) == manifest | {"name": name}
        assert _files(corpus).keys() == _files(corpus.parent / name).keys() and _verified(corpus.parent / name)


def test_pictures_need_an_image_tokenizer(asset: Path) -> None:
    _no_pictures(asset)
    with pytest.raises(ValueError, match=r"got pictures in source 'made' but no image tokenizer, need vqgan\.json"):
        prepare(_config(asset))


def test_halves_of_another_size(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StubTokenizer, "n_codes", 8)
    with pytest.raises(ValueError, match=r"got an image tokenizer of 8 codes on a grid of \(2, 2\), need 16 on"):
        load_encoders(asset, load_vocabulary(asset), "cpu")


def test_killed_worker(asset: Path) -> None:
    _no_pictures(asset)
    with pytest.raises(ValueError, match=r"got a worker process that was killed .*start the same command again"):
        prepare(_config(asset, workers=2, source=MadeUpConfig(killed=0)))


def test_two_at_once(asset: Path) -> None:
    config = _config(asset)
    with alone(Path(config.corpora) / "c"):
        with pytest.raises(ValueError, match="got a second process in .*c, need one at a time: wait for it"):
            prepare(config)
    assert prepare(config)["splits"]
    assert [path.name for path in Path(config.corpora).rglob(".*")] == []


def test_bad_configs(asset: Path) -> None:
    config = _config(asset)
    for changes, message in (
        ({"sources": {}}, "got no sources, need at least one: name them"),
        ({"sources": {"a/b": MadeUpConfig()}}, "got source name 'a/b', need a plain folder name"),
        ({"sources": {"..": MadeUpConfig()}}, r"got source name '\.\.', need a plain folder name"),
        ({"name": "../c"}, r"got corpus name '\.\./c', need a plain folder name .*: rename it"),
        ({"name": "/tmp/c"}, "got corpus name '/tmp/c', need a plain folder name"),
        ({"name": "a\\b"}, "got corpus name .*, need a plain folder name"),
        ({"name": "."}, r"got corpus name '\.', need a plain folder name"),
        ({"name": ".."}, r"got corpus name '\.\.', need a plain folder name"),
        ({"name": ""}, "got corpus name '', need a plain folder name"),
        ({"val_fraction": 1.0}, "got val_fraction=1.0, need 0 to below 1"),
        ({"workers": -1}, "got shard_tokens=100 and workers=-1, need at least 1 and 0"),
        ({"tokenizer": "smal"}, "did you mean 'small'"),
        ({"near_bits": 17}, "got near_bits=17 and near_overlap=0.8, need 0 to 16 and 0.5 to 1: use 4 and 0.8"),
        ({"ray_address": "auto"}, "got ray_address=auto for engine=processes, need ray: set engine=ray"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(replace(config, **changes))


def test_yaml_is_the_dataclass() -> None:
    config = compose("prepare", []).config
    assert list(config.sources) == ["twemoji", "openmoji", "web", "asv"]
    assert replace(config, sources={}) == PrepareConfig()
    with pytest.raises(ValueError, match="need one of emoji, scripture, interleaved.*: did you mean emoji"):
        compose("prepare", ["sources.twemoji.kind=emojy"])


def test_no_shard_of_a_whole_skipped_chunk(asset: Path) -> None:
    manifest = prepare(_config(asset, source=MadeUpConfig(n=1, broken=0)))
    assert manifest["splits"] == {"train": {}, "val": {}}
    with pytest.raises(ValueError, match="got source 'made', need a source of"):
        open_source(asset.parent / "corpora" / "c", "train", "made")


def test_record_of_a_lost_shard_is_not_trusted(asset: Path) -> None:
    config = _config(asset)
    STOP_AT[:] = [25, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    progress = Path(config.corpora) / "c" / ".progress"
    (record, *_) = sorted(progress.glob("train-*.json"))
    stored = json.loads(record.read_text())
    (progress.parent / "train" / "made" / stored["shard"]["file"]).unlink()
    STOP_AT[0] = -1
    prepare(config)
    assert _verified(progress.parent)
