"""Reading files that strangers made: lines, records, tar members, names, pictures. Nothing is unpacked or held whole.

    paths("web-{000..012}.tar")   files of a pattern, in order
    lines(path)                   (place, line) or Broken; .gz .bz2 .xz .zst are read as they are
    records(path)                 (place, object) or Broken, of JSON Lines or of one JSON list
    tar_members(path)             (name, offset, size) or Broken
    finder(folder or tar)         name -> Picture, read where it lies when it is opened

A line that cannot be read is one `Broken`; where a stream breaks (a damaged .gz, a damaged list), one `Broken` stands
for the rest of its file. Sizes come from limits, never from what a file says of itself: a line longer than
`MAX_LINE` is passed over without being held, and a compressed file may become `MAX_EXPANSION` times as long.

Refuses (`Broken` or `Refused`): names that are absolute, climb with `..`, or reach out of the folder through a link; in
tar files links, devices, sparse files and sizes past the end.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from moma.data.sources.raw import MAX_LINE, MAX_NAME, MAX_PICTURE_BYTES, Broken, Refused
from moma.tokenizer.documents import Picture

BLOCK = 2**20  # bytes read at once
SAMPLE, SAMPLES = 2**12, 64  # bytes of a piece, pieces of a file, that a version is made of
MAX_EXPANSION = 200  # text compresses 3 to 20 times, repetitive JSON 50 times; a bomb 1,000 times and more
FREE_EXPANSION = 16 * 2**20  # bytes that any compressed file may become
MAX_BLANK = 100  # empty lines in a row that are kept: a kilobyte of .bz2 may hold millions
MAX_XZ_MEMORY = 256 * 2**20  # of the decoder: xz -9 needs 65 MiB, a hostile header may ask for 4 GiB
MAX_PATHS = 100_000  # files of one pattern
MAX_TAR_NAME = 2**16  # bytes of an extended tar header
TAR_PADDING = 2**20  # zero bytes that may follow the end of a tar file; tar itself writes up to 10 KiB
_TAR_BLOCK = 512
_BROKEN_STREAM = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Member(NamedTuple):
    """A plain file in a tar file: its name without `./`, and where its bytes lie."""

    name: str
    offset: int
    size: int


# ---- names and patterns ---------------------------------------------------------------------------------------------


def paths(patterns: str, folders: bool = False) -> list[Path]:
    """Files of a pattern, sorted within each alternative: `*`, `?`, `**`, `{000..012}`, `{a,b}`.

    With `folders`, a folder may stand in the place of a file. ValueError if there is none.
    """
    found: dict[str, None] = {}
    for pattern in _braces(patterns):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [name for name in matches if os.path.isfile(name) or (folders and os.path.isdir(name))]
        if not matches:
            what = "file or folder" if folders else "file"
            raise ValueError(f"got no {what} {pattern!r}, need one: correct the path")
        found |= dict.fromkeys(matches)
    if any(name.lower().endswith((".zst", ".parquet")) for name in found):
        arrow()  # its absence is the setting's fault, not the file's
    return [Path(name) for name in found]


def name_in(patterns: str, path: Path) -> str:
    """A file's name below the folder that its pattern starts with: the same wherever that folder lies."""
    fixed = re.split(r"[*?\[{]", patterns, maxsplit=1)[0]
    return printable(os.path.relpath(path, os.path.dirname(fixed) or "."))


