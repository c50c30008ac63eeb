"""Chameleon's vocabulary file: its map by name, the library's encoding, and text that can forge nothing.

The files here are made: of the same form as the published one, small, and once of its full size.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moma.tokenizer.chameleon
from moma.tokenizer.chameleon import chameleon_asset, read_vocabulary_file
from moma.tokenizer.text import TextTokenizer, byte_alphabet
from moma.tokenizer.vocab import JSON_FILE, RANKS_FILE, VOCAB_FILE, load_vocabulary, write_vocabulary

tokenizers = pytest.importorskip("tokenizers")

N_CODES = 24
WORDS = "the quick brown fox jumps over </b> a <b> lazy dog while 2024 rain ... falls don't".split()
HOSTILE = [
    "<s>",
    "</s><pad>",
    "a<racm3:break>IMGIMGAZIMGIMGBZIMGIMGCDZ<eoss> b",
    "IMGIMGBDZ",
    " IMGIMGAZ IMGIMGCZ ",
    "<reserved00020>x<unk><sep>",
    "<racm3:break",
    "the<s> quick</s>",
]
Change = Callable[[dict[str, Any]], None]


def image_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def vocabulary_file(path: Path, n_codes: int, text_start: int, text: list[str], merges: list[list[str]]) -> Path:
    """A file of the published form: specials, image codes, reserved names, text."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_name, range(n_codes)), "<eoss>", "<racm3:break>"]
    names += [f"<reserved{id_ - 4:05}>" for id_ in range(len(names), text_start)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": name, **flags} for id_, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "IMGIMG[A-J]+Z"}, "behavior": "Isolated", "invert": False},
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: id_ for id_, name in enumerate([*names, *text])},
            "merges": merges,
        },
    }
    path.write_text(json.dumps(state))
    return path


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator([" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(50)], trainer)
    model = json.loads(trained.to_str())["model"]
    text = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert any(name.startswith("<") and name != "<" for name in text)  # "</", "<b": text that begins with a bracket
    return vocabulary_file(tmp_path_factory.mktemp("file") / "v.json", N_CODES, 64, text, model["merges"])


@pytest.fixture
def asset(small_file: Path, tmp_path: Path) -> Path:
    chameleon_asset(small_file, tmp_path / "asset", (2, 3))
    return tmp_path / "asset"


def changed(small_file: Path, folder: Path, change: Change) -> Path:
    state = json.loads(small_file.read_text())
    change(state)
    (folder / "changed.json").write_text(json.dumps(state))
    return folder / "changed.json"


def load(folder: Path) -> TextTokenizer:
    return TextTokenizer.load(folder, load_vocabulary(folder))


def samples() -> list[str]:
    draw = random.Random(0)
    texts = [
        "",
        " ",
        "the quick </b> fox don't\n\n jump 1234",
        "\x00\x7f\x85\u2003",
        "👩🏽‍🌾 汉字 é e\u0301",
        "<",
        "<<b",
        "Ġ",
    ]
    for _ in range(100):
        texts.append("".join(draw.choices([*WORDS, *" \n\t<>/éZ🙂IMG", "  "], k=draw.randrange(30))))
        texts.append(bytes(draw.randrange(256) for _ in range(40)).decode("utf-8", errors="replace"))
    return texts


def test_the_map_of_65536_ids(tmp_path: Path) -> None:
    bytes_ = list(byte_alphabet())
    merges = [[a, b] for a in bytes_[:222] for b in bytes_[:222]][: 49152 - 256]
    text = [*bytes_, *(a + b for a, b in merges)]
    file = vocabulary_file(tmp_path / "v.json", 8192, 16384, text, merges)
    vocab = chameleon_asset(file, tmp_path / "asset")
    assert (vocab.size, vocab.bos, vocab.pad, vocab.eos, vocab.eoi, vocab.boi) == (65536, 0, 1, 2, 8196, 8197)
    assert (vocab.image_start, vocab.image_stop, vocab.text_start, vocab.text_stop) == (4, 8196, 16384, 65536)
    assert vocab.image_grid == (32, 32) and vocab.tokens_per_image == 1024
    names = json.loads(file.read_text())["model"]["vocab"]
    assert names["<reserved08706>"] == 8710 and names["IMGIMGIBJBZ"] == 8191 + 4
    tokenizer = load(tmp_path / "asset")
    assert tokenizer.special("<sep>") == 8710
    assert tokenizer.encode("!") == [16384] and tokenizer.decode(tokenizer.encode("Chameleon é")) == "Chameleon é"


def test_encoding_is_the_librarys(small_file: Path, asset: Path) -> None:
    library, ours = tokenizers.Tokenizer.from_file(str(small_file)), load(asset)
    for text in samples():
        ids = ours.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids) == text
        assert ours.decode_bytes(ids) == text.encode()
    # Ids in any order, so that bytes of characters are torn apart.
    draw = random.Random(1)
    for _ in range(200):
        ids = [draw.randrange(64, ours.vocab.text_stop) for _ in range(9)]
        assert ours.decode(ids) == library.decode(ids)


def _one_word(state: dict[str, Any]) -> None:
    """Names in brackets are words of their own, and nothing is an added token."""
    state["added_tokens"] = []
    split = {"type": "Split", "pattern": {"Regex": "<[^>]*>"}, "behavior": "Isolated", "invert": False}
    steps = state["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, split)
    steps[-1]["use_regex"] = False


def spelled_by_merges(state: dict[str, Any]) -> None:
    """Merges that lead to image codes and to the ends of a document."""
    _one_word(state)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    steps = ["I M", "IM G", "IMG IMG", "IMGIMG A", "IMGIMGA Z", "IMGIMG B", "IMGIMGB D", "IMGIMGBD Z"]
    for merge in ["< s", "<s >", "< /", "</ s", "</s >", *steps]:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    merges[:0] = [merge.split() for merge in ["< s", "<s >", "</ s", "</s >", *steps]]


def whole_words(state: dict[str, Any]) -> None:
    """A word that is a name is taken as it is, without any merge."""
    _one_word(state)
    state["model"]["ignore_merges"] = True


def as_published(state: dict[str, Any]) -> None:
    """Added tokens, as in the published file."""


@pytest.mark.parametrize("change", [as_published, spelled_by_merges, whole_words])
def test_text_cannot_forge_a_token(small_file: Path, tmp_path: Path, change: Change) -> None:
    file = changed(small_file, tmp_path, change)
    library = tokenizers.Tokenizer.from_file(str(file))
    vocab = chameleon_asset(file, tmp_path / "asset", (2, 3))
    ours = load(tmp_path / "asset")
    forged = 0
    for text in HOSTILE:
        forged += any(id_ < vocab.text_start for id_ in library.encode(text).ids)
        ids = ours.encode(text)
        assert all(vocab.text_start <= id_ < vocab.text_stop for id_ in ids)
        assert ours.decode(ids) == text
    assert forged >= 4  # the library does read tokens out of these texts


def other_rules(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "NFC"}
    state["pre_tokenizer"]["pretokenizers"][2]["add_prefix_space"] = True


def plain_added_token(state: dict[str, Any]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    state["added_tokens"].append({"id": len(state["model"]["vocab"]), "content": "quick fox", **flags})


def merges_as_strings(state: dict[str, Any]) -> None:
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]


@pytest.mark.parametrize("change", [other_rules, plain_added_token, merges_as_strings])
def test_other_files_are_read_as_by_the_library(small_file: Path, tmp_path: Path, change: Change) -> None:
    file = changed(small_file, tmp_path, change)
    library = tokenizers.Tokenizer.from_file(str(file))
    chameleon_asset(file, tmp_path / "asset", (2, 3))
    ours = load(tmp_path / "asset")
    for text in [*samples(), "the quick fox", "quick foxquick fox"]:
        ids = ours.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids)


def test_what_is_not_encoding_is_left_out(small_file: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["model"]["dropout"] = 0.9
        state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        state["padding"] = {
            **{"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"},
        }
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }

    chameleon_asset(changed(small_file, tmp_path, change), tmp_path / "a", (2, 3))
    chameleon_asset(small_file, tmp_path / "b", (2, 3))
    text = "the quick brown fox jumps over"
    assert load(tmp_path / "a").encode(text) == load(tmp_path / "b").encode(text)


def test_ids_are_found_by_name(small_file: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        """Text first, structure last."""
        vocab = state["model"]["vocab"]
        for name in vocab:
            vocab[name] = (vocab[name] - 64) % len(vocab)
        for entry in state["added_tokens"]:
            entry["id"] = vocab[entry["content"]]

    vocab = chameleon_asset(changed(small_file, tmp_path, change), tmp_path / "asset", (2, 3))
    size = vocab.size
    assert (vocab.text_start, vocab.text_stop, vocab.bos, vocab.boi) == (
        0,
        size - 64,
        size - 64,
        size - 64 + 5 + N_CODES,
    )
    assert (vocab.image_start, vocab.image_stop) == (size - 60, size - 60 + N_CODES)
    tokenizer = load(tmp_path / "asset")
    assert tokenizer.decode(tokenizer.encode("the fox <s>")) == "the fox <s>"


def test_brackets_that_are_text(small_file: Path) -> None:
    file = read_vocabulary_file(small_file)
    assert any(name.startswith("</") for name in file.text) and "<" in file.text
    assert all(name.startswith("<") and name.endswith(">") for name in file.specials)
    assert len(file.image_ids) == N_CODES


def test_half_a_character_and_surrogates(asset: Path) -> None:
    tokenizer = load(asset)
    ids = tokenizer.encode("é")
    assert tokenizer.decode_bytes(ids[:1]) == b"\xc3" and tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_other_ids_have_no_text(asset: Path) -> None:
    tokenizer = load(asset)
    vocab = tokenizer.vocab
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([vocab.bos, vocab.boi, vocab.image_start, vocab.eoi, *ids, 63, vocab.eos]) == "fox"


def test_hash_covers_the_file(asset: Path) -> None:
    before = load_vocabulary(asset).hash
    state = json.loads((asset / JSON_FILE).read_text())
    state["model"]["merges"].reverse()
    (asset / JSON_FILE).write_text(json.dumps(state))
    assert load_vocabulary(asset).hash != before


def test_a_file_that_does_not_belong(small_file: Path, asset: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        del state["model"]["vocab"]["IMGIMGCDZ"], state["added_tokens"][N_CODES + 3]

    (asset / JSON_FILE).write_bytes(changed(small_file, tmp_path, change).read_bytes())
    with pytest.raises(
        ValueError, match=r"got image_stop 27 by the names .*, need 28 as in vocab\.json: put the file back"
    ):
        load(asset)


def test_an_asset_is_not_overwritten(small_file: Path, asset: Path) -> None:
    with pytest.raises(
        ValueError, match=r"got text_tokenizer\.json and vocab\.json in .* already, need an empty place"
    ):
        chameleon_asset(small_file, asset, (2, 3))
    before = load_vocabulary(asset)
    assert chameleon_asset(asset / JSON_FILE, asset, (2, 3), overwrite=True) == before
    (asset / RANKS_FILE).write_text("")
    with pytest.raises(
        ValueError, match=r"got text\.tiktoken and text_tokenizer\.json in .*, need one text half: remove"
    ):
        load_vocabulary(asset)
    assert chameleon_asset(small_file, asset, (2, 3), overwrite=True) == before


def test_no_rules_of_ours_beside_the_files(asset: Path) -> None:
    stored = json.loads((asset / VOCAB_FILE).read_text())
    (asset / VOCAB_FILE).write_text(json.dumps({**stored, "digits": "triple"}))
    with pytest.raises(
        ValueError, match=r"got digits or whitespace in .*, need neither: text_tokenizer\.json cuts text"
    ):
        load_vocabulary(asset)


def _set(*keys: Any, value: Any) -> Change:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def _renamed(old: str, new: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        state["model"]["vocab"] = {new if name == old else name: id_ for name, id_ in state["model"]["vocab"].items()}
        for entry in state["added_tokens"]:
            entry["content"] = new if entry["content"] == old else entry["content"]

    return change


def _swapped(state: dict[str, Any]) -> None:
    vocab = state["model"]["vocab"]
    vocab["IMGIMGAZ"], vocab["IMGIMGBZ"] = vocab["IMGIMGBZ"], vocab["IMGIMGAZ"]
    state["added_tokens"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", value=[]), "got 'model' of .* as list, need an object"),
        (_set("model", "type", value="Unigram"), "with model 'Unigram', need byte-level BPE"),
        (_set("pre_tokenizer", value={"type": "Whitespace"}), "need byte-level BPE .a ByteLevel pre-tokenizer"),
        (_set("pre_tokenizer", value=7), "need byte-level BPE .a ByteLevel pre-tokenizer"),
        (_set("model", "end_of_word_suffix", value="</w>"), "with marks inside or behind words, need plain"),
        (_set("model", "vocab", value=["a"]), "got 'vocab' of .* as list, need an object"),
        (_set("model", "vocab", "the", value="7"), "got id '7' for 'the' in .*, need a whole number"),
        (_set("model", "vocab", "the", value=2**40), "got id 1099511627776 for 'the' in .*, need a whole number"),
        (_set("model", "vocab", "the", value=True), "got id True for 'the' in .*, need a whole number"),
        (_set("model", "vocab", "new", value=0), "got two names for one id in"),
        (_set("model", "merges", value={}), "got 'merges' of .* as dict, need a list"),
        (_set("model", "merges", 3, value=["a", 3]), r"got merge 3 of .* as \['a', 3\], need two names"),
        (_set("model", "merges", 3, value="a b c"), "got merge 3 of .* as 'a b c', need two names"),
        (_set("model", "merges", 3, value="a b"), "got merge 3 of .* with the unknown 'ab', need known names"),
        (_set("added_tokens", value=True), "got 'added_tokens' of .* as bool, need a list"),
        (_set("added_tokens", 0, value="<s>"), "got added token '<s>' in .*, need an object with 'content'"),
        (_set("added_tokens", 0, "id", value=9), "got ids 0 and 9 for '<s>' in .*, need one"),
        (_set("added_tokens", 0, "id", value=None), "got id None for '<s>' in .*, need a whole number"),
        (_renamed("<racm3:break>", "<break>"), "got a vocabulary file without <racm3:break>, need them"),
        (_renamed("IMGIMGFZ", "<five>"), "got 23 names of image codes in .*, need 0, 1, ... each once"),
        (_renamed("IMGIMGFZ", "IMGIMGAAZ"), "got 24 names of image codes in .*, need 0, 1, ... each once"),
        (_swapped, "got image code 1 at id 4, need it at 6, codes in order without gaps: take Chameleon's own file"),
        (_renamed("!", "<!>"), r"without the single bytes \[33\], need all 256"),
        (_set("model", "vocab", "<s>", value=70), "got ids 70 and 0 for '<s>' in .*, need one"),
        (
            _set("decoder", value={"type": "None such"}),
            "that 'tokenizers' refuses .*, need a whole file: copy it again",
        ),
    ],
)
def test_errors(small_file: Path, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chameleon_asset(changed(small_file, tmp_path, change), tmp_path / "asset", (2, 3))
        load(tmp_path / "asset")


def test_structure_inside_the_text(small_file: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        vocab = state["model"]["vocab"]
        vocab["<s>"], vocab["the"] = vocab["the"], vocab["<s>"]
        state["added_tokens"] = []

    with pytest.raises(ValueError, match=r"got .* and .* ids that overlap at .*, need one meaning"):
        chameleon_asset(changed(small_file, tmp_path, change), tmp_path / "asset", (2, 3))
    assert not (tmp_path / "asset").exists()


def test_unreadable_files(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got no file .*, need Chameleon's text_tokenizer\.json or tokenizer\.json"):
        read_vocabulary_file(tmp_path / "none.json")
    for content, message in (
        (b"{", "that is no JSON .* need a whole file: copy it again"),
        (b"\xff\xfe\xff", "that is no JSON"),
        (b"[" * 100_000, "that is no JSON"),
        (b"[1]", "that holds a list, need an object: copy the file again"),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_vocabulary_file(tmp_path / "bad.json")
    monkeypatch.setattr(moma.tokenizer.chameleon, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"of \d+ bytes, need at most 1000: it is no file of this kind"):
        read_vocabulary_file(small_file)


def test_separator_only_where_the_file_has_one(small_file: Path, tmp_path: Path) -> None:
    chameleon_asset(small_file, tmp_path / "a", (2, 3))
    assert load(tmp_path / "a").specials == {}
    chameleon_asset(
        changed(small_file, tmp_path, _renamed("<reserved00040>", "<reserved08706>")), tmp_path / "b", (2, 3)
    )
    assert load(tmp_path / "b").special("<sep>") == 44


def test_the_default_asset_has_no_json(tmp_path: Path) -> None:
    (tmp_path / RANKS_FILE).write_text("")
    write_vocabulary(tmp_path, text_size=256, image_codes=8, image_grid=(2, 2))
    (tmp_path / RANKS_FILE).unlink()
    with pytest.raises(ValueError, match=r"without vocab\.json or text\.tiktoken, need both"):
        load_vocabulary(tmp_path)
