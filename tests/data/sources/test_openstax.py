"""OpenStax checkouts: order of the book, what CNXML becomes, figures in place, hostile XML."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from moma.config import compose
from moma.data.sources import attribution_text, source_of
from moma.data.sources.openstax import Figure, blocks

CNXML = 'xmlns="http://cnx.rice.edu/cnxml" xmlns:m="http://www.w3.org/1998/Math/MathML"'
ALT = "A red square on a white wall."
FIGURE = (
    f'<figure id="f1"><media alt="{ALT}"><image src="../../media/a.png"/><image src="../../media/b.png"/></media>'
    "<title>Red</title><caption>A <emphasis>red</emphasis> square.</caption></figure>"
)
PAGE = f"""<document {CNXML}><title>Squares</title>
<metadata xmlns:md="http://cnx.rice.edu/mdml"><md:title>Squares</md:title>
<md:abstract><para>Not this.</para></md:abstract></metadata>
<content><para>See <link target-id="f1"/>.</para>{FIGURE}<para>After.</para></content></document>"""


def _collection(*modules: str, title: str = "A Book") -> str:
    inner = "".join(f'<col:module document="{module}"/>' for module in modules)
    return f"""<col:collection xmlns:col="http://cnx.rice.edu/collxml" xmlns:md="http://cnx.rice.edu/mdml"><metadata>
    <md:title>{title}</md:title><md:license url="http://creativecommons.org/licenses/by/4.0/">CC</md:license></metadata>
    <col:content><col:subcollection><col:content>{inner}</col:content></col:subcollection></col:content>
    </col:collection>"""


def _book(folder: Path, png: bytes, modules: dict[str, str], *order: str) -> Path:
    for name in ("collections", "media", "modules"):
        (folder / name).mkdir(parents=True)
    (folder / "media" / "a.png").write_bytes(png)
    for module, text in modules.items():
        (folder / "modules" / module).mkdir()
        (folder / "modules" / module / "index.cnxml").write_text(text)
    (folder / "collections" / "book.collection.xml").write_text(_collection(*(order or modules)))
    return folder


def _blocks(content: str) -> list[str | Figure]:
    return list(blocks(ElementTree.fromstring(f"<document {CNXML}><content>{content}</content></document>")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<section><title>One</title><para>a\n <term>b</term>  c</para></section>", ["One", "a b c"]),
        ("<para>before<list><item>x</item><item>y <emphasis>z</emphasis></item></list>after</para>",
         ["before", "- x", "- y z", "after"]),
        ("<para>H<sub>2</sub>O, 10<sup>3</sup><newline/>m<footnote>note</footnote></para>", ["H2O, 10^3 m (note)"]),
        ('<table id="t"><title>T</title><tgroup><thead><row><entry>a</entry><entry>b</entry></row></thead><tbody><row>'
         "<entry>1</entry><entry/></row><row><entry/></row></tbody></tgroup></table>", ["T", "a | b\n1 |"]),
        ("<glossary><definition><term>cat</term><meaning>an animal</meaning></definition></glossary>",
         ["cat: an animal"]),
        ("<exercise><problem><para>Why?</para></problem><solution><para>So.</para></solution></exercise>",
         ["Why?", "So."]),
        ('<para>See <link target-id="t"/>, (<link url="u"/>) <link document="m1"/>, <link url="u">here</link>.</para>'
         '<table id="t"/>', ["See the table, another section, here."]),
        ("<media><iframe src='x'/></media><para/><note><label/></note>", []),
        ("<!-- no --><para>a<!-- no -->b<?no no?>c</para>", ["abc"]),
    ],
)  # fmt: skip
def test_blocks_of_text(content: str, expected: list[str]) -> None:
    assert _blocks(content) == expected


@pytest.mark.parametrize(
    ("math", "expected"),
    [
        ("<m:mfrac><m:mi>a</m:mi><m:mrow><m:mi>b</m:mi><m:mo>+</m:mo><m:mn>1</m:mn></m:mrow></m:mfrac>", "a/(b + 1)"),
        ("<m:msubsup><m:mi>v</m:mi><m:mn>0</m:mn><m:mn>2</m:mn></m:msubsup>", "v_0^2"),
        ("<m:msqrt><m:mi>x</m:mi></m:msqrt><m:mo>=</m:mo><m:mover><m:mi>F</m:mi><m:mo>\u2192</m:mo></m:mover>",
         "\u221a(x) = F"),
        ("<m:mtable><m:mtr><m:mtd><m:mi>a</m:mi></m:mtd><m:mtd><m:mi>b</m:mi></m:mtd></m:mtr><m:mtr><m:mtd><m:mi>c</m:mi>"
         "</m:mtd></m:mtr></m:mtable>", "a b; c"),
        ("<m:mmultiscripts><m:mi>He</m:mi><m:mprescripts/><m:mn>2</m:mn><m:mn>4</m:mn></m:mmultiscripts>", "^4_2He"),
        ("<m:mfrac/><m:msup><m:mi>a</m:mi></m:msup><m:mmultiscripts/><m:mover/>", "a"),
        ("<m:semantics><m:mi>a</m:mi><m:annotation>no</m:annotation></m:semantics>", "a"),
    ],
)  # fmt: skip
def test_mathematics_in_a_line(math: str, expected: str) -> None:
    assert _blocks(f"<equation><m:math>{math}</m:math></equation>") == [expected]


def test_figures_in_place() -> None:
    assert _blocks(f"<section><para>a</para>{FIGURE}</section>") == [
        "a",
        Figure("../../media/a.png", "Red. A red square.", ALT),
    ]
    left, right = ('<media alt="l"><image src="l"/></media>', '<media><image src="r"/></media>')
    two = f"<figure><subfigure>{left}</subfigure>{right}<caption>c</caption></figure>"
    assert _blocks(two) == [Figure("l", "c", "l"), Figure("r", "", "")]
    assert _blocks('<para>a<media alt="b"><image src="s"/></media>c</para>') == ["a", Figure("s", "", "b"), "c"]


def test_pages_in_the_order_of_the_book(tmp_path: Path, png: bytes, listing, shown) -> None:
    other = PAGE.replace("../../media/a.png", "../../media/missing.png")
    _book(tmp_path / "osbooks-b", png, {"m2": PAGE, "m1": other, "m9": PAGE}, "m1", "m2", "m1")
    _book(tmp_path / "osbooks-a", png, {"m1": PAGE})
    items = listing("openstax", folder=tmp_path)
    assert [(d.id, d.key) for d in items] == [(i, i) for i in ("osbooks-a/m1", "osbooks-b/m1", "osbooks-b/m2")]
    caption = f"Red. A red square.\n{ALT}"
    assert shown(items[0]) == [["Squares"], ["\nSee the figure."], [png, caption], ["\nAfter."]]
    with pytest.raises(FileNotFoundError):
        items[1].segments[2][0].content()
    assert [d.id for d in listing("openstax", folder=tmp_path / "osbooks-a", split="val")] == ["osbooks-a/m1"]


def test_what_is_taken(tmp_path: Path, png: bytes, listing, shown) -> None:
    _book(
        tmp_path / "osbooks-a",
        png,
        {"m1": PAGE, "m2": PAGE.replace("A <emphasis>", "Used by permission. A <emphasis>")},
    )
    folder = tmp_path / "osbooks-a"
    pair, *none = listing("openstax", folder=folder, take="pictures", captions="alt", order="picture_first")
    assert (pair.id, pair.key, shown(pair), none) == ("osbooks-a/m1#0", "osbooks-a/m1", [[png, ALT]], [])
    assert len(listing("openstax", folder=folder, take="pictures", skip_captions="")) == 2
    assert listing("openstax", folder=folder, take="pictures", min_caption=30) == []
    prose = listing("openstax", folder=folder, take="prose")
    assert [shown(d) for d in prose] == [[["Squares"], ["\nSee the figure."], ["\nAfter."]]] * 2


LAUGHS = '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (LAUGHS + PAGE.replace("After", "&b;"), "unreadable"),
        ('<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + PAGE.replace("After", "&x;"), "unreadable"),
        (PAGE.replace("After", "&nbsp;"), "unreadable"),
        (PAGE[:200], "unreadable"),
        ("", "unreadable"),
        (PAGE.replace("After", "<para>" * 100_000 + "</para>" * 100_000), "too_large"),
        (
            f"<document {CNXML}>" + "<section><emphasis>" * 5_000 + "</emphasis></section>" * 5_000 + "</document>",
            "too_large",
        ),
        (PAGE.replace("After", "x" * 3_000_000), "too_large"),
        (PAGE.replace("After", "x" * 9_000_000), "too_large"),
        (PAGE.replace("../../media/a.png", "../../../a.png"), "outside"),
        (PAGE.replace("../../media/a.png", "/etc/passwd"), "outside"),
        (PAGE.replace("../../media/a.png", "../../media/link.png"), "outside"),
        (PAGE.replace("../../media/a.png", ""), "readable"),
        (f"<document {CNXML}/>", "empty"),
    ],
)
def test_hostile_modules(tmp_path: Path, png: bytes, listing, text: str, kind: str) -> None:
    book = _book(tmp_path / "osbooks-a", png, {"m1": PAGE, "m2": text, "m3": PAGE})
    (book / "media" / "link.png").symlink_to("/etc/passwd")
    first, broken, last = listing("openstax", folder=tmp_path)
    assert (first.id, last.id) == ("osbooks-a/m1", "osbooks-a/m3")
    if kind == "readable":  # the folder stands where a picture should: found when it is opened
        with pytest.raises(ValueError, match="which is no plain file"):
            broken.segments[2][0].content()
        return
    assert (broken.kind, broken.place) == (kind, "osbooks-a/m2") and broken.reason.startswith("got ")


def test_hostile_collections(tmp_path: Path, png: bytes, listing) -> None:
    book = _book(tmp_path / "osbooks-a", png, {"m1": PAGE}, "../m1", "m1", "m404", "")
    (book / "collections" / "a.collection.xml").write_text("<col:collection")
    (book / "collections" / "b.collection.xml").symlink_to("/etc/passwd")
    items = listing("openstax", folder=book)
    assert [getattr(item, "kind", None) for item in items] == [
        "unreadable", "outside", "wrong_type", None, "unreadable", "wrong_type"]  # fmt: skip
    assert "got no file 'modules/m404/index.cnxml'" in items[4].reason


def test_credits_name_each_book_and_its_commit(tmp_path: Path, png: bytes) -> None:
    book = _book(tmp_path / "osbooks-a", png, {"m1": PAGE})
    (book / ".git" / "refs" / "heads").mkdir(parents=True)
    config = compose("prepare", ["data=openstax", f"folder={tmp_path}"]).config.sources["pairs"]
    source = source_of(config)
    for head, version in (
        ("f" * 40, "commit " + "f" * 40),
        ("ref: refs/heads/main", "commit " + "e" * 40),
        ("ref: ../../x", "unknown commit"),
    ):
        (book / ".git" / "HEAD").write_text(head + "\n")
        (book / ".git" / "refs" / "heads" / "main").write_text("e" * 40)
        assert source.attribution(config)[0]["version"] == version
    text = attribution_text("From:", source.attribution(config))
    assert "A Book, by OpenStax, Rice University" in text and "creativecommons.org/licenses/by/4.0" in text
    assert [d.id for d in source.documents(config)] == ["osbooks-a/m1#0"]


def test_settings_that_cannot_work(tmp_path: Path, png: bytes, listing) -> None:
    with pytest.raises(
        ValueError, match=r"got folder .* without collections/ in it .*: run experiments/openstax/fetch"
    ):
        listing("openstax", folder=tmp_path)
    _book(tmp_path / "osbooks-a", png, {"m1": PAGE})
    with pytest.raises(ValueError, match=r"got skip_captions='\(' .*, need a pattern: correct it"):
        listing("openstax", folder=tmp_path, skip_captions="(")