def suffix_of(path: Path) -> str:
    """The ending that tells the format, lower case, a compression's left out: "a.JSONL.gz" -> ".jsonl"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSED), "")


def version_of(files: Iterable[Path]) -> str:
    """What tells one state of the files from another in a corpus's provenance: number, sizes, a digest of samples.

    Small files count whole, large ones by SAMPLES evenly spaced pieces: a change in place may lie between them.
    """
    files, digest, total = list(files), hashlib.sha256(), 0
    for path in files:
        size = path.stat().st_size
        total += size
        digest.update(b"%d\n" % size)
        with open(path, "rb") as file:
            for offset in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE))
    number = f"{len(files)} files, " if len(files) > 1 else ""
    return f"{number}{total} bytes, sample {digest.hexdigest()[:16]}"


def printable(name: str) -> str:
    """The name as it may stand in a log: line ends, control characters and bytes that are no UTF-8 escaped, cut."""
    escape = lambda found: found[0].encode("unicode_escape").decode()  # noqa: E731
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", escape, name[:MAX_NAME])


def safe_name(name: str) -> str:
    """A file's name inside its folder or archive, without `./`; Refused if it leads out or cannot be a name."""
    check_text(name, "file name")
    if len(name) > MAX_NAME:
        raise Refused("too_large", f"got a file name of {len(name)} characters, need at most {MAX_NAME}: shorten it")
    if not name or "\0" in name:
        raise Refused("wrong_type", f"got file name {name!r:.80}, need a name without NUL: correct it")
    if name.startswith("/") or ".." in name.split("/"):
        raise Refused("outside", f"got {name!r:.80} outside of its folder or archive, need a file inside: correct it")
    return posixpath.normpath(name)


def check_text(value: Any, what: str) -> str:
    """`value` if it is a string that UTF-8 can hold; else Refused."""
    if not isinstance(value, str):
        raise Refused("wrong_type", f"got {what} {value!r:.60} ({type(value).__name__}), need a string: correct it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(
            "unreadable", f"got {what} {value!r:.60} with half a surrogate pair, need text: mend it"
        ) from None
    return value


def check_id(value: Any) -> str:
    """An id or a key as a short string; Refused if it is no string or integer."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 128:
        value = str(value)
    text = check_text(value, "id or key")
    if not text:
        raise Refused("wrong_type", "got an empty id or key, need a name: correct it")
    if len(text) > MAX_NAME:
        raise Refused("too_large", f"got an id or key of {len(text)} characters, need at most {MAX_NAME}: shorten it")
    return text


# ---- streams, lines, records ----------------------------------------------------------------------------------------


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed by its ending; raises one of `_BROKEN_STREAM`, or Refused for a bomb."""
    size, total, compressed = path.stat().st_size, 0, path.suffix.lower() in _COMPRESSED
    limit = max(FREE_EXPANSION, MAX_EXPANSION * size)
    if compressed and not size:
        raise EOFError("an empty file")
    for block in _decoded(path):
        total += len(block)
        if compressed and total > limit:
            reason = f"got {size} bytes that become more than {limit}, need no bomb: remove the file"
            raise Refused("too_large", reason)
        yield block


def lines(path: Path, blank: bool = False) -> Iterator[tuple[str, str] | Broken]:
    """(place, line without its end) of a text file in UTF-8; `blank`: blank ones too, at most MAX_BLANK in a row."""
    number, held, size, empty = 1, [], 0, 0
    try:
        for block in blocks(path):
            *ended, rest = block.split(b"\n")
            for part in ended:
                empty = 0 if part or size else empty + 1
                if not empty or (blank and empty <= MAX_BLANK):
                    yield from _line(path, number, [*held, part], size + len(part), blank)
                    held, size = [], 0
                number += 1
            size += len(rest)
            held = [*held, rest] if size <= MAX_LINE else []
    except _BROKEN_STREAM as error:
        yield broken_file(path, error, f" after line {number - 1}")
        return
    if size:
        yield from _line(path, number, held, size, blank)


def records(path: Path) -> Iterator[tuple[str, Any] | Broken]:
    """(place, object) of a file of JSON Lines, or of one JSON list whose elements are read one by one."""
    try:
        first = next((text.lstrip()[0] for text in _texts(path, "replace") if text.strip()), "")
    except _BROKEN_STREAM as error:
        yield broken_file(path, error)
        return
    if first == "[":
        yield from _elements(path)
        return
    for line in lines(path):
        if isinstance(line, Broken):
            yield line
            continue
        place, text = line
        try:
            yield place, parse_json(text)
        except Refused as refused:
            yield Broken(refused.kind, place, str(refused))


