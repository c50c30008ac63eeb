"""Mutated inputs for every kind of source that reads strangers' files: no crash, no hang, all errors named.

A case copies a small valid input, damages one to three of its files, lists all documents and opens all pictures.
Allowed are documents, `Broken` items of a known kind, and a ValueError before the first of them (a setting that cannot
work); a picture may refuse with ValueError or OSError. Every reason says what was got and what is needed. As a script
it runs more cases and counts what happened: `python tests/data/test_fuzz.py CASES SEED RESULTS.json`.
"""

import contextlib
import faulthandler
import gzip
import io
import json
import lzma
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from moma.data.sources import SOURCES, Broken, RawDocument
from moma.data.sources.raw import KINDS
from moma.schema import build
from moma.tokenizer.documents import Picture, Text
from moma.tokenizer.image import open_image

CASES = 110  # of each input below, in the suite
SECONDS = 10  # that one case may take
HOSTILE = [
    *(None, True, 0, -1, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\ufeff"),
    *("../a.png", "/etc/passwd", "a/../../b", "x" * 5000, "https://example.org/a.jpg", "<image>", ["a.png", 7]),
    *([], {}, [[]], {"": {}}),
]
NAMES = [
    *("../a.png", "/etc/passwd", "a/../../b.png", "./0.png", "\udcff.png", "x" * 300, "", "a\nb.png", ".png"),
    *("..", "a/"),
]
ENDINGS = ["", ".gz", ".xz", ".bz2", ".zst", ".json", ".jsonl", ".parquet", ".tar", ".txt"]
WORDS = [
    *(
        b"[" * 3000,
        b"{" * 3000,
        b"9" * 6000,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x00" * 600,
        b"\r",
        b"\n\n\n",
        b"\x1f\x8b",
    ),
    *(b"<!DOCTYPE d [<!ENTITY a 'b'>]>", b"&a;", b"<para>" * 2000, b"]]>", b"\\ud800", b"NaN", b'"', b"-"),
]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP"]


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


def _from_zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


CODECS = {
    ".gz": (gzip.compress, gzip.decompress),
    ".xz": (lzma.compress, lzma.decompress),
    ".zst": (_zstd, _from_zstd),
}


# ---- valid inputs ---------------------------------------------------------------------------------------------------


@cache
def _encoded(format_: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format_)
    return file.getvalue()


def _picture(rng: random.Random) -> bytes:
    return _encoded(rng.choice(FORMATS))


def _pictures(folder: Path, rng: random.Random) -> None:
    (folder / "images").mkdir()
    for i in range(3):
        (folder / "images" / f"{i}.png").write_bytes(_picture(rng))


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(
        path, "w", format=random.Random(path.name).choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _pages(n: int = 4) -> list[object]:
    return [
        {
            "id": f"d{i}",
            "key": f"k{i // 2}",
            "segs": [{"t": f"text {i}"}, {"i": f"{i % 3}.png", "cap": "red", "alt": "a"}],
        }
        for i in range(n)
    ]


def _talks(n: int = 4) -> list[object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    return [{"id": f"t{i}", "image": f"{i % 3}.png", "conversations": turns} for i in range(n)]


def _lines(records: list[object]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _interleaved(folder: Path, rng: random.Random) -> dict[str, str]:
    _pictures(folder, rng)
    (folder / "d.jsonl").write_bytes(_lines(_pages()))
    return {"documents": "d.jsonl", "pictures": "images"}


def _interleaved_tar(folder: Path, rng: random.Random) -> dict[str, str]:
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(_lines(_pages())))
    _tar(folder / "p.tar", {f"{i}.png": _picture(rng) for i in range(3)})
    return {"documents": "d.jsonl.xz", "pictures": "p.tar", "take": "pictures"}


def _webdataset(folder: Path, rng: random.Random) -> dict[str, str]:
    for shard in "ab":
        members = {
            f"{i}.{end}": data for i in range(3) for end, data in (("png", _picture(rng)), ("txt", b"red square"))
        }
        _tar(folder / f"{shard}.tar", members)
    return {"shards": "{a,b}.tar"}


def _webdataset_json(folder: Path, rng: random.Random) -> dict[str, str]:
    pairs = {
        f"{i}.{end}": data for i in range(4) for end, data in (("jpg", _picture(rng)), ("json", b'{"caption": "red"}'))
    }
    _tar(folder / "a.tar", pairs)
    return {"shards": "*.tar", "caption": "json:caption"}


def _obelics(folder: Path, rng: random.Random) -> dict[str, str]:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([["one", None, "two"]] * 6, pyarrow.list_(pyarrow.string()))
    images = pyarrow.array([[None, _picture(rng), None] for _ in range(6)], pyarrow.list_(pyarrow.binary()))
    metadata = [json.dumps([None, {"alt_text": "a square"}, None])] * 6
    table = pyarrow.table({"texts": texts, "images": images, "metadata": metadata})
    parquet.write_table(
        table, folder / "a.parquet", row_group_size=3, compression=rng.choice(["none", "snappy", "zstd"])
    )
    return {"files": "a.parquet", "captions": "alt"}


def _llava(folder: Path, rng: random.Random) -> dict[str, str]:
    _pictures(folder, rng)
    (folder / "t.json").write_text(json.dumps(_talks(), indent=rng.choice([None, 1])))
    return {"documents": "t.json", "pictures": "images"}


def _llava_tar(folder: Path, rng: random.Random) -> dict[str, str]:
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(_lines(_talks())))
    _tar(folder / "p.tar", {f"{i}.png": _picture(rng) for i in range(3)})
    return {"documents": "t.jsonl.gz", "pictures": "p.tar"}


def _text(folder: Path, rng: random.Random) -> dict[str, str]:
    (folder / "a.txt").write_text("one\ntwo\n\nthree\n\n\nfour\n" * 3)
    (folder / "b.txt").write_text("bl\u00e5\n\nsyv")
    return {"files": "*.txt*"} | rng.choice([{}, {"separator": ""}])


def _text_lines(folder: Path, rng: random.Random) -> dict[str, str]:
    (folder / "a.jsonl.zst").write_bytes(_zstd(_lines([{"text": f"text {i}\n\nmore", "url": i} for i in range(6)])))
    return {"files": "a.jsonl.zst", "key": "url"}


def _text_rows(folder: Path, rng: random.Random) -> dict[str, str]:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": [f"text {i} " * 20 for i in range(9)], "n": list(range(9))})
    parquet.write_table(table, folder / "a.parquet", row_group_size=4, use_dictionary=rng.random() < 0.5)
    return {"files": "a.parquet", "key": "n"}


def _openstax(folder: Path, rng: random.Random) -> dict[str, str]:
    book = folder / "osbooks-a"
    (book / "media").mkdir(parents=True)
    for i in range(2):
        (book / "media" / f"{i}.png").write_bytes(_picture(rng))
        (book / "modules" / f"m{i}").mkdir(parents=True)
        (book / "modules" / f"m{i}" / "index.cnxml").write_text(
            '<document xmlns="http://cnx.rice.edu/cnxml" xmlns:m="http://www.w3.org/1998/Math/MathML"><title>A</title>'
            '<content><para id="p">See <link target-id="f"/> at 10<sup>2</sup>.</para><figure id="f"><media alt="A red '
            f'square on a wall."><image src="../../media/{i}.png"/></media><caption>Red.</caption></figure><list><item>'
            "x</item></list><equation><m:math><m:mfrac><m:mi>a</m:mi><m:mi>b</m:mi></m:mfrac></m:math></equation><table>"
            "<tgroup><tbody><row><entry>1</entry><entry>2</entry></row></tbody></tgroup></table></content></document>"
        )
    (book / "collections").mkdir()
    (book / "collections" / "a.collection.xml").write_text(
        '<collection xmlns="http://cnx.rice.edu/collxml"><content><module document="m0"/><module document="m1"/>'
        "</content></collection>"
    )
    return {"folder": ""}


INPUTS: dict[str, tuple[str, Callable[[Path, random.Random], dict[str, str]]]] = {
    "interleaved": ("interleaved", _interleaved),
    "interleaved-tar": ("interleaved", _interleaved_tar),
    "webdataset": ("webdataset", _webdataset),
    "webdataset-json": ("webdataset", _webdataset_json),
    "obelics": ("obelics", _obelics),
    "llava": ("llava", _llava),
    "llava-tar": ("llava", _llava_tar),
    "text": ("text", _text),
    "text-lines": ("text", _text_lines),
    "text-rows": ("text", _text_rows),
    "openstax": ("openstax", _openstax),
}
PATHS = ("documents", "pictures", "shards", "files", "folder")


# ---- mutations ------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 4, 64, 512])]


def _duplicate(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice([1, 16, 512, len(data)])] * rng.choice([1, 3])


def _insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice([*WORDS, bytes([rng.randrange(32)]), rng.randbytes(8)])


def _zero(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    size = min(rng.choice([1, 8, 512]), len(data) - start)
    data[start : start + size] = rng.choice([b"\0", b"\xff"]) * size


def _number(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(max(1, len(data) - 8))
    data[start : start + 8] = rng.choice([0, 1, 2**31 - 1, 2**31, 2**63, 2**64 - 1]).to_bytes(
        8, rng.choice(["big", "little"])
    )


BYTES = [_flip, _truncate, _remove, _duplicate, _insert, _zero, _number]


def _mutate_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        rng.choice(BYTES)(data, rng)
    path.write_bytes(data)


def _mutate_inner(path: Path, rng: random.Random) -> None:
    """Damage what a compressed file holds, not its stream."""
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError, zlib.error):
        inner = bytearray(CODECS[path.suffix][1](path.read_bytes())) if path.suffix in CODECS else bytearray()
        if inner:
            rng.choice(BYTES)(inner, rng)
            path.write_bytes(CODECS[path.suffix][0](bytes(inner)))


def _swap(value: object, rng: random.Random) -> object:
    """A JSON value with one node somewhere in it replaced by a hostile one."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        made = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.1:
            del made[key]
        else:
            made[key] = _swap(made[key], rng)
        return made
    return rng.choice(HOSTILE)


def _mutate_json(path: Path, rng: random.Random) -> None:
    whole = path.name.endswith(".json")
    records = (
        _talks()
        if path.name.startswith("t.")
        else _pages()
        if path.name.startswith("d.")
        else [{"text": "x", "url": 1}]
    )
    changed = _swap(records, rng) if whole else [_swap(record, rng) for record in records]
    text = json.dumps(changed) if whole else "\n".join(map(json.dumps, changed))  # type: ignore[arg-type]
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(CODECS[path.suffix][0](data) if path.suffix in CODECS else data)


def _mutate_tar(path: Path, rng: random.Random) -> None:
    """Change one header, and its checksum with it, so that the lie is believed."""
    data = bytearray(path.read_bytes())
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return
    at = rng.choice(starts)
    what = rng.choice(["name", "type", "size", "prefix"])
    if what == "name":
        data[at : at + 100] = rng.choice(NAMES).encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    elif what == "prefix":
        data[at + 345 : at + 500] = rng.choice(NAMES).encode("utf-8", "surrogateescape")[:155].ljust(155, b"\0")
    elif what == "type":
        data[at + 156] = rng.choice(b"01234567SLKxgXDV\x00\xff")
    else:
        sizes = [
            b"77777777777\0",
            b"-0000000001\0",
            b"00000000000\0",
            b"99999999999\0",
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
        ]
        data[at + 124 : at + 136] = rng.choice([*sizes, b"%011o\0" % rng.randrange(3000)])
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)


def _mutate_table(path: Path, rng: random.Random) -> None:
    """A well-formed Parquet file of other types, names or lengths."""
    import pyarrow
    from pyarrow import parquet

    columns = {
        "texts": rng.choice([[["a", None]], [None], ["a"], [[1, 2]], [[["a"], None]], [[]], [["x" * 100_000, None]]]),
        "images": rng.choice([[[None, b"x"]], [[None, "https://x.org/a.png"]], [[None, 7]], [None], [[b"", b""]],
                              [[None, {"bytes": b"x"}]], [[None, {"path": "../a"}]]]),
        "metadata": rng.choice([["[]"], ["x"], [7], [None], ['[null, {"alt_text": 7}]']]),
        "text": rng.choice([["a"], [b"\xff"], [1.5], [["a"]], [None]]),
        "n": rng.choice([["k"], [None], [[1]], [1e300]]),
    }  # fmt: skip
    for name in [name for name in columns if rng.random() < 0.1]:
        del columns[name]
    parquet.write_table(pyarrow.table(columns), path)


def _mutate_xml(path: Path, rng: random.Random) -> None:
    """A well-formed file with an element that is gone, renamed, nested, repeated or says something else."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError:
        return
    elements = list(root.iter())
    parent = rng.choice([each for each in elements if len(each)] or [root])
    child = rng.choice(list(parent) or [root])
    words = str(rng.choice([word for word in HOSTILE if isinstance(word, str)])).replace("\0", "").replace("\ud800", "")
    what = rng.choice(["gone", "renamed", "nested", "repeated", "words", "attribute", "moved"])
    if what == "gone" and child is not root:
        parent.remove(child)
    elif what == "renamed":
        child.tag = rng.choice([each.tag for each in elements])
    elif what == "nested":
        for _ in range(rng.choice([1, 30, 400])):
            outer = ElementTree.Element(child.tag)
            outer.extend(list(root))
            root[:] = [outer]
    elif what == "repeated" and child is not root:
        parent[:] = [*parent, *[child] * rng.choice([1, 200])]
    elif what == "words":
        child.text, child.tail = words, words
    elif what == "attribute" and child.attrib:
        child.set(rng.choice(list(child.attrib)), words)
    elif child is not root and child not in (other := rng.choice(elements)).iter() and other not in child.iter():
        other.append(child)
    path.write_bytes(ElementTree.tostring(root))


def _replace(path: Path, rng: random.Random) -> None:
    """Put something else in a file's place: a link out, a loop, a folder, nothing."""
    path.unlink()
    what = rng.choice(["/etc/passwd", "/dev/zero", path.name, "no-such", "folder", "nothing"])
    if what == "folder":
        path.mkdir()
    elif what != "nothing":
        path.symlink_to(what)


def _rename(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(path.name.split(".")[0] + rng.choice(ENDINGS) + rng.choice(ENDINGS)))


def _damage(folder: Path, rng: random.Random) -> None:
    """One to three mutations of the input's files."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        path = rng.choice(files)
        own = [_mutate_tar] * 2 if path.suffix == ".tar" else [_mutate_json] * 2 if ".json" in path.name else []
        own += [_mutate_table] if path.suffix == ".parquet" else []
        own += [_mutate_xml] * 5 if path.suffix in (".xml", ".cnxml") else []
        others = [
            *[_mutate_bytes] * 4,
            *[_mutate_inner] * (4 if path.suffix in CODECS else 0),
            *([_replace, _rename] if rng.random() < 0.1 else []),
        ]
        rng.choice([*own, *others])(path, rng)


# ---- one case -------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """The case took too long; no `except Exception` holds it."""


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _watched(seconds: int) -> Iterator[None]:
    """A loop outside of Python hears no signal: the process ends with its traceback instead."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _named(reason: str) -> None:
    assert "got " in reason and "need" in reason, f"not named: {reason}"
    reason.encode()


def _open(picture: Picture) -> str:
    assert callable(picture.content) and len(pickle.dumps(picture)) < 5000
    picture.place.encode()
    try:
        open_image(picture.content(), picture.place)
    except OSError as error:
        return f"picture {type(error).__name__}"
    except ValueError as error:
        _named(str(error))
        return "picture refused"
    return "picture"


def _check(item: RawDocument | Broken) -> list[str]:
    """What happened, in words to count."""
    if isinstance(item, Broken):
        assert item.kind in KINDS
        assert item.place and len(item.place) < 3000 and len(item.reason) < 3000
        item.place.encode()
        _named(item.reason)
        return [item.kind]
    assert item.id and item.segments and item.split in (None, "train", "val")
    (item.id + item.key).encode()
    happened = ["document"]
    for part in (part for segment in item.segments for part in segment):
        if isinstance(part, Text):
            part.text.encode()
        else:
            happened.append(_open(part))
    return happened


def run_case(name: str, seed: int, folder: Path) -> Counter[str]:
    """Damage a fresh input in `folder` by the case's seed, list and open everything; counts of what happened."""
    kind, make = INPUTS[name]
    rng = random.Random(f"{name} {seed}")
    options = make(folder, rng)
    _damage(folder, rng)
    options = {key: f"{folder}/{value}" if key in PATHS else value for key, value in options.items()}
    happened: Counter[str] = Counter()
    source = SOURCES[kind]
    with _limited(SECONDS):
        try:
            config = build(source.config, options)
            for item in source.documents(config):
                happened.update(_check(item))
            source.attribution(config)
        except ValueError as error:
            assert not happened, f"a ValueError after the first document: {error}"
            _named(str(error))
            happened["setting refused"] += 1
    return happened


@pytest.mark.parametrize("name", INPUTS)
def test_the_input_is_valid_before_it_is_damaged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("obelics", "text-lines", "text-rows"):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(sys.modules[__name__], "_damage", lambda folder, rng: None)
    happened = run_case(name, 0, tmp_path)
    assert happened["document"] and set(happened) <= {"document", "picture"}


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_inputs(name: str, tmp_path: Path) -> None:
    if name in ("obelics", "text-lines", "text-rows"):
        pytest.importorskip("pyarrow")
    happened: Counter[str] = Counter()
    with _watched(CASES * SECONDS):
        for seed in range(CASES):
            (tmp_path / f"{seed}").mkdir()
            try:
                happened += run_case(name, seed, tmp_path / f"{seed}")
            except (Exception, Hang) as error:
                raise AssertionError(f"case {seed} of {name}: {error!r}") from error
    # the mutations reach both sides: much is still read, and much is not
    assert happened["document"] > CASES / 4 and sum(happened[kind] for kind in KINDS) > CASES / 8, happened


def test_a_damaged_footer_that_ended_the_process(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    run_case("text-rows", 2114, tmp_path)  # pyarrow 26 aborts when asked for this file's metadata by column


def main(cases: int, first: int, results: Path) -> int:
    """Run `cases` of every input from seed `first` on, and write what happened; 1 if a case failed."""
    record: dict[str, object] = {"cases_each": cases, "first_seed": first}
    failed = 0
    for name in INPUTS:
        happened, failures, slowest, start = Counter[str](), [], 0.0, time.monotonic()
        for seed in range(first, first + cases):
            folder = Path("fuzzed")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            began = time.monotonic()
            try:
                with _watched(6 * SECONDS):
                    happened += run_case(name, seed, folder)
            except (Exception, Hang) as error:
                failures.append(f"seed {seed}: {type(error).__name__}: {error!s:.200}")
            slowest = max(slowest, time.monotonic() - began)
        failed += len(failures)
        record[name] = {"happened": dict(sorted(happened.items())), "failures": failures,
                        "slowest_s": round(slowest, 3), "all_s": round(time.monotonic() - start, 1)}  # fmt: skip
        print(name, record[name], flush=True)
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    shutil.rmtree("fuzzed", ignore_errors=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
