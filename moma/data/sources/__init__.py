"""Sources of raw documents, one file a kind: `SOURCES` is the whole list.

A new kind is one file with a config dataclass, `documents` and `attribution`, and a name in each of `SOURCES`
and `SourceConfig`.
"""

from typing import Any

from moma.data.sources import emoji, interleaved, llava, obelics, openstax, scripture, text, webdataset
from moma.data.sources.raw import Broken, RawDocument, Source
from moma.data.sources.split import concept_key, is_held_out
from moma.schema import kind_field

SOURCES: dict[str, Source] = {
    "emoji": emoji.SOURCE,
    "scripture": scripture.SOURCE,
    "interleaved": interleaved.SOURCE,
    "openstax": openstax.SOURCE,
    "webdataset": webdataset.SOURCE,
    "obelics": obelics.SOURCE,
    "llava": llava.SOURCE,
    "text": text.SOURCE,
}
SourceConfig = (
    emoji.EmojiConfig
    | scripture.ScriptureConfig
    | interleaved.InterleavedConfig
    | openstax.OpenStaxConfig
    | webdataset.WebDatasetConfig
    | obelics.ObelicsConfig
    | llava.LlavaConfig
    | text.TextConfig
)

__all__ = [
    "SOURCES",
    "Broken",
    "RawDocument",
    "Source",
    "SourceConfig",
    "attribution_text",
    "concept_key",
    "is_held_out",
    "source_of",
    "sources_field",
    "split_of",
]


def sources_field() -> Any:
    """The dataclass field `sources: dict[str, SourceConfig]`, each entry's `kind` one of `SOURCES`."""
    return kind_field({name: source.config for name, source in SOURCES.items()}, default_factory=dict)


def source_of(config: SourceConfig) -> Source:
    """The source that a config belongs to."""
    return next(source for source in SOURCES.values() if source.config is type(config))


def split_of(document: RawDocument, val_fraction: float, salt: str) -> str:
    """`train` or `val`: as the document says, else by its key."""
    return document.split or ("val" if is_held_out(document.key, val_fraction, salt) else "train")


def attribution_text(title: str, credits_: list[dict[str, str]]) -> str:
    """The text of an ATTRIBUTION file: one paragraph a work, each named once."""
    lines = [title, ""]
    for credit in {(credit["title"], credit["version"]): credit for credit in credits_}.values():
        lines += [f"{credit['title']}, by {credit['author']}", f"  licence: {credit['licence']}"]
        lines += [f"  source:  {credit['url']}, {credit['version']}", ""]
    lines.append("Changed: resized, encoded as tokens, put together with their names.")
    return "\n".join(lines) + "\n"