def parse_json(text: str) -> Any:
    """What `json.loads` returns; Refused for everything it raises (nesting and huge integers too)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("unreadable", f"got no JSON ({_brief(error)}), need one whole object: correct it") from None


def read_text(path: Path) -> str:
    """A whole text file in UTF-8, decompressed by its ending; Refused if it is damaged or longer than MAX_LINE."""
    data = bytearray()
    try:
        for block in blocks(path):
            data += block
            if len(data) > MAX_LINE:
                raise Refused("too_large", f"got a text of more than {MAX_LINE} bytes, need less: split it")
        return data.decode("utf-8-sig")
    except Refused:
        raise
    except _BROKEN_STREAM as error:
        raise Refused(
            "unreadable", f"got a broken text ({_brief(error)}), need it whole in UTF-8: copy or convert it"
        ) from None


def broken_file(path: Path, error: Exception, where: str = "") -> Broken:
    """The `Broken` that stands for a file, or for the rest of it."""
    place = printable(str(path))
    if isinstance(error, Refused):
        return Broken(error.kind, place, str(error))
    reason = f"got a file that cannot be read{where} ({_brief(error)}), need a whole one: copy or compress it again"
    return Broken("unreadable", place, reason)


# ---- tar files and pictures -----------------------------------------------------------------------------------------


def tar_members(path: Path) -> Iterator[Member | Broken]:
    """Plain files of an uncompressed tar file, in order, headers alone being read; folders are left out."""
    try:
        with open(path, "rb") as file:
            yield from _members(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        yield broken_file(path, error)


def finder(pictures: Path) -> tuple[Callable[[str], Picture], list[Broken]]:
    """name -> Picture of a folder or tar file, and what of the tar file cannot be read.

    The function raises Refused for a name that leads out; a file that is not there is found when it is opened.
    ValueError for a tar file of which nothing can be read.
    """
    if pictures.is_dir():
        return partial(_in_folder, os.path.realpath(pictures)), []
    index, broken = {}, []
    for member in tar_members(pictures):
        if isinstance(member, Broken):
            broken.append(member)
        else:
            index[member.name] = member
    if not index and any(each.kind == "unreadable" for each in broken):
        raise ValueError(
            f"got {pictures} that cannot be read as a tar file ({broken[0].reason}), need a whole, uncompressed one "
            "or a folder: decompress it or copy it again"
        )
    return partial(_in_tar, pictures, index), broken


def member_picture(path: Path, member: Member) -> Picture:
    """The picture in a tar file, read when it is opened."""
    return Picture(
        partial(read_slice, path, member.offset, member.size), f"{printable(str(path))}:{printable(member.name)}"
    )


def read_slice(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`; ValueError if that is too large for a picture or not there."""
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"got a picture of {size} bytes, need at most {MAX_PICTURE_BYTES}: shrink or remove it")
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"got {len(data)} bytes at {offset} of {printable(str(path))}, need {size}: prepare it again")
    return data


