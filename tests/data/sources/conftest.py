"""Shared by the tests of the sources: `listing` builds a config and lists it, `tarred` writes tar files by hand."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from moma.data.sources import SOURCES, Broken, RawDocument
from moma.schema import build
from moma.tokenizer.documents import Picture, Text

Item = RawDocument | Broken


def encoded(color: str = "red", format_: str = "PNG") -> bytes:
    """A picture of 4 x 4 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, format_)
    return file.getvalue()


@pytest.fixture(scope="session")
def png() -> bytes:
    """The bytes of a red square."""
    return encoded()


@pytest.fixture(scope="session")
def listing() -> Callable[..., list[Item]]:
    """`listing(kind, **options)`: all that the source yields, after a trip through pickle."""

    def list_(kind: str, **options: object) -> list[Item]:
        source = SOURCES[kind]
        mapping = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return pickle.loads(pickle.dumps(list(source.documents(build(source.config, mapping)))))

    return list_


@pytest.fixture(scope="session")
def shown() -> Callable[[Item], object]:
    """`shown(document)`: its segments, text as it is, a picture as its bytes; a broken one as its kind."""

    def show(item: Item) -> object:
        if isinstance(item, Broken):
            return item.kind
        return [[part.text if isinstance(part, Text) else _bytes(part) for part in s] for s in item.segments]

    return show


def _bytes(picture: Picture) -> bytes:
    assert callable(picture.content)
    return picture.content()


@pytest.fixture(scope="session")
def tarred() -> Callable[..., Path]:
    """`tarred(path, {name: bytes or TarInfo}, format)`: a tar file with those members."""

    def write(path: Path, members: dict[str, bytes | tarfile.TarInfo], format_: int = tarfile.GNU_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format_) as archive:
            for name, content in members.items():
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return write
