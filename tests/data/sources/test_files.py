"""Reading strangers' files: patterns, tar headers that lie, JSON lists, compressed streams."""

import json
import lzma
import tarfile
import zlib
from pathlib import Path

import pytest

from moma.data.sources import files
from moma.data.sources.files import Member, lines, name_in, paths, records, tar_members, version_of
from moma.data.sources.raw import Broken


def test_patterns(tmp_path: Path) -> None:
    for name in ("b-2.txt", "b-10.txt", "a.txt", "sub/c.txt", "odd{1}[2].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = lambda pattern: [str(path.relative_to(tmp_path)) for path in paths(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("*-*.txt") == ["b-10.txt", "b-2.txt"]
    assert names("b-{2,10}.txt") == ["b-2.txt", "b-10.txt"]
    assert names("odd{1}[2].txt") == ["odd{1}[2].txt"]
    assert names("{a,sub/c}.txt") == ["a.txt", "sub/c.txt"]
    assert names("**/c.txt") == ["sub/c.txt"]
    (tmp_path / "w-009").write_text("")
    (tmp_path / "w-010").write_text("")
    assert names("w-{009..010}") == ["w-009", "w-010"]
    assert name_in(f"{tmp_path}/**/*.txt", tmp_path / "sub" / "c.txt") == "sub/c.txt"
    assert name_in(f"{tmp_path}/a.txt", tmp_path / "a.txt") == "a.txt"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing-*.txt", r"got no file '.*nothing-\*\.txt', need one: correct the path"),
        ("{2..1}.txt", r"got \{2\.\.1\} in '.*', need a rising range of at most 100000: correct it"),
        ("{0..999999999}", r"need a rising range of at most 100000"),
        ("{0..99999}{0..99999}", r"with 10000000000 alternatives, need at most 100000: use \*"),
    ],
)
def test_bad_patterns(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paths(f"{tmp_path}/{pattern}")


# ---- tar files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_as_the_standard_library_reads_them(tmp_path: Path, tarred, format_: int) -> None:
    long = "/".join(["folder" * 10] * (2 if format_ == tarfile.USTAR_FORMAT else 5)) + "/name.png"
    path = tarred(tmp_path / "t.tar", {"a.png": b"1" * 700, long: b"2", "\u00e9.png": b"", "last": b"3" * 512}, format_)
    with tarfile.open(path) as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(tar_members(path)) == expected and len(expected) == 4


def _header(name: str, size: int = 0, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        (_header("../a.png"), "outside"),
        (_header("x/../../a.png"), "outside"),
        (_header("/etc/passwd"), "outside"),
        (_header("soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "wrong_type"),
        (_header("hard.png", type=tarfile.LNKTYPE, linkname="a.png"), "wrong_type"),
        (_header("zero.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "wrong_type"),
        (_header("pipe.png", type=tarfile.FIFOTYPE), "wrong_type"),
        (_header("sparse.png", type=tarfile.GNUTYPE_SPARSE), "wrong_type"),
        (_header("\udcff.png"), "unreadable"),
        (_header("n" * 1001), "too_large"),
    ],
)
def test_a_member_that_may_not_be_read(tmp_path: Path, tarred, member: tarfile.TarInfo, kind: str) -> None:
    first, broken, last = tar_members(tarred(tmp_path / "t.tar", {"a": b"1", "x": member, "b": b"2"}))
    assert (first.name, broken.kind, last.name) == ("a", kind, "b")
    assert broken.place.startswith(f"{tmp_path}/t.tar:") and "got " in broken.reason


def _forged(tmp_path: Path, *headers: bytes) -> Path:
    path = tmp_path / "t.tar"
    path.write_bytes(b"".join(headers) + bytes(1024))
    return path


@pytest.mark.parametrize("size", [-512, -1, 2**20, 2**62, 8**11 - 1])
def test_a_size_that_lies_ends_the_file(tmp_path: Path, size: int) -> None:
    good = _header("a.png").tobuf()
    lying = _header("b.png", size).tobuf(tarfile.GNU_FORMAT)
    first, broken = tar_members(_forged(tmp_path, good, lying, good))
    assert first.name == "a.png" and broken.kind == "unreadable"
    assert f"got a member of {size} bytes, need at most the 1536 that follow" in broken.reason


@pytest.mark.parametrize("size", ["-1", "99999999999999999999", "many", "1e3"])
def test_an_extended_size_that_lies_ends_the_file(tmp_path: Path, size: str) -> None:
    data = _header("b.png").tobuf()
    record = f" size={size}\n"
    text = f"{len(record) + 2}{record}".encode()
    extended = _header("pax", len(text), type=tarfile.XHDTYPE).tobuf() + text.ljust(512, b"\0")
    (broken,) = tar_members(_forged(tmp_path, extended, data))
    assert broken.kind == "unreadable" and "need at most" in broken.reason


def test_extended_headers_are_bounded(tmp_path: Path) -> None:
    extended = _header("pax", 2**40, type=tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    (broken,) = tar_members(_forged(tmp_path, extended))
    assert broken.kind == "too_large" and "extended tar header of 1099511627776 bytes" in broken.reason


def test_what_follows_the_end_is_not_silent(tmp_path: Path, tarred) -> None:
    path = tarred(tmp_path / "t.tar", {"a": b"1"})
    whole = path.read_bytes()
    for more in (bytes(2**21), whole):
        path.write_bytes(whole + more)
        first, broken = tar_members(path)
        assert first.name == "a" and "after the end of the tar file, need one archive a file" in broken.reason
    path.write_bytes(whole[:1024])  # the end itself is missing, and perhaps more
    first, broken = tar_members(path)
    assert first.name == "a" and "got no tar header at byte 1024" in broken.reason
    path.write_bytes(whole[:1536])
    assert [member.name for member in tar_members(path)] == ["a"]


def test_names_in_messages_are_one_line(tmp_path: Path, tarred) -> None:
    (broken,) = tar_members(
        tarred(
            tmp_path / "t.tar",
            {
                "../a\nb\x1b": b"",
            },
        )
    )
    assert broken.place == f"{tmp_path}/t.tar:../a\\nb\\x1b"


# ---- lines and records ----------------------------------------------------------------------------------------------


def test_long_lines_end_where_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 7)
    monkeypatch.setattr(files, "MAX_LINE", 10)
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n01234567890\n" + "x" * 50 + "\nend\n\n" + "y" * 11)
    found = list(lines(path))
    assert [item if isinstance(item, tuple) else (item.place, item.kind) for item in found] == [
        (f"{path}:1", "0123456789"),
        (f"{path}:2", "too_large"),
        (f"{path}:3", "too_large"),
        (f"{path}:4", "end"),
        (f"{path}:6", "too_large"),
    ]
    assert "got a line of 50 bytes" in found[2].reason


def test_runs_of_empty_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n" + "\n" * 100_000 + " \nb")
    assert list(lines(path)) == [(f"{path}:1", "a"), (f"{path}:100003", "b")]
    found = [text for _, text in lines(path, blank=True)]
    assert found == ["a", *[""] * 100, " ", "b"]


ELEMENTS = [{"a": 1}, [1, [2]], "te\\xt \u00e9\u4e2d]", 12345, -1.5e3, None, True, {}, {"b": {"c": [1, 2, "]["]}}]


@pytest.mark.parametrize("block", [1, 2, 5, 17, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / "a.json"
    for text in (json.dumps(ELEMENTS, indent=indent), "\ufeff \n" + json.dumps(ELEMENTS, ensure_ascii=False) + " \n"):
        path.write_text(text)
        assert list(records(path)) == [(f"{path}:[{i}]", element) for i, element in enumerate(ELEMENTS)]


@pytest.mark.parametrize("text", ["[]", " [ ] ", ""])
def test_an_empty_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert list(records(tmp_path / "a.json")) == []


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("[1, 2", 1),
        ("[1, 2,", 2),
        ("[1, 2,]", 2),
        ("[1,, 2]", 1),
        ("[1 2]", 1),
        ("[1, 2] 3", 2),
        ("[1, {2: 3}, 4]", 1),
        ("[1, nul, 4]", 1),
        ('[1, "open', 1),
        ("[1, " + "[" * 100_000, 1),
        ("[1, " + "9" * 5000 + ", 2]", 1),
        ("[,1]", 0),
    ],
)
def test_a_damaged_list_is_read_up_to_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, whole: int, block: int
) -> None:
    if len(text) > 10_000 and block < 100:
        block = 10_000
    monkeypatch.setattr(files, "BLOCK", block)
    (tmp_path / "a.json").write_text(text)
    *found, broken = records(tmp_path / "a.json")
    assert [value for _, value in found] == [1, 2][:whole]
    assert isinstance(broken, Broken) and broken.kind == "unreadable" and "need a whole one" in broken.reason


def test_an_element_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 50)
    monkeypatch.setattr(files, "MAX_LINE", 200)
    (tmp_path / "a.json").write_text('[1, "' + "x" * 10_000 + '"]')
    first, broken = records(tmp_path / "a.json")
    assert first[1] == 1 and broken.kind == "too_large" and "of more than 200 characters" in broken.reason


def test_xz_streams_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one\n") + bytes(8) + lzma.compress(b"two\n") + bytes(4))
    assert [text for _, text in lines(path)] == ["one", "two"]
    path.write_bytes(b"")
    (broken,) = lines(path)
    assert broken.kind == "unreadable"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_an_empty_compressed_file_is_not_silent(tmp_path: Path, suffix: str) -> None:
    if suffix == "zst":
        pytest.importorskip("pyarrow")
    (tmp_path / f"a.txt.{suffix}").write_bytes(b"")
    (broken,) = lines(tmp_path / f"a.txt.{suffix}")
    assert broken.kind == "unreadable" and "need a whole one" in broken.reason


def test_zstd_frames_follow_each_other(tmp_path: Path) -> None:
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    (tmp_path / "a.txt.zst").write_bytes(b"".join(codec.compress(t, asbytes=True) for t in (b"one\n", b"two\n")))
    assert [text for _, text in lines(tmp_path / "a.txt.zst")] == ["one", "two"]


def test_xz_memory_is_bounded(tmp_path: Path) -> None:
    whole = lzma.compress(b"x", preset=0)
    # the dictionary's size is one byte of the block header, after the filter's id and the length 1: 36 is 1 GiB
    forged = bytearray(whole)
    forged[whole.index(b"\x21\x01") + 2] = 36
    start, size = 12, (whole[12] + 1) * 4
    forged[start + size - 4 : start + size] = zlib.crc32(bytes(forged[start : start + size - 4])).to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(forged)
    (broken,) = lines(tmp_path / "a.txt.xz")
    assert broken.kind == "unreadable" and "Memory usage limit" in broken.reason


def test_a_version_tells_files_apart_that_were_changed_in_place(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"a" * 5000)
    large.write_bytes(bytes(3 * 2**20))
    before = version_of([small, large])
    assert before.startswith("2 files, 3150728 bytes, sample ") and version_of([small, large]) == before
    small.write_bytes(b"a" * 4999 + b"b")
    changed = version_of([small, large])
    assert changed != before
    large.write_bytes(b"c" * 3 * 2**20)
    assert version_of([small, large]) not in (before, changed)
    assert version_of([large, small]) != version_of([small, large])
    assert version_of([small]).startswith("5000 bytes, sample ")
