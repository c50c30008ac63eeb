"""Text <-> vocabulary ids: byte-level BPE, run by tiktoken.

    bytes of the text --pattern--> words --lowest rank first--> ranks;  id = text_start + rank

`text.tiktoken` holds one token a line: base64 of its bytes, a space, its rank. All 256 bytes are tokens, so
every text has an encoding and there is no unknown token. The pattern is GPT-4's with one change: digits stand
alone, so that a number is spelled the same way wherever it occurs (a table of 4,096 has no room for
three-digit groups).

Special strings in data ("<s>", "<|endoftext|>") are ordinary text. The only module that imports tiktoken.
"""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from moma.modality import Vocabulary

RANKS_FILE = "text.tiktoken"

# Without possessive quantifiers, so that the trainer's regex engine and tiktoken's read it alike.
PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class TextTokenizer:
    """Byte-level BPE over the vocabulary's text range."""

    def __init__(self, ranks: dict[bytes, int], vocab: Vocabulary) -> None:
        n_ids = vocab.text_stop - vocab.text_start
        if sorted(ranks.values()) != list(range(n_ids)):
            raise ValueError(
                f"got {len(ranks)} text tokens, need ranks 0 to {n_ids - 1}, each once, for the vocabulary's "
                f"text range of {n_ids} ids: put the {RANKS_FILE} back that belongs to vocab.json"
            )
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"got text ranks without the single bytes {missing[:8]}, need all 256: train with train_bpe"
            )
        self.vocab = vocab
        self._encoding = tiktoken.Encoding(
            "moma", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=n_ids
        )

    @classmethod
    def load(cls, folder: Path, vocab: Vocabulary) -> "TextTokenizer":
        """The tokenizer of an asset folder; ValueError if its ranks do not fit `vocab`."""
        return cls(read_ranks(Path(folder) / RANKS_FILE), vocab)

    def encode(self, text: str) -> list[int]:
        """Vocabulary ids of `text`; special strings are ordinary text, lone surrogates become U+FFFD."""
        start = self.vocab.text_start
        return [start + rank for rank in self._encoding.encode_ordinary(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text ids among `ids`; every other id is ignored."""
        start, stop = self.vocab.text_start, self.vocab.text_stop
        return self._encoding.decode_bytes([int(i) - start for i in ids if start <= i < stop])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the text ids among `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


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
