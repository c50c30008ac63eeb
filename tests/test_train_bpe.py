"""`moma train_bpe`: deterministic, equal to the trainer's encoding, trained on training documents only."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import moma.data.sources
import moma.train_bpe
from moma.config import compose
from moma.data.sources import Broken, RawDocument, Source, is_held_out
from moma.tokenizer.documents import Text
from moma.tokenizer.text import RANKS_FILE, TextTokenizer, byte_alphabet, read_ranks, word_pattern
from moma.tokenizer.vocab import JSON_FILE, TextOptions, load_vocabulary, text_options
from moma.train_bpe import TrainBpeConfig, _train, train_bpe

pytest.importorskip("tokenizers")

WORDS = "the quick brown fox jumps over a lazy dog while rain falls softly on hills and rivers run".split()


@dataclass(frozen=True)
class WordsConfig:
    n: int = 400
    split: str | None = None
    broken: int = 0


def words(config: WordsConfig) -> Iterator[RawDocument | Broken]:
    for i in range(config.n):
        key = f"k{i}"
        if i < config.broken:
            yield Broken("unreadable" if i else "too_large", f"w.jsonl:{i}", "is torn")
            continue
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
    assert summary["train_bytes"]["words"] > summary["val_bytes"]["words"] > 0 and summary["skipped"] == {"words": {}}
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


@pytest.mark.parametrize("digits", ["single", "triple"])
@pytest.mark.parametrize("whitespace", ["grouped", "single"])
def test_tiktoken_equals_the_trainer(tmp_path: Path, digits: Any, whitespace: Any) -> None:
    options = TextOptions(digits, whitespace)
    trained, ranks = _train((d.segments[0][0].text for d in words(WordsConfig())), 330, word_pattern(options))
    train_bpe(_config(tmp_path, text_size=330, val_fraction=0.0, digits=digits, whitespace=whitespace))
    assert text_options(tmp_path) == options
    assert read_ranks(tmp_path / RANKS_FILE) == ranks
    text = TextTokenizer.load(tmp_path, load_vocabulary(tmp_path))
    start = text.vocab.text_start
    for sample in (
        "the lazy dogs'll JUMP 1234 times…\n\n  twice",
        "in 1234567 0.25 ½ ٣٤٥٦ №17, (42).\n\n\n\t x   y \n z  ",
        "é🙂 №№\t\tx\r\n",
        "\x00\x7f\x85 \u2003ab",
        "汉字",
    ):
        assert [i - start for i in text.encode(sample)] == trained.encode(sample).ids


def test_byte_alphabet_is_the_trainers() -> None:
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


def test_weights(tmp_path: Path) -> None:
    sources = {"words": WordsConfig(), "more": WordsConfig(n=50)}
    summaries = [
        train_bpe(_config(tmp_path / str(weight), sources=sources, weights={"more": weight})) for weight in (0, 20)
    ]
    assert summaries[0]["hash"] != summaries[1]["hash"] and "more" in summaries[0]["bytes_per_token"]


def test_threads_do_not_matter(tmp_path: Path) -> None:
    """The trainer's threads are set when its library starts: one process each."""
    code = (
        "import random, sys; from pathlib import Path; from moma.tokenizer.text import word_pattern, write_ranks; "
        "from moma.tokenizer.vocab import TextOptions; from moma.train_bpe import _train; draw = random.Random(0); "
        "texts = [' '.join(''.join(draw.choices('abcdef', k=draw.randrange(1, 7))) for _ in range(30)) "
        "for _ in range(2000)]; "
        "write_ranks(Path(sys.argv[1]), _train(iter(texts), 800, word_pattern(TextOptions()))[1])"
    )
    for threads in (1, 4):
        out = str(tmp_path / f"{threads}")
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", code, out], env=environment, check=True, timeout=120)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()
    assert len(read_ranks(tmp_path / "1")) == 800