def read_picture(path: str) -> bytes:
    """A picture file's bytes; ValueError if it is no plain file or too large for a picture."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"got {printable(path)}, which is no plain file, need a picture: remove it")
    return read_slice(Path(path), 0, status.st_size)


def inside(folder: str, name: str) -> str:
    """The path of a file in `folder` (a real path), links resolved; Refused if it lies elsewhere."""
    path = os.path.realpath(os.path.join(folder, safe_name(name)))
    if not Path(path).is_relative_to(folder):
        raise Refused("outside", f"got {name!r:.80} outside of {folder}, need a file inside: remove the link")
    return path


def _in_folder(folder: str, name: str) -> Picture:
    path = inside(folder, name)
    return Picture(partial(read_picture, path), printable(path))


def _in_tar(path: Path, index: dict[str, Member], name: str) -> Picture:
    member = index.get(safe_name(name))
    if member is None:
        place = f"{printable(str(path))}:{printable(name)}"
        return Picture(partial(_missing, place), place)
    return member_picture(path, member)


def _missing(place: str) -> bytes:
    raise FileNotFoundError(f"no such picture: {place}")


def _braces(pattern: str) -> list[str]:
    """Alternatives of a pattern, in order: "{00..02}" and "{a,b}", not nested."""
    choices = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        bounds = re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", part)
        if bounds:
            low, high = int(bounds[1]), int(bounds[2])
            if not 0 <= high - low < MAX_PATHS:
                raise ValueError(f"got {part} in {pattern!r}, need a rising range of at most {MAX_PATHS}: correct it")
            choices.append([f"{number:0{len(bounds[1])}d}" for number in range(low, high + 1)])
        elif part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_PATHS:
        raise ValueError(f"got {pattern!r} with {count} alternatives, need at most {MAX_PATHS}: use *")
    return ["".join(chosen) for chosen in product(*choices)]


def _decoded(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        if suffix == ".gz":
            with gzip.open(file) as stream:
                yield from iter(partial(stream.read, BLOCK), b"")
        elif suffix == ".bz2":
            with bz2.open(file) as stream:
                yield from iter(partial(stream.read, BLOCK), b"")
        elif suffix == ".xz":
            yield from _xz(partial(file.read, BLOCK))
        elif suffix == ".zst":
            pyarrow = arrow()
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
                yield from iter(partial(stream.read, BLOCK), b"")
        else:
            yield from iter(partial(file.read, BLOCK), b"")


def _xz(read: Callable[[], bytes]) -> Iterator[bytes]:
    """Streams one after the other, with the padding between them; unlike `lzma.open` with a limit on memory."""
    decoder, data = lzma.LZMADecompressor(lzma.FORMAT_AUTO, MAX_XZ_MEMORY), read()
    while data or not decoder.eof:
        if decoder.eof:
            data = data.lstrip(b"\0") or read()
            if data.strip(b"\0"):
                decoder = lzma.LZMADecompressor(lzma.FORMAT_AUTO, MAX_XZ_MEMORY)
            continue
        block = decoder.decompress(data, BLOCK)
        if block:
            yield block
        if decoder.eof:
            data = decoder.unused_data or read()
        elif decoder.needs_input:
            data = read()
            if not data:
                raise EOFError("compressed file ended before the end-of-stream marker was reached")
        else:
            data = b""


def arrow() -> Any:
    """The module `pyarrow`; ValueError with the install command if it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("got no package 'pyarrow', need it for .parquet and .zst: pip install pyarrow") from error
    return pyarrow


def _line(path: Path, number: int, parts: list[bytes], size: int, blank: bool) -> Iterator[tuple[str, str] | Broken]:
    place = f"{printable(str(path))}:{number}"
    if size > MAX_LINE:
        yield Broken("too_large", place, f"got a line of {size} bytes, need at most {MAX_LINE}: split or remove it")
        return
    try:
        text = b"".join(parts).decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        yield Broken("unreadable", place, f"got a line that is no UTF-8 ({_brief(error)}), need UTF-8: convert it")
        return
    if blank or text.strip():
        yield place, text


def _elements(path: Path) -> Iterator[tuple[str, Any] | Broken]:
    """Elements of a JSON list, one after the other; at most `MAX_LINE` characters of text are held for each."""
    scan, number = json.JSONDecoder().raw_decode, 0
    texts, held, at, ended = _texts(path), "", 0, False
    need = "["  # then an element or "]", then "," or "]", then an element, and so on
    try:
        while True:
            at = _SPACE.match(held, at).end()  # type: ignore[union-attr]  # it matches anywhere
            value, end = _next(scan, held, at, need)
            if end is None:
                if ended:
                    raise ValueError("the list does not end")
                if len(held) - at > MAX_LINE:
                    reason = f"got an element of more than {MAX_LINE} characters, need less: shorten it"
                    raise Refused("too_large", reason)
                more = next(texts, None)
                ended, held, at = more is None, held[at:] + (more or ""), 0
            elif need == "element" or (need == "element or ]" and held[at] != "]"):
                number, at, need = number + 1, end, ", or ]"
                yield f"{printable(str(path))}:[{number - 1}]", value
            elif held[at] == "]":
                break
            else:
                at, need = end, "element or ]" if need == "[" else "element"
        if held[at + 1 :].strip() or any(text.strip() for text in texts):
            raise ValueError("text after the end of the list")
    except (*_BROKEN_STREAM, RecursionError) as error:
        yield broken_file(path, error, f" after element {number - 1}" if number else "")


_SPACE = re.compile(r"[ \t\r\n]*")


