"""Text <-> vocabulary ids: byte-level BPE.

    bytes of the text --pattern--> words --lowest rank first--> ranks;  id = text_start + rank

The text half of an asset is one of two files, and `TextTokenizer.load` takes what is there. `text.tiktoken`, run
by tiktoken: one token a line, base64 of its bytes, a space, its rank. `text_tokenizer.json`, a vocabulary as
Chameleon's: see `moma/tokenizer/chameleon.py`. All 256 bytes are tokens, so every text has an encoding and there
is no unknown token.

The pattern cuts text into words, which no token crosses. It is GPT-4's with two choices, which `vocab.json`
records (`TextOptions`):

    digits      single   2024 -> 2 0 2 4     a number is spelled the same way wherever it occurs
                triple   2024 -> 202 4       up to three digits can be one token, as in GPT-4
    whitespace  grouped  a run of spaces or line ends can be one token, and a line end can close punctuation
                single   every space and line end is a token, but for the one space in front of a word

Special strings in data ("<s>", "<|endoftext|>") are ordinary text. The only module that imports tiktoken.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import tiktoken

from moma.modality import Vocabulary
from moma.schema import nearest
from moma.tokenizer.vocab import JSON_FILE, RANKS_FILE, TextOptions, text_options

_DIGITS = {"single": r"\p{N}", "triple": r"\p{N}{1,3}"}
_WHITESPACE = {
    "grouped": (r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    "single": (r" ?[^\s\p{L}\p{N}]+", r"\s"),
}


class Coder(NamedTuple):
    """What spells text in ranks, counted from the vocabulary's `text_start`, and joins the bytes of ranks."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]


class TextTokenizer:
    """Byte-level BPE over the vocabulary's text range; `specials`: ids of the asset's special tokens by name."""

    def __init__(self, coder: Coder, vocab: Vocabulary, specials: Mapping[str, int] | None = None) -> None:
        self.vocab, self.specials = vocab, dict(specials or {})
        self._coder = coder

    @classmethod
    def load(cls, folder: Path, vocab: Vocabulary) -> "TextTokenizer":
        """The tokenizer of an asset folder; ValueError if its text half does not fit `vocab`."""
        folder = Path(folder)
        options = text_options(folder)
        if (folder / JSON_FILE).is_file():
            # Here, not above: it imports this module.
            from moma.tokenizer.chameleon import json_coder

            return cls(json_coder(folder / JSON_FILE, vocab), vocab, options.special_tokens)
        return cls(rank_coder(read_ranks(folder / RANKS_FILE), vocab, options), vocab, options.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Vocabulary ids of `text`; special strings are ordinary text, lone surrogates become U+FFFD."""
        start = self.vocab.text_start
        return [start + rank for rank in self._coder.encode(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text ids among `ids`; every other id is ignored."""
        start, stop = self.vocab.text_start, self.vocab.text_stop
        return self._coder.decode([int(i) - start for i in ids if start <= i < stop])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the text ids among `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a special token of the asset, such as "<sep>"; no text is ever encoded to it.

        Raises ValueError with the nearest name if the asset has none of this name.
        """
        if name not in self.specials:
            hint = nearest(name, self.specials) or ": train the tokenizer with it among special_tokens"
            raise ValueError(f"got the special token {name!r}, need one of {sorted(self.specials)}{hint}")
        return self.specials[name]


def word_pattern(options: TextOptions) -> str:
    """The regular expression whose matches are the words that no token crosses."""
    # Without possessive quantifiers, so that the trainer's regex engine and tiktoken's read it alike.
    return "|".join(
        [
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            _DIGITS[options.digits],
            *_WHITESPACE[options.whitespace],
        ]
    )


def rank_coder(ranks: dict[bytes, int], vocab: Vocabulary, options: TextOptions) -> Coder:
    """tiktoken over token bytes -> rank; ValueError if the ranks do not fill the text range or a byte is missing."""
    n_ids = vocab.text_stop - vocab.text_start
    if sorted(ranks.values()) != list(range(n_ids)):
        raise ValueError(
            f"got {len(ranks)} text tokens, need ranks 0 to {n_ids - 1}, each once, for the vocabulary's "
            f"text range of {n_ids} ids: put the {RANKS_FILE} back that belongs to vocab.json"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"got text ranks without the single bytes {missing[:8]}, need all 256: train with train_bpe")
    encoding = tiktoken.Encoding(
        "moma", pat_str=word_pattern(options), mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=n_ids
    )
    return Coder(encoding.encode_ordinary, encoding.decode_bytes)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank from a ranks file; ValueError naming the line that cannot be read.

    Not `tiktoken.load`: that keeps a copy per path in a cache folder and would serve a stale one.
    """
    if not path.is_file():
        raise ValueError(f"got no file {path}, need the text ranks: run train_bpe or check the tokenizer's path")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"got line {number} of {path} as {line[:40]!r}, need 'base64 rank': copy the file again"
            ) from error
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write the ranks file, in order of rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered))


def sound_text(text: str) -> str:
    """`text` with lone surrogates replaced by U+FFFD, as tiktoken reads it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's printable byte alphabet: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
