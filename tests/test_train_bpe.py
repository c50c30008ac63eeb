"""`moma train_bpe`: deterministic, equal to the trainer's encoding, trained on training documents only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import moma.data.sources
from moma.config import compose
from moma.data.sources import RawDocument, Source, is_held_out
from moma.tokenizer.documents import Text
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, read_ranks
from moma.tokenizer.vocab import load_vocabulary
from moma.train_bpe import TrainBpeConfig, _byte_alphabet, _train, train_bpe

pytest.importorskip("tokenizers")

WORDS = "the quick brown fox jumps over a lazy dog while rain falls softly on hills and rivers run".split()


@dataclass(frozen=True)
class WordsConfig:
    n: int = 400
    split: str | None = None


def words(config: WordsConfig) -> Iterator[RawDocument]:
    for i in range(config.n):
        key = f"k{i}"
        text = " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(12)) + f" №{i} é🙂.\n"
        text += "zygote " * 40 if is_held_out(key) else ""
        yield RawDocument(f"w/{i}", key, ((Text(text),),), config.split)


def credits_of(config: WordsConfig) -> list[dict[str, str]]:
    return [{"title": "Words", "author": "us", "licence": "CC0", "url": "u", "version": "v1"}]


@pytest.fixture(autouse=True)
def words_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moma.data.sources.SOURCES, "words", Source(WordsConfig, words, credits_of, "text"))


def _config(folder: Path, **options: Any) -> TrainBpeConfig:
    defaults = {"text_size": 320, "image_codes": 8, "image_grid": (2, 2), "sources": {"words": WordsConfig()}}
    return TrainBpeConfig(out=str(folder), **(defaults | options))


def test_train_bpe(tmp_path: Path) -> None:
    summary = train_bpe(_config(tmp_path / "a"))
    vocab = load_vocabulary(tmp_path / "a")
    assert summary["text_size"] == 320 and summary["vocab_size"] == vocab.size and summary["hash"] == vocab.hash
    assert summary["bytes_per_token"]["words"] > 1.5 and summary["val_bytes_per_token"]["words"] > 1
    assert "Words, by us" in (tmp_path / "a" / "ATTRIBUTION").read_text()
    ranks = read_ranks(tmp_path / "a" / RANKS_FILE)
    assert b" quick" in ranks or b" brown" in ranks
    text = TextTokenizer.load(tmp_path / "a", vocab)
    assert text.decode(text.encode("The quick 🦊\n№")) == "The quick 🦊\n№"


def test_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(_config(tmp_path / name))
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    train_bpe(_config(tmp_path / "a"))
    assert not any(b"zyg" in token for token in read_ranks(tmp_path / "a" / RANKS_FILE))
    train_bpe(_config(tmp_path / "b", sources={"words": WordsConfig(split="train")}))
    assert any(b"zyg" in token for token in read_ranks(tmp_path / "b" / RANKS_FILE))


def test_tiktoken_equals_the_trainer(tmp_path: Path) -> None:
    trained, ranks = _train((d.segments[0][0].text for d in words(WordsConfig())), 330)
    train_bpe(_config(tmp_path, text_size=330, val_fraction=0.0))
    assert read_ranks(tmp_path / RANKS_FILE) == ranks
    text = TextTokenizer.load(tmp_path, load_vocabulary(tmp_path))
    start = text.vocab.text_start
    for sample in (
        "the lazy dogs'll JUMP 1234 times…\n\n  twice",
        "é🙂 №№\t\tx\r\n",
        "\x00\x7f\x85 \u2003ab",
        "汉字",
    ):
        assert [i - start for i in text.encode(sample)] == trained.encode(sample).ids


def test_byte_alphabet_is_the_trainers() -> None:
    from tokenizers import pre_tokenizers

    alphabet = _byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


def test_weights(tmp_path: Path) -> None:
    sources = {"words": WordsConfig(), "more": WordsConfig(n=50)}
    summaries = [
        train_bpe(_config(tmp_path / str(weight), sources=sources, weights={"more": weight})) for weight in (0, 20)
    ]
    assert summaries[0]["hash"] != summaries[1]["hash"] and "more" in summaries[0]["bytes_per_token"]


def test_errors(tmp_path: Path) -> None:
    train_bpe(_config(tmp_path / "a"))
    for changes, message in (
        ({}, r"got text\.tiktoken and vocab\.json in .* already, need an empty place: choose another out"),
        ({"text_size": 100}, "got text_size=100, need at least the 256 bytes: use 4096"),
        ({"sources": {}}, "got no sources, need at least one"),
        (
            {"weights": {"wordz": 2}},
            r"got a weight for source 'wordz', need one of \['words'\]: correct its name",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train_bpe(replace(_config(tmp_path / "a"), **changes))
    with pytest.raises(ValueError, match=r"got text for \d+ tokens, need text_size=100000: add sources, or lower"):
        train_bpe(_config(tmp_path / "b", text_size=100000))
    assert train_bpe(_config(tmp_path / "a", overwrite=True))["text_size"] == 320


def test_yaml_is_the_dataclass() -> None:
    config = compose("train_bpe", []).config
    assert list(config.sources) == ["twemoji", "openmoji", "web", "asv"]
    assert config.weights == {"twemoji": 32, "openmoji": 0, "web": 1, "asv": 1}
    assert replace(config, sources={}, weights={}) == TrainBpeConfig()