def _next(scan: Callable[[str, int], tuple[Any, int]], held: str, at: int, need: str) -> tuple[Any, int | None]:
    """What stands at `at`, and where it ends (None: it may go on after what is held); ValueError if it is no `need`."""
    if at == len(held):
        return None, None
    if held[at] == "]" and "]" in need or not need.startswith("element"):
        if held[at] not in need:
            raise ValueError(f"{held[at]!r} where {need} should stand")
        return held[at], at + 1
    try:
        value, end = scan(held, at)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or error.pos > len(held) - 16:
            return None, None
        raise
    if end == len(held) or (held[end] not in ",] \t\r\n" and end > len(held) - 16):
        return None, None  # "-1" may go on as "-1.5e3"
    return value, end


def _texts(path: Path, errors: str = "strict") -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    for block in blocks(path):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _members(path: Path, file: Any, total: int) -> Iterator[Member | Broken]:
    archive = printable(str(path))
    offset, zeros, name, size, sparse = 0, 0, None, None, False
    while True:
        file.seek(offset)
        header = file.read(_TAR_BLOCK)
        if header == bytes(_TAR_BLOCK):
            offset, zeros = offset + _TAR_BLOCK, zeros + 1
            if zeros < 2:
                continue
        if zeros == 2 or (zeros and not header):
            if total - offset > TAR_PADDING or any(file.read(TAR_PADDING)):
                yield Broken("unreadable", archive, f"got {total - offset} bytes after the end of the tar file, need "
                             "one archive a file: split it")  # fmt: skip
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError) as error:
            yield Broken("unreadable", archive, f"got no tar header at byte {offset} ({_brief(error)}), need a whole, "
                         "uncompressed tar file: copy or decompress it")  # fmt: skip
            return
        data, zeros = offset + _TAR_BLOCK, 0
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
            if not 0 <= info.size <= MAX_TAR_NAME or data + info.size > total:
                yield Broken("too_large", archive, f"got an extended tar header of {info.size} bytes at byte {offset}, "
                             f"need at most {MAX_TAR_NAME}: make the archive again")  # fmt: skip
                return
            text = file.read(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended = _pax(text)
                name, size = extended.get("path", name), extended.get("size", size)
                sparse = sparse or any(key.startswith("GNU.sparse") for key in extended)
            offset = data + _padded(info.size)
            continue
        length = info.size
        if size is not None:
            length = int(size) if re.fullmatch(r"[0-9]{1,18}", size) else -1
        stored = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        sparse = sparse or info.type == tarfile.GNUTYPE_SPARSE
        more = info.type == tarfile.GNUTYPE_SPARSE and header[482]
        while more:  # blocks that continue the map of a sparse file
            file.seek(data)
            more, data = file.read(_TAR_BLOCK)[504:505] not in (b"", b"\0"), data + _TAR_BLOCK
        if stored and (length < 0 or data + length > total):
            yield Broken("unreadable", f"{archive}:{printable(name or info.name)}", f"got a member of {length} bytes, "
                         f"need at most the {max(0, total - data)} that follow: copy the archive again")  # fmt: skip
            return
        if not info.isdir():
            yield _member(archive, info, name if name is not None else info.name, Member("", data, length), sparse)
        offset, name, size, sparse = data + (_padded(length) if stored else 0), None, None, False


def _member(archive: str, info: tarfile.TarInfo, name: str, where: Member, sparse: bool) -> Member | Broken:
    place = f"{archive}:{printable(name)}"
    if sparse or not info.isreg():
        what = "a sparse file" if sparse else "a link" if info.islnk() or info.issym() else "no plain file"
        return Broken("wrong_type", place, f"got {what}, need plain files: make the archive again without it")
    try:
        return where._replace(name=safe_name(name))
    except Refused as refused:
        return Broken(refused.kind, place, str(refused))


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


def _pax(data: bytes) -> dict[str, str]:
    """Records "length key=value\\n" of an extended header, as far as they are whole."""
    found, at = {}, 0
    while length := re.match(rb"([1-9][0-9]{0,9}) ", data[at : at + 12]):
        record = data[at + length.end() : at + int(length[1])]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals:
            break
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length[1])
    return found


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