def test_broken_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {"words": WordsConfig(broken=6)}
    summary = train_bpe(_config(tmp_path / "a", sources=sources))
    assert summary["skipped"] == {"words": {"too_large": 1, "unreadable": 5}}
    printed = capsys.readouterr().out
    assert "words: train " in printed and "bytes/token" in printed
    assert "skipped 1 too_large, 5 unreadable: w.jsonl:0: is torn | w.jsonl:1: is torn | w.jsonl:2: is torn" in printed
    with pytest.raises(
        ValueError, match=r"got w\.jsonl:0 that cannot be read \(is torn\), need readable documents: mend"
    ):
        train_bpe(_config(tmp_path / "b", sources=sources, on_error="stop"))
    assert not (tmp_path / "b").exists()


def test_half_a_surrogate_pair_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(config: WordsConfig) -> Iterator[RawDocument | Broken]:
        yield from words(config)
        yield RawDocument("w/torn", "torn", ((Text("half \ud83d a pair"), Text("")),), "train")

    monkeypatch.setitem(moma.data.sources.SOURCES, "words", Source(WordsConfig, torn, credits_of, "text"))
    assert train_bpe(_config(tmp_path))["text_size"] == 320


def test_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are measured in full or by an even sample; the tokenizer is the same."""
    measured = []
    count = moma.train_bpe._count_tokens

    def counted(texts: list[str], *rest: Any) -> int:
        measured.extend(texts)
        return count(texts, *rest)

    monkeypatch.setattr(moma.train_bpe, "_count_tokens", counted)
    whole = train_bpe(_config(tmp_path / "a", sources={"words": WordsConfig(1000)}))
    assert len(measured) == 1000
    measured.clear()
    some = train_bpe(_config(tmp_path / "b", sources={"words": WordsConfig(1000)}, sample_bytes=8000))
    n_bytes = sum(len(text.encode()) for text in measured)
    assert 8000 < n_bytes < 17000 and "№0 " in measured[0]
    assert whole["hash"] == some["hash"]
    assert some["bytes_per_token"]["words"] == pytest.approx(whole["bytes_per_token"]["words"], rel=0.05)


def test_disagreement_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text: [self.vocab.text_start])
    with pytest.raises(ValueError, match="got different tokens from tiktoken and the trainer for 'the quick"):
        train_bpe(_config(tmp_path))


def test_special_tokens(tmp_path: Path) -> None:
    plain = train_bpe(_config(tmp_path / "a"))
    summary = train_bpe(_config(tmp_path / "b", special_tokens=("<sep>",)))
    assert summary["hash"] != plain["hash"] and summary["vocab_size"] == plain["vocab_size"]
    text = TextTokenizer.load(tmp_path / "b", load_vocabulary(tmp_path / "b"))
    assert text.special("<sep>") == 14 and text.special("<sep>") not in text.encode("a <sep>")


def test_a_json_asset_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / JSON_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"got text_tokenizer\.json in .* already, need an empty place"):
        train_bpe(_config(tmp_path))
    train_bpe(_config(tmp_path, overwrite=True))
    assert load_vocabulary(tmp_path).text_stop - load_vocabulary(tmp_path).text_start == 320


def test_errors(tmp_path: Path) -> None:
    train_bpe(_config(tmp_path / "a"))
    for changes, message in (
        ({}, r"got text\.tiktoken and vocab\.json in .* already, need an empty place: choose another out"),
        ({"text_size": 100}, "got text_size=100, need at least the 256 bytes: use 4096"),
        ({"sources": {}}, "got no sources, need at least one"),
        ({"sample_bytes": 0}, "got sample_bytes=0, need at least 1: use 16777216"),
        ({"weights": {"words": -1}}, "got weight -1 for source 'words', need 0 or more: 0 leaves the source out"),
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


def test_another_data_option_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text("# @package _global_\nsources: {asv: {kind: scripture}}\n")
    assert compose("train_bpe", [f"hydra.searchpath=[file://{tmp_path}]", "data=own"]).config.weights == {}
